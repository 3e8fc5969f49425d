"""One step as a program: what it carries, computes and returns, and how it is cut over devices."""
