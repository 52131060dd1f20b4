"""Host side of sm90_combine.cu: the sum of each token's rows in a fixed order."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, load, pointer

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


def launch(contributions: torch.Tensor, topk_ids: torch.Tensor, num_experts: int, out: torch.Tensor) -> None:
    """Write `out` bf16 [M, H], 8 dividing H, on the current stream: the sum of the rows of `contributions` bf16
    [M * top_k, H] that `topk_ids` int32 [M, top_k] has an expert for, in fp32 and slot by slot. M > 0."""
    num_tokens, hidden_size = out.shape
    vectors_per_row = hidden_size // COLUMNS
    params = _Params(
        contributions=pointer(contributions),
        topk_ids=pointer(topk_ids),
        out=pointer(out),
        num_vectors=num_tokens * vectors_per_row,
        vectors_per_row=vectors_per_row,
        top_k=topk_ids.shape[1],
        num_experts=num_experts,
    )
    _kernel(out.device).launch(params, -(-params.num_vectors // NUM_THREADS), overlap_previous=True)
