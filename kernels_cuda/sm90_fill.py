"""Host side of sm90_fill.cu: what a kernel whose routing and tokens are ready still needs before it."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, Launch, load

KERNEL = "sm90_fill"
NUM_THREADS = 512
VECTOR_BYTES = 16
CTAS_PER_SM = 4  # could be resident; one is launched, to leave the rest to the next kernel


class _Params(ctypes.Structure):
    _fields_ = (
        ("zeros", ctypes.c_uint64),
        ("ones", ctypes.c_uint64),
        ("num_zeros", ctypes.c_uint64),
        ("num_ones", ctypes.c_uint64),
    )


def compiled() -> Cubin:
    """The kernel, compiled."""
    return compile_kernel(KERNEL, {"PARAMS_BYTES": ctypes.sizeof(_Params)})


@functools.cache
def _kernel(device: torch.device) -> Kernel:
    return load(compiled(), NUM_THREADS, cluster_size=1, dynamic_smem_bytes=0, device=device)


def warm(device: torch.device) -> None:
    """Compile and load, which must not happen while a CUDA graph is captured."""
    _kernel(device)


def bind(device: torch.device, *, num_zero_bytes: int, num_one_bytes: int = 0) -> Launch:
    """A launch that clears every bit of `zeros` and sets every bit of `ones`, memory of so many bytes, multiples of 16,
    whose addresses the caller fills in."""
    kernel = _kernel(device)
    params = _Params(num_zeros=num_zero_bytes // VECTOR_BYTES, num_ones=num_one_bytes // VECTOR_BYTES)
    num_ctas = min(-(-max(params.num_zeros, params.num_ones) // NUM_THREADS), kernel.max_clusters // CTAS_PER_SM)
    return kernel.bind(params, num_ctas, overlap_previous=False)
