"""Kernels run in a child process, because a kernel may crash it, hang it, or leave its GPU context unusable.

The child (worker_child.py) stays alive between tasks, since starting one takes seconds and its weights and compiled
kernels can be used again. It says what it is about to run before it runs it, and reports every measurement when it is
made; so when it dies or falls silent, the parent knows whose fault it was, records that, and gives what is left of the
task to a fresh child. Nothing that was measured is lost or measured twice. Only while all candidates are timed together
is the culprit unknown; then each that is left is timed by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import timing
from workbench.errors import InputError, WorkbenchError
from workbench.problem import Workload
from workbench.strict_json import decode, encode
from workbench.trace import Job, Key, Scope, Status, Trace, from_json, now
from workbench.variant import Config

START_LIMIT_S = 180.0
"""For a child to import torch and all variants."""
INPUTS_ALLOWANCE = 10
"""Making inputs and the reference's output may take this many time limits: no variant runs there."""
POLL_S = 0.2
NUM_LOG_LINES = 3
STACK_LIMIT_S = 5.0
"""For a child that hangs to say where."""
CHILD_MODULE = "workbench.worker_child"

Candidate = tuple[str, Config]


@dataclass(frozen=True)
class Task:
    """One job on one workload. For bench and tune all candidates are timed interleaved, for each scope."""

    job: Job
    device: str
    """As torch names it: "cuda", "cuda:1", "cpu". Triton variants on "cpu" run in the interpreter, in verify alone."""
    workload: Workload
    candidates: tuple[Candidate, ...]
    """Names of variants, each with a configuration."""
    scopes: tuple[Scope, ...] = ("kernel", "layer")
    """What bench and tune time; verify and compile ignore it."""

    def __post_init__(self) -> None:
        if len(set(self.candidates)) < len(self.candidates):
            raise InputError(f"candidates: expected each one once, got {[f'{v} {c}' for v, c in self.candidates]}")


def run(tasks: Iterable[Task], *, time_limit_s: float, effort: timing.Effort) -> Iterator[Trace]:
    """Do the tasks in order; yields each Trace as it is made.

    verify gives one Trace per candidate, bench and tune one per candidate and scope, compile one per kernel, those that
    are not clean last. `time_limit_s` bounds each step of a candidate (preparing and verifying it, or warming it up and
    capturing it). A step that dies or exceeds it ends as CRASHED or HUNG for that candidate, and the rest goes on in a
    fresh child. Closing the iterator, or an exception in the consumer such as KeyboardInterrupt, kills the child.

    Raises WorkbenchError when a task itself is at fault (an unknown variant, a device that is not there) or when a
    child cannot start.
    """
    children: dict[bool, _Child] = {}
    try:
        for task in tasks:
            for part in _by_process(task):
                yield from _run_to_the_end(part, children, time_limit_s, effort)
    finally:
        for child in children.values():
            child.kill()


def interpreted(task: Task, candidate: Candidate) -> bool:
    """Whether `candidate` needs a process in which Triton interprets kernels."""
    return task.job == "verify" and task.device.startswith("cpu") and candidate[0].startswith("triton.")


def _by_process(task: Task) -> Iterator[Task]:
    """`task` in parts of which each fits one kind of process."""
    for kind in (False, True):
        candidates = tuple(each for each in task.candidates if interpreted(task, each) is kind)
        if candidates:
            yield dataclasses.replace(task, candidates=candidates)


def _run_to_the_end(
    task: Task, children: dict[bool, _Child], time_limit_s: float, effort: timing.Effort
) -> Iterator[Trace]:
    """`task` in as many children as it takes."""
    kind = interpreted(task, task.candidates[0])
    left = deque([task])
    while left:
        part = left.popleft()
        if kind not in children:
            children[kind] = _Child(interpreted=kind)
        attempt = _Attempt(part)
        try:
            for trace in children[kind].perform(attempt, time_limit_s, effort):
                attempt.done.add(_part_of(trace))
                yield trace
        except _ChildEndedError as end:
            fresh = children[kind].num_tasks == 1
            children.pop(kind).kill()
            if attempt.step == "start" and fresh:
                raise WorkbenchError(f"the process for {task.job} did not start: {end}") from end
            for trace in attempt.blame(end):
                attempt.done.add(_part_of(trace))
                yield trace
            left.extendleft(reversed(attempt.rest()))


Part = tuple[str, Config, Scope | None]
"""What one measurement is of, within a task."""


def _part_of(trace: Trace) -> Part:
    return trace.key.variant, trace.key.config, trace.scope


class _ChildEndedError(Exception):
    """The child died or was killed; says how."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Attempt:
    """One task in one child: how far it got, and what to make of it when the child ends."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.keys: tuple[Key, ...] = ()
        self.step: str | int = "start"
        """The index of the candidate that is running, or "start", "inputs" or "timing"."""
        self.done: set[Part] = set()

    def blame(self, end: _ChildEndedError) -> Iterator[Trace]:
        """A Trace for each measurement that the end of the child decides.

        While all candidates are being timed together the culprit is unknown; `rest` then tries them one by one.
        """
        if self.step == "timing" and len(self.task.candidates) > 1:
            return
        for i, key in enumerate(self.keys):
            if self.step not in (i, "timing", "inputs"):
                continue
            for scope in self._scopes():
                if (key.variant, key.config, scope) not in self.done:
                    yield Trace(
                        job=self.task.job,
                        status=end.status,
                        key=key,
                        seed=self.task.workload.seed,
                        scope=scope,
                        message=str(end),
                        created=now(),
                    )

    def rest(self) -> list[Task]:
        """What is neither measured nor blamed."""
        rest = []
        for scope in self._scopes():
            candidates = [each for each in self.task.candidates if (*each, scope) not in self.done]
            groups = [(each,) for each in candidates] if self.step == "timing" else [tuple(candidates)]
            scopes = self.task.scopes if scope is None else (scope,)
            rest += [dataclasses.replace(self.task, candidates=group, scopes=scopes) for group in groups if group]
        return rest

    def _scopes(self) -> tuple[Scope | None, ...]:
        return self.task.scopes if self.task.job in ("bench", "tune") else (None,)


class _Child:
    """The process, its pipes and its log. Tasks go in by stdin; messages come back by a pipe of their own, since
    kernels and compilers print to stdout and stderr."""

    def __init__(self, interpreted: bool) -> None:
        reading, writing = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        environment = dict(os.environ)
        # What the parent can import the child can: modules of variants that are nowhere installed, tests among them.
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        environment["TRITON_INTERPRET"] = "1" if interpreted else "0"
        environment["PYTHONFAULTHANDLER"] = "1"  # an abort prints the stacks of all threads
        if interpreted:
            environment["OMP_NUM_THREADS"] = "1"  # numpy's small arrays: 2.7 times as fast as with two
        self._process = subprocess.Popen(
            [sys.executable, "-m", CHILD_MODULE, str(writing)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=(writing,),
            start_new_session=True,  # a group to kill as one, and out of reach of the terminal's Ctrl-C
            env=environment,
        )
        os.close(writing)
        self._messages = os.fdopen(reading, "rb", buffering=0)
        self._received = b""
        self.num_tasks = 0

    def perform(self, attempt: _Attempt, time_limit_s: float, effort: timing.Effort) -> Iterator[Trace]:
        """Hand over the task; yields its traces and keeps `attempt` up to date. Raises _ChildEndedError."""
        self.num_tasks += 1
        self._send({"task": encode(attempt.task), "effort": encode(effort)})
        limit_s = START_LIMIT_S
        while True:
            message = self._receive(limit_s)
            ((kind, content),) = message.items()
            if kind == "keys":
                attempt.keys = tuple(decode(Key, key) for key in content)
            elif kind == "step":
                attempt.step = content
                factors = {"inputs": INPUTS_ALLOWANCE, "timing": len(attempt.task.candidates)}
                limit_s = time_limit_s * factors.get(content, 1)
            elif kind == "trace":
                yield from_json(content)
            elif kind == "refused":
                raise WorkbenchError(content)
            elif kind == "fault":
                raise _ChildEndedError(Status.CRASHED, content)
            else:
                return

    def kill(self) -> None:
        """End the child and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._messages.close()
        self._log.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a dead child is found by the next _receive
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _receive(self, limit_s: float) -> dict[str, Any]:
        """The child's next message within `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._messages, selectors.EVENT_READ)
            while b"\n" not in self._received:
                # A process that the child forked may hold the pipe open, so its end alone would not show a death.
                dead = self._process.poll() is not None
                if selector.select(0 if dead else POLL_S):
                    chunk = self._messages.read(1 << 16)
                    self._received += chunk
                    dead = dead or not chunk
                elif not dead and time.monotonic() > deadline:
                    printed = self._last_lines()
                    raise _ChildEndedError(Status.HUNG, f"no answer within {limit_s:g} s{printed}{self._abort()}")
                if dead and b"\n" not in self._received:
                    raise _ChildEndedError(Status.CRASHED, _how_it_ended(self._process.wait()) + self._last_lines())
        line, self._received = self._received.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _last_lines(self) -> str:
        """What the child printed last, on one line."""
        printed = self._printed_since(max(0, self._log.seek(0, os.SEEK_END) - 4096))
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        return "; it printed: " + " | ".join(lines[-NUM_LOG_LINES:]) if lines else ""

    def _printed_since(self, position: int) -> str:
        self._log.seek(position)
        return self._log.read().decode(errors="replace")

    def _abort(self) -> str:
        """Ends a child that hangs; what it was doing, on one line, the innermost call first."""
        size = self._log.seek(0, os.SEEK_END)
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(self._process.pid, resource.RLIMIT_CORE, (0, 0))  # no file for the abort
        self._process.send_signal(signal.SIGABRT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STACK_LIMIT_S)
        stack = self._printed_since(size).partition("Current thread")[2]
        calls = re.findall(r'^  File "(.+)", line (\d+) in (.+)$', stack, re.MULTILINE)[:NUM_LOG_LINES]
        return "; it was in " + ", from ".join(f"{name} ({file}:{line})" for file, line, name in calls) if calls else ""


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the process ended with exit code {code}"
    try:
        return f"the process was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"the process was killed by signal {-code}"
