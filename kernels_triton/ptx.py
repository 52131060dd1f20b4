"""PTX that the Triton language has no word for, each instruction wrapped once."""

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

from kernels_triton.interpreter import EMULATED_PTX

PREFETCH_L2 = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
EMULATED_PTX[PREFETCH_L2.value] = lambda pointers: np.zeros(pointers.shape, np.int32)


@triton.jit
def prefetch_l2(pointers):
    """Ask L2 for the 128-byte line of each pointer; one pointer a line is enough. Waits for nothing."""
    tl.inline_asm_elementwise(PREFETCH_L2, "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait_for_predecessor():
    """Start of every kernel in a chain of programmatic dependent launches.

    Waits until the kernel before this one has finished and its writes are visible, then allows the kernel after this
    one to start. In this order, what was written two kernels ago is visible even before the wait.
    """
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
