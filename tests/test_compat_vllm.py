"""vLLM's names on CPU tensors: alignment by a loop, quantisation by the reference, fused_experts by the layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference.moe import moe
from reference.quant import quantise_activations
from workbench import ops
from workbench.compat import vllm
from workbench.errors import InputError, UnsupportedError
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.verify import expected_output

CPU = torch.device("cpu")
SHAPE = MoEShape(6, 256, 128, 2)
EXPERT_MAP = torch.tensor([-1, 0, -1, 1, 2, -1], dtype=torch.int32)
"""Of six experts, three are on this rank."""


@pytest.fixture(autouse=True)
def _nothing_recorded_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    yield
    ops.forget_layers()


@pytest.fixture
def weights() -> MoEWeights:
    return make_weights(SHAPE, seed=0, device=CPU)


@pytest.fixture
def inputs() -> MoEInputs:
    return make_inputs(Workload(SHAPE, 7), CPU)


def on_this_rank(weights: MoEWeights) -> dict[str, torch.Tensor]:
    """Weights and scales of the experts that EXPERT_MAP places here, by vLLM's names."""
    here = [1, 3, 4]
    return {
        "w1": weights.w13[here],
        "w2": weights.w2[here],
        "w1_scale": weights.w13_scale[here],
        "w2_scale": weights.w2_scale[here],
    }


def call(weights: MoEWeights, inputs: MoEInputs, **others: Any) -> torch.Tensor:
    given = {
        "hidden_states": inputs.tokens,
        "w1": weights.w13,
        "w2": weights.w2,
        "topk_weights": inputs.topk_weights,
        "topk_ids": inputs.topk_ids,
        "use_fp8_w8a8": True,
        "w1_scale": weights.w13_scale,
        "w2_scale": weights.w2_scale,
        "block_shape": [128, 128],
    }
    return vllm.fused_experts(**{**given, **others})


def assert_close(out: torch.Tensor, reference: torch.Tensor) -> None:
    assert out.dtype is torch.bfloat16
    assert measure(out, reference, 0.05).rel_err <= 0.05


def align_one_by_one(
    ids: list[int], block_size: int, experts: list[int], names: dict[int, int]
) -> tuple[list[int], list[int]]:
    """What is in use of (sorted_token_ids, expert_ids), by filling the blocks of each expert in turn."""
    sorted_ids: list[int] = []
    block_experts: list[int] = []
    for expert in experts:
        mine = [choice for choice, chosen in enumerate(ids) if chosen == expert]
        num_blocks = -(-len(mine) // block_size)
        sorted_ids += mine + [len(ids)] * (num_blocks * block_size - len(mine))
        block_experts += [names[expert]] * num_blocks
    return sorted_ids, block_experts


def assert_aligned(
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sorted_ids: list[int], experts: list[int], num_choices: int
) -> None:
    """What is in use is as given, and the rest is padding."""
    assert [tensor.dtype for tensor in made] == [torch.int32] * 3
    used = len(sorted_ids)
    assert made[2].tolist() == [used]
    assert made[0][:used].tolist() == sorted_ids
    assert set(made[0][used:].tolist()) <= {num_choices}
    assert made[1][: len(experts)].tolist() == experts
    assert set(made[1][len(experts) :].tolist()) <= {-1}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
def test_alignment_groups_choices_by_expert(num_tokens: int, block_size: int, dtype: torch.dtype) -> None:
    topk_ids = torch.randint(-1, 7, (num_tokens, 3), dtype=dtype)  # 6 and -1 are no experts
    made = vllm.moe_align_block_size(topk_ids, block_size, 6)
    names = {expert: expert for expert in range(6)}
    assert_aligned(
        made, *align_one_by_one(topk_ids.flatten().tolist(), block_size, list(range(6)), names), topk_ids.numel()
    )


@pytest.mark.parametrize("pad_sorted_ids", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 40])
def test_the_capacity_is_vllms(num_tokens: int, pad_sorted_ids: bool) -> None:
    num_choices, block_size, num_experts = 3 * num_tokens, 16, 6
    made = vllm.moe_align_block_size(
        torch.zeros(num_tokens, 3).int(), block_size, num_experts, pad_sorted_ids=pad_sorted_ids
    )
    capacity = num_choices + num_experts * (block_size - 1)
    if num_choices < num_experts:
        capacity = min(capacity, num_choices * block_size)
    num_blocks = -(-capacity // block_size)
    assert made[0].numel() == (num_blocks * block_size if pad_sorted_ids else capacity)
    assert made[1].numel() == num_blocks


def test_blocks_of_experts_elsewhere_stay_and_are_marked() -> None:
    topk_ids = torch.randint(0, 6, (20, 3), dtype=torch.int32)
    made = vllm.moe_align_block_size(topk_ids, 8, 6, EXPERT_MAP)
    names = dict(enumerate(EXPERT_MAP.tolist()))
    assert_aligned(made, *align_one_by_one(topk_ids.flatten().tolist(), 8, list(range(6)), names), 60)
    assert -1 in made[1][: int(made[2]) // 8]


def test_experts_elsewhere_are_left_out_on_request() -> None:
    topk_ids = torch.randint(0, 6, (20, 3), dtype=torch.int32)
    made = vllm.moe_align_block_size(topk_ids, 8, 6, EXPERT_MAP, ignore_invalid_experts=True)
    names = {1: 0, 3: 1, 4: 2}
    assert_aligned(made, *align_one_by_one(topk_ids.flatten().tolist(), 8, [1, 3, 4], names), 60)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"topk_ids": torch.zeros(3).int()}, r"topk_ids: expected int32 or int64 \[M, top_k\], got int32 \[3\]"),
        ({"topk_ids": torch.zeros(3, 2)}, r"topk_ids: expected int32 or int64 \[M, top_k\], got float32 \[3, 2\]"),
        ({"block_size": 0}, r"block_size: expected an integer >= 1, got 0"),
        ({"num_experts": 0}, r"num_experts: expected an integer >= 1, got 0"),
        ({"expert_map": torch.zeros(5).int()}, r"expert_map: expected int32 or int64 \[6\], got int32 \[5\]"),
    ],
)
def test_alignment_refuses_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    given = {"topk_ids": torch.zeros(3, 2).int(), "block_size": 8, "num_experts": 6, **changed}
    with pytest.raises(InputError, match="^" + message):
        vllm.moe_align_block_size(**given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 256), (0, 128), (2, 3, 384)])
def test_quantisation_is_the_references(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    x_q, scale = vllm.per_token_group_quant_fp8(x, 128)
    wanted_q, wanted_scale = quantise_activations(x.view(-1, shape[-1]))
    assert (x_q.shape, scale.shape) == (x.shape, (*shape[:-1], shape[-1] // 128))
    assert torch.equal(x_q.view(-1, shape[-1]).float(), wanted_q.float())
    assert torch.equal(scale.view(wanted_scale.shape), wanted_scale)


def test_the_layouts_of_scales() -> None:
    x = torch.randn(5, 384).bfloat16()
    _, plain = vllm.per_token_group_quant_fp8(x, 128)
    _, columns = vllm.per_token_group_quant_fp8(x, 128, column_major_scales=True)
    _, aligned = vllm.per_token_group_quant_fp8(x, 128, column_major_scales=True, tma_aligned_scales=True)
    assert (plain.stride(), columns.stride(), aligned.stride()) == ((3, 1), (1, 5), (1, 8))
    assert torch.equal(columns, plain)
    assert torch.equal(aligned, plain)


def test_scales_of_powers_of_two() -> None:
    x = torch.randn(5, 256)
    x_q, scale = vllm.per_token_group_quant_fp8(x, 128, use_ue8m0=True)
    wanted_q, wanted = quantise_activations(x, power_of_two=True)
    assert torch.equal(scale, wanted)
    assert torch.equal(x_q.float(), wanted_q.float())
    assert torch.equal(scale.log2(), scale.log2().round())


def test_out_q_is_written_and_returned() -> None:
    x, out_q = torch.randn(5, 256), torch.empty(5, 256, dtype=torch.float8_e4m3fn)
    x_q, _ = vllm.per_token_group_quant_fp8(x, 128, out_q=out_q)
    assert x_q is out_q
    assert torch.equal(out_q.float(), quantise_activations(x)[0].float())
    with pytest.raises(InputError, match=r"^out_q: expected float8_e4m3fn \[5, 256\], got float32 \[5, 256\]$"):
        vllm.per_token_group_quant_fp8(x, 128, out_q=x)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"group_size": 64}, UnsupportedError, "group_size: expected 128, got 64"),
        ({"eps": 1e-6}, UnsupportedError, "eps: expected 1e-10, got 1e-06"),
        ({"dtype": torch.float8_e5m2}, UnsupportedError, "dtype: expected float8_e4m3fn, got torch.float8_e5m2"),
        (
            {"x": torch.zeros(2, 200)},
            InputError,
            "x: expected a contiguous tensor whose last dimension 128 divides, got",
        ),
        ({"x": torch.zeros(128, 2).T}, InputError, "x: expected a contiguous tensor whose last dimension 128 divides"),
        ({"x": torch.zeros(2, 128).int()}, InputError, "x: expected bfloat16, float16 or float32 [..., H], got int32"),
        (
            {"x": torch.zeros(2, 2, 128), "column_major_scales": True},
            UnsupportedError,
            "column_major_scales: expected x [M, H] with it, got float32 [2, 2, 128]",
        ),
    ],
)
def test_quantisation_refuses_by_name(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as refused:
        vllm.per_token_group_quant_fp8(**{"x": torch.zeros(2, 128), "group_size": 128, **changed})
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_fused_experts_is_the_layer(weights: MoEWeights, inputs: MoEInputs, dtype: torch.dtype) -> None:
    before = inputs.tokens.clone()
    out = call(weights, inputs, topk_ids=inputs.topk_ids.to(dtype))
    assert_close(out, expected_output(weights, inputs))
    assert torch.equal(inputs.tokens, before)


def test_in_place_writes_to_hidden_states(weights: MoEWeights, inputs: MoEInputs) -> None:
    wanted = call(weights, inputs)
    assert call(weights, inputs, inplace=True) is inputs.tokens
    assert torch.equal(inputs.tokens, wanted)


def test_minus_one_contributes_nothing(weights: MoEWeights, inputs: MoEInputs) -> None:
    inputs.topk_ids[:, 0] = -1
    inputs.topk_ids[3] = -1
    out = call(weights, inputs)
    assert_close(out, expected_output(weights, inputs))
    assert torch.equal(out[3], torch.zeros(256, dtype=torch.bfloat16))


@pytest.mark.parametrize("global_num_experts", [-1, 6])
def test_experts_elsewhere_contribute_nothing(weights: MoEWeights, inputs: MoEInputs, global_num_experts: int) -> None:
    inputs.topk_ids[2, 1] = -1
    here = torch.isin(inputs.topk_ids, torch.tensor([1, 3, 4]))
    only_here = MoEInputs(inputs.topk_ids.masked_fill(~here, -1), inputs.topk_weights, x=inputs.x)
    out = call(weights, inputs, expert_map=EXPERT_MAP, global_num_experts=global_num_experts, **on_this_rank(weights))
    assert 0 < here.sum() < here.numel()
    assert_close(out, expected_output(weights, only_here))


def test_the_router_weight_on_the_input(weights: MoEWeights) -> None:
    inputs = make_inputs(Workload(MoEShape(6, 256, 128, 1), 7), CPU)
    topk_weights = torch.randn(7, 1)
    out = call(weights, inputs, topk_weights=topk_weights, apply_router_weight_on_input=True)
    x_q, x_scale = quantise_activations(inputs.tokens)
    reference = moe(
        x_q,
        x_scale * topk_weights,
        weights.w13,
        weights.w13_scale,
        weights.w2,
        weights.w2_scale,
        torch.ones(7, 1),
        inputs.topk_ids,
    )
    assert_close(out, reference)
    with pytest.raises(UnsupportedError, match=r"^apply_router_weight_on_input: expected top_k 1 with it, got 2$"):
        call(weights, make_inputs(Workload(SHAPE, 7), CPU), apply_router_weight_on_input=True)


class MoEActivation(Enum):
    """As later versions of vLLM name activations."""

    SILU = "silu"
    SWIGLUOAI = "swigluoai"


def quant_config(weights: MoEWeights, **others: Any) -> SimpleNamespace:
    """As vLLM's FusedMoEQuantConfig shows itself."""
    shown = {
        "use_fp8_w8a8": True,
        "use_int8_w8a8": False,
        "per_act_token_quant": False,
        "block_shape": [128, 128],
        "w1_scale": weights.w13_scale,
        "w2_scale": weights.w2_scale,
        "a1_scale": None,
        "w1_bias": None,
    }
    return SimpleNamespace(**{**shown, **others})


def test_a_quant_config_stands_for_its_arguments(weights: MoEWeights, inputs: MoEInputs) -> None:
    tensors = (inputs.tokens, weights.w13, weights.w2, inputs.topk_weights, inputs.topk_ids)
    out = vllm.fused_experts(*tensors, activation=MoEActivation.SILU, quant_config=quant_config(weights))
    assert torch.equal(out, call(weights, inputs))
    with pytest.raises(UnsupportedError, match=r"^a1_scale: this layer does not have it, got "):
        vllm.fused_experts(*tensors, quant_config=quant_config(weights, a1_scale=torch.ones(1)))


def test_biases_and_the_numbers_of_the_activation_are_those_of_the_layers_form() -> None:
    shape = MoEShape(6, 256, 128, 2, swiglu_limit=0.5, swiglu_alpha=1.702, swiglu_beta=1.0, has_bias=True)
    weights, inputs = make_weights(shape, seed=0, device=CPU), make_inputs(Workload(shape, 7), CPU)
    tensors = (inputs.tokens, weights.w13, weights.w2, inputs.topk_weights, inputs.topk_ids)
    biases = {"w1_bias": weights.w13_bias, "w2_bias": weights.w2_bias}
    numbers = {"gemm1_clamp_limit": 0.5, "gemm1_alpha": 1.702, "gemm1_beta": 1.0}
    out = vllm.fused_experts(*tensors, quant_config=quant_config(weights, **biases, **numbers))
    assert_close(out, expected_output(weights, inputs))
    with pytest.raises(InputError, match=r"^w2_bias: expected one with w1"):
        call(weights, inputs, w1_bias=weights.w13_bias)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"use_int8_w8a8": True}, "use_int8_w8a8: this layer does not have it, got True"),
        ({"use_int8_w8a16": True}, "use_int8_w8a16: this layer does not have it, got True"),
        ({"use_int4_w4a16": True}, "use_int4_w4a16: this layer does not have it, got True"),
        ({"use_mxfp4_w4a4": True}, "use_mxfp4_w4a4: this layer does not have it, got True"),
        ({"per_channel_quant": True}, "per_channel_quant: this layer does not have it, got True"),
        ({"w1_zp": torch.zeros(1)}, "w1_zp: this layer does not have it, got float32 [1]"),
        ({"a1_scale": torch.ones(1)}, "a1_scale: this layer does not have it, got float32 [1]"),
        ({"a2_scale": torch.ones(1)}, "a2_scale: this layer does not have it, got float32 [1]"),
        ({"use_fp8_w8a8": False}, "use_fp8_w8a8: expected True, got False"),
        ({"block_shape": None}, "block_shape: expected [128, 128], got None"),
        ({"block_shape": [64, 128]}, "block_shape: expected [128, 128], got [64, 128]"),
        ({"activation": "gelu"}, "activation: expected 'silu', which is gated, got 'gelu'"),
        ({"activation": MoEActivation.SWIGLUOAI}, "activation: expected 'silu', which is gated, got 'swigluoai'"),
    ],
)
def test_a_missing_feature_is_refused_by_name(
    weights: MoEWeights, inputs: MoEInputs, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError) as refused:
        call(weights, inputs, **changed)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_states": torch.zeros(7, 256)}, "hidden_states: expected bfloat16 [7, 256], got float32 [7, 256]"),
        ({"w1": torch.zeros(6, 256, 256)}, "w1: expected float8_e4m3fn [E, 2I, H], got float32 [6, 256, 256]"),
        ({"w1_scale": torch.zeros(6, 2, 1)}, "w1_scale: expected float32 [6, 2, 2], got float32 [6, 2, 1]"),
        ({"w1_scale": None}, "w1_scale: expected the scales of FP8 weights, got None"),
        ({"w2_scale": None}, "w2_scale: expected the scales of FP8 weights, got None"),
        ({"topk_ids": torch.full((7, 2), 6)}, "topk_ids: expected ids in -1..5, got 6 at [0, 0]"),
        ({"topk_weights": torch.zeros(7, 3)}, "topk_weights: expected float32 [7, 2], got float32 [7, 3]"),
        ({"global_num_experts": 12}, "global_num_experts: expected 6 without an expert_map, got 12"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_by_vllms_name(
    weights: MoEWeights, inputs: MoEInputs, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as refused:
        call(weights, inputs, **changed)
    assert str(refused.value) == message


def test_argument_names_and_order_are_vllms() -> None:
    assert list(inspect.signature(vllm.fused_experts).parameters)[:8] == [
        *("hidden_states", "w1", "w2", "topk_weights", "topk_ids"),
        *("inplace", "activation", "apply_router_weight_on_input"),
    ]
    assert list(inspect.signature(vllm.moe_align_block_size).parameters) == [
        *("topk_ids", "block_size", "num_experts", "expert_map", "pad_sorted_ids", "ignore_invalid_experts"),
    ]
    assert list(inspect.signature(vllm.per_token_group_quant_fp8).parameters) == [
        *("x", "group_size", "eps", "dtype", "column_major_scales", "tma_aligned_scales", "out_q", "use_ue8m0"),
    ]
