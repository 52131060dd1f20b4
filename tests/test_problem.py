"""Shapes, routing laws and workloads: what they refuse, and how they are written."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.quant import quantise_rows
from workbench.errors import InputError
from workbench.generate import make_inputs
from workbench.problem import MoEInputs, MoEShape, RoutingLaw, Workload, scale_blocks

SHAPE = MoEShape(num_experts=9, hidden_size=256, intermediate_size=128, top_k=3, num_shared_experts=1)


def test_a_shape_is_written_by_its_numbers_or_its_name() -> None:
    assert str(SHAPE) == "E9_N256_K256_top3_shared1"
    assert str(MoEShape(8, 256, 128, 2, name="tiny")) == "tiny"


def test_a_name_does_not_make_another_shape() -> None:
    assert MoEShape(8, 256, 128, 2, name="one") == MoEShape(8, 256, 128, 2, name="other")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected an integer >= 1, got 0"),
        ({"hidden_size": 2.0}, r"hidden_size: expected an integer >= 1, got 2\.0"),
        ({"intermediate_size": True}, "intermediate_size: expected an integer >= 1, got True"),
        ({"num_shared_experts": -1}, "num_shared_experts: expected an integer >= 0, got -1"),
        ({"top_k": 9}, r"top_k: expected 1\.\.8 for 8 routed and 0 shared experts, got 9"),
        ({"top_k": 1, "num_shared_experts": 1}, r"top_k: expected 2\.\.8 for 7 routed and 1 shared experts, got 1"),
        ({"activation": "gelu"}, "activation: expected 'swiglu', got 'gelu'"),
        ({"swiglu_limit": 0.0}, r"swiglu_limit: expected a positive number or None, got 0\.0"),
        ({"swiglu_limit": float("inf")}, "swiglu_limit: expected a positive number or None, got inf"),
        ({"swiglu_alpha": float("nan")}, "swiglu_alpha: expected a finite number, got nan"),
        ({"swiglu_beta": "1"}, "swiglu_beta: expected a finite number, got '1'"),
        ({"weight_scales": "tensor"}, "weight_scales: expected one of block, channel, got 'tensor'"),
        (
            {"activation_scales": "tensor"},
            "activation_scales: expected one of group, group_ue8m0, token, got 'tensor'",
        ),
    ],
)
def test_impossible_shapes_are_refused(sizes: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"num_experts": 8, "hidden_size": 256, "intermediate_size": 128, "top_k": 2}
    with pytest.raises(InputError, match=f"^{message}$"):
        MoEShape(**(good | sizes))  # type: ignore[arg-type]


GPT_OSS = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702, "swiglu_beta": 1.0, "has_bias": True}


def test_another_form_makes_another_shape_and_shows_in_how_it_is_written() -> None:
    channel = MoEShape(8, 256, 128, 2, weight_scales="channel", activation_scales="token")
    assert str(channel) == "E8_N256_K256_top2_shared0_channel_token"
    assert str(MoEShape(8, 256, 128, 2, **GPT_OSS)) == "E8_N256_K256_top2_shared0_limit7_alpha1.702_beta1_bias"
    assert len({channel, MoEShape(8, 256, 128, 2, **GPT_OSS), MoEShape(8, 256, 128, 2)}) == 3


@pytest.mark.parametrize(
    ("form", "served", "reason"),
    [
        ({}, (), ""),
        ({"swiglu_limit": 10.0}, (), "swiglu_limit: expected None, got 10.0"),
        ({"swiglu_limit": 10.0}, ("swiglu_limit",), ""),
        (GPT_OSS, ("swiglu_limit", "swiglu_alpha", "swiglu_beta"), "has_bias: expected False, got True"),
        ({"activation_scales": "group_ue8m0"}, ("group_ue8m0",), ""),
        ({"activation_scales": "token"}, ("group_ue8m0",), "activation_scales: expected 'group', got 'token'"),
        ({"weight_scales": "channel"}, (), "weight_scales: expected 'block', got 'channel'"),
    ],
)
def test_a_form_that_a_kernel_does_not_serve_is_named(
    form: dict[str, Any], served: tuple[str, ...], reason: str
) -> None:
    assert MoEShape(8, 256, 128, 2, **form).unserved(*served) == reason


def test_a_token_has_a_scale_for_each_128_values_or_one() -> None:
    assert MoEShape(8, 300, 128, 2).scales_per_token == 3
    assert MoEShape(8, 300, 128, 2, activation_scales="group_ue8m0").scales_per_token == 3
    assert MoEShape(8, 300, 128, 2, activation_scales="token").scales_per_token == 1


def test_expected_rows_share_the_routed_choices_among_the_experts_hit() -> None:
    shape = MoEShape(9, 256, 128, 3, num_shared_experts=1)
    assert [shape.expected_rows(num_tokens) for num_tokens in (0, 1)] == [0.0, 1.0]
    assert shape.expected_rows(4000) == pytest.approx(4000 * 2 / 8)


def test_expected_experts_hit_are_the_mean_of_uniform_routing_without_the_shared_ones() -> None:
    shape = MoEShape(num_experts=17, hidden_size=8, intermediate_size=8, top_k=5, num_shared_experts=1)
    assert [shape.expected_experts_hit(num_tokens) for num_tokens in (0, 1)] == [0.0, 4.0]
    for dropped in (0.0, 0.4):
        batches = [make_inputs(Workload(shape, 4, seed=seed, dropped=dropped), "cpu").topk_ids for seed in range(400)]
        hit = [len(set(ids[:, :-1].flatten().tolist()) - {-1}) for ids in batches]
        assert shape.expected_experts_hit(4, dropped) == pytest.approx(sum(hit) / len(hit), rel=0.03)


@pytest.mark.parametrize("text", ["uniform", "zipf:1.2", "zipf:0.5", "one-expert"])
def test_laws_are_written_as_they_are_read(text: str) -> None:
    assert str(RoutingLaw.parse(text)) == text
    assert RoutingLaw.parse(text).identity() == text


@pytest.mark.parametrize(
    "text", ["", "uniform:1", "zipf:x", "zipf:-1", "zipf:0", "zipf:nan", "replay", "replay:/absent"]
)
def test_malformed_laws_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^routing: "):
        RoutingLaw.parse(text)


def test_a_replayed_file_counts_by_its_content(tmp_path: Path) -> None:
    one, copy, other = (tmp_path / name for name in ("one.pt", "copy.pt", "other.pt"))
    one.write_bytes(b"1")
    copy.write_bytes(b"1")
    other.write_bytes(b"2")
    one_law, copy_law, other_law = (RoutingLaw.parse(f"replay:{path}") for path in (one, copy, other))
    assert str(one_law) == f"replay:{one}"
    assert one_law.identity() == copy_law.identity() != other_law.identity()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_tokens": -1}, "num_tokens: expected an integer >= 0, got -1"),
        ({"input_kind": "fp4"}, r"input_kind: expected one of \('bf16', 'fp8'\), got 'fp4'"),
        ({"dropped": 1.5}, r"dropped: expected a fraction in 0\.\.1, got 1\.5"),
        ({"dropped": float("nan")}, r"dropped: expected a fraction in 0\.\.1, got nan"),
    ],
)
def test_impossible_workloads_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Workload(**({"shape": SHAPE, "num_tokens": 1} | values))  # type: ignore[arg-type]


def test_a_workload_reads_as_one_line() -> None:
    workload = Workload(SHAPE, 7, RoutingLaw.parse("zipf:1.2"), input_kind="fp8", dropped=0.25)
    assert str(workload) == "E9_N256_K256_top3_shared1 M=7 zipf:1.2 fp8 dropped=0.25"


def test_a_batch_is_made_of_its_fields() -> None:
    fields = dataclasses.fields(MoEInputs)
    parameters = inspect.signature(MoEInputs).parameters
    assert list(parameters) == [field.name for field in fields]
    given = [object() for _ in fields]
    assert vars(MoEInputs(*given)) == dict(zip(parameters, given, strict=True))  # type: ignore[arg-type]
    for field in fields[2:]:
        assert parameters[field.name].default == field.default
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoEInputs(*given).x = None  # type: ignore[arg-type,misc]


def test_quantising_a_batch_replaces_its_tokens_once() -> None:
    ids, weights = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    batch = MoEInputs(ids, weights, x=torch.randn(2, 256).bfloat16(), routed_scaling_factor=2.5)
    quantised = batch.quantise()
    assert not batch.quantised
    assert quantised.quantised
    assert quantised.x is None
    assert quantised.quantise() is quantised
    assert quantised.routed_scaling_factor == 2.5
    assert quantised.tokens.dtype == torch.float8_e4m3fn
    assert quantised.num_tokens == 2


def test_a_batch_is_quantised_as_its_layer_wants_it() -> None:
    shape = MoEShape(8, 256, 128, 2, activation_scales="token")
    batch = make_inputs(Workload(shape, 3), "cpu")
    quantised = batch.quantise()
    assert quantised.x_q is not None
    assert quantised.x_scale is not None
    x_q, x_scale = quantise_rows(batch.tokens)
    assert torch.equal(quantised.x_q.view(torch.uint8), x_q.view(torch.uint8))
    assert torch.equal(quantised.x_scale, x_scale)


def test_a_batch_without_tokens_says_so() -> None:
    batch = MoEInputs(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    with pytest.raises(InputError, match="inputs: expected x, or x_q with x_scale; got neither"):
        _ = batch.tokens


def test_scale_blocks_cover() -> None:
    assert [scale_blocks(size) for size in (1, 128, 129, 256, 7168)] == [1, 1, 2, 2, 56]
