"""Checks and measurements of one command on a GPU machine."""
