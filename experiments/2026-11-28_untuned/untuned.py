"""What is chosen for a layer that nobody has measured, against the best that was then measured of it.

    PYTHONPATH=. python experiments/2026-11-28_untuned/untuned.py <traces.jsonl or traces.jsonl.gz> ...

*Untuned* is what `fused_moe` runs when no table has the shape: the default variant with its default config. *Best* is
the fastest that was verified and benched. Both in the scope `layer`, by which a layer chooses, and under uniform
routing.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from experiments.traces import read
from kernels_cuda import sm90
from workbench import registry, select
from workbench.problem import MoEShape
from workbench.table import Cell, Table
from workbench.trace import Environment, Scope, Status, Trace
from workbench.variant import Config, Support

BAR = 0.9
NARROW = 256
"""Channels up to which the README gives times over the floor."""

Identity = tuple[str, Config]


@dataclass(frozen=True)
class Measured:
    """What was benched of one shape at one M, by scope and (variant, config)."""

    shape: MoEShape
    num_tokens: int
    environment: Environment
    benches: dict[Scope, dict[Identity, Trace]]

    def us(self, scope: Scope, identity: Identity) -> float | None:
        found = self.benches[scope].get(identity)
        return None if found is None else us(found)

    def best(self, scope: Scope, variant: str = "") -> Identity:
        """Of all variants, or of the one."""
        times = self.benches[scope]
        return min((one for one in times if variant in ("", one[0])), key=lambda one: us(times[one]))

    def untuned(self) -> Identity:
        """As on a GPU that all kernels are for, with an empty selection table."""
        table, cell = Table(self.environment, (), {}), Cell(self.shape, "uniform", "bf16", "layer")
        with mock.patch.object(sm90, "supports_device", return_value=Support.yes()):
            return select.choose(table, cell, self.num_tokens, registry.variants(), torch.device("cpu")).identity

    def gain(self, scope: Scope, untuned: Identity, variant: str = "") -> float | None:
        """Time of the best over that of `untuned`: 1 is as fast, and None not benched."""
        own = self.us(scope, untuned)
        return None if own is None else us(self.benches[scope][self.best(scope, variant)]) / own


def us(one: Trace) -> float:
    assert one.timing is not None
    return one.timing.median_us


def measured(traces: Iterable[Trace]) -> list[Measured]:
    """By shape in the order of the traces, and by M; of two benches of one thing the later counts."""
    cells: dict[MoEShape, dict[int, Measured]] = {}
    for one in sorted(traces, key=lambda one: one.created):
        key = one.key
        if (one.job, one.status, key.routing, key.dropped) != ("bench", Status.PASSED, "uniform", 0.0):
            continue
        assert one.scope is not None
        empty = Measured(key.shape, key.num_tokens, key.environment, {"kernel": {}, "layer": {}})
        cell = cells.setdefault(key.shape, {}).setdefault(key.num_tokens, empty)
        cell.benches[one.scope][key.variant, key.config] = one
    return [by_tokens[num_tokens] for by_tokens in cells.values() for num_tokens in sorted(by_tokens)]


def print_choices(cells: Iterable[Measured]) -> None:
    print(
        "| shape | M | rows of an expert | untuned | us | best | us | best / untuned | kernels alone | best of floor |"
    )
    print("| --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for at in cells:
        untuned, best = at.untuned(), at.best("layer")
        figures = [number(at.us("layer", untuned)), name(best), number(at.us("layer", best))]
        gains = [number(at.gain(scope, untuned), 2) for scope in ("layer", "kernel")]
        rows = f"{at.shape.expected_rows(at.num_tokens):.1f}"
        line = [str(at.shape), str(at.num_tokens), rows, name(untuned), *figures, *gains, number(of_floor(at), 2)]
        print(f"| {' | '.join(line)} |")


def print_summary(cells: list[Measured]) -> None:
    """The choice's ratios, then each variant's default config against the best of its own."""
    print("\n| untuned | scope | cells | best / untuned, least | where | >= 0.9 |")
    print("| --- | --- | ---: | ---: | --- | ---: |")
    variants = sorted({variant for at in cells for variant, _ in at.benches["kernel"]})
    for scope in ("layer", "kernel"):
        line("the choice", scope, [(at.gain(scope, at.untuned()), at) for at in cells])
        for variant in variants:
            ran = [at for at in cells if any(variant == one for one, _ in at.benches[scope])]
            line(variant, scope, [(at.gain(scope, (variant, default(variant, at)), variant), at) for at in ran])


def default(variant: str, at: Measured) -> Config:
    return next(iter(registry.find(variant).configs(at.shape, at.num_tokens)))


def line(what: str, scope: Scope, gains: list[tuple[float | None, Measured]]) -> None:
    known = [(gain, at) for gain, at in gains if gain is not None]
    if not known:
        print(f"| {what} | {scope} | 0 of {len(gains)} | | | |")
        return
    least, at = min(known, key=lambda pair: pair[0])
    met = sum(gain >= BAR for gain, _ in known)
    print(f"| {what} | {scope} | {len(known)} of {len(gains)} | {least:.2f} | {at.shape} M={at.num_tokens} | {met} |")


def of_floor(at: Measured) -> float | None:
    """The fastest kernel over the floor, of wide layers."""
    fastest = at.benches["kernel"][at.best("kernel")]
    wide = at.shape.intermediate_size > NARROW
    return us(fastest) / fastest.floor_us if wide and fastest.floor_us else None


def name(identity: Identity) -> str:
    return f"{identity[0].removeprefix('cuda.sm90_')} {identity[1]}"


def number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def main() -> None:
    select.logger.setLevel(logging.ERROR)  # every cell is a miss
    cells = measured(one for path in sys.argv[1:] for one in read(Path(path)))
    if not cells:
        sys.exit("expected traces with benches under uniform routing")
    print_choices(cells)
    print_summary(cells)


if __name__ == "__main__":
    main()
