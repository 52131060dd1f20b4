"""Host side of sm90_prologue.cu: aligning the routing, quantising the tokens and zeroing the output in one launch."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, load, pointer
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting

KERNEL = "sm90_prologue"
NUM_THREADS = 1024
MAX_EXPERTS = 1024
GROUPS_PER_CTA = NUM_THREADS // 16
CTAS_PER_SM = 2


class _Params(ctypes.Structure):
    _fields_ = (
        ("topk_ids", ctypes.c_uint64),
        ("sorted_token_ids", ctypes.c_uint64),
        ("expert_ids", ctypes.c_uint64),
        ("num_tokens_post_padded", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("x_q", ctypes.c_uint64),
        ("x_scale", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("num_values", ctypes.c_uint64),
        ("num_choices", ctypes.c_uint32),
        ("num_experts", ctypes.c_uint32),
        ("block_m", ctypes.c_uint32),
        ("capacity", ctypes.c_uint32),
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


def empty_alignment(num_choices: int, num_experts: int, block_m: int, device: torch.device) -> AlignedRouting:
    """Room for the worst alignment of `num_choices` choices, as reference.routing.align_block_size sizes it."""
    capacity = min(num_choices + num_experts * (block_m - 1), num_choices * block_m)
    num_blocks = -(-capacity // block_m)
    integers = torch.empty(num_blocks * block_m + num_blocks + 1, dtype=torch.int32, device=device)
    sorted_token_ids, expert_ids, total = integers.split((num_blocks * block_m, num_blocks, 1))
    return AlignedRouting(sorted_token_ids, expert_ids, total, block_m)


def launch(
    *,
    out: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    quantised: tuple[torch.Tensor, torch.Tensor] | None = None,
    topk_ids: torch.Tensor | None = None,
    num_experts: int = 0,
    aligned: AlignedRouting | None = None,
) -> None:
    """Any of: zero `out` bf16 [M, H]; quantise `x` bf16 [M, H] into `quantised`, (x_q, x_scale) as in
    reference.quant.quantise_activations; align `topk_ids` int32 [M, top_k] into `aligned`. M > 0."""
    device = next(tensor.device for tensor in (out, x, topk_ids) if tensor is not None)
    rows = out if out is not None else x
    num_values = rows.numel() if rows is not None else 0
    x_q, x_scale = quantised if quantised is not None else (None, None)
    params = _Params(x=pointer(x), x_q=pointer(x_q), x_scale=pointer(x_scale), out=pointer(out), num_values=num_values)
    num_ctas = -(-num_values // (GROUP_SIZE * GROUPS_PER_CTA))
    kernel = _kernel(device)
    num_ctas = min(num_ctas, CTAS_PER_SM * kernel.max_clusters)
    if topk_ids is not None and aligned is not None:
        params.topk_ids = pointer(topk_ids)
        params.sorted_token_ids = pointer(aligned.sorted_token_ids)
        params.expert_ids = pointer(aligned.expert_ids)
        params.num_tokens_post_padded = pointer(aligned.num_tokens_post_padded)
        params.num_choices = topk_ids.numel()
        params.num_experts = num_experts
        params.block_m = aligned.block_size
        params.capacity = aligned.sorted_token_ids.numel()
        num_ctas += 1
    kernel.launch(params, num_ctas, overlap_previous=False)
