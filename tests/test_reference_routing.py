"""Routing against loops over tokens and choices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.routing import align_block_size, grouped_sigmoid_topk, softmax_topk


@pytest.mark.parametrize("renormalise", [False, True])
def test_softmax_topk_takes_the_likeliest_experts(renormalise: bool) -> None:
    logits = torch.randn(20, 11)
    topk_weights, topk_ids = softmax_topk(logits, 4, renormalise)
    assert topk_ids.dtype == torch.int32
    assert topk_weights.dtype == torch.float32
    for row, weights, ids in zip(logits.tolist(), topk_weights.tolist(), topk_ids.tolist(), strict=True):
        chosen = sorted(range(11), key=lambda expert: -row[expert])[:4]
        total = sum(math.exp(row[expert]) for expert in (chosen if renormalise else range(11)))
        assert ids == chosen
        assert weights == pytest.approx([math.exp(row[expert]) / total for expert in chosen], rel=1e-5)


@pytest.mark.parametrize("renormalise", [False, True])
def test_grouped_sigmoid_topk_chooses_biased_within_the_best_groups_and_weighs_unbiased(renormalise: bool) -> None:
    logits, bias = torch.randn(30, 16), torch.randn(16)
    topk_weights, topk_ids = grouped_sigmoid_topk(
        logits, bias, top_k=3, num_groups=4, topk_groups=2, renormalise=renormalise
    )
    for row, weights, ids in zip(logits.tolist(), topk_weights.tolist(), topk_ids.tolist(), strict=True):
        score = [1 / (1 + math.exp(-logit)) for logit in row]
        biased = [s + b for s, b in zip(score, bias.tolist(), strict=True)]
        group_score = [sum(sorted(biased[4 * group : 4 * group + 4])[-2:]) for group in range(4)]
        open_groups = sorted(range(4), key=lambda group: -group_score[group])[:2]
        candidates = [expert for expert in range(16) if expert // 4 in open_groups]
        chosen = sorted(candidates, key=lambda expert: -biased[expert])[:3]
        total = sum(score[expert] for expert in chosen) if renormalise else 1.0
        assert ids == chosen
        assert weights == pytest.approx([score[expert] / total for expert in chosen], rel=1e-5)


def test_an_expert_of_a_closed_group_is_not_chosen_however_good_it_is() -> None:
    logits = torch.tensor([[9.0, -9.0, 1.0, 1.0]])  # the best expert is alone in its group
    _, topk_ids = grouped_sigmoid_topk(logits, torch.zeros(4), 2, num_groups=2, topk_groups=1, renormalise=True)
    assert sorted(topk_ids.flatten().tolist()) == [2, 3]


def align_one_by_one(ids: list[int], block_size: int, num_experts: int) -> tuple[list[int], list[int]]:
    """Used entries of sorted_token_ids and of expert_ids, by filling each expert's blocks in turn."""
    sorted_ids: list[int] = []
    block_experts: list[int] = []
    for expert in range(num_experts):
        mine = [choice for choice, chosen in enumerate(ids) if chosen == expert]
        while len(mine) % block_size:
            mine.append(len(ids))
        sorted_ids += mine
        block_experts += [expert] * (len(mine) // block_size)
    return sorted_ids, block_experts


@settings(deadline=None, max_examples=80)
@given(st.data(), st.integers(0, 12), st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 2, 3, 8, 16]))
def test_choices_are_grouped_by_expert_into_padded_blocks(
    data: st.DataObject, num_tokens: int, top_k: int, num_experts: int, block_size: int
) -> None:
    size = num_tokens * top_k
    ids = data.draw(st.lists(st.integers(-1, num_experts - 1), min_size=size, max_size=size))
    topk_ids = torch.tensor(ids, dtype=torch.int32).view(num_tokens, top_k)
    aligned = align_block_size(topk_ids, block_size, num_experts)
    sorted_ids, block_experts = align_one_by_one(ids, block_size, num_experts)

    capacity = min(size + num_experts * (block_size - 1), size * block_size)
    capacity = (capacity + block_size - 1) // block_size * block_size
    assert aligned.block_size == block_size
    assert aligned.num_tokens_post_padded.tolist() == [len(sorted_ids)]
    assert aligned.sorted_token_ids.tolist() == sorted_ids + [size] * (capacity - len(sorted_ids))
    assert aligned.expert_ids.tolist() == block_experts + [-1] * (capacity // block_size - len(block_experts))
    for tensor in (aligned.sorted_token_ids, aligned.expert_ids, aligned.num_tokens_post_padded):
        assert tensor.dtype == torch.int32


def test_an_example_written_out() -> None:
    aligned = align_block_size(torch.tensor([[2, 0], [2, -1], [0, 2]], dtype=torch.int32), block_size=2, num_experts=3)
    assert aligned.sorted_token_ids.tolist() == [1, 4, 0, 2, 5, 6, 6, 6, 6, 6]
    assert aligned.expert_ids.tolist() == [0, 2, 2, -1, -1]
    assert aligned.num_tokens_post_padded.tolist() == [6]
