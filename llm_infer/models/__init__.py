"""Decoder architectures in functional Flax over stacked weights."""
