"""Host side of sm90_fill.cu: what a kernel whose routing and tokens are ready still needs before it."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, load, pointer

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


def launch(*, zeros: torch.Tensor, ones: torch.Tensor | None = None) -> None:
    """Clear every bit of `zeros` and set every bit of `ones`, in one launch on the current stream. Both contiguous and
    a multiple of 16 bytes."""
    kernel = _kernel(zeros.device)
    num_zeros = zeros.nbytes // VECTOR_BYTES
    num_ones = 0 if ones is None else ones.nbytes // VECTOR_BYTES
    num_ctas = min(-(-max(num_zeros, num_ones) // NUM_THREADS), kernel.max_clusters // CTAS_PER_SM)
    kernel.launch(_Params(pointer(zeros), pointer(ones), num_zeros, num_ones), num_ctas, overlap_previous=False)
