"""From traces of `workbench compare` or `ship`, beside published kernels: how far each bar is met, and tables.

    PYTHONPATH=. python experiments/2026-11-27_compare/summary.py <folder with traces.jsonl or h200_traces.jsonl.gz>

*Ours* in a cell is the fastest CUDA variant and config that was verified, kernel scope. Peers are those of
../2026-11-23_first_comparison/peers.json. What is selected is worked out for the sources that made the traces, even if
they have changed since.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

import torch

from experiments.traces import read
from workbench import registry, select, table
from workbench.problem import MoEShape
from workbench.table import Cell, Table
from workbench.trace import Status, Trace

PEERS = json.loads((Path(__file__).parents[1] / "2026-11-23_first_comparison" / "peers.json").read_text())
PEER_NAMES = {
    "alpha_moe": "Alpha-MoE",
    "sglang_triton": "SGLang Triton",
    "deepgemm_contig": "DeepGEMM",
    "deepgemm_masked": "DeepGEMM",
    "hpc_ops": "HPC-Ops",
}
SHOWN = (
    "cuda.sm90_stream",
    "cuda.sm90_stream_in_place",
    "cuda.sm90_fused",
    "cuda.sm90_prefill",
    "triton.grouped",
)
UNIFORM = "uniform"
NUM_CELLS = 39


@dataclasses.dataclass(frozen=True)
class Measured:
    """The fastest verified benches of one (shape, routing) at one M."""

    shape: MoEShape
    num_tokens: int
    benches: tuple[Trace, ...]

    @property
    def label(self) -> str:
        return f"{self.shape} M={self.num_tokens}"

    def fastest(self, scope: str, prefix: str) -> Trace | None:
        found = [one for one in self.benches if one.scope == scope and one.key.variant.startswith(prefix)]
        return min(found, key=us, default=None)

    def of(self, scope: str, variant: str) -> Trace | None:
        return min(
            (one for one in self.benches if (one.scope, one.key.variant) == (scope, variant)), key=us, default=None
        )

    @property
    def ours(self) -> Trace | None:
        return self.fastest("kernel", "cuda.")

    @property
    def floor(self) -> float | None:
        return next((one.floor_us for one in self.benches if one.scope == "kernel" and one.floor_us), None)

    @property
    def peer(self) -> tuple[float, str] | None:
        """Its time and its name, by how traces are measured here."""
        for row in PEERS["rows"]:
            if (row["shape"], row["num_tokens"]) == (self.shape.name, self.num_tokens):
                best = min(row["us"], key=row["us"].__getitem__)
                return row["us"][best], PEER_NAMES[best]
        return None


def us(one: Trace) -> float:
    assert one.timing is not None
    return one.timing.median_us


def compared(folder: Path) -> list[Trace]:
    """Those of layers and batches with a published figure."""
    plain = folder / "traces.jsonl"
    traces = read(plain if plain.exists() else folder / "h200_traces.jsonl.gz")
    published = {(row["shape"], row["num_tokens"]) for row in PEERS["rows"]}
    return [one for one in traces if (one.key.shape.name, one.key.num_tokens) in published]


def measured(traces: list[Trace], routing: str) -> list[Measured]:
    """In the order of the traces' shapes and by M; what has no passed verification of the same key, or a red one for
    any kind of input, is left out. Of two benches of one thing the later counts."""
    any_input = {one: dataclasses.replace(one.key, input_kind="bf16") for one in traces if one.job == "verify"}
    red = {key for one, key in any_input.items() if one.status is not Status.PASSED}
    green = {one.key for one in any_input if one.status is Status.PASSED}
    benches: dict[tuple[MoEShape, int], dict[object, Trace]] = {}
    for one in sorted(traces, key=lambda one: one.created):
        key = one.key
        if one.job != "bench" or key.routing != routing or key.dropped or key.input_kind != "bf16":
            continue
        if one.status is Status.PASSED and key in green and key not in red:
            benches.setdefault((key.shape, key.num_tokens), {})[key, one.scope] = one
    shapes = list(dict.fromkeys(one.key.shape for one in traces))
    order = sorted(benches, key=lambda cell: (shapes.index(cell[0]), cell[1]))
    return [Measured(*cell, tuple(benches[cell].values())) for cell in order]


def table_of(traces: list[Trace]) -> Table:
    """The selection table, taking the last sources of each variant for those it has now."""
    last = {one.key.variant: one.key.sources for one in sorted(traces, key=lambda one: one.created)}
    with mock.patch.object(table, "sources_digest", lambda variant: last.get(variant.name, "")):
        return table.build(traces, traces[-1].key.environment, registry.variants())


def selected(known: Table, at: Measured) -> tuple[str, Trace | None]:
    """What the table says for the layer, and its bench there."""
    cell = Cell(at.shape, at.benches[0].key.routing, "bf16", "layer")
    choice = select.choose(known, cell, at.num_tokens, registry.variants(), torch.device("cpu"))
    if not choice.measured:
        return "-", None
    benches = [one for one in at.benches if one.scope == "layer"]
    found = [one for one in benches if (one.key.variant, one.key.config) == choice.identity]
    return choice.variant.removeprefix("cuda."), next(iter(found), None)


def print_tables(cells: list[Measured], known: Table) -> None:
    names = " | ".join(f"{name.removeprefix('cuda.')} kernel" for name in SHOWN)
    for shape in dict.fromkeys(at.shape for at in cells):
        print(f"\n**{shape}**\n")
        print(f"| M | floor | {names} | layer | selected | best published |")
        print(f"| ---: | ---: |{' ---: |' * len(SHOWN)} ---: | --- | ---: |")
        for at in cells:
            if at.shape == shape:
                choice, layer = selected(known, at)
                kernels = [number(at.of("kernel", name)) for name in SHOWN]
                floor = f"{at.floor:.1f}" if at.floor else ""
                peer = f"{at.peer[0]:.1f} ({at.peer[1]})" if at.peer else ""
                print(f"| {at.num_tokens} | {' | '.join([floor, *kernels, number(layer), choice, peer])} |")


def number(one: Trace | None) -> str:
    return f"{us(one):.1f}" if one else ""


@dataclasses.dataclass(frozen=True)
class Ratio:
    value: float
    label: str


def against_peers(cells: Iterable[Measured]) -> list[Ratio]:
    """Best peer / ours."""
    return [Ratio(at.peer[0] / us(at.ours), at.label) for at in cells if at.peer and at.ours]


def against_floor(cells: Iterable[Measured]) -> list[Ratio]:
    """Ours / floor."""
    return [Ratio(us(at.ours) / at.floor, at.label) for at in cells if at.floor and at.ours]


def mean(ratios: list[Ratio]) -> float:
    return math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios))


def line(what: str, ratios: list[Ratio], bar: float, beyond: float | None, *, at_most: bool = False) -> None:
    """One row: the ratio that is furthest from meeting the bar, and how many cells meet it."""
    if not ratios:
        print(f"| {what} | {bar} | {beyond or ''} | not measured | |")
        return
    worst = (max if at_most else min)(ratios, key=lambda ratio: ratio.value)
    met = sum(ratio.value <= bar if at_most else ratio.value >= bar for ratio in ratios)
    report(what, worst.value, f"{worst.label}; {met} of {len(ratios)} cells", bar, beyond, at_most=at_most)


def report(what: str, value: float, where: str, bar: float, beyond: float | None, *, at_most: bool = False) -> None:
    def met(limit: float) -> bool:
        return value <= limit if at_most else value >= limit

    verdict = "beyond" if beyond is not None and met(beyond) else "met" if met(bar) else "**not met**"
    print(f"| {what} | {bar} | {beyond or ''} | {value:.4g} ({where}) | {verdict} |")


def print_bars(cells: list[Measured], skewed: list[Measured], traces: list[Trace]) -> None:
    peers = against_peers(cells)
    print("\n| | bar | beyond | found | |\n| --- | ---: | ---: | --- | --- |")
    if peers:
        where = f"{len(peers)} of {NUM_CELLS} cells"
        report("best peer / ours, geometric mean", mean(peers), where, 1.30, 1.5)
    line("best peer / ours, worst cell", peers, 1.03, 1.05)
    small = [at for at in cells if at.num_tokens <= 2]
    qwen = [at for at in small if at.shape.name == "qwen3next_tp4"]
    line("M <= 2, ours / floor, qwen3next_tp4", against_floor(qwen), 2.5, 1.4, at_most=True)
    others = [at for at in small if at not in qwen]
    line("M <= 2, ours / floor, the others", against_floor(others), 1.8, 1.4, at_most=True)
    middle = against_floor(at for at in cells if 8 <= at.num_tokens <= 256)
    line("8 <= M <= 256, ours / floor, worst", middle, 1.10, 1.05, at_most=True)
    if middle:
        within = sum(ratio.value <= 1.10 for ratio in middle)
        print(f"| the same, geometric mean | | | {mean(middle):.4g} ({within} of {len(middle)} cells within 1.10) | |")
    line("M >= 4096, best peer / ours", against_peers(at for at in cells if at.num_tokens >= 4096), 1.5, 1.8)
    uniform = {ratio.label: ratio.value for ratio in against_floor(cells)}
    skew = [
        Ratio(ratio.value / uniform[ratio.label], ratio.label)
        for ratio in against_floor(skewed)
        if ratio.label in uniform
    ]
    line("zipf 1.2, ours / floor over the same with uniform", skew, 1.05, None, at_most=True)
    if len(skew) > 1:
        _, next_to_worst, *_ = sorted((ratio.value for ratio in skew), reverse=True)
        within = sum(ratio.value <= 1.10 for ratio in skew)
        print(f"| the same, next to worst | | | {next_to_worst:.4g} ({within} of {len(skew)} cells within 1.10) | |")
    found = {one.key: one.accuracy.rel_err for one in traces if one.job == "verify" and one.accuracy}
    errors = [Ratio(found[at.ours.key], at.label) for at in cells if at.ours]
    line("relative error of ours, uniform", errors, 0.008, 0.005, at_most=True)


def print_errors(traces: list[Trace]) -> None:
    print("\n| variant | largest relative error (bar 0.008, beyond 0.005) | where | verifications | red |")
    print("| --- | ---: | --- | ---: | ---: |")
    for variant in sorted({one.key.variant for one in traces}):
        verified = [one for one in traces if one.job == "verify" and one.key.variant == variant]
        errors = [(one.accuracy.rel_err, one) for one in verified if one.accuracy]
        red = sum(one.status is not Status.PASSED for one in verified)
        if errors:
            # NaN is worse than any number.
            error, one = max(errors, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
            where = f"{one.key.shape} M={one.key.num_tokens} {one.key.routing} {one.key.input_kind}"
            print(f"| {variant} | {error:.4f} | {where} | {len(verified)} | {red} |")


def main() -> None:
    traces = compared(Path(sys.argv[1]))
    if not traces:
        sys.exit(f"{sys.argv[1]}: no traces of a layer and batch with a published figure")
    cells = measured(traces, UNIFORM)
    known = table_of(traces)
    print(f"{traces[-1].key.environment.device}; microseconds per call")
    print_tables(cells, known)
    print_bars(cells, measured(traces, "zipf:1.2"), traces)
    print_errors(traces)


if __name__ == "__main__":
    main()
