"""Variants timed against each other on one workload, in one interleaved run.

Two figures are kept apart. *kernel*: `run` on quantised tokens with the routing aligned ahead, which is what published
kernel times mean. *layer*: `run` on what the serving engine has, with aligning, quantising and zeroing inside.

No speed without a right answer. Which candidates come here is decided by the records of verify, but those are of
another process; so the very object that will be timed, captured graph included, is run once on poisoned output and
held against the reference. What fails there is recorded as WRONG and has no time.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workbench import numerics, timing
from workbench.errors import one_line
from workbench.generate import make_inputs
from workbench.problem import MoEInputs
from workbench.roofline import floor_us
from workbench.timing import Armed, Backend, Effort
from workbench.trace import Accuracy, Environment, Job, Scope, Status, Trace, now
from workbench.variant import Config, Variant
from workbench.verify import Case, key_of


@dataclass(frozen=True)
class Contender:
    """A variant with a configuration, prepared for the weights of the case."""

    variant: Variant
    prepared: Any
    config: Config

    @property
    def label(self) -> str:
        return f"{self.variant.name} {self.config}"


Announce = Callable[[Contender | None], None]
"""Told what is about to run: one contender being warmed up and checked, or None when all are being timed."""


def bench(
    job: Job,
    contenders: Sequence[Contender],
    case: Case,
    scope: Scope,
    environment: Environment,
    backend: Backend,
    effort: Effort,
    announce: Announce = lambda contender: None,
) -> Iterator[Trace]:
    """Time `contenders` interleaved on the workload of `case`; one Trace each, those that fail or err first.

    Each call of a sample has a batch of its own (the workload with another seed); the last is the case's own, so that
    the output left behind can be held against the reference. `job` is "bench" or "tune".
    """
    batches = _batches(case, scope, effort.calls_per_sample)
    kind = "fp8" if scope == "kernel" else case.workload.input_kind
    floors = [floor_us(case.workload.shape, batch.topk_ids, kind, environment.device) for batch in batches]
    known_floors = [floor for floor in floors if floor is not None]
    out = torch.empty_like(case.expected, dtype=torch.bfloat16)
    traces: dict[str, Trace] = {}
    armed: list[Armed] = []
    for contender in contenders:
        announce(contender)
        trace = Trace(
            job=job,
            status=Status.FAILED,
            key=key_of(contender.variant, contender.config, case.workload, environment),
            seed=case.workload.seed,
            scope=scope,
            floor_us=statistics.mean(known_floors) if known_floors else None,
            message="did not end",
            created=now(),
        )
        try:
            ready = timing.arm(_candidate(contender, batches, scope, out), backend)
            accuracy = _accuracy(ready, contender, case, out, backend)
        except Exception as error:
            yield dataclasses.replace(trace, message=one_line(error))
            continue
        if not numerics.passed(accuracy):
            message = f"relative error {accuracy.rel_err:.4g}, expected at most {accuracy.tolerance:g}"
            yield dataclasses.replace(trace, status=Status.WRONG, accuracy=accuracy, message=message)
            continue
        armed.append(ready)
        traces[contender.label] = dataclasses.replace(trace, accuracy=accuracy)
    announce(None)
    for label, measured in timing.measure(armed, backend, effort).items():
        yield dataclasses.replace(traces[label], status=Status.PASSED, timing=measured, message="")


def _batches(case: Case, scope: Scope, count: int) -> list[MoEInputs]:
    """`count` batches of the workload under different seeds, the case's own last; quantised for the kernel scope."""
    workload = case.workload
    others = [dataclasses.replace(workload, seed=workload.seed + 1 + i) for i in range(count - 1)]
    batches = [*(make_inputs(other, case.weights.device) for other in others), case.inputs]
    return [batch.quantise() for batch in batches] if scope == "kernel" else batches


def _candidate(
    contender: Contender, batches: Sequence[MoEInputs], scope: Scope, out: torch.Tensor
) -> timing.Candidate:  # fmt: skip
    variant, prepared, config = contender.variant, contender.prepared, contender.config
    if scope == "kernel":
        batches = [variant.align(prepared, batch, config) for batch in batches]
    calls = [functools.partial(variant.run, prepared, batch, out, config) for batch in batches]
    return timing.Candidate(contender.label, calls, graph=variant.graph_capturable and out.device.type == "cuda")


def _accuracy(ready: Armed, contender: Contender, case: Case, out: torch.Tensor, backend: Backend) -> Accuracy:
    numerics.poison(out)
    ready.run()
    backend.wait()
    return numerics.measure(out, case.expected, contender.variant.tolerance)
