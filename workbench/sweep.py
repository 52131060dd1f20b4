"""Work that is remembered: tasks go to the worker, each trace is appended to the file as it is made, and what the file
already holds is not done again.

A measurement is looked up by its job, scope, seed and whole key, so a changed source, driver or library redoes it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench import registry, trace, worker
from workbench.environment import current
from workbench.problem import Workload
from workbench.timing import Effort
from workbench.trace import Environment, Job, Key, Scope, Status, Trace
from workbench.variant import Config
from workbench.verify import key_of
from workbench.worker import Task

Candidates = tuple[tuple[str, Config], ...]
"""(variant name, config) pairs that go through one task together."""

Watch = Callable[[str, int, Iterator[Trace]], Iterator[Trace]]
"""Shows progress: given a title, how many traces are to come and the traces, it passes them on."""


def unwatched(title: str, total: int, traces: Iterator[Trace]) -> Iterator[Trace]:
    """The Watch that shows nothing."""
    return traces


class Journal:
    """The traces of one file, and how to find them. Raises RecordError when the file cannot be read whole."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        """With `fresh`, what the file holds is kept there and not looked at: everything is measured again."""
        self.path = path
        self._known: dict[tuple[object, ...], list[Trace]] = defaultdict(list)
        recorded = trace.read(path)
        if not fresh:
            for known in recorded:
                self._index(known)

    def append(self, made: Trace) -> None:
        """Write `made` to the file, durably, and remember it."""
        trace.append(self.path, made)
        self._index(made)

    def find(self, job: Job, scope: Scope | None, seed: int, key: Key) -> list[Trace]:
        """The traces of one measurement, the latest last; of compile those of all kernels."""
        return self._known.get((job, scope, seed, key), [])

    def latest(self) -> list[Trace]:
        """The latest trace of each measurement, in the order in which they were first made."""
        return [found[-1] for found in self._known.values()]

    def _index(self, known: Trace) -> None:
        self._known[known.job, known.scope, known.seed, known.key].append(known)


@dataclass(frozen=True)
class Session:
    """What all measurements of one command share."""

    device: torch.device
    environment: Environment
    journal: Journal
    time_limit_s: float
    """How long one measurement may take before its process is killed."""
    effort: Effort
    watch: Watch


def open_session(
    device: torch.device,
    path: Path,
    *,
    time_limit_s: float,
    effort: Effort,
    fresh: bool = False,
    watch: Watch = unwatched,
) -> Session:
    """A session that records to `path`. RecordError when that file cannot be read whole."""
    return Session(device, current(device), Journal(path, fresh), time_limit_s, effort, watch)


def task_of(job: Job, session: Session, workload: Workload, candidates: Candidates) -> Task:
    """A task of all `candidates` on `workload`; bench is of both scopes, tune of the kernel alone."""
    task = Task(job, str(session.device), workload, candidates)
    return dataclasses.replace(task, scopes=("kernel",)) if job == "tune" else task


def measure(session: Session, title: str, tasks: Iterable[Task], effort: Effort | None = None) -> list[Trace]:
    """Do what of `tasks` the journal does not hold; all traces of `tasks`, old and new, in the tasks' order.

    An interrupt leaves everything made so far in the file.
    """
    tasks = [task for task in tasks if task.candidates]
    lacking = [rest for task in tasks for rest in left(session, task)]
    total = sum(len(list(_parts(task))) for task in lacking)
    skipped = sum(len(list(_parts(task))) for task in tasks) - total
    if skipped:
        title = f"{title} ({skipped} recorded already)"
    if tasks:
        made = worker.run(lacking, time_limit_s=session.time_limit_s, effort=effort or session.effort)
        for one in session.watch(title, total, made):
            session.journal.append(one)
    return list(dict.fromkeys(known for task in tasks for known in recorded(session, task)))


def recorded(session: Session, task: Task) -> list[Trace]:
    """The traces of `task` that the journal holds: the latest of each measurement, of compile one per kernel."""
    found: list[Trace] = []
    for part in _parts(task):
        known = _find(session, task, *part)
        found += {one.compiled.kernel if one.compiled else "": one for one in known}.values()
    return found


def left(session: Session, task: Task) -> Iterator[Task]:
    """`task` with what is not recorded yet: one task per set of scopes that candidates lack."""
    lacking: dict[tuple[str, Config], list[Scope | None]] = {}
    for variant, config, scope in _parts(task):
        if not _find(session, task, variant, config, scope):
            lacking.setdefault((variant, config), []).append(scope)
    groups: dict[tuple[Scope | None, ...], list[tuple[str, Config]]] = {}
    for candidate, scopes in lacking.items():
        groups.setdefault(tuple(scopes), []).append(candidate)
    for scopes_lacking, candidates in groups.items():
        scopes_of_task = tuple(scope for scope in scopes_lacking if scope is not None) or task.scopes
        yield dataclasses.replace(task, candidates=tuple(candidates), scopes=scopes_of_task)


def unrecorded(session: Session, task: Task) -> Candidates:
    """Those of the task's candidates of which the journal lacks something."""
    return tuple(candidate for rest in left(session, task) for candidate in rest.candidates)


def verified(session: Session, workload: Workload, candidates: Candidates) -> Candidates:
    """Those of `candidates` that the journal shows to be right on `workload`."""
    task = task_of("verify", session, workload, candidates)
    right = {(one.key.variant, one.key.config) for one in recorded(session, task) if one.status is Status.PASSED}
    return tuple(candidate for candidate in candidates if candidate in right)


def failures(traces: Sequence[Trace]) -> list[Trace]:
    """The traces that show something to be wrong; an unsupported shape is not."""
    return [one for one in traces if one.status not in (Status.PASSED, Status.UNSUPPORTED)]


def _parts(task: Task) -> Iterator[tuple[str, Config, Scope | None]]:
    """The measurements of one task."""
    scopes = task.scopes if task.job in ("bench", "tune") else (None,)
    for variant, config in task.candidates:
        for scope in scopes:
            yield variant, config, scope


def _find(session: Session, task: Task, variant: str, config: Config, scope: Scope | None) -> list[Trace]:
    key = key_of(registry.find(variant), config, task.workload, session.environment)
    return session.journal.find(task.job, scope, task.workload.seed, key)
