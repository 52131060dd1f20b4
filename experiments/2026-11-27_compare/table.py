"""The README's table from h200_traces.jsonl.gz beside this file: what the search of `workbench compare` timed."""

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


def main() -> None:
    peers = {(row["shape"], row["num_tokens"]): row["best_us"] for row in PEERS}
    times: dict[tuple[str, int], dict[str, float]] = {}
    floors: dict[tuple[str, int], float] = {}
    with gzip.open(HERE / "h200_traces.jsonl.gz", "rt") as lines:
        for record in map(json.loads, lines):
            if record["job"] != "tune":
                continue
            key = record["key"]
            shape = SHAPES[key["shape"]["num_experts"], key["shape"]["intermediate_size"]]
            cell = shape, key["num_tokens"]
            floors[cell] = record["floor_us"]
            best = times.setdefault(cell, {})
            best[key["variant"]] = min(best.get(key["variant"], math.inf), record["timing"]["median_us"])
    ratios = []
    for (shape, num_tokens), best in sorted(times.items()):
        missing = [name for name in OURS if name not in best]
        ours, peer = min(best[name] for name in OURS if name in best), peers[shape, num_tokens]
        figures = " | ".join(f"{best[name]:.1f}" if name in best else "" for name in VARIANTS)
        floor = floors[shape, num_tokens]
        print(
            f"| {shape} {num_tokens} | {floor:.1f} | {figures} | {ours / floor:.2f} | {peer:.1f} | {peer / ours:.2f} |"
        )
        if not missing:
            ratios.append(peer / ours)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"{len(ratios)} cells with all of ours: geometric mean {mean:.3f}, least {min(ratios):.3f}")


if __name__ == "__main__":
    main()
