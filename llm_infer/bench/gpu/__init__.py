"""What one command measures on a GPU machine."""
