"""The search: every config verified before it is timed, what is clearly slower stops early, the default never does."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import CPU, SHAPE, Worker, key, named, timed, variant

from workbench import registry, trace, worker
from workbench.errors import InputError, RecordError
from workbench.problem import Workload
from workbench.sweep import Session, failures, open_session
from workbench.timing import QUICK
from workbench.trace import Status
from workbench.tune import AT_ONCE, space, survivors, tune, verify
from workbench.variant import Config

SEARCHED = variant("triton.grouped", 20)
SINGLE = variant("torch.loop")
WORKLOADS = [Workload(SHAPE, 1), Workload(SHAPE, 8)]
NAMES = ["triton.grouped", "torch.loop"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Config block_m=7 is the fastest, its neighbours are close, and the default is slow."""
    fake = Worker(lambda name, config: 10.0 + 2.0 * abs(config.integer("block_m") - 7))
    monkeypatch.setattr(worker, "run", fake.run)
    monkeypatch.setattr(registry, "variants", lambda: named(SEARCHED, SINGLE))
    monkeypatch.setattr(registry, "find", named(SEARCHED, SINGLE).__getitem__)
    return fake


def session(folder: Path, fresh: bool = False) -> Session:
    return open_session(CPU, folder / "traces.jsonl", time_limit_s=1.0, effort=QUICK, fresh=fresh)


def search(of: Session, **options: int) -> list[trace.Trace]:
    return verify(of, WORKLOADS, NAMES) + tune(of, WORKLOADS, NAMES, **options)


def asked(fake: Worker, job: str) -> list[tuple[str, Config, int]]:
    return [(name, config, num_tokens) for asked_job, name, config, num_tokens in fake.asked if asked_job == job]


def test_the_whole_space_is_verified_and_then_passed_over_once(fake: Worker, tmp_path: Path) -> None:
    search(session(tmp_path))
    everything = {(name, config, m.num_tokens) for m in WORKLOADS for name, config in space(NAMES, m)}
    assert set(asked(fake, "verify")) == everything
    assert set(asked(fake, "tune")) == {one for one in everything if one[0] == "triton.grouped"}
    jobs = [job for job, *_ in fake.asked]
    assert jobs == sorted(jobs, key=["verify", "tune", "bench"].index)


def test_what_is_clearly_slower_is_not_timed_again_but_the_defaults_are(fake: Worker, tmp_path: Path) -> None:
    search(session(tmp_path))
    at_eight = [(name, config["block_m"]) for name, config, num_tokens in asked(fake, "bench") if num_tokens == 8]
    assert at_eight == [("triton.grouped", 0), ("torch.loop", 0), ("triton.grouped", 7)]


def test_keep_bounds_the_survivors_of_each_variant() -> None:
    first_pass = [timed(key(SEARCHED, i), 10.0 + 0.1 * i, job="tune") for i in range(5)]
    first_pass += [timed(key(SINGLE, i), 90.0 + 0.1 * i, job="tune") for i in range(5)]
    assert survivors(first_pass, keep=2) == tuple(
        (name, Config(block_m=i)) for name in ("triton.grouped", "torch.loop") for i in (0, 1)
    )
    assert len(survivors(first_pass)) == 10


def test_a_config_that_is_wrong_is_never_timed(fake: Worker, tmp_path: Path) -> None:
    fake.wrong = {"triton.grouped"}
    traces = search(session(tmp_path))
    assert {name for job, name, *_ in fake.asked if job != "verify"} == {"torch.loop"}
    assert {one.status for one in failures(traces)} == {Status.WRONG}


def test_a_second_search_measures_nothing_and_finds_the_same(fake: Worker, tmp_path: Path) -> None:
    first = search(session(tmp_path))
    lines = (tmp_path / "traces.jsonl").read_text()
    fake.asked.clear()
    assert search(session(tmp_path)) == first
    assert fake.asked == []
    assert (tmp_path / "traces.jsonl").read_text() == lines


def test_fresh_measures_again_and_keeps_what_was_there(fake: Worker, tmp_path: Path) -> None:
    search(session(tmp_path))
    before = (tmp_path / "traces.jsonl").read_text()
    search(session(tmp_path, fresh=True))
    assert (tmp_path / "traces.jsonl").read_text() == before * 2


@pytest.mark.parametrize("after", [0, 5, 45, 85])
def test_an_interrupted_search_keeps_what_is_done_and_goes_on_from_there(
    fake: Worker, tmp_path: Path, after: int
) -> None:
    fake.interrupt_after = after
    with pytest.raises(KeyboardInterrupt):
        search(session(tmp_path))
    kept = trace.read(tmp_path / "traces.jsonl")
    fake.interrupt_after = None
    search(session(tmp_path))
    every = trace.read(tmp_path / "traces.jsonl")
    assert len(kept) == after
    assert every[:after] == kept
    measured = [(one.job, one.scope, one.key) for one in every]
    assert len(measured) == len(set(measured)), "nothing is measured twice"


def test_configs_are_interleaved_in_handfuls(fake: Worker, tmp_path: Path) -> None:
    search(session(tmp_path))
    sizes = [len(task.candidates) for task in fake.tasks if task.job == "tune"]
    assert sizes == [AT_ONCE, AT_ONCE, 4] * 2


def test_a_torn_record_is_refused_before_anything_is_measured(fake: Worker, tmp_path: Path) -> None:
    search(session(tmp_path))
    path = tmp_path / "traces.jsonl"
    path.write_text(path.read_text()[:-10])
    fake.asked.clear()
    with pytest.raises(RecordError, match="torn"):
        session(tmp_path)
    assert fake.asked == []


def test_a_space_needs_a_config() -> None:
    with pytest.raises(InputError, match="configs: expected at least 1, got 0"):
        space(NAMES, WORKLOADS[0], limit=0)
