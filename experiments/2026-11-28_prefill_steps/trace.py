"""Where the up phase of cuda.sm90_prefill spends its time, on a GPU, with the kernels patched to write it down:

    git apply experiments/2026-11-28_prefill_steps/trace.patch
    PYTHONPATH=. python experiments/2026-11-28_prefill_steps/trace.py [alias:M:height ...]
    git apply -R experiments/2026-11-28_prefill_steps/trace.patch

Prints cycles of the SMs, the 5th, 50th and 95th percentile of all pieces of all CTAs, of one call on a cold L2.
"""

import sys

import numpy
import torch

from experiments.calls import call_on_cold_l2, written_down
from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias

CASES = ("dsv3_tp8:8192:272", "dsv3_tp16:4096:192", "qwen3next_tp4:4096:128")
ENTRIES = 1024


def traced(alias: str, num_tokens: int, height: int) -> numpy.ndarray:
    shape = shape_of_alias(alias)
    config = sp.Config(max_rows=height, **sp.downs(shape)[0])
    call_on_cold_l2(sp.SM90Prefill(), shape, num_tokens, config)
    return written_down(sp._compile_up(shape, config, False)[0], "traced", ENTRIES)


def summary(entries: numpy.ndarray) -> None:
    waits, products, epilogues, totals, by_rows = [], [], [], [], {}
    for start, *rest in entries:
        now = start
        while rest[0] > 0:
            (piece, began, multiplied, finished), rest = rest[:4], rest[4:]
            rows, steps = -(-(piece >> 16) // 16) * 8, piece & 0xFFFF
            waits.append(began - now)
            products.append(multiplied - began)
            epilogues.append(finished - multiplied)
            by_rows.setdefault(int(rows), []).append((multiplied - began) / steps)
            now = finished
        totals.append(now - start)
    for name, values in (("wait", waits), ("products", products), ("epilogue", epilogues), ("whole", totals)):
        share = f"{sum(values) / sum(totals):.1%} of the time"
        print(f"  {name:9}", *(f"{value:9.0f}" for value in numpy.percentile(values, [5, 50, 95])), share)
    per_step = {rows: f"{numpy.median(values):.0f}" for rows, values in sorted(by_rows.items())}
    print("  cycles of a step by rows of a CTA:", per_step)


def main() -> None:
    print(torch.cuda.get_device_name(0))
    for case in sys.argv[1:] or CASES:
        alias, num_tokens, height = case.split(":")
        print(case)
        summary(traced(alias, int(num_tokens), int(height)))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
