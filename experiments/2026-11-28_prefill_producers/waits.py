"""Cycles of a step of the up phase of cuda.sm90_prefill, and how many are waits, on a GPU, with the kernels patched:

    git apply experiments/2026-11-28_prefill_producers/waits.patch
    PYTHONPATH=. python experiments/2026-11-28_prefill_producers/waits.py [--compile] [alias:M:height ...]
    git apply -R experiments/2026-11-28_prefill_producers/waits.patch

Of one call on a cold L2: the mean over all CTAs. --compile only compiles, and needs no GPU.
"""

import sys

import numpy
import torch

from experiments.calls import call_on_cold_l2, written_down
from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias

CASES = ("dsv3_tp16:1024:128", "dsv3_tp16:4096:160", "dsv3_tp8:8192:272", "qwen3next_tp4:4096:128")
ENTRIES = 1024


def products(entries: numpy.ndarray) -> tuple[int, int]:
    """Cycles of the products of one CTA, and their steps."""
    cycles = steps = 0
    for piece, began, multiplied, _ in zip(*[iter(entries[1:])] * 4, strict=False):
        if piece >> 16 == 0:
            break
        cycles += multiplied - began
        steps += piece & 0xFFFF
    return cycles, steps


def measure(case: str) -> None:
    alias, num_tokens, height = case.split(":")
    shape = shape_of_alias(alias)
    config = sp.Config(max_rows=int(height), **sp.downs(shape)[0])
    call_on_cold_l2(sp.SM90Prefill(), shape, int(num_tokens), config)
    cubin = sp._compile_up(shape, config, False)[0]
    cycles, steps = numpy.sum([products(row) for row in written_down(cubin, "traced", ENTRIES)], axis=0)
    math, producers = written_down(cubin, "waited", 2).sum(axis=0)
    print(
        f"{case}: {cycles / steps:.0f} cycles a step, math waits {math / steps:.0f}, producers {producers / steps:.0f}"
    )


def main() -> None:
    cases = [argument for argument in sys.argv[1:] if argument != "--compile"] or CASES
    for case in cases:
        if "--compile" in sys.argv:
            alias, _, height = case.split(":")
            shape = shape_of_alias(alias)
            sp._compile_up(shape, sp.Config(max_rows=int(height), **sp.downs(shape)[0]), False)
        else:
            measure(case)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
