"""Work that is remembered: what is recorded is not done again, and what changed is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded import CPU, SHAPE, Worker, named, variant

from workbench import registry, trace, worker
from workbench.problem import Workload
from workbench.sweep import Session, failures, measure, open_session, task_of, verified
from workbench.timing import QUICK
from workbench.trace import Status, Trace
from workbench.variant import Config
from workbench.worker import Task

LOOP = variant("torch.loop")
GROUPED = variant("torch.grouped")
PAIR = (("torch.loop", Config(block_m=0)), ("torch.grouped", Config(block_m=0)))
WORKLOAD = Workload(SHAPE, 8)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Worker:
    fake = Worker()
    monkeypatch.setattr(worker, "run", fake.run)
    monkeypatch.setattr(registry, "find", named(LOOP, GROUPED).__getitem__)
    return fake


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return open_session(CPU, tmp_path / "traces.jsonl", time_limit_s=1.0, effort=QUICK)


def bench(session: Session, workload: Workload = WORKLOAD) -> list[Task]:
    return [task_of("bench", session, workload, PAIR)]


def test_every_trace_is_in_the_file_before_the_next_is_made(fake: Worker, session: Session) -> None:
    lengths = []

    def counting(title: str, total: int, traces: Iterator[Trace]) -> Iterator[Trace]:
        for one in traces:
            lengths.append(len(trace.read(session.journal.path)))
            yield one

    measure(dataclasses.replace(session, watch=counting), "bench", bench(session))
    assert lengths == [0, 1, 2, 3]


def test_what_is_recorded_comes_back_in_the_tasks_order(fake: Worker, session: Session) -> None:
    first = measure(session, "bench", bench(session))
    assert [(one.key.variant, one.scope) for one in first] == [
        (name, scope) for name in ("torch.loop", "torch.grouped") for scope in ("kernel", "layer")
    ]
    fake.asked.clear()
    assert measure(session, "bench", bench(session)) == first
    assert fake.asked == []


@pytest.mark.parametrize(
    "change",
    [{"num_tokens": 9}, {"seed": 1}, {"input_kind": "fp8"}, {"dropped": 0.5}],
    ids=lambda change: next(iter(change)),
)
def test_another_workload_is_measured_anew(fake: Worker, session: Session, change: dict) -> None:
    measure(session, "bench", bench(session))
    fake.asked.clear()
    measure(session, "bench", bench(session, dataclasses.replace(WORKLOAD, **change)))
    assert len(fake.asked) == 2


def test_changed_sources_are_measured_anew(fake: Worker, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(session, "bench", bench(session))
    fake.asked.clear()
    monkeypatch.setattr(type(LOOP), "sources", lambda self: (Path(__file__),))
    measure(session, "bench", bench(session))
    assert [name for _, name, *_ in fake.asked] == ["torch.loop"]


def test_one_missing_scope_is_measured_alone(fake: Worker, session: Session) -> None:
    fake.interrupt_after = 3
    with pytest.raises(KeyboardInterrupt):
        measure(session, "bench", bench(session))
    fake.interrupt_after = None
    fake.tasks.clear()
    measure(session, "bench", bench(session))
    (task,) = fake.tasks
    assert (task.candidates, task.scopes) == (PAIR[1:], ("layer",))


def test_only_what_passed_counts_as_verified(fake: Worker, session: Session) -> None:
    fake.wrong = {"torch.grouped"}
    assert verified(session, WORKLOAD, PAIR) == ()
    traces = measure(session, "verify", [task_of("verify", session, WORKLOAD, PAIR)])
    assert verified(session, WORKLOAD, PAIR) == PAIR[:1]
    assert [(one.key.variant, one.status) for one in failures(traces)] == [("torch.grouped", Status.WRONG)]


def test_the_watcher_hears_how_much_is_to_come_and_how_much_is_there(fake: Worker, session: Session) -> None:
    heard = []

    def hearing(title: str, total: int, traces: Iterator[Trace]) -> Iterator[Trace]:
        heard.append((title, total))
        return traces

    watched = dataclasses.replace(session, watch=hearing)
    measure(watched, "bench", bench(session))
    measure(watched, "bench", bench(session))
    measure(watched, "bench", [])
    assert heard == [("bench", 4), ("bench (4 recorded already)", 0)]
