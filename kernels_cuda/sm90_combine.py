"""Host side of sm90_combine.cu: the sum of each token's rows in a fixed order."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, Launch, load
from workbench.problem import MoEShape

KERNEL = "sm90_combine"
NUM_THREADS = 256
COLUMNS = 8


class _Params(ctypes.Structure):
    _fields_ = (
        ("contributions", ctypes.c_uint64),
        ("topk_ids", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("num_vectors", ctypes.c_uint64),
        ("vectors_per_row", ctypes.c_uint32),
        ("top_k", ctypes.c_uint32),
        ("num_experts", ctypes.c_uint32),
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


def bind(device: torch.device, num_tokens: int, shape: MoEShape) -> Launch:
    """A launch that writes `out` bf16 [M, H], 8 dividing H: the sum of the rows of `contributions` bf16
    [M * top_k, H] that `topk_ids` int32 [M, top_k] has an expert for, in fp32 and slot by slot. M > 0. The caller fills
    in the addresses of the three."""
    vectors_per_row = shape.hidden_size // COLUMNS
    params = _Params(
        num_vectors=num_tokens * vectors_per_row,
        vectors_per_row=vectors_per_row,
        top_k=shape.top_k,
        num_experts=shape.num_experts,
    )
    return _kernel(device).bind(params, -(-params.num_vectors // NUM_THREADS), overlap_previous=True)
