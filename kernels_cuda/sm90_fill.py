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
        ("out", ctypes.c_uint64),
        ("poison", ctypes.c_uint64),
        ("num_out_vectors", ctypes.c_uint64),
        ("num_poison_vectors", ctypes.c_uint64),
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


def bind(
    device: torch.device, *, num_out_bytes: int, num_poison_bytes: int = 0, overlap_previous: bool = False
) -> Launch:
    """A launch that clears every bit of `out` and sets every bit of `poison`, memory of so many bytes, multiples of 16,
    whose addresses the caller fills in. It may overlap the launch before, and ends after it."""
    kernel = _kernel(device)
    params = _Params(num_out_vectors=num_out_bytes // VECTOR_BYTES, num_poison_vectors=num_poison_bytes // VECTOR_BYTES)
    num_vectors = max(params.num_out_vectors, params.num_poison_vectors)
    num_ctas = min(-(-num_vectors // NUM_THREADS), kernel.max_clusters // CTAS_PER_SM)
    return kernel.bind(params, num_ctas, overlap_previous=overlap_previous)
