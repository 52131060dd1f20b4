"""The floor is what published figures for the H200 were held against."""

from __future__ import annotations

import pytest
import torch

from workbench.problem import MoEShape
from workbench.roofline import experts_hit, floor_us

DSV3_TP16 = MoEShape(257, 7168, 128, 9, 1)
DSV3_TP8 = MoEShape(257, 7168, 256, 9, 1)
QWEN3NEXT_TP4 = MoEShape(512, 2048, 128, 10)


def routing_that_hits(num_experts: int, num_tokens: int, top_k: int) -> torch.Tensor:
    """topk_ids [M, top_k] that name exactly the first `num_experts` experts."""
    return (torch.arange(num_tokens * top_k, dtype=torch.int32) % num_experts).view(num_tokens, top_k)


@pytest.mark.parametrize(
    ("shape", "num_tokens", "active_experts", "microseconds"),
    [
        (DSV3_TP16, 1, 9, 7.4),
        (DSV3_TP16, 8, 57, 36.2),
        (DSV3_TP16, 64, 230, 140.0),
        (DSV3_TP16, 1024, 257, 160.6),
        (DSV3_TP16, 8192, 257, 277.2),
        (QWEN3NEXT_TP4, 1, 10, 3.7),
        (QWEN3NEXT_TP4, 256, 512, 89.9),
        (QWEN3NEXT_TP4, 8192, 512, 100.5),
        (DSV3_TP8, 8, 57, 70.3),
        (DSV3_TP8, 4096, 257, 328.8),
        (DSV3_TP8, 8192, 257, 554.5),
    ],
)
def test_the_floor_of_measured_cells(
    shape: MoEShape, num_tokens: int, active_experts: int, microseconds: float
) -> None:  # fmt: skip
    topk_ids = routing_that_hits(active_experts, num_tokens, shape.top_k)
    # The published floors leave out the scales of the tokens: 0.25 us at the largest batch.
    assert floor_us(shape, topk_ids, "fp8", "NVIDIA H200") == pytest.approx(microseconds, abs=0.26)


def test_bf16_tokens_cost_the_bytes_that_they_are_longer_by() -> None:
    topk_ids = routing_that_hits(257, 1024, 9)
    fp8 = floor_us(DSV3_TP16, topk_ids, "fp8", "NVIDIA H200")
    bf16 = floor_us(DSV3_TP16, topk_ids, "bf16", "NVIDIA H200")
    assert fp8 is not None
    assert bf16 is not None
    assert bf16 - fp8 == pytest.approx(1024 * (7168 * 2 - 7168 - 56 * 4) / 4.6e6)


def test_a_choice_that_is_on_another_rank_costs_nothing() -> None:
    topk_ids = torch.tensor([[3, -1, 5], [5, -1, -1]], dtype=torch.int32)
    assert experts_hit(topk_ids) == 2
    absent = torch.full((8192, 9), -1, dtype=torch.int32)
    memory_alone = 2 + 8192 * (7168 + 56 * 4 + 2 * 7168) / 4.6e6
    assert floor_us(DSV3_TP8, absent, "fp8", "NVIDIA H200") == pytest.approx(memory_alone)


def test_an_empty_batch_takes_the_latency_of_memory() -> None:
    assert floor_us(DSV3_TP8, torch.empty(0, 9, dtype=torch.int32), "bf16", "NVIDIA H200") == 2.0


def test_a_device_that_was_not_measured_has_no_floor() -> None:
    assert floor_us(DSV3_TP8, routing_that_hits(9, 1, 9), "fp8", "some CPU") is None
