"""When the CTAs of cuda.sm90_prefill come to their steps, on a GPU, with the phases overlapped (see README.md):

    git apply experiments/2026-11-28_overlapped_phases/overlap.patch
    git apply experiments/2026-11-28_overlapped_phases/trace.patch
    PYTHONPATH=. python experiments/2026-11-28_overlapped_phases/trace.py [--compile]

Prints microseconds after the first CTA's start, the 0th, 10th, 50th, 90th and 100th percentile of CTAs, of one call on
a cold L2. --compile only compiles and needs no GPU.
"""

import sys

import numpy
import torch

from experiments.calls import call_on_cold_l2, compiled_cases, written_down
from kernels_cuda import sm90_prefill as sp

CASES = ("dsv3_tp16:4096", "dsv3_tp8:8192")
SPLITS = ((0, 66), (128, 44), (128, 55))
UP_STEPS = ("up starts", "its early tiles are done", "up ends")
DOWN_STEPS = ("down starts", "early tiles are there", "waits for late ones", "late ones are there", "down ends")
ENTRIES = 8


def main() -> None:
    variant = sp.SM90Prefill()
    cases = compiled_cases(variant, CASES)
    if "--compile" in sys.argv:
        return
    print(torch.cuda.get_device_name(0))
    for case in cases:
        for sp.OVERLAP in SPLITS:
            call_on_cold_l2(variant, case.shape, case.num_tokens, case.config)
            compiled = [
                compile_one(case.shape, case.config, False) for compile_one in (sp._compile_up, sp._compile_down)
            ]
            up, down = (written_down(cubin, "traced", ENTRIES) for cubin, _ in compiled)
            print(f"{case.alias} M={case.num_tokens}, {sp.OVERLAP[0]} of 256 early, {sp.OVERLAP[1]} late clusters")
            for times, steps in ((up, UP_STEPS), (down, DOWN_STEPS)):
                for step, name in enumerate(steps):
                    after = (times[:, step] - up[:, 0].min()) / 1000
                    spread = numpy.percentile(after, [0, 10, 50, 90, 100])
                    print(f"  {name:26}" + "".join(f"{us:8.1f}" for us in spread))


if __name__ == "__main__":
    main()
