"""What layer calls take more than kernels, and what changed since other traces of `workbench ship`:

    PYTHONPATH=. python experiments/2026-11-28_shipped/layers.py <traces.jsonl.gz> [<older traces.jsonl.gz>]

By M, over the layers of both files under uniform routing: of the fastest call of each layer, least and most us (and per
cent) beyond the fastest kernel; the time of the streaming kernel in place over that on a copy of the weights, geometric
mean and the most; and new over old, geometric mean, of each variant's kernels, of its layer calls and of the fastest
call.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path

from experiments.traces import Times, fastest_us, read


def times(path: Path) -> Times:
    return fastest_us(one for one in read(path) if one.job == "bench" and one.key.routing == "uniform")


def fastest(measured: Times) -> Times:
    """The same, of the fastest variant of each scope, as variant "fastest"."""
    best: Times = {}
    for (shape, num_tokens, scope, _), us in measured.items():
        key = (shape, num_tokens, scope, "fastest")
        best[key] = min(best.get(key, math.inf), us)
    return best


def mean(ratios: Iterable[float]) -> str:
    logs = [math.log(ratio) for ratio in ratios]
    return f"{math.exp(sum(logs) / len(logs)):.3f} ({len(logs)})" if logs else ""


def main(arguments: list[str]) -> None:
    new, *older = (times(Path(argument)) for argument in arguments)
    best = fastest(new)
    sizes = sorted({num_tokens for _, num_tokens, _, _ in new})
    print("| M | layer beyond kernel, us | % |\n| ---: | ---: | ---: |")
    for size in sizes:
        pairs = [
            (us, best[shape, size, "layer", "fastest"])
            for (shape, num_tokens, scope, _), us in best.items()
            if (num_tokens, scope) == (size, "kernel") and (shape, size, "layer", "fastest") in best
        ]
        beyond, percent = [layer - kernel for kernel, layer in pairs], [100 * (layer / us - 1) for us, layer in pairs]
        print(f"| {size} | {min(beyond):.1f} to {max(beyond):.1f} | {min(percent):.1f} to {max(percent):.1f} |")
    copies = {key[:3]: us for key, us in new.items() if key[2:] == ("kernel", "cuda.sm90_stream")}
    in_place = [
        us / copies[key[:3]] for key, us in new.items() if key[3] == "cuda.sm90_stream_in_place" and key[:3] in copies
    ]
    if in_place:
        print(f"\nin place over a copy: {mean(in_place)}, {max(in_place):.2f} at most")
    for old in older:
        both, older_best = {**new, **best}, {**old, **fastest(old)}
        columns = sorted({(scope, variant) for _, _, scope, variant in both})
        print("\n| M |", " | ".join(f"{variant} {scope}" for scope, variant in columns), "|")
        print("| ---: |" + " ---: |" * len(columns))
        for size in sizes:
            cells = [
                mean(
                    us / older_best[key]
                    for key, us in both.items()
                    if key[1:] == (size, scope, variant) and key in older_best
                )
                for scope, variant in columns
            ]
            print(f"| {size} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
