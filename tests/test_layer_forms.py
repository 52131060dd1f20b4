"""Layers other than the plain one, from the public call to the refusals by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from workbench import ops
from workbench.errors import InputError
from workbench.generate import make_inputs, make_weights
from workbench.layer import MoELayer
from workbench.numerics import measure
from workbench.ops import fused_moe
from workbench.problem import LayerForm, MoEInputs, MoEShape, MoEWeights, Workload
from workbench.verify import expected_output

CPU = torch.device("cpu")
PLAIN = MoEShape(num_experts=4, hidden_size=320, intermediate_size=176, top_k=2)
FORMS: dict[str, dict[str, Any]] = {
    "deepseek-v4": {"swiglu_limit": 10.0, "activation_scales": "group_ue8m0"},
    "gpt-oss": {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0, "has_bias": True},
    "channel": {"weight_scales": "channel", "activation_scales": "token"},
}


@pytest.fixture(autouse=True)
def _nothing_recorded_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    ops.forget_layers()
    yield
    ops.forget_layers()


def layer_in(form: str) -> tuple[MoEWeights, MoEInputs]:
    shape = dataclasses.replace(PLAIN, **FORMS[form])
    return make_weights(shape, seed=0, device=CPU), make_inputs(Workload(shape, 7), CPU)


def arguments_of(weights: MoEWeights) -> LayerForm:
    """The form of a layer, as public calls take it."""
    shape = weights.shape
    return {
        "w13_bias": weights.w13_bias,
        "w2_bias": weights.w2_bias,
        "swiglu_limit": shape.swiglu_limit,
        "swiglu_alpha": shape.swiglu_alpha,
        "swiglu_beta": shape.swiglu_beta,
        "activation_scales": shape.activation_scales,
    }


def tensors_of(weights: MoEWeights) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return weights.w13, weights.w13_scale, weights.w2, weights.w2_scale


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return measure(out, expected, 1.0).rel_err


@pytest.mark.parametrize("variant", ["auto", "torch.loop", "torch.grouped"])
@pytest.mark.parametrize("form", FORMS)
def test_the_call_computes_the_layer_in_its_form(form: str, variant: str) -> None:
    weights, inputs = layer_in(form)
    call = (inputs.topk_weights, inputs.topk_ids)
    expected = expected_output(weights, inputs)
    out = fused_moe(inputs.tokens, *tensors_of(weights), *call, variant=variant, **arguments_of(weights))
    assert relative_error(out, expected) < 0.05
    layer = MoELayer(*tensors_of(weights), top_k=2, variant=variant, **arguments_of(weights))
    assert layer.shape == weights.shape
    quantised = inputs.quantise()
    assert quantised.x_q is not None
    from_quantised = layer(quantised.x_q, *call, x_scale=quantised.x_scale)
    assert relative_error(from_quantised, expected) < 0.05
    layer.warm([1, 3], quantised=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_call_computes_the_layer_in_its_form(form: str) -> None:
    weights, inputs = layer_in(form)

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: torch.Tensor) -> torch.Tensor:
        return fused_moe(x, *tensors_of(weights), inputs.topk_weights, inputs.topk_ids, **arguments_of(weights))

    assert relative_error(compiled(inputs.tokens), expected_output(weights, inputs)) < 0.05


def test_the_same_weights_in_another_form_are_another_layer() -> None:
    weights, inputs = layer_in("deepseek-v4")
    call = (inputs.tokens, *tensors_of(weights), inputs.topk_weights, inputs.topk_ids)
    limited = fused_moe(*call, **arguments_of(weights))
    plain = fused_moe(*call)
    again = fused_moe(*call, **arguments_of(weights))
    same_by_default = fused_moe(*call, swiglu_limit=None)
    assert relative_error(plain, limited.float()) > 0.1
    assert torch.equal(again, limited)
    assert torch.equal(same_by_default, plain)
    assert len(ops._kept) == 2


def test_a_keyword_or_bias_that_is_none_is_refused_also_where_the_plain_layer_is_kept() -> None:
    weights, inputs = layer_in("deepseek-v4")
    call = (inputs.tokens, *tensors_of(weights), inputs.topk_weights, inputs.topk_ids)
    fused_moe(*call)
    with pytest.raises(TypeError, match=r"expected keywords of w13_bias, .*, got swiglu_limits"):
        fused_moe(*call, swiglu_limits=10.0)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"^w13_bias: expected a tensor, got list$"):
        fused_moe(*call, w13_bias=[0.0])  # type: ignore[arg-type]


def test_freed_biases_take_their_layer_with_them() -> None:
    weights, inputs = layer_in("gpt-oss")
    tensors, arguments = tensors_of(weights), arguments_of(weights)
    fused_moe(inputs.tokens, *tensors, inputs.topk_weights, inputs.topk_ids, **arguments)
    assert len(ops._kept) == 1
    del weights, arguments
    assert len(ops._kept) == 0


def test_one_scale_per_expert_is_served_as_equal_block_scales() -> None:
    weights, inputs = layer_in("deepseek-v4")
    w13_scale, w2_scale = torch.rand(4, 2) * 4e-4, torch.rand(4) * 4e-4
    layer = MoELayer(weights.w13, w13_scale, weights.w2, w2_scale, top_k=2, variant="torch.loop")
    in_blocks = dataclasses.replace(
        weights,
        shape=PLAIN,
        w13_scale=w13_scale.repeat_interleave(2, dim=1)[..., None].expand(4, 4, 3).contiguous(),
        w2_scale=w2_scale[:, None, None].expand(4, 3, 2).contiguous(),
    )
    plain = dataclasses.replace(inputs, activation_scales="group")
    out = layer(inputs.tokens, inputs.topk_weights, inputs.topk_ids)
    assert layer.shape == PLAIN
    assert relative_error(out, expected_output(in_blocks, plain)) < 0.005


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"swiglu_limit": 10.0}, "swiglu_limit: expected None, got 10.0"),
        ({"swiglu_alpha": 1.702}, "swiglu_alpha: expected 1.0, got 1.702"),
        ({"swiglu_beta": 1.0}, "swiglu_beta: expected 0.0, got 1.0"),
        ({"weight_scales": "channel"}, "weight_scales: expected 'block', got 'channel'"),
        ({"activation_scales": "token"}, "activation_scales: expected 'group', got 'token'"),
        ({"activation_scales": "group_ue8m0"}, "activation_scales: expected 'group', got 'group_ue8m0'"),
        ({"has_bias": True}, "has_bias: expected False, got True"),
    ],
)
def test_the_triton_variant_refuses_by_name_what_it_does_not_compute(form: dict[str, Any], reason: str) -> None:
    grouped = pytest.importorskip("kernels_triton.grouped")
    support = grouped.TritonGrouped().supports(MoEShape(4, 256, 128, 2, **form), CPU)
    assert not support
    assert support.reason == reason
