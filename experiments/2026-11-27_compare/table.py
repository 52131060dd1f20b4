"""The README's tables and figures from the h200_traces.jsonl.gz of a folder, by default this one: what was benched
under uniform routing where there is a published figure.

    PYTHONPATH=. python experiments/2026-11-27_compare/table.py [folder]
"""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path

HERE = Path(__file__).parent
PEERS = json.loads((HERE.parent / "2026-11-23_first_comparison" / "peers.json").read_text())["rows"]
SHAPES = {(257, 128, 7168): "dsv3_tp16", (257, 256, 7168): "dsv3_tp8", (512, 128, 2048): "qwen3next_tp4"}
OURS = ("cuda.sm90_stream", "cuda.sm90_stream_in_place", "cuda.sm90_fused", "cuda.sm90_prefill")
COLUMNS = {
    "cuda.sm90_stream": "stream",
    "cuda.sm90_stream_in_place": "in place",
    "cuda.sm90_fused": "fused",
    "cuda.sm90_prefill": "prefill",
    "cuda.sm90_stream_deterministic": "stream, det.",
    "cuda.sm90_prefill_deterministic": "prefill, det.",
    "triton.grouped": "triton",
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    peers = {(row["shape"], row["num_tokens"]): row["best_us"] for row in PEERS}
    times: dict[tuple[str, int], dict[str, float]] = {}
    layers: dict[tuple[str, int], float] = {}
    floors: dict[tuple[str, int], float] = {}
    with gzip.open(folder / "h200_traces.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            key = record["key"]
            if (record["job"], key["routing"]) != ("bench", "uniform"):
                continue
            sizes = (key["shape"][name] for name in ("num_experts", "intermediate_size", "hidden_size"))
            cell = SHAPES.get(tuple(sizes), ""), key["num_tokens"]
            if cell not in peers:
                continue
            us = record["timing"]["median_us"]
            if record["scope"] == "layer":
                if key["variant"] in OURS:
                    layers[cell] = min(layers.get(cell, math.inf), us)
                continue
            floors[cell] = record["floor_us"]
            best = times.setdefault(cell, {})
            best[key["variant"]] = min(best.get(key["variant"], math.inf), us)
    fastest = {cell: min(best[name] for name in OURS if name in best) for cell, best in times.items()}
    ratios = []
    timed = [name for name in COLUMNS if any(name in best for best in times.values())]
    heads = ["M", "floor", *(COLUMNS[name] for name in timed), "best of floor", "best published", "times faster"]
    for shape in SHAPES.values():
        print(f"\n**{shape}**\n\n| {' | '.join(heads)} |\n|{' ---: |' * len(heads)}")
        for num_tokens in sorted(m for name, m in times if name == shape):
            best, floor, peer = times[shape, num_tokens], floors[shape, num_tokens], peers[shape, num_tokens]
            ours = fastest[shape, num_tokens]
            figures = " | ".join(f"{best[name]:.1f}" if name in best else "" for name in timed)
            print(f"| {num_tokens} | {floor:.1f} | {figures} | {ours / floor:.2f} | {peer:.1f} | {peer / ours:.2f} |")
            ratios.append(peer / ours)
    beyond = {cell: (us - fastest[cell], us) for cell, us in layers.items()}
    for least, most in ((1, 64), (65, 1024), (1025, 8192)):
        some = [each for (_, m), each in beyond.items() if least <= m <= most]
        shares = [more / (us - more) for more, us in some]
        us = f"{min(more for more, _ in some):.1f} to {max(more for more, _ in some):.1f} us"
        print(f"\nlayer beyond kernel, {least} <= M <= {most}: {us}, {min(shares):.1%} to {max(shares):.1%}")
    for form in ("stream", "prefill"):
        cost = {
            cell: best[f"cuda.sm90_{form}_deterministic"] / best[f"cuda.sm90_{form}"] - 1
            for cell, best in times.items()
            if f"cuda.sm90_{form}_deterministic" in best
        }
        for least, most in ((1, 63), (64, 512), (1024, 8192)):
            some = [each for (_, m), each in cost.items() if least <= m <= most]
            if not some:
                continue
            print(f"\ndeterministic {form}, {least} <= M <= {most}: {min(some):.0%} to {max(some):.0%}")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\n{len(ratios)} cells: geometric mean {mean:.3f}, least {min(ratios):.3f}")


if __name__ == "__main__":
    main()
