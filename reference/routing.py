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


@dataclass(frozen=True)
class TiledRouting:
    """Choices grouped by expert without padding, and the tiles that each group is cut into.

    A group of c rows becomes n = ceil(c / max_rows) tiles of c / n rows rounded up to a multiple of 8, the last of what
    is left. Tiles are ordered by the height of their expert's tiles, in three classes - above 7/8 of `max_rows`, above
    5/8, and the others - then by expert and first row: those that take the same weights stand beside each other.
    """

    sorted_choices: torch.Tensor
    """int32 [M * top_k]: choices grouped by ascending expert; undefined past those with an expert on this rank."""
    tiles: torch.Tensor
    """int32 [1 + capacity, 4]: (number of tiles, number of rows, 0, 0), then for each tile (expert, first row in
    `sorted_choices`, number of rows, number of tiles of the expert); zeros past those."""
    max_rows: int


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


def aligned_capacity(num_choices: int, block_size: int, num_experts: int) -> int:
    """The least multiple of `block_size` that holds any alignment of so many choices."""
    capacity = min(num_choices + num_experts * (block_size - 1), num_choices * block_size)
    return -(-capacity // block_size) * block_size


def align_block_size(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> AlignedRouting:
    """Group the choices of `topk_ids` int32 [M, top_k] by expert and pad each group to whole blocks.

    A choice with id -1 is left out. The capacity depends on shapes alone.
    """
    num_choices, device = topk_ids.numel(), topk_ids.device
    capacity = aligned_capacity(num_choices, block_size, num_experts)
    choices, experts, counts = _by_expert(topk_ids, num_experts)
    blocks = (counts + block_size - 1) // block_size
    first_position = (blocks.cumsum(0) - blocks) * block_size

    sorted_token_ids = torch.full((capacity,), num_choices, dtype=torch.int32, device=device)
    sorted_token_ids[first_position[experts] + _rank(experts, counts)] = choices.int()
    block_experts = torch.arange(num_experts, device=device).repeat_interleave(blocks)
    expert_ids = torch.full((capacity // block_size,), -1, dtype=torch.int32, device=device)
    expert_ids[: len(block_experts)] = block_experts.int()
    num_tokens_post_padded = (blocks.sum(dim=0, keepdim=True) * block_size).int()
    return AlignedRouting(sorted_token_ids, expert_ids, num_tokens_post_padded, block_size)


def tile_capacity(num_choices: int, max_rows: int, num_experts: int) -> int:
    """No routing of so many choices has more tiles: every group has at most one that is not full, and none is empty."""
    return min(num_choices, num_experts + num_choices // max_rows)


def tile_rows(topk_ids: torch.Tensor, max_rows: int, num_experts: int) -> TiledRouting:
    """Group the choices of `topk_ids` int32 [M, top_k] by expert and cut each group into tiles of at most `max_rows`,
    a multiple of 8. A choice with id -1 is left out. The capacity depends on shapes alone.
    """
    num_choices, device = topk_ids.numel(), topk_ids.device
    choices, _, counts = _by_expert(topk_ids, num_experts)
    num_tiles = -(-counts // max_rows)
    heights = _round_up_to_8(-(-counts // num_tiles.clamp(min=1)))

    experts = torch.arange(num_experts, device=device).repeat_interleave(num_tiles)
    start = _rank(experts, num_tiles) * heights[experts]  # within the group
    first_row = (counts.cumsum(0) - counts)[experts] + start
    num_rows = torch.minimum(heights[experts], counts[experts] - start)
    height_class = (((max_rows - heights) * 8 // max_rows + 1) // 2).clamp(max=2)
    order = height_class[experts].argsort(stable=True)

    sorted_choices = torch.zeros(num_choices, dtype=torch.int32, device=device)
    sorted_choices[: len(choices)] = choices.int()
    tiles = torch.zeros(1 + tile_capacity(num_choices, max_rows, num_experts), 4, dtype=torch.int32, device=device)
    tiles[0, :2] = torch.tensor([len(order), len(choices)])
    columns = torch.stack((experts, first_row, num_rows, num_tiles[experts]), dim=1)
    tiles[1 : 1 + len(order)] = columns[order].int()
    return TiledRouting(sorted_choices, tiles, max_rows)


def _by_expert(topk_ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The choices with an expert here by ascending expert, then choice; their experts; choices of each expert [E]."""
    ids = topk_ids.flatten().long()
    choices = ids.argsort(stable=True)
    choices = choices[ids[choices] >= 0]
    experts = ids[choices]
    return choices, experts, torch.bincount(experts, minlength=num_experts)


def _rank(groups: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The position of each element within its group; `groups` ascends, and group g has sizes[g] elements."""
    return torch.arange(len(groups), device=groups.device) - (sizes.cumsum(0) - sizes)[groups]


def _round_up_to_8(values: torch.Tensor) -> torch.Tensor:
    return (values + 7) // 8 * 8
