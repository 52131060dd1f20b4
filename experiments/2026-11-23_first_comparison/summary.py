"""Markdown tables of a comparison's traces beside published kernels (peers.json), and how far each bar is met.

python experiments/2026-11-23_first_comparison/summary.py <folder with traces.jsonl>
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from workbench import registry, select, table, trace
from workbench.table import Cell, Table
from workbench.trace import Status, Trace

PEERS = json.loads(Path(__file__).with_name("peers.json").read_text())
VARIANTS = ("cuda.sm90_fused", "triton.grouped")
HELD_AGAINST = {"cuda.sm90_fused": "alpha_moe", "triton.grouped": "sglang_triton"}


def fastest(traces: list[Trace], shape: str, num_tokens: int, variant: str, scope: str) -> Trace | None:
    """The fastest bench of a variant in one cell."""
    cell = [
        one
        for one in traces
        if one.job == "bench"
        and one.status is Status.PASSED
        and (one.key.shape.name, one.key.num_tokens, one.key.variant, one.scope) == (shape, num_tokens, variant, scope)
    ]
    return min(cell, key=lambda one: one.timing.median_us, default=None)


def selected(measured: Table, one: Trace) -> str:
    """What the selection table says for the layer in the cell of `one`."""
    cell = Cell(one.key.shape, one.key.routing, one.key.input_kind, "layer", one.key.dropped)
    choice = select.choose(measured, cell, one.key.num_tokens, registry.variants(), torch.device("cpu"))
    return choice.variant.partition(".")[2] if choice.variant.startswith("cuda") else choice.variant


def number(one: Trace | None) -> str:
    return f"{one.timing.median_us:.1f}" if one else "-"


def main() -> None:
    traces = trace.read(Path(sys.argv[1]) / "traces.jsonl")
    measured = table.build(traces, traces[0].key.environment, registry.variants())
    peers = {(row["shape"], row["num_tokens"]): row["us"] for row in PEERS["rows"]}
    against_best: list[float] = []
    against_own: dict[str, list[tuple[float, str]]] = {variant: [] for variant in VARIANTS}
    for shape in dict.fromkeys(one.key.shape.name for one in traces):
        sizes = sorted({one.key.num_tokens for one in traces if one.key.shape.name == shape})
        print(f"\n**{shape}**\n")
        print("| M | floor | sm90_fused kernel | layer | triton.grouped kernel | layer | selected | best published |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |")
        for num_tokens in sizes:
            timed = {(v, s): fastest(traces, shape, num_tokens, v, s) for v in VARIANTS for s in ("kernel", "layer")}
            first = timed[VARIANTS[0], "kernel"]
            peer = peers.get((shape, num_tokens), {})
            best = min(peer, key=peer.__getitem__, default="")
            figures = " | ".join(number(one) for one in timed.values())
            floor = f"{first.floor_us:.1f}" if first and first.floor_us else "-"
            choice = selected(measured, first) if first else "-"
            print(
                f"| {num_tokens} | {floor} | {figures} | {choice} | {f'{peer[best]:.1f} ({best})' if best else '-'} |"
            )
            ours = [one.timing.median_us for (_, scope), one in timed.items() if one and scope == "kernel"]
            if best and ours:
                against_best.append(peer[best] / min(ours))
            for variant, name in HELD_AGAINST.items():
                one = timed[variant, "kernel"]
                if one and name in peer:
                    against_own[variant].append((one.timing.median_us / peer[name], f"{shape} M={num_tokens}"))
    print()
    for variant, ratios in against_own.items():
        worst = max(ratios)
        print(f"{variant}: at most {worst[0]:.2f} of {HELD_AGAINST[variant]}'s time ({worst[1]}), {len(ratios)} cells")
    if against_best:
        mean = math.exp(sum(map(math.log, against_best)) / len(against_best))
        least = min(against_best)
        print(f"best published / ours: geometric mean {mean:.2f}, least {least:.2f}, {len(against_best)} cells")
    for variant in VARIANTS:
        errors = [
            (one.accuracy.rel_err, f"{one.key.shape} M={one.key.num_tokens}")
            for one in traces
            if one.accuracy and one.key.variant == variant and one.job == "verify"
        ]
        print(
            f"{variant}: relative error at most {max(errors)[0]:.4f} ({max(errors)[1]}) in {len(errors)} verifications"
        )


if __name__ == "__main__":
    main()
