"""The catalogue: ranks of real models, and the errors for what is not in it."""

from __future__ import annotations

import dataclasses

import pytest

from workbench import registry
from workbench.errors import InputError
from workbench.models import ALIASES, MODELS, shape_of_alias, shape_of_model, usual_shapes
from workbench.problem import MoEShape


@pytest.mark.parametrize(
    ("model", "tp", "expected"),
    [
        ("deepseek-v3", 16, MoEShape(257, 7168, 128, 9, 1)),
        ("deepseek-v3", 8, MoEShape(257, 7168, 256, 9, 1)),
        ("deepseek-v3.2", 16, MoEShape(257, 7168, 128, 9, 1, activation_scales="group_ue8m0")),
        (
            "deepseek-v4-pro",
            16,
            MoEShape(385, 7168, 192, 7, 1, swiglu_limit=10.0, activation_scales="group_ue8m0"),
        ),
        (
            "gpt-oss-20b",
            8,
            MoEShape(32, 2880, 360, 4, swiglu_limit=7.0, swiglu_alpha=1.702, swiglu_beta=1.0, has_bias=True),
        ),
        ("kimi-k2", 8, MoEShape(385, 7168, 256, 9, 1)),
        ("qwen3-next-80b-a3b", 4, MoEShape(513, 2048, 128, 11, 1)),
        ("qwen3-30b-a3b", 1, MoEShape(128, 2048, 768, 8)),
        ("mixtral-8x7b", 2, MoEShape(8, 4096, 7168, 2)),
        ("llama-4-maverick", 4, MoEShape(129, 5120, 2048, 2, 1)),
    ],
)
def test_a_rank_has_all_experts_with_a_share_of_i(model: str, tp: int, expected: MoEShape) -> None:
    assert shape_of_model(model, tp) == expected
    assert str(shape_of_model(model, tp)) == f"{model}_tp{tp}"


def test_every_model_is_a_valid_layer_at_tp_1() -> None:
    for name, model in MODELS.items():
        shape = shape_of_model(name, 1)
        assert shape.w13_rows == 2 * model.intermediate_size
        assert shape.top_k == model.top_k + model.num_shared_experts


def test_rows_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODELS["deepseek-v3"].top_k = 9  # type: ignore[misc]


@pytest.mark.parametrize(
    ("alias", "experts", "w13_rows", "hidden_size", "top_k", "shared"),
    [
        ("dsv3_tp16", 257, 256, 7168, 9, 1),
        ("dsv3_tp8", 257, 512, 7168, 9, 1),
        ("qwen3next_tp4", 512, 256, 2048, 10, 0),
        ("tiny", 8, 256, 256, 2, 0),
        ("tiny_shared", 9, 256, 512, 3, 1),
    ],
)
def test_aliases(alias: str, experts: int, w13_rows: int, hidden_size: int, top_k: int, shared: int) -> None:
    shape = shape_of_alias(alias)
    assert (shape.num_experts, shape.w13_rows, shape.hidden_size) == (experts, w13_rows, hidden_size)
    assert (shape.top_k, shape.num_shared_experts, str(shape)) == (top_k, shared, alias)


def test_aliases_of_a_model_are_its_ranks() -> None:
    assert ALIASES["dsv3_tp16"] == shape_of_model("deepseek-v3", 16)
    assert ALIASES["dsv3_tp8"] == shape_of_model("deepseek-v3", 8)


def test_an_unknown_model_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match=r"model: expected one of deepseek-r1, .*ling-1t.*; got 'gpt'"):
        shape_of_model("gpt", 1)


def test_an_unknown_alias_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(InputError, match=r"shape: expected one of dsv3_tp16, .*tiny_shared; got 'huge'"):
        shape_of_alias("huge")


@pytest.mark.parametrize("tp", [0, -1, 3, 4096])
def test_a_tp_that_does_not_divide_i_is_refused(tp: int) -> None:
    expected = f"tp: expected a divisor of deepseek-v3's intermediate size 2048, got {tp}"
    with pytest.raises(InputError, match=f"^{expected}$"):
        shape_of_model("deepseek-v3", tp)


def test_routed_experts_alone_are_a_layer_of_their_own() -> None:
    assert shape_of_model("deepseek-v3", 16, shared_as_experts=False) == MoEShape(256, 7168, 128, 8)
    assert str(shape_of_model("deepseek-v3", 16, shared_as_experts=False)) == "deepseek-v3_tp16_routed"
    assert str(shape_of_model("qwen3-30b-a3b", 2, shared_as_experts=False)) == "qwen3-30b-a3b_tp2"
    assert shape_of_model("qwen3-next-80b-a3b", 4, shared_as_experts=False) == ALIASES["qwen3next_tp4"]


def test_usual_shapes_are_served_by_kernels_of_this_project() -> None:
    """All models but those published in MXFP4, each at one or two degrees of tensor parallelism."""
    assert {name for name, model in MODELS.items() if not model.usual_tp} == {"gpt-oss-20b", "gpt-oss-120b"}
    assert all(len(model.usual_tp) <= 2 for model in MODELS.values())
    names = ("cuda.sm90_fused", "cuda.sm90_stream", "cuda.sm90_stream_in_place", "cuda.sm90_prefill")
    fast = [registry.find(name) for name in names]
    for shared_as_experts in (True, False):
        shapes = usual_shapes(shared_as_experts=shared_as_experts)
        assert len(set(shapes)) == len(shapes)
        for shape in shapes:
            for variant in fast:
                assert variant.supports_shape(shape), f"{variant.name}: {shape}"
    assert {ALIASES["dsv3_tp16"], ALIASES["dsv3_tp8"]} <= set(usual_shapes())
    assert ALIASES["qwen3next_tp4"] in usual_shapes(shared_as_experts=False)
