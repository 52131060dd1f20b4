"""Routing: which experts a token visits, and the choices grouped into blocks of one expert each.

A choice is one (token, slot) pair, numbered `token * top_k + slot`. Weights are fp32 [M, top_k], ids int32 [M, top_k].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AlignedRouting:
    """Choices grouped by expert in blocks of `block_size`, as vLLM and SGLang define it."""

    sorted_token_ids: torch.Tensor
    """int32 [capacity]: choices grouped by ascending expert, each group padded to whole blocks with M * top_k."""
    expert_ids: torch.Tensor
    """int32 [capacity / block_size]: the expert of each block; -1 past the end."""
    num_tokens_post_padded: torch.Tensor
    """int32 [1]: how many entries of `sorted_token_ids` are in use, padding included."""
    block_size: int


def softmax_topk(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `top_k` likeliest experts under a softmax of `logits` [M, E]; returns (topk_weights, topk_ids).

    `renormalise` makes each row's weights sum to one.
    """
    topk_weights, topk_ids = logits.float().softmax(dim=-1).topk(top_k, dim=-1)
    if renormalise:
        topk_weights = topk_weights / topk_weights.sum(dim=-1, keepdim=True)
    return topk_weights, topk_ids.int()


def grouped_sigmoid_topk(
    logits: torch.Tensor,
    correction_bias: torch.Tensor,
    top_k: int,
    num_groups: int,
    topk_groups: int,
    renormalise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group-limited selection as DeepSeek-V3 does it; returns (topk_weights, topk_ids).

    Experts of `logits` [M, E] lie in `num_groups` equal groups. A group scores the sum of its two best biased scores;
    experts are chosen by biased score among the `topk_groups` best groups. `correction_bias` [E] steers the choice and
    never enters the weights, which are the plain sigmoids (DeepSeek-V3 technical report, section 2.1.2).
    """
    scores = logits.float().sigmoid()
    grouped = (scores + correction_bias.float()).unflatten(1, (num_groups, -1))  # [M, groups, E / groups]
    group_scores = grouped.topk(min(2, grouped.shape[2]), dim=2).values.sum(dim=2)
    closed = torch.ones_like(group_scores, dtype=torch.bool)
    closed.scatter_(1, group_scores.topk(topk_groups, dim=1).indices, False)
    choosable = grouped.masked_fill(closed.unsqueeze(2), -torch.inf).flatten(1)
    topk_ids = choosable.topk(top_k, dim=1).indices
    topk_weights = scores.gather(1, topk_ids)
    if renormalise:
        topk_weights = topk_weights / topk_weights.sum(dim=1, keepdim=True)
    return topk_weights, topk_ids.int()


def align_block_size(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> AlignedRouting:
    """Group the choices of `topk_ids` int32 [M, top_k] by expert and pad each group to whole blocks.

    A choice with id -1 is left out. The capacity depends on shapes alone: the least multiple of `block_size` that holds
    any routing of so many choices.
    """
    ids = topk_ids.flatten().long()
    num_choices = ids.numel()
    capacity = min(num_choices + num_experts * (block_size - 1), num_choices * block_size)
    capacity = -(-capacity // block_size) * block_size

    choices = ids.argsort(stable=True)
    choices = choices[ids[choices] >= 0]
    experts = ids[choices]
    counts = torch.bincount(experts, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    first_position = (blocks.cumsum(0) - blocks) * block_size
    first_choice = counts.cumsum(0) - counts
    rank = torch.arange(len(choices), device=ids.device) - first_choice[experts]

    sorted_token_ids = torch.full((capacity,), num_choices, dtype=torch.int32, device=ids.device)
    sorted_token_ids[first_position[experts] + rank] = choices.int()
    block_experts = torch.arange(num_experts, device=ids.device).repeat_interleave(blocks)
    expert_ids = torch.full((capacity // block_size,), -1, dtype=torch.int32, device=ids.device)
    expert_ids[: len(block_experts)] = block_experts.int()
    num_tokens_post_padded = (blocks.sum(dim=0, keepdim=True) * block_size).int()
    return AlignedRouting(sorted_token_ids, expert_ids, num_tokens_post_padded, block_size)
