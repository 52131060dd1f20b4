"""The plan of the shipped tables, and that a run which is cut off loses nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import recorded

from workbench import registry, ship, worker
from workbench.models import shape_of_model
from workbench.problem import RoutingLaw, Workload
from workbench.sweep import Session, open_session
from workbench.timing import QUICK
from workbench.trace import Status
from workbench.variant import Config

CUDA = {name: variant for name, variant in registry.variants().items() if variant.backend == "cuda"}
DSV3 = shape_of_model("deepseek-v3", 16)


def names(workload: Workload) -> list[str]:
    return [name.removeprefix("cuda.sm90_") for name, _ in ship.entrants(workload, registry.variants(), None)]


def test_the_plan_is_every_usual_shape_at_every_power_of_two_under_both_laws() -> None:
    plan = ship.plan()
    assert len(set(plan)) == len(plan)
    by_shape: dict[Any, set[tuple[int, str]]] = {}
    for workload in plan:
        by_shape.setdefault(workload.shape, set()).add((workload.num_tokens, str(workload.routing)))
    expected = {(2**power, law) for power in range(15) for law in ("uniform", "zipf:1.2")}
    assert all(found == expected for found in by_shape.values())
    assert {shape_of_model("deepseek-v3", tp) for tp in (8, 16)} < by_shape.keys()
    assert shape_of_model("qwen3-next-80b-a3b", 4, shared_as_experts=False) in by_shape


def test_the_plan_begins_with_what_is_worth_most() -> None:
    plan = ship.plan()
    laws = [str(workload.routing) for workload in plan]
    assert laws == sorted(laws)  # uniform, zipf
    half = plan[: len(plan) // 2]
    fours = [math.log2(workload.num_tokens) % 2 == 0 for workload in half]
    assert fours == sorted(fours, reverse=True)
    assert [(str(one.shape), one.num_tokens) for one in plan[:9]] == [
        *(("dsv3_tp16", 4**power) for power in range(8)),
        ("dsv3_tp8", 1),
    ]


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (1, ["stream", "stream_in_place", "fused"]),
        (64, ["stream", "stream_in_place", "fused"]),
        (256, ["stream", "stream_in_place", "fused", "prefill"]),
        (1024, ["stream", "stream_in_place", "fused", "prefill"]),
        (4096, ["prefill"]),
    ],
)
def test_what_may_win_takes_part(num_tokens: int, expected: list[str]) -> None:
    assert names(Workload(DSV3, num_tokens)) == expected


def test_what_no_other_kernel_serves_is_measured_with_the_one_that_does() -> None:
    halves = shape_of_model("qwen3-235b-a22b", 8)  # I = 192
    assert names(Workload(halves, 16384)) == ["stream", "stream_in_place"]
    biased = shape_of_model("gpt-oss-20b", 1)
    assert [name for name, _ in ship.entrants(Workload(biased, 4), registry.variants(), recorded.CPU)] == [
        "torch.grouped"
    ]


@pytest.mark.parametrize("workload", ship.plan()[::37], ids=str)
def test_a_fast_kernel_takes_part_everywhere(workload: Workload) -> None:
    found = names(workload)
    if workload.shape.expected_rows(workload.num_tokens) <= ship.MOST_OF_FEW_ROWS:
        assert {"stream", "stream_in_place", "fused"} <= set(found)
    else:
        assert found == ["prefill"]


def test_all_kernels_of_the_plan_are_compiled_ahead_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[ship.Request] = []
    monkeypatch.setattr(ship, "precompile", requests.extend)
    workloads = [Workload(DSV3, num_tokens, law) for num_tokens in (1, 256) for law in ship.LAWS]
    ship.compile_ahead(workloads, registry.variants(), None)
    assert {(one.variant, one.shape) for one in requests} == {
        (f"cuda.sm90_{name}", DSV3) for name in names(workloads[-1])
    }
    for workload in workloads:
        assert {
            ship.Request(name, DSV3, config) for name, config in ship.entrants(workload, registry.variants(), None)
        } <= set(requests)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> recorded.Worker:
    made = recorded.Worker()
    monkeypatch.setattr(worker, "run", made.run)
    return made


VARIANTS = {name: registry.find(name) for name in ("torch.grouped", "torch.loop")}
WORKLOADS = [
    Workload(recorded.SHAPE, num_tokens, law)
    for law in (RoutingLaw(), RoutingLaw("zipf", 1.2))
    for num_tokens in (1, 4)
]


def session(tmp_path: Path) -> Session:
    return open_session(recorded.CPU, tmp_path / "traces.jsonl", time_limit_s=1.0, effort=QUICK)


def test_each_workload_is_verified_and_then_timed(fake: recorded.Worker, tmp_path: Path) -> None:
    filled = ship.fill(session(tmp_path), WORKLOADS, VARIANTS, math.inf)
    assert [(task.job, task.workload) for task in fake.tasks] == [
        (job, workload) for workload in WORKLOADS for job in ("verify", "bench")
    ]
    assert filled.num_left == 0
    assert len(filled.traces) == 3 * len(WORKLOADS)  # a verification, and a time of each scope


def test_what_is_wrong_is_not_timed(fake: recorded.Worker, tmp_path: Path) -> None:
    fake.wrong.add("torch.grouped")
    filled = ship.fill(session(tmp_path), WORKLOADS, VARIANTS, math.inf)
    assert {job for job, *_ in fake.asked} == {"verify"}
    assert {one.status for one in filled.traces} == {"wrong"}
    assert filled.num_left == 0


def test_a_run_that_is_cut_off_keeps_what_it_made_and_goes_on(
    fake: recorded.Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: float(len(fake.tasks)))
    first = ship.fill(session(tmp_path), WORKLOADS, VARIANTS, deadline=3.0)
    assert first.num_left == 2  # the workload that was begun in time was ended
    assert [(one.job, one.key.num_tokens) for one in first.traces if one.scope != "layer"] == [
        *(("verify", 1), ("bench", 1), ("verify", 4), ("bench", 4))
    ]
    second = ship.fill(session(tmp_path), WORKLOADS, VARIANTS, deadline=math.inf)
    assert second.num_left == 0
    assert second.traces[: len(first.traces)] == first.traces
    assert len(fake.asked) == 2 * len(WORKLOADS)  # nothing twice


def test_what_changed_sources_made_is_no_result(fake: recorded.Worker, tmp_path: Path) -> None:
    of = recorded.key(VARIANTS["torch.loop"], Config(), 1, sources="0" * 16)
    with_stale = session(tmp_path)
    with_stale.journal.append(recorded.verified(of, Status.WRONG))
    filled = ship.fill(with_stale, WORKLOADS[:1], VARIANTS, math.inf)
    assert {one.status for one in filled.traces} == {"passed"}


def test_on_a_real_worker(tmp_path: Path) -> None:
    filled = ship.fill(
        open_session(recorded.CPU, tmp_path / "traces.jsonl", time_limit_s=60.0, effort=QUICK),
        WORKLOADS[:1],
        VARIANTS,
        math.inf,
    )
    assert [(one.job, one.scope, one.status) for one in filled.traces] == [
        ("verify", None, "passed"),
        ("bench", "kernel", "passed"),
        ("bench", "layer", "passed"),
    ]
