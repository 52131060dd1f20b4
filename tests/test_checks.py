"""Bad input by hand: each is an error of one line that names the argument, what was expected and what came."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from workbench import checks
from workbench.errors import InputError
from workbench.generate import make_inputs, make_weights
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = MoEShape(8, 256, 192, 2)
WEIGHTS = make_weights(SHAPE, seed=0, device=CPU)
BIASES = {"w13_bias": torch.randn(8, 384), "w2_bias": torch.randn(8, 256)}
M = 4


def made(**changed: Any) -> MoEWeights:
    good = {name: getattr(WEIGHTS, name) for name in ("w13", "w13_scale", "w2", "w2_scale")}
    return checks.weights(**{**good, "top_k": 2, "num_shared_experts": 0, **changed})


def weights(**changed: Any) -> MoEShape:
    return made(**changed).shape


def batch(inputs: MoEInputs, **changed: Any) -> None:
    good = {
        "x": inputs.tokens,
        "x_scale": inputs.x_scale,
        "topk_weights": inputs.topk_weights,
        "topk_ids": inputs.topk_ids,
        "routed_scaling_factor": 2.5,
        "out": None,
    }
    checks.batch(SHAPE, CPU, **{**good, **changed})


BF16 = make_inputs(Workload(SHAPE, M), CPU)
FP8 = BF16.quantise()


def test_weights_that_fit_make_their_shape() -> None:
    assert weights() == SHAPE
    assert weights(top_k=3, num_shared_experts=1) == MoEShape(8, 256, 192, 3, 1)
    assert weights(swiglu_limit=10.0, activation_scales="token") == dataclasses.replace(
        SHAPE, swiglu_limit=10.0, activation_scales="token"
    )


def test_weights_are_aliased() -> None:
    tensors = made(**BIASES).tensors
    given = (WEIGHTS.w13, WEIGHTS.w13_scale, WEIGHTS.w2, WEIGHTS.w2_scale, *BIASES.values())
    assert [tensor.data_ptr() for tensor in tensors] == [tensor.data_ptr() for tensor in given]


@pytest.mark.parametrize("shape", [(8,), (8, 1, 1)])
def test_a_scale_per_expert_becomes_the_scale_of_its_blocks(shape: tuple[int, ...]) -> None:
    scale = torch.rand(8)
    layer = made(w13_scale=scale.view(shape), w2_scale=2 * scale.view(shape))
    assert layer.shape == SHAPE
    assert torch.equal(layer.w13_scale, scale.view(8, 1, 1).expand(8, 4, 2))
    assert torch.equal(layer.w2_scale, 2 * scale.view(8, 1, 1).expand(8, 2, 2))


def test_a_scale_for_the_gate_and_one_for_the_up_rows_become_those_of_their_blocks() -> None:
    scale = torch.rand(8, 2)
    w13_scale = made(w13_scale=scale, w2_scale=scale[:, 0].contiguous()).w13_scale
    assert torch.equal(w13_scale[:, :2], scale[:, :1, None].expand(8, 2, 2))
    assert torch.equal(w13_scale[:, 2:], scale[:, 1:, None].expand(8, 2, 2))


def test_a_scale_per_row_makes_channel_weights() -> None:
    layer = made(w13_scale=torch.rand(8, 384, 1), w2_scale=torch.rand(8, 256, 1))
    assert layer.shape == dataclasses.replace(SHAPE, weight_scales="channel")


def test_e8m0_scales_are_the_powers_of_two_that_they_stand_for() -> None:
    codes = torch.arange(255, dtype=torch.uint8)[: 8 * 4 * 2].view(8, 4, 2)
    layer = made(w13_scale=codes.view(torch.float8_e8m0fnu))
    assert layer.w13_scale.flatten().tolist() == [2.0 ** (code - 127) for code in range(64)]


def test_bf16_biases_become_fp32() -> None:
    layer = made(**{name: bias.bfloat16() for name, bias in BIASES.items()})
    assert layer.shape == dataclasses.replace(SHAPE, has_bias=True)
    assert layer.w13_bias is not None
    assert layer.w13_bias.dtype == torch.float32
    assert torch.equal(layer.w13_bias, BIASES["w13_bias"].bfloat16().float())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w13": None}, "w13: expected float8_e4m3fn [E, 2I, H], got None"),
        ({"w13": [1.0]}, "w13: expected float8_e4m3fn [E, 2I, H], got list"),
        ({"w13": WEIGHTS.w13.float()}, "w13: expected float8_e4m3fn [E, 2I, H], got float32 [8, 384, 256]"),
        ({"w13": WEIGHTS.w13[0]}, "w13: expected float8_e4m3fn [E, 2I, H], got float8_e4m3fn [384, 256]"),
        ({"w13": WEIGHTS.w13[:, 1:]}, "w13: expected float8_e4m3fn [E, 2I, H], got float8_e4m3fn [8, 383, 256]"),
        (
            {"w13": WEIGHTS.w13.transpose(1, 2).contiguous().transpose(1, 2)},
            "w13: expected a contiguous tensor [8, 384, 256], got strides [98304, 1, 384]",
        ),
        (
            {"w13_scale": WEIGHTS.w13_scale[..., :1].half()},
            "w13_scale: expected float32 [8, 4, 2], got float16 [8, 4, 1]",
        ),
        ({"w13_scale": WEIGHTS.w13_scale[:, :3]}, "w13_scale: expected float32 [8, 4, 2], got float32 [8, 3, 2]"),
        ({"w2": WEIGHTS.w2[:7]}, "w2: expected float8_e4m3fn [8, 256, 192], got float8_e4m3fn [7, 256, 192]"),
        ({"w2": WEIGHTS.w2.to(META)}, "w2: expected a tensor on cpu, where w13 is, got one on meta"),
        ({"w2_scale": WEIGHTS.w2_scale.double()}, "w2_scale: expected float32 [8, 2, 2], got float64 [8, 2, 2]"),
        ({"top_k": 9}, "top_k: expected 1..8 for 8 routed and 0 shared experts, got 9"),
        ({"top_k": 0}, "top_k: expected an integer >= 1, got 0"),
        ({"num_shared_experts": 2}, "top_k: expected 3..8 for 6 routed and 2 shared experts, got 2"),
        (
            {"w13_scale": torch.ones(8, 384, 1)},
            "w2_scale: expected one scale per channel, as w13_scale has, got block scales",
        ),
        (
            {"w2_scale": torch.ones(8, 256, 1)},
            "w2_scale: expected one scale per block, as w13_scale has, got channel scales",
        ),
        ({"w13_scale": torch.ones(8).half()}, "w13_scale: expected float32 [8], got float16 [8]"),
        (
            {"w13_scale": torch.ones(8, device=META)},
            "w13_scale: expected a tensor on cpu, where w13 is, got one on meta",
        ),
        ({"w2_scale": torch.ones(8, 2)}, "w2_scale: expected float32 [8, 2, 2], got float32 [8, 2]"),
        ({"w13_bias": BIASES["w13_bias"]}, "w2_bias: expected one with w13_bias, got None"),
        ({"w2_bias": BIASES["w2_bias"]}, "w13_bias: expected one with w2_bias, got None"),
        (
            {**BIASES, "w2_bias": BIASES["w13_bias"]},
            "w2_bias: expected float32 [8, 256], got float32 [8, 384]",
        ),
        ({**BIASES, "w13_bias": [0.0]}, "w13_bias: expected float32 [8, 384], got list"),
        ({"swiglu_limit": -1.0}, "swiglu_limit: expected a positive number or None, got -1.0"),
        ({"activation_scales": "tensor"}, "activation_scales: expected one of group, group_ue8m0, token, got 'tensor'"),
        ({"num_shared_experts": -1}, "num_shared_experts: expected an integer >= 0, got -1"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_weights_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        weights(**changed)
    assert str(refused.value) == message


def test_batches_that_fit_pass() -> None:
    batch(BF16)
    batch(FP8)
    batch(BF16, out=torch.empty(M, 256, dtype=torch.bfloat16), routed_scaling_factor=1)
    batch(make_inputs(Workload(SHAPE, 0), CPU))


def test_tokens_scaled_as_a_whole_have_one_scale_each() -> None:
    shape = dataclasses.replace(SHAPE, activation_scales="token")
    by_token = make_inputs(Workload(shape, M), CPU).quantise()
    routing = (BF16.topk_weights, BF16.topk_ids, 1.0, None)
    checks.batch(shape, CPU, by_token.tokens, by_token.x_scale, *routing)
    with pytest.raises(InputError, match=r"^x_scale: expected float32 \[4, 1\], got float32 \[4, 2\]$"):
        checks.batch(shape, CPU, FP8.tokens, FP8.x_scale, *routing)


@pytest.mark.parametrize(
    ("inputs", "changed", "message"),
    [
        (BF16, {"x": BF16.tokens.half()}, "x: expected bfloat16 [4, 256], got float16 [4, 256]"),
        (BF16, {"x": BF16.tokens[:, :128]}, "x: expected bfloat16 [4, 256], got bfloat16 [4, 128]"),
        (BF16, {"x": BF16.tokens[0]}, "x: expected [M, 256], got bfloat16 [256]"),
        (BF16, {"x": None}, "x: expected [M, 256], got None"),
        (
            BF16,
            {"x": BF16.tokens.T.contiguous().T},
            "x: expected a contiguous tensor [4, 256], got strides [1, 4]",
        ),
        (BF16, {"x": BF16.tokens.to(META)}, "x: expected a tensor on cpu, where w13 is, got one on meta"),
        (BF16, {"x_scale": FP8.x_scale}, "x: expected float8_e4m3fn [4, 256], got bfloat16 [4, 256]"),
        (FP8, {"x_scale": None}, "x_scale: expected float32 [4, 2] with quantised x, got None"),
        (FP8, {"x_scale": FP8.x_scale[:, :1]}, "x_scale: expected float32 [4, 2], got float32 [4, 1]"),
        (
            FP8,
            {"x_scale": FP8.x_scale.T.contiguous().T},
            "x_scale: expected a contiguous tensor [4, 2], got strides [1, 4]",
        ),
        (
            BF16,
            {"topk_weights": BF16.topk_weights.bfloat16()},
            "topk_weights: expected float32 [4, 2], got bfloat16 [4, 2]",
        ),
        (BF16, {"topk_weights": BF16.topk_weights[:3]}, "topk_weights: expected float32 [4, 2], got float32 [3, 2]"),
        (BF16, {"topk_ids": BF16.topk_ids.long()}, "topk_ids: expected int32 [4, 2], got int64 [4, 2]"),
        (BF16, {"topk_ids": BF16.topk_ids[:, :1]}, "topk_ids: expected int32 [4, 2], got int32 [4, 1]"),
        (BF16, {"routed_scaling_factor": "1"}, "routed_scaling_factor: expected a finite number, got '1'"),
        (BF16, {"routed_scaling_factor": math.nan}, "routed_scaling_factor: expected a finite number, got nan"),
        (BF16, {"out": torch.empty(M, 256)}, "out: expected bfloat16 [4, 256], got float32 [4, 256]"),
        (BF16, {"out": BF16.tokens}, "out: expected memory of its own, got that of x"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_batches_that_do_not_fit(inputs: MoEInputs, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        batch(inputs, **changed)
    assert str(refused.value) == message


def test_alike_are_tensors_of_other_values_and_memory() -> None:
    weights, ids = torch.rand(4, 2), torch.zeros(4, 2, dtype=torch.int32)
    alike = checks.alike(weights, ids)
    assert alike(weights, ids)
    assert alike(torch.rand(4, 2), torch.ones_like(ids))
    with torch.no_grad():
        assert alike(weights, ids)


@pytest.mark.parametrize(
    "other",
    [
        torch.rand(4, 2).half(),
        torch.rand(4, 2).view(torch.int32),
        torch.rand(4, 3),
        torch.rand(2, 4),
        torch.rand(8),
        torch.rand(2, 4).T,
        torch.rand(4, 3)[:, :2],
        torch.rand(4, 2, device=META),
        torch.rand(4, 2, requires_grad=True),
        torch.nn.Parameter(torch.rand(4, 2), requires_grad=False),
        torch.rand(4, 2).to_sparse(),
        [[0.0, 0.0]] * 4,
        None,
    ],
    ids=lambda other: checks.described(other),
)
def test_not_alike_are_tensors_that_differ_in_what_is_checked(other: Any) -> None:
    alike = checks.alike(torch.rand(4, 2), torch.rand(4, 2))
    assert not alike(torch.rand(4, 2), other)
    assert not alike(other, torch.rand(4, 2))


def test_not_alike_are_tensors_under_autocast_or_inference_mode_or_one_tensor_twice() -> None:
    one, other = torch.rand(4, 2), torch.rand(4, 2)
    alike = checks.alike(one, other)
    assert not alike(one, one)
    with torch.autocast("cpu"):
        assert not alike(one, other)
    with torch.inference_mode():
        assert not alike(one, other)


def test_nothing_is_alike_where_torch_cannot_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._C._dynamo.guards.TensorGuards")
    one = torch.rand(4, 2)
    assert not checks.alike(one)(one)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scales_are_finite(value: float) -> None:
    scale = WEIGHTS.w2_scale.clone()
    checks.finite_values("w2_scale", scale)
    scale[3, 1, 0] = value
    with pytest.raises(InputError) as refused:
        checks.finite_values("w2_scale", scale)
    assert str(refused.value) == f"w2_scale: expected finite values, got {value} at [3, 1, 0]"


@pytest.mark.parametrize("wrong", [8, -2, 2**31 - 1])
def test_ids_are_experts_or_minus_one(wrong: int) -> None:
    ids = BF16.topk_ids.clone()
    ids[0, 0] = -1
    checks.id_values(ids, num_experts=8)
    ids[2, 1] = wrong
    with pytest.raises(InputError) as refused:
        checks.id_values(ids, num_experts=8)
    assert str(refused.value) == f"topk_ids: expected ids in -1..7, got {wrong} at [2, 1]"
