"""Where an epilogue of the up phase of cuda.sm90_prefill spends its time, and how long products wait for stages, on a
GPU, with the kernels patched to write it down:

    git apply experiments/2026-11-28_short_epilogues/marks.patch
    PYTHONPATH=. python experiments/2026-11-28_short_epilogues/marks.py [alias:M:height ...]
    git apply -R experiments/2026-11-28_short_epilogues/marks.patch

Prints cycles of the SMs: medians over all CTAs of one call on a cold L2, of the first epilogue of each and of later
ones.
"""

import sys
from collections import defaultdict
from dataclasses import dataclass

import numpy
import torch

from experiments.calls import call_on_cold_l2, written_down
from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias

CASES = ("qwen3next_tp4:8192:192", "dsv3_tp16:4096:160")
ENTRIES = 4096
PARTS = ("begin", "wait for the last rows", "SwiGLU and largest", "barrier", "scales", "codes", "barrier", "hand over")


@dataclass(frozen=True)
class Piece:
    """One of a CTA's pieces of work, in cycles."""

    rows: int
    steps: int
    waited_before: int
    products: int
    waited_for_stages: int
    epilogue: int
    parts: numpy.ndarray | None  # None: its sums went to another CTA
    is_first: bool


def pieces(entries: numpy.ndarray, marks: numpy.ndarray) -> list[Piece]:
    found = []
    for (start, *rest), of_cta in zip(entries, marks, strict=True):
        now, next_mark = start, 0
        while rest[0] > 0:
            (piece, began, multiplied, waited, finished), rest = rest[:5], rest[5:]
            own, parts = of_cta[next_mark : next_mark + len(PARTS)], None
            if len(own) == len(PARTS) and multiplied <= own[0] <= finished:
                parts, next_mark = numpy.diff(own, prepend=multiplied), next_mark + len(PARTS)
            rows = -(-(piece >> 16) // 16) * 8
            found.append(
                Piece(
                    rows,
                    piece & 0xFFFF,
                    began - now,
                    multiplied - began,
                    waited,
                    finished - multiplied,
                    parts,
                    now == start,
                )
            )
            now = finished
    return found


def summary(found: list[Piece]) -> None:
    total = sum(one.waited_before + one.products + one.epilogue for one in found)
    for name in ("waited_before", "products", "waited_for_stages", "epilogue"):
        print(f"  {name:18} {sum(getattr(one, name) for one in found) / total:6.1%}")
    for name, is_first in (("first", True), ("later", False)):
        whole = [one for one in found if one.parts is not None and one.is_first == is_first]
        if not whole:
            continue
        parts = numpy.median([one.parts for one in whole], axis=0)
        rows = numpy.median([one.rows for one in whole])
        print(
            f"  {name} epilogues, of {rows:.0f} rows: {numpy.median([one.epilogue for one in whole]):.0f} cycles,",
            end=" ",
        )
        print(", ".join(f"{part} {cycles:.0f}" for part, cycles in zip(PARTS, parts, strict=True)))
    by_rows = defaultdict(list)
    for one in found:
        by_rows[one.rows].append((one.products / one.steps, one.waited_for_stages / one.steps))
    for rows, both in sorted(by_rows.items()):
        step, waited = numpy.median(both, axis=0)
        print(f"  a step of {rows:3} rows: {step:5.0f} cycles, of which {waited:3.0f} waiting")


def main() -> None:
    print(torch.cuda.get_device_name(0))
    for case in sys.argv[1:] or CASES:
        alias, num_tokens, height = case.split(":")
        print(case)
        shape = shape_of_alias(alias)
        config = sp.Config(max_rows=int(height), **sp.downs(shape)[0])
        call_on_cold_l2(sp.SM90Prefill(), shape, int(num_tokens), config)
        cubin = sp._compile_up(shape, config, False)[0]
        summary(pieces(*(written_down(cubin, name, ENTRIES) for name in ("traced", "marked"))))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
