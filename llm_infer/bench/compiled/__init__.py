"""Records of what compilers for chips that are not here say about kernels and steps."""
