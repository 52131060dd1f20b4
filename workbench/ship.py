"""Measuring the tables of shipped.py: every usual shape at every M that matters, as fast as can be done honestly.

All of it takes a GPU some twenty minutes. So the plan begins with what is worth most, a run may be cut off after a
number of seconds, and the next one goes on where it stopped. A workload is verified and timed before the next one
begins, since both need the same weights and the same output of the reference. Only default configs of variants that may
win take part; `workbench tune` is for the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from workbench import worker
from workbench.compare import GPU_SHAPES
from workbench.environment import sources_digest
from workbench.models import shape_of_alias, usual_shapes
from workbench.precompile import Request, precompile
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.select import FALLBACK_ORDER
from workbench.sweep import Candidates, Session, left, task_of, verified
from workbench.trace import Trace
from workbench.tune import defaults
from workbench.variant import Variant
from workbench.worker import Task

POWERS_OF_FOUR = tuple(4**power for power in range(8))  # 1 .. 16384
BETWEEN = tuple(2 * tokens for tokens in POWERS_OF_FOUR[:-1])
LAWS = (RoutingLaw("uniform"), RoutingLaw("zipf", exponent=1.2))

FOR_FEW_ROWS, FOR_MANY_ROWS = ("cuda.sm90_stream", "cuda.sm90_stream_in_place", "cuda.sm90_fused"), "cuda.sm90_prefill"
MOST_OF_FEW_ROWS = 96
"""Of an expert, on average, up to which the kernels for few may win: the height of the tallest tiles of sm90_stream."""
LEAST_OF_MANY_ROWS = 4
"""From which the prefill kernel may win: at 8 it is far behind on the layers it was measured on."""


def plan() -> list[Workload]:
    """What to measure, the most valuable first: the law that decides at run time before the other, powers of four
    before what lies between them, and shared experts as extra experts before layers that leave them out."""
    whole = list(dict.fromkeys([*map(shape_of_alias, GPU_SHAPES), *usual_shapes()]))
    routed = [shape for shape in usual_shapes(shared_as_experts=False) if shape not in whole]
    return [
        Workload(shape, num_tokens, law)
        for law in LAWS
        for batch_sizes in (POWERS_OF_FOUR, BETWEEN)
        for shapes in (whole, routed)
        for shape in shapes
        for num_tokens in batch_sizes
    ]


def entrants(workload: Workload, variants: Mapping[str, Variant], device: torch.device | None) -> Candidates:
    """The default configs of those of `variants` that may be the fastest on `workload`; without a device, on the one
    that they are for."""
    shape, num_tokens = workload.shape, workload.num_tokens
    serving = [name for name, variant in variants.items() if _serves(variant, shape, device)]
    ours = [name for name in (*FOR_FEW_ROWS, FOR_MANY_ROWS) if name in serving]
    rows = shape.expected_rows(num_tokens)
    few, many = rows <= MOST_OF_FEW_ROWS, rows >= LEAST_OF_MANY_ROWS
    may_win = [name for name in ours if (many if name == FOR_MANY_ROWS else few)]
    # Where the kernels written for this device do not serve the shape, the first of the others that does.
    others = [name for name in FALLBACK_ORDER if name in serving][:1]
    return defaults(may_win or ours or others, workload)


def compile_ahead(workloads: Iterable[Workload], variants: Mapping[str, Variant], device: torch.device | None) -> None:
    """Compile what `workloads` need; needs no GPU."""
    precompile(
        Request(name, workload.shape, config)
        for workload in workloads
        for name, config in entrants(workload, variants, device)
        if variants[name].backend == "cuda"
    )


@dataclass(frozen=True)
class Filled:
    """What is recorded of the plan after a run."""

    traces: tuple[Trace, ...]
    num_left: int
    """Workloads that were not begun."""


def fill(session: Session, workloads: Sequence[Workload], variants: Mapping[str, Variant], deadline: float) -> Filled:
    """Verify and time what of `workloads` is not recorded yet, beginning none after `deadline` (time.monotonic())."""
    entries = [(workload, entrants(workload, variants, session.device)) for workload in workloads]
    left_over = deque(entries)

    def tasks() -> Iterator[Task]:
        while left_over and time.monotonic() < deadline:
            workload, candidates = left_over.popleft()
            yield from left(session, task_of("verify", session, workload, candidates))
            yield from left(session, task_of("bench", session, workload, verified(session, workload, candidates)))

    made = worker.run(tasks(), time_limit_s=session.time_limit_s, effort=session.effort)
    for one in session.watch("shipped tables", 3 * sum(len(candidates) for _, candidates in entries), made):
        session.journal.append(one)
    digests = {name: sources_digest(variant) for name, variant in variants.items()}
    shapes = {workload.shape for workload in workloads}
    known = [
        one
        for one in session.journal.latest()
        if one.job in ("verify", "bench")
        and one.key.environment == session.environment
        and one.key.shape in shapes
        and digests.get(one.key.variant) == one.key.sources
    ]
    return Filled(tuple(known), len(left_over))


def _serves(variant: Variant, shape: MoEShape, device: torch.device | None) -> bool:
    return bool(variant.supports_shape(shape) if device is None else variant.supports(shape, device))
