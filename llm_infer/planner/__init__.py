"""What a model will take and how fast it can be on a device, before there is one."""
