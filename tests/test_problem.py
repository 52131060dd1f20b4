"""Shapes, routing laws and workloads: what they refuse, and how they are written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workbench.errors import InputError
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
    ],
)
def test_impossible_shapes_are_refused(sizes: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"num_experts": 8, "hidden_size": 256, "intermediate_size": 128, "top_k": 2}
    with pytest.raises(InputError, match=f"^{message}$"):
        MoEShape(**(good | sizes))  # type: ignore[arg-type]


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


def test_a_batch_without_tokens_says_so() -> None:
    batch = MoEInputs(torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1))
    with pytest.raises(InputError, match="inputs: expected x, or x_q with x_scale; got neither"):
        _ = batch.tokens


def test_scale_blocks_cover() -> None:
    assert [scale_blocks(size) for size in (1, 128, 129, 256, 7168)] == [1, 1, 2, 2, 56]
