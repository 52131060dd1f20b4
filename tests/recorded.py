"""Records without kernels: variants that never run, traces with chosen figures, and a worker that makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench import registry
from workbench.environment import current, sources_digest
from workbench.problem import InputKind, MoEInputs, MoEShape, MoEWeights
from workbench.timing import Effort
from workbench.trace import Accuracy, Environment, Job, Key, Scope, Status, Timing, Trace
from workbench.variant import Config, Support, Variant
from workbench.verify import key_of
from workbench.worker import Task

SHAPE = MoEShape(8, 256, 128, 2)
CPU = torch.device("cpu")
HERE = current(CPU)


def variant(
    name: str, num_configs: int = 1, *, configs: Callable[[int], Sequence[Config]] | None = None, reason: str = ""
) -> Variant:
    """A variant with configs block_m=0, 1, ... that supports everything, or with a `reason` nothing."""

    class Recorded(Variant):
        backend = "torch"

        def supports(self, shape: MoEShape, device: torch.device) -> Support:
            return Support(not reason, reason)

        def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
            return configs(num_tokens) if configs else [Config(block_m=i) for i in range(num_configs)]

        def prepare(self, weights: MoEWeights) -> Any:
            raise AssertionError("a recorded variant never runs")

        def run(self, prepared: Any, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
            raise AssertionError("a recorded variant never runs")

        def sources(self) -> tuple[Path, ...]:
            return (Path(__file__),)

    Recorded.name = name
    return Recorded()


DIGEST = sources_digest(variant("torch.loop"))
"""Of the sources of every recorded variant."""


def named(*variants: Variant) -> dict[str, Variant]:
    return {each.name: each for each in variants}


def key(
    of: Variant,
    config: int | Config = 0,
    num_tokens: int = 8,
    *,
    shape: MoEShape = SHAPE,
    routing: str = "uniform",
    input_kind: InputKind = "bf16",
    environment: Environment = HERE,
    sources: str | None = None,
) -> Key:
    return Key(
        variant=of.name,
        config=Config(block_m=config) if isinstance(config, int) else config,
        sources=DIGEST if sources is None else sources,
        shape=shape,
        num_tokens=num_tokens,
        routing=routing,
        dropped=0.0,
        input_kind=input_kind,
        environment=environment,
    )


def verified(of: Key, status: Status = Status.PASSED, created: str = "2026-01-01T00:00:00+00:00") -> Trace:
    """How a verification of `of` ended."""
    message = "" if status is Status.PASSED else "so the test says"
    accuracy = Accuracy(0.001 if status is Status.PASSED else 0.5, 0.1, 0.99, 0.016)
    return Trace("verify", status, of, accuracy=accuracy, message=message, created=created)


def timed(
    of: Key,
    median_us: float,
    noise: float = 0.01,
    *,
    scope: Scope = "kernel",
    job: Job = "bench",
    created: str = "2026-01-01T00:00:00+00:00",
) -> Trace:
    """A measurement of `of` whose interval reaches `noise` of the median to both sides."""
    timing = Timing(median_us, median_us * (1 - noise), median_us * (1 + noise), 20, 6, graph=True)
    return Trace(job, Status.PASSED, of, scope=scope, timing=timing, floor_us=median_us / 2, created=created)


def both(of: Key, median_us: float, noise: float = 0.01) -> list[Trace]:
    """Verified, and timed in both scopes; the layer takes twice as long."""
    return [
        verified(of),
        timed(of, median_us, noise, scope="kernel"),
        timed(of, 2 * median_us, noise, scope="layer"),
    ]


class Worker:
    """Stands in for worker.run: takes each candidate's figure from `median_us`, and keeps what it was asked."""

    def __init__(self, median_us: Callable[[str, Config], float] = lambda name, config: 10.0) -> None:
        self.median_us = median_us
        self.wrong: set[str] = set()
        """Names of variants that fail verification."""
        self.interrupt_after: int | None = None
        self.num_made = 0
        self.tasks: list[Task] = []
        self.asked: list[tuple[str, str, Config, int]] = []
        """(job, variant, config, M) of every candidate of every task."""

    def run(self, tasks: Iterable[Task], *, time_limit_s: float, effort: Effort) -> Iterator[Trace]:
        for task, name, config, scope in self._measurements(tasks):
            if self.num_made == self.interrupt_after:
                raise KeyboardInterrupt
            self.num_made += 1
            of = key_of(registry.find(name), config, task.workload, HERE)
            if task.job == "verify":
                yield verified(of, Status.WRONG if name in self.wrong else Status.PASSED)
            else:
                assert scope is not None
                yield timed(of, self.median_us(name, config), scope=scope, job=task.job)

    def _measurements(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, str, Config, Scope | None]]:
        for task in tasks:
            self.tasks.append(task)
            for name, config in task.candidates:
                self.asked.append((task.job, name, config, task.workload.num_tokens))
                for scope in task.scopes if task.job in ("bench", "tune") else (None,):
                    yield task, name, config, scope
