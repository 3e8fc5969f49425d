"""Kernels for LLM inference, stand-alone: one folder per op, plain arrays in and out; `dispatch` picks one."""
