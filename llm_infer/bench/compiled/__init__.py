"""What compilers for chips that are not here say of kernels and steps."""
