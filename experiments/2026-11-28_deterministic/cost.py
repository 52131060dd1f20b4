"""What the deterministic forms cost, from the traces beside it:

    PYTHONPATH=. python experiments/2026-11-28_deterministic/cost.py

us of the plain and of the deterministic form, the fastest config of each, and the second over the first.
"""

from __future__ import annotations

from pathlib import Path

from experiments.traces import fastest_us, read

PAIRS = (
    ("cuda.sm90_stream", "cuda.sm90_stream_deterministic"),
    ("cuda.sm90_prefill", "cuda.sm90_prefill_deterministic"),
)


def main() -> None:
    best = fastest_us(read(Path(__file__).with_name("h200_traces.jsonl.gz")))
    print("| layer | M | scope |", " | ".join(f"{plain} | deterministic | ratio" for plain, _ in PAIRS), "|")
    print("| --- | ---: | --- |" + " ---: | ---: | ---: |" * len(PAIRS))
    for shape, num_tokens, scope in sorted({key[:3] for key in best}):
        cells = []
        for plain, deterministic in PAIRS:
            before = best.get((shape, num_tokens, scope, plain))
            after = best.get((shape, num_tokens, scope, deterministic))
            cells += [f"{before:.1f}", f"{after:.1f}", f"{after / before:.2f}"] if before and after else ["", "", ""]
        print(f"| {shape} | {num_tokens} | {scope} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
