"""Search of the variants' configurations.

The whole (pruned) space of a variant is verified and timed once, shortly; what is clearly slower than that variant's
best stops there. The survivors are then timed properly, interleaved, together with every variant's default: the
default is always in the race, and by the rule of select.py it wins ties. Results are written one by one, so that an
interrupted search resumes where it stopped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from workbench import registry
from workbench.errors import InputError
from workbench.problem import Workload
from workbench.sweep import Candidates, Session, measure, recorded, task_of, verified
from workbench.timing import TUNE
from workbench.trace import Status, Trace
from workbench.worker import Task

CLEARLY_SLOWER = 1.05
"""A config stops when even the low end of its interval is above the high end of its variant's best by this factor."""

AT_ONCE = 8
"""Configs interleaved in one task of the first pass: what a kill can lose, and what a fault repeats."""


def space(variants: Sequence[str], workload: Workload, limit: int | None = None) -> Candidates:
    """The first `limit` configs of each variant, or all: those each variant calls its tuning space."""
    if limit is not None and limit < 1:
        raise InputError(f"configs: expected at least 1, got {limit}")
    return tuple(
        (name, config)
        for name in variants
        for config in itertools.islice(registry.find(name).configs(workload.shape, workload.num_tokens), limit)
    )


def defaults(variants: Sequence[str], workload: Workload) -> Candidates:
    """Every variant with the config it uses untuned."""
    return space(variants, workload, limit=1)


def verify(
    session: Session, workloads: Sequence[Workload], variants: Sequence[str], limit: int | None = None
) -> list[Trace]:
    """Verify up to `limit` configs per variant on each workload; all traces made or found."""
    tasks = [task_of("verify", session, workload, space(variants, workload, limit)) for workload in workloads]
    return measure(session, "verify", tasks)


def tune(
    session: Session,
    workloads: Sequence[Workload],
    variants: Sequence[str],
    *,
    limit: int | None = None,
    keep: int | None = None,
) -> list[Trace]:
    """Search up to `limit` configs per variant on each workload; all traces made or found.

    Only what the journal shows to be verified takes part. Each pass goes through all workloads before the next begins,
    so that one process serves it and makes the weights of a shape once. `keep` bounds how many survivors of a variant
    are timed properly, besides its default.
    """
    right = {workload: verified(session, workload, space(variants, workload, limit)) for workload in workloads}
    short = {workload: _first_pass(session, workload, right[workload]) for workload in workloads}
    made = measure(session, "tune, first pass", itertools.chain.from_iterable(short.values()), effort=TUNE)
    finalists = [
        (workload, _finalists(session, short[workload], right[workload], defaults(variants, workload), keep))
        for workload in workloads
    ]
    made += measure(session, "bench", [task_of("bench", session, workload, some) for workload, some in finalists])
    return made


def race(session: Session, workloads: Sequence[Workload], spaces: Sequence[Candidates]) -> list[Trace]:
    """Verify and properly time, on each workload, all candidates of its space; all traces made or found."""
    entries = list(zip(workloads, spaces, strict=True))
    made = measure(session, "verify", [task_of("verify", session, *entry) for entry in entries])
    right = [(workload, verified(session, workload, space)) for workload, space in entries]
    return made + measure(session, "bench", [task_of("bench", session, *entry) for entry in right])


def survivors(traces: Sequence[Trace], keep: int | None = None) -> Candidates:
    """The candidates that are not clearly slower than the best of their variant, fastest first, `keep` at most."""
    timed: dict[str, list[Trace]] = {}
    for one in sorted(traces, key=lambda one: (_median(one), str(one.key.config))):
        if one.status is Status.PASSED and one.timing is not None:
            timed.setdefault(one.key.variant, []).append(one)
    return tuple(
        (variant, one.key.config)
        for variant, ranked in timed.items()
        for one in ranked[:keep]
        if not _clearly_slower(one, ranked[0])
    )


def _first_pass(session: Session, workload: Workload, candidates: Candidates) -> list[Task]:
    contested = _contested(candidates)
    slices = [contested[start : start + AT_ONCE] for start in range(0, len(contested), AT_ONCE)]
    return [task_of("tune", session, workload, some) for some in slices]


def _contested(candidates: Candidates) -> Candidates:
    """The candidates of variants with more than one: a variant with a single config has nothing to search."""
    names = [variant for variant, _ in candidates]
    return tuple(candidate for candidate in candidates if names.count(candidate[0]) > 1)


def _finalists(
    session: Session, first_pass: Sequence[Task], right: Candidates, default: Candidates, keep: int | None
) -> Candidates:
    """Every verified default, the single-config variants, and the survivors of the first pass."""
    timed = [found for task in first_pass for found in recorded(session, task)]
    contested = _contested(right)
    uncontested = [candidate for candidate in right if candidate not in contested]
    verified_default = [candidate for candidate in default if candidate in right]
    return tuple(dict.fromkeys((*verified_default, *uncontested, *survivors(timed, keep))))


def _median(one: Trace) -> float:
    return one.timing.median_us if one.timing is not None else float("inf")


def _clearly_slower(one: Trace, best: Trace) -> bool:
    assert one.timing is not None
    assert best.timing is not None
    return one.timing.low_us > best.timing.high_us * CLEARLY_SLOWER
