"""SGLang's names on CPU tensors: where its semantics differ from vLLM's, and the config that fused_experts takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from reference.quant import quantise_activations
from workbench import ops
from workbench.compat import sglang
from workbench.errors import InputError, UnsupportedError
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.verify import expected_output

CPU = torch.device("cpu")
SHAPE = MoEShape(6, 256, 128, 2)


@pytest.fixture(autouse=True)
def _nothing_recorded_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    yield
    ops.forget_layers()


class TopKOutput(NamedTuple):
    """Stands in for SGLang's StandardTopKOutput."""

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor | None = None


@dataclasses.dataclass
class RunnerConfig:
    """Stands in for SGLang's MoeRunnerConfig, with its fields' names and defaults."""

    num_experts: int | None = None
    num_local_experts: int | None = None
    hidden_size: int | None = None
    intermediate_size_per_partition: int | None = None
    layer_id: int | None = None
    top_k: int | None = None
    num_fused_shared_experts: int | None = None
    params_dtype: torch.dtype | None = None
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    inplace: bool = True
    no_combine: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None


@pytest.fixture
def weights() -> MoEWeights:
    return make_weights(SHAPE, seed=0, device=CPU)


@pytest.fixture
def inputs() -> MoEInputs:
    return make_inputs(Workload(SHAPE, 7), CPU)


def call(weights: MoEWeights, inputs: MoEInputs, config: RunnerConfig, **others: Any) -> torch.Tensor:
    given = {
        "hidden_states": inputs.tokens,
        "w1": weights.w13,
        "w2": weights.w2,
        "topk_output": TopKOutput(inputs.topk_weights, inputs.topk_ids),
        "moe_runner_config": config,
        "use_fp8_w8a8": True,
        "w1_scale": weights.w13_scale,
        "w2_scale": weights.w2_scale,
        "block_shape": [128, 128],
    }
    return sglang.fused_experts(**{**given, **others})


def align_one_by_one(ids: list[int], block_size: int, num_experts: int) -> tuple[list[int], list[int]]:
    """What is in use of (sorted_token_ids, expert_ids): choices of -1 first, then expert by expert."""
    sorted_ids: list[int] = []
    block_experts: list[int] = []
    for expert in range(-1, num_experts):
        mine = [choice for choice, chosen in enumerate(ids) if chosen == expert]
        num_blocks = -(-len(mine) // block_size)
        sorted_ids += mine + [len(ids)] * (num_blocks * block_size - len(mine))
        block_experts += [expert] * num_blocks
    return sorted_ids, block_experts


@pytest.mark.parametrize("lowest", [-1, 0])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 40])
def test_choices_of_minus_one_come_first_in_blocks_of_no_expert(num_tokens: int, lowest: int) -> None:
    topk_ids = torch.randint(lowest, 6, (num_tokens, 3), dtype=torch.int32)
    sorted_ids, experts = align_one_by_one(topk_ids.flatten().tolist(), 8, 6)
    sorted_token_ids, expert_ids, total = sglang.moe_align_block_size(topk_ids, 8, 6)
    assert total.tolist() == [len(sorted_ids)]
    assert sorted_token_ids[: len(sorted_ids)].tolist() == sorted_ids
    assert set(sorted_token_ids[len(sorted_ids) :].tolist()) <= {topk_ids.numel()}
    assert expert_ids[: len(experts)].tolist() == experts
    assert set(expert_ids[len(experts) :].tolist()) <= {-1}


@pytest.mark.parametrize(("num_tokens", "capacity"), [(1, 3 * 8), (2, 6 * 8), (3, 9 + 7 * 7), (40, 120 + 7 * 7)])
def test_the_capacity_counts_minus_one_as_an_expert(num_tokens: int, capacity: int) -> None:
    sorted_token_ids, expert_ids, _ = sglang.moe_align_block_size(torch.zeros(num_tokens, 3).int(), 8, 6)
    assert (sorted_token_ids.numel(), expert_ids.numel()) == (capacity, -(-capacity // 8))


def test_the_alignment_into_given_tensors() -> None:
    topk_ids = torch.randint(-1, 6, (20, 3), dtype=torch.int32)
    made = sglang.moe_align_block_size(topk_ids, 8, 6)
    given = tuple(
        torch.full((one.numel() + more,), 99, dtype=torch.int32) for one, more in zip(made, (9, 2, 0), strict=True)
    )
    cumsum_buffer = torch.empty(8, dtype=torch.int32)
    assert sglang.sgl_moe_align_block_size(topk_ids, 7, 8, *given, cumsum_buffer, True) is None
    for one, other in zip(made, given, strict=True):
        assert torch.equal(other[: one.numel()], one)
    assert set(given[0][made[0].numel() :].tolist()) == {60}
    assert set(given[1][made[1].numel() :].tolist()) == {-1}


def test_given_tensors_that_do_not_fit_are_refused_by_name() -> None:
    topk_ids, one = torch.zeros(20, 3).int(), torch.empty(1, dtype=torch.int32)
    sorted_token_ids, experts_ids = torch.empty(60 + 7 * 7).int(), torch.empty(14).int()
    with pytest.raises(InputError, match=r"^sorted_token_ids: expected at least 109 elements, got 108$"):
        sglang.sgl_moe_align_block_size(topk_ids, 7, 8, sorted_token_ids[:108], experts_ids, one)
    with pytest.raises(InputError, match=r"^experts_ids: expected at least 14 elements, got 13$"):
        sglang.sgl_moe_align_block_size(topk_ids, 7, 8, sorted_token_ids, experts_ids[:13], one)
    with pytest.raises(InputError, match=r"^num_tokens_post_pad: expected int32 of one dimension, got int64 \[1\]$"):
        sglang.sgl_moe_align_block_size(topk_ids, 7, 8, sorted_token_ids, experts_ids, one.long())


def test_quantisation_is_the_references_in_every_layout_of_scales() -> None:
    x = torch.randn(5, 384).bfloat16()
    wanted_q, wanted = quantise_activations(x)
    layouts = {(False, False): (3, 1), (True, False): (1, 5), (True, True): (1, 8)}
    for (columns, aligned), strides in layouts.items():
        x_q, scale = sglang.sglang_per_token_group_quant_fp8(
            x, 128, column_major_scales=columns, scale_tma_aligned=aligned
        )
        assert torch.equal(x_q.float(), wanted_q.float())
        assert torch.equal(scale, wanted)
        assert scale.stride() == strides


@pytest.mark.parametrize(
    ("name", "value"), [("scale_ue8m0", True), ("fuse_silu_and_mul", True), ("masked_m", torch.zeros(1))]
)
def test_quantisation_refuses_by_name(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"^{name}: this layer does not have it, got "):
        sglang.sglang_per_token_group_quant_fp8(torch.zeros(2, 128), 128, **{name: value})


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [None, 2.5])
def test_fused_experts_is_the_layer(
    weights: MoEWeights, inputs: MoEInputs, factor: float | None, inplace: bool
) -> None:
    inputs.topk_ids[:, 0] = -1
    inputs = dataclasses.replace(inputs, routed_scaling_factor=factor or 1.0)
    reference, before = expected_output(weights, inputs), inputs.tokens.clone()
    out = call(weights, inputs, RunnerConfig(inplace=inplace, routed_scaling_factor=factor, num_experts=12, top_k=2))
    assert out.dtype is torch.bfloat16
    assert measure(out, reference, 0.05).rel_err <= 0.05
    assert (out is inputs.tokens) == inplace
    assert torch.equal(inputs.tokens, out if inplace else before)


def test_the_router_weight_on_the_input_wants_one_choice(weights: MoEWeights) -> None:
    config = RunnerConfig(apply_router_weight_on_input=True)
    one = make_inputs(Workload(MoEShape(6, 256, 128, 1), 7), CPU)
    halved = dataclasses.replace(one, x=one.tokens / 2, topk_weights=torch.ones(7, 1))  # exact
    out = call(weights, dataclasses.replace(one, topk_weights=torch.full((7, 1), 0.5)), config)
    assert measure(out, expected_output(weights, halved), 0.05).rel_err <= 0.05
    with pytest.raises(UnsupportedError, match=r"^apply_router_weight_on_input: expected top_k 1 with it, got 2$"):
        call(weights, make_inputs(Workload(SHAPE, 7), CPU), config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("is_gated", False),
        ("no_combine", True),
        ("gemm1_alpha", 1.702),
        ("gemm1_clamp_limit", 7.0),
        ("swiglu_limit", 10.0),
    ],
)
def test_a_config_that_asks_for_what_is_missing_is_refused_by_name(
    weights: MoEWeights, inputs: MoEInputs, field: str, value: Any
) -> None:
    with pytest.raises(UnsupportedError) as refused:
        call(weights, inputs, RunnerConfig(**{field: value}))
    assert str(refused.value) == f"moe_runner_config.{field}: this layer does not have it, got {value!r}"


def test_a_field_of_a_later_version_is_refused_only_when_it_is_used(weights: MoEWeights, inputs: MoEInputs) -> None:
    @dataclasses.dataclass
    class LaterConfig(RunnerConfig):
        inplace: bool = False
        expert_skipping: str = "none"

    assert torch.equal(call(weights, inputs, LaterConfig()), call(weights, inputs, RunnerConfig(inplace=False)))
    with pytest.raises(UnsupportedError, match=r"^moe_runner_config\.expert_skipping: this layer does not have it"):
        call(weights, inputs, LaterConfig(expert_skipping="half"))


@pytest.mark.parametrize("name", ["b1", "b2", "w1_zp", "w2_zp", "a1_scale", "a2_scale"])
def test_a_tensor_for_what_is_missing_is_refused_by_name(weights: MoEWeights, inputs: MoEInputs, name: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"^{name}: this layer does not have it, got float32 \[1\]$"):
        call(weights, inputs, RunnerConfig(), **{name: torch.ones(1)})


@pytest.mark.parametrize("name", ["use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"])
def test_another_quantisation_is_refused_by_name(weights: MoEWeights, inputs: MoEInputs, name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^{name}: this layer does not have it, got True$"):
        call(weights, inputs, RunnerConfig(), **{name: True})


def test_argument_names_and_order_are_sglangs() -> None:
    assert list(inspect.signature(sglang.fused_experts).parameters) == [
        *("hidden_states", "w1", "w2", "topk_output", "moe_runner_config", "b1", "b2"),
        *("use_fp8_w8a8", "use_int8_w8a8", "use_int8_w8a16", "use_int4_w4a16", "per_channel_quant"),
        *("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale", "block_shape"),
    ]
    assert list(inspect.signature(sglang.moe_align_block_size).parameters) == ["topk_ids", "block_size", "num_experts"]
    assert list(inspect.signature(sglang.sglang_per_token_group_quant_fp8).parameters) == [
        *("x", "group_size", "eps", "column_major_scales", "scale_tma_aligned", "scale_ue8m0"),
        *("fuse_silu_and_mul", "masked_m", "enable_v2"),
    ]
