"""Variants written in CUDA C++ for sm_90a: each kernel source with its launcher of the same name beside it."""
