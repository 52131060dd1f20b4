"""Each Triton kernel of the layer against the definition of its step."""

from __future__ import annotations

import pytest
import torch

from kernels_triton.align import align
from kernels_triton.combine import combine
from kernels_triton.grouped_gemm import GemmConfig, grouped_gemm
from kernels_triton.quantise import quantise
from kernels_triton.swiglu import swiglu
from kernels_triton.up_swiglu import up_swiglu
from reference.quant import dequantise_activations, dequantise_w13, dequantise_weights, quantise_activations
from reference.routing import align_block_size
from workbench.generate import make_inputs, make_weights
from workbench.numerics import poison
from workbench.problem import FP8, MoEShape, Workload

POISON = torch.nan


def random_ids(num_tokens: int, num_experts: int, top_k: int, dropped: float = 0.2) -> torch.Tensor:
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)]).int()
    return ids.masked_fill(torch.rand(ids.shape) < dropped, -1)


def assert_aligned_as_the_reference(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> None:
    got, expected = align(topk_ids, block_size, num_experts), align_block_size(topk_ids, block_size, num_experts)
    assert torch.equal(got.sorted_token_ids, expected.sorted_token_ids)
    assert torch.equal(got.expert_ids, expected.expert_ids)
    assert torch.equal(got.num_tokens_post_padded, expected.num_tokens_post_padded)
    assert got.block_size == expected.block_size


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "block_size"),
    [(1, 8, 2, 16), (7, 9, 3, 16), (70, 5, 4, 32), (200, 5, 2, 64), (3, 150, 2, 128)],
)
def test_align_equals_the_reference(num_tokens: int, num_experts: int, top_k: int, block_size: int) -> None:
    assert_aligned_as_the_reference(random_ids(num_tokens, num_experts, top_k), block_size, num_experts)


def test_align_counts_a_large_batch_by_chunks() -> None:
    assert_aligned_as_the_reference(random_ids(3000, 6, 3), 16, 6)


@pytest.mark.parametrize("block_size", [16, 64])
def test_align_of_one_busy_expert_and_of_none(block_size: int) -> None:
    assert_aligned_as_the_reference(torch.full((90, 2), 3, dtype=torch.int32), block_size, 4)
    assert_aligned_as_the_reference(torch.full((9, 2), -1, dtype=torch.int32), block_size, 4)
    assert_aligned_as_the_reference(torch.empty((0, 2), dtype=torch.int32), block_size, 4)


@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(0, 128), (1, 128), (5, 384), (33, 256)])
def test_quantise_equals_the_reference_bit_for_bit(num_tokens: int, hidden_size: int) -> None:
    x = (torch.randn(num_tokens, hidden_size) * torch.logspace(-6, 3, hidden_size)).bfloat16()
    x[::2, :128] = 0
    x_q, x_scale = quantise(x)
    expected_q, expected_scale = quantise_activations(x)
    assert torch.equal(x_q.view(torch.uint8), expected_q.view(torch.uint8))
    assert torch.equal(x_scale, expected_scale)


@pytest.mark.parametrize("split_k", [1, 3])
def test_swiglu_sums_the_shares_and_skips_dropped_choices(split_k: int) -> None:
    topk_ids = torch.tensor([[0, 1], [-1, 2], [3, -1]], dtype=torch.int32)
    present = topk_ids.flatten() >= 0
    partial = torch.randn(split_k, 6, 2 * 256)
    partial[:, ~present] = POISON
    activated, scale = poison(torch.empty(6, 256, dtype=FP8)), poison(torch.empty(6, 2))
    swiglu(partial, topk_ids, activated, scale)

    gate, up = partial.sum(0)[present].chunk(2, dim=1)
    value = torch.nn.functional.silu(gate) * up
    _, expected_scale = quantise_activations(value)
    torch.testing.assert_close(scale[present], expected_scale)
    error = dequantise_activations(activated, scale)[present] - value
    assert (error.abs() <= value.abs() / 16 + expected_scale.repeat_interleave(128, 1) * 2**-9).all()
    assert (activated[~present].view(torch.uint8) == 0xFF).all()


def test_combine_weighs_each_present_choice_and_never_reads_the_others() -> None:
    topk_ids = torch.tensor([[0, 5, -1], [-1, -1, -1], [2, 2, 2]], dtype=torch.int32)
    topk_weights = torch.rand(3, 3).masked_fill(topk_ids < 0, POISON)
    expert_out = torch.randn(3, 3, 1280).bfloat16()
    expert_out[topk_ids < 0] = POISON
    out = torch.full((3, 1280), POISON, dtype=torch.bfloat16)
    combine(expert_out, topk_ids, topk_weights, out, 2.5)
    expected = 2.5 * (topk_weights.nan_to_num()[..., None] * expert_out.float().nan_to_num()).sum(1)
    torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-6)
    assert not out[1].any()


GEMM_CONFIGS = [
    GemmConfig(block_n=128, tiles=1, split_k=1, swap=True, num_warps=4, num_stages=3),
    GemmConfig(block_n=64, tiles=3, split_k=1, swap=False, num_warps=4, num_stages=3),
    GemmConfig(block_n=128, tiles=2, split_k=2, swap=False, num_warps=4, num_stages=3),
    GemmConfig(block_n=64, tiles=1, split_k=3, swap=True, num_warps=4, num_stages=3),
]


@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=str)
@pytest.mark.parametrize("k", [128, 256, 640])
def test_grouped_gemm_multiplies_each_choice_by_its_expert(k: int, config: GemmConfig) -> None:
    num_experts, n, top_k = 4, 384, 2
    topk_ids = random_ids(21, num_experts, top_k)
    weights = make_weights(MoEShape(num_experts, n, k, top_k), 0, "cpu")  # w2: e4m3 [4, 384, k]
    a_q, a_scale = quantise_activations(torch.randn(21, k))
    out = torch.full((config.split_k, 42, n), POISON)
    grouped_gemm(
        a_q, a_scale, weights.w2, weights.w2_scale, out, align(topk_ids, 16, num_experts), top_k, config, prefetch=True
    )
    a = dequantise_activations(a_q, a_scale).repeat_interleave(top_k, 0)
    w = dequantise_weights(weights.w2, weights.w2_scale)
    for choice, expert in enumerate(topk_ids.flatten().tolist()):
        if expert < 0:
            assert out[:, choice].isnan().all()
        else:
            torch.testing.assert_close(out[:, choice].sum(0), w[expert] @ a[choice], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("block_m", "swap"), [(16, True), (64, False)])
def test_up_projection_with_swiglu_in_its_epilogue(block_m: int, swap: bool) -> None:
    shape = MoEShape(num_experts=3, hidden_size=384, intermediate_size=256, top_k=2)
    weights = make_weights(shape, 0, "cpu")
    inputs = make_inputs(Workload(shape, 19, input_kind="fp8", dropped=0.2), "cpu")
    assert inputs.x_q is not None
    assert inputs.x_scale is not None
    activated, scale = poison(torch.empty(38, 256, dtype=FP8)), poison(torch.empty(38, 2))
    config = GemmConfig(block_n=128, tiles=1, split_k=1, swap=swap, num_warps=4, num_stages=3)
    routing = align(inputs.topk_ids, block_m, 3)
    up_swiglu(inputs.x_q, inputs.x_scale, weights.w13, weights.w13_scale, activated, scale, routing, 2, config)

    x = dequantise_activations(inputs.x_q, inputs.x_scale).repeat_interleave(2, 0)
    w13 = dequantise_w13(weights.w13, weights.w13_scale)
    for choice, expert in enumerate(inputs.topk_ids.flatten().tolist()):
        if expert < 0:
            assert (activated[choice].view(torch.uint8) == 0xFF).all()
            continue
        gate, up = (w13[expert] @ x[choice]).chunk(2)
        _, expected_scale = quantise_activations((torch.nn.functional.silu(gate) * up)[None])
        torch.testing.assert_close(scale[choice], expected_scale[0], rtol=1e-4, atol=1e-8)
        error = dequantise_activations(activated[choice][None], scale[choice][None]) - (
            torch.nn.functional.silu(gate) * up
        )
        assert (error.abs() <= scale[choice].repeat_interleave(128) * 16.01).all()  # half a step at the top of e4m3
