"""Alignment as vLLM and SGLang both define it: choices grouped by expert, each group padded to whole blocks."""

from __future__ import annotations

import torch

from reference.routing import align_block_size
from workbench.checks import described
from workbench.compat.kernel import kernel, runs_on
from workbench.errors import InputError


def align(
    topk_ids: torch.Tensor, block_size: int, num_experts: int, whole_blocks: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sorted_token_ids int32 [capacity], expert_ids int32 [ceil(capacity / block_size)], num_tokens_post_padded [1]).

    `topk_ids` is int32 or int64 [M, top_k]; an id outside 0..num_experts-1 is left out. The capacity holds any choices,
    and is a multiple of block_size if `whole_blocks`. Past what is in use sorted_token_ids holds M * top_k and
    expert_ids -1. May be captured in a CUDA graph, once called outside of one, on the devices that our kernel serves;
    elsewhere the reference aligns, and waits for the device. InputError for what does not fit.
    """
    check_choices(topk_ids)
    for name, value in (("block_size", block_size), ("num_experts", num_experts)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name}: expected an integer >= 1, got {value!r}")
    num_choices, device = topk_ids.numel(), topk_ids.device
    topk_ids = topk_ids.int().contiguous()
    if num_choices and runs_on(device):
        with torch.cuda.device(device):
            aligned = kernel().align_choices(topk_ids, block_size, num_experts)
    else:
        here = (topk_ids >= 0) & (topk_ids < num_experts)
        aligned = align_block_size(topk_ids.masked_fill(~here, -1), block_size, num_experts)
    capacity = min(num_choices + num_experts * (block_size - 1), num_choices * block_size)
    in_blocks = aligned.sorted_token_ids
    return in_blocks if whole_blocks else in_blocks[:capacity], aligned.expert_ids, aligned.num_tokens_post_padded


def check_choices(topk_ids: torch.Tensor) -> None:
    """InputError unless `topk_ids` is int32 or int64 [M, top_k]."""
    if not isinstance(topk_ids, torch.Tensor) or topk_ids.ndim != 2 or topk_ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"topk_ids: expected int32 or int64 [M, top_k], got {described(topk_ids)}")
