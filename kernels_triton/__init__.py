"""Variants written in Triton. In a process with TRITON_INTERPRET=1 they run on the CPU, in the repaired interpreter."""

from kernels_triton import interpreter

if interpreter.requested():
    interpreter.install()
