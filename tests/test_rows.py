"""What a report says of one M: figures where the gate is green, a word where it is not."""

from __future__ import annotations

import pytest
from recorded import CPU, HERE, SHAPE, both, key, named, timed, variant, verified

from workbench.problem import MoEShape
from workbench.rows import Row, Subject, expected_experts_hit, rows
from workbench.table import build
from workbench.trace import Status, Trace

FUSED = variant("cuda.sm90_fused")
GROUPED = variant("triton.grouped")
VARIANTS = named(FUSED, GROUPED)


def rows_of(traces: list[Trace]) -> list[Row]:
    return rows(build(traces, HERE, VARIANTS), Subject(SHAPE, "uniform", "bf16", 0.0), VARIANTS, CPU)


@pytest.mark.parametrize("status", [Status.WRONG, Status.CRASHED, Status.HUNG, Status.FAILED])
def test_without_a_green_gate_there_is_a_word_and_no_speed_up(status: Status) -> None:
    traces = [*both(key(FUSED), 10.0), verified(key(GROUPED), status), timed(key(GROUPED), 1.0)]
    (row,) = rows_of(traces)
    assert row.figure("triton.grouped", "kernel") == status.upper()
    assert row.speed_up("triton.grouped", "kernel") == status.upper()
    assert row.chosen("kernel") == "cuda.sm90_fused"


def test_unverified_figures_are_not_shown() -> None:
    (row,) = rows_of([*both(key(FUSED), 10.0), timed(key(GROUPED), 1.0)])
    assert row.figure("triton.grouped", "kernel") == "UNVERIFIED"


def test_verified_and_not_timed_says_so() -> None:
    (row,) = rows_of([*both(key(FUSED), 10.0), verified(key(GROUPED))])
    assert row.figure("triton.grouped", "layer") == "verified"


def test_the_floor_fraction_is_the_floor_over_the_kernel_time() -> None:
    (row,) = rows_of(both(key(FUSED), 10.0))
    assert row.floor_us == 5.0
    assert row.floor_fraction("cuda.sm90_fused") == 0.5


@pytest.mark.parametrize(
    ("routing", "num_tokens", "expected"),
    [
        ("uniform", 0, 0.0),
        ("uniform", 1, 3.0),
        ("uniform", 4096, 257.0),
        ("one-expert", 64, 9.0),
        ("zipf:1.2", 8, None),
    ],
)
def test_experts_hit_follow_from_the_routing_law(routing: str, num_tokens: int, expected: float | None) -> None:
    top_k = 9 if routing == "one-expert" else 3
    shape = MoEShape(257, 7168, 128, top_k, num_shared_experts=1)
    hit = expected_experts_hit(Subject(shape, routing, "bf16", 0.0), num_tokens)
    assert hit == (None if expected is None else pytest.approx(expected))
