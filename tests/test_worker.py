"""A variant may die, hang or lie: the sweep says so of it, and measures all others."""

from __future__ import annotations

import os
import re
import selectors
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_variants import ILLEGAL_ADDRESS

from workbench.errors import InputError, WorkbenchError
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.timing import Effort
from workbench.trace import Status, Trace
from workbench.variant import Config
from workbench.worker import Candidate, Task, run

SHAPE = MoEShape(num_experts=4, hidden_size=128, intermediate_size=128, top_k=2, name="little")
WORKLOAD = Workload(SHAPE, num_tokens=5)
EFFORT = Effort(num_samples=6, calls_per_sample=3)
GOOD: Candidate = ("torch.faulty", Config())


@pytest.fixture(autouse=True)
def _third_party(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_VARIANTS", "register_faulty_variants")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def faulty(fault: str) -> Candidate:
    return "torch.faulty", Config(fault=fault)


def task(job: str, *candidates: Candidate, workload: Workload = WORKLOAD) -> Task:
    return Task(job, "cpu", workload, candidates)  # type: ignore[arg-type]


def perform(*tasks: Task, time_limit_s: float = 5.0) -> Iterator[Trace]:
    return run(tasks, time_limit_s=time_limit_s, effort=EFFORT)


def test_each_way_to_go_wrong_ends_as_its_own_status_and_the_sweep_goes_on() -> None:
    faults = ("dies", "half", "hangs", "raises", "exits")
    candidates = [GOOD, *(faulty(fault) for fault in faults), ("torch.loop", Config())]
    traces = list(perform(task("verify", *candidates), task("verify", GOOD, workload=Workload(SHAPE, 3))))
    assert [(trace.key.variant, trace.key.config) for trace in traces] == [*candidates, GOOD]
    assert [trace.status for trace in traces] == [
        Status.PASSED,
        Status.CRASHED,
        Status.WRONG,
        Status.HUNG,
        Status.FAILED,
        Status.CRASHED,
        Status.PASSED,
        Status.PASSED,
    ]
    messages = [trace.message for trace in traces]
    assert messages[1].startswith("the process was killed by SIGSEGV")
    assert messages[3].startswith("no answer within 5 s")
    assert re.search(r"it was in run \(.*faulty_variants\.py:\d+\), from ", messages[3])
    assert messages[4] == "ValueError: no tile of that size"
    assert messages[5].startswith("the process ended with exit code 3; it printed:")
    assert messages[5].endswith("an assertion in a library | last words")
    assert [trace.key.num_tokens for trace in traces] == [5] * 7 + [3]


def test_a_fault_of_the_device_is_a_crash_and_the_next_candidate_gets_a_fresh_process() -> None:
    """A broken context fails every later call, so the process that has one must not serve another candidate."""
    who = faulty("raises who")
    before, broken, good, after = perform(
        task("verify", who, faulty("breaks the device"), GOOD), task("verify", who, workload=Workload(SHAPE, 3))
    )
    assert (broken.status, broken.message) == (Status.CRASHED, ILLEGAL_ADDRESS)
    assert good.status is Status.PASSED
    assert before.message.startswith("ValueError: process ")
    assert after.message.startswith("ValueError: process ")
    assert before.message != after.message


def test_a_candidate_that_dies_takes_no_time_from_the_others() -> None:
    """One dies while it is warmed up, one while all are timed together; every other has both its figures, once."""
    candidates = (GOOD, faulty("dies"), faulty("dies when timed"), ("torch.loop", Config()))
    traces = list(perform(task("bench", *candidates)))
    ended = {(trace.key.variant, str(trace.key.config), trace.scope): trace.status for trace in traces}
    assert len(ended) == len(traces) == 8
    assert ended == {
        (variant, str(config), scope): Status.CRASHED if "dies" in str(config) else Status.PASSED
        for variant, config in candidates
        for scope in ("kernel", "layer")
    }
    assert all(trace.job == "bench" for trace in traces)


def test_a_candidate_that_cannot_run_says_why_for_each_of_its_figures() -> None:
    candidates = (("torch.unsupporting", Config()), ("torch.unpreparable", Config()), ("triton.telltale", Config()))
    traces = list(perform(task("tune", *candidates), task("verify", *candidates)))
    said = {(trace.job, trace.key.variant, trace.scope): (trace.status, trace.message) for trace in traces}
    unsupported = Status.UNSUPPORTED, "hidden size 128 is too small"
    unpreparable = Status.FAILED, "prepare: RuntimeError: out of registers"
    untimed = Status.UNSUPPORTED, "the time of Triton's interpreter says nothing about the kernel"
    assert said == {
        **{("tune", "torch.unsupporting", scope): unsupported for scope in ("kernel", "layer")},
        **{("tune", "torch.unpreparable", scope): unpreparable for scope in ("kernel", "layer")},
        **{("tune", "triton.telltale", scope): untimed for scope in ("kernel", "layer")},
        ("verify", "torch.unsupporting", None): unsupported,
        ("verify", "torch.unpreparable", None): unpreparable,
        ("verify", "triton.telltale", None): (Status.FAILED, "ValueError: TRITON_INTERPRET=1"),
    }


def test_compiling_reports_every_kernel_and_what_is_not_clean_last() -> None:
    clean, unclean, none = perform(task("compile", ("cuda.compiled", Config(block_m=8)), GOOD))
    assert clean.compiled is not None
    assert (clean.status, clean.compiled.kernel, clean.compiled.registers) == (Status.PASSED, "align", 32)
    assert unclean.status is Status.FAILED
    assert unclean.message == "up: 32 bytes spilled; 8 bytes of stack; C7508: setmaxnreg ignored"
    assert (none.status, none.message) == (Status.UNSUPPORTED, "torch.faulty has nothing to compile without a GPU")


def test_the_child_lives_on_between_tasks_and_goes_when_the_consumer_does() -> None:
    traces = perform(*(task("verify", faulty(fault)) for fault in ("raises who", "half", "raises who", "hangs")))
    first, wrong, third = (next(traces) for _ in range(3))
    assert wrong.status is Status.WRONG
    assert first.message == third.message
    process = int(first.message.rpartition(" ")[2])
    os.kill(process, 0)
    traces.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_an_interrupt_kills_a_child_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = perform(task("verify", faulty("raises who"), faulty("hangs")), time_limit_s=60.0)
    process = int(next(traces).message.rpartition(" ")[2])
    # While the child is waited for: a signal from another thread may arrive where Python drops it, as in a hook of the
    # garbage collector.
    with monkeypatch.context() as patched:
        patched.setattr(selectors.DefaultSelector, "select", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            next(traces)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (task("verify", ("torch.nothing", Config())), "variant: expected one of .*, got 'torch.nothing'"),
        (Task("verify", "cuda:99", WORKLOAD, (GOOD,)), r"device: expected one of \d+ CUDA devices, got 'cuda:99'"),
        (Task("verify", "warp", WORKLOAD, (GOOD,)), r"device: expected cpu or cuda\[:<index>\], got 'warp'"),
        (task("verify", GOOD, workload=Workload(SHAPE, 3, RoutingLaw("replay", path="/no/file"))), "/no/file"),
    ],
)
def test_a_task_that_is_itself_at_fault_is_an_error(wrong: Task, complaint: str) -> None:
    with pytest.raises(WorkbenchError, match=complaint):
        list(perform(wrong))


def test_a_candidate_named_twice_is_refused() -> None:
    with pytest.raises(InputError, match="candidates: expected each one once"):
        task("bench", GOOD, GOOD)


def test_a_child_that_cannot_start_is_an_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.worker.CHILD_MODULE", "no_such_module")
    with pytest.raises(WorkbenchError, match=r"did not start: .* exit code 1; it printed: .*no_such_module"):
        list(perform(task("verify", GOOD)))
