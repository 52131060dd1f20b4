"""The README's tables from h200_traces.jsonl.gz beside this file: what `workbench compare` benched, uniform routing."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

HERE = Path(__file__).parent
PEERS = json.loads((HERE.parent / "2026-11-23_first_comparison" / "peers.json").read_text())["rows"]
SHAPES = {(257, 128): "dsv3_tp16", (257, 256): "dsv3_tp8", (512, 128): "qwen3next_tp4"}
VARIANTS = (
    "cuda.sm90_stream",
    "cuda.sm90_fused",
    "cuda.sm90_prefill",
    "cuda.sm90_stream_deterministic",
    "cuda.sm90_prefill_deterministic",
    "triton.grouped",
)
OURS = VARIANTS[:3]


COLUMNS = (
    *("M", "floor", "stream", "fused", "prefill", "stream, det.", "prefill, det.", "triton"),
    *("best of floor", "best published", "times faster"),
)


def main() -> None:
    peers = {(row["shape"], row["num_tokens"]): row["best_us"] for row in PEERS}
    times: dict[tuple[str, int], dict[str, float]] = {}
    floors: dict[tuple[str, int], float] = {}
    with gzip.open(HERE / "h200_traces.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            key = record["key"]
            if (record["job"], record["scope"], key["routing"]) != ("bench", "kernel", "uniform"):
                continue
            shape = SHAPES[key["shape"]["num_experts"], key["shape"]["intermediate_size"]]
            cell = shape, key["num_tokens"]
            floors[cell] = record["floor_us"]
            best = times.setdefault(cell, {})
            best[key["variant"]] = min(best.get(key["variant"], math.inf), record["timing"]["median_us"])
    ratios = []
    for shape in SHAPES.values():
        print(f"\n**{shape}**\n\n| {' | '.join(COLUMNS)} |\n|{' ---: |' * len(COLUMNS)}")
        for num_tokens in sorted(m for name, m in times if name == shape):
            best, floor, peer = times[shape, num_tokens], floors[shape, num_tokens], peers[shape, num_tokens]
            ours = min(best[name] for name in OURS)
            figures = " | ".join(f"{best[name]:.1f}" if name in best else "" for name in VARIANTS)
            print(f"| {num_tokens} | {floor:.1f} | {figures} | {ours / floor:.2f} | {peer:.1f} | {peer / ours:.2f} |")
            ratios.append(peer / ours)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\n{len(ratios)} cells: geometric mean {mean:.3f}, least {min(ratios):.3f}")


if __name__ == "__main__":
    main()
