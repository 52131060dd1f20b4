"""When the CTAs of both phases of cuda.sm90_prefill come to what, on a GPU, with the kernels patched to write it down:

    git apply experiments/2026-11-29_prefill_start/marks.patch
    PYTHONPATH=. python experiments/2026-11-29_prefill_start/timeline.py [alias:M[:law] ...]
    git apply -R experiments/2026-11-29_prefill_start/marks.patch

Prints us since the first CTA began, of one call on a cold L2: the least, 5th, 50th and 95th percentile and the most
over all CTAs, and the mean.
"""

import sys

import numpy
import torch

from experiments.calls import call_on_cold_l2, written_down
from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias
from workbench.problem import RoutingLaw

CASES = ("dsv3_tp16:4096", "qwen3next_tp4:8192", "qwen3next_tp4:4096")
NUM_MARKS = 16
UP = ("began", "the kernel before is done", "share is found", "math begins", "first stage is there", "ended")
DOWN = ("began", "the up phase is done", "first block is there", "ended")


def main() -> None:
    print(torch.cuda.get_device_name(0))
    variant = sp.SM90Prefill()
    for case in sys.argv[1:] or CASES:
        alias, num_tokens, law = (*case.split(":", 2), "uniform")[:3]
        shape = shape_of_alias(alias)
        config = next(iter(variant.configs(shape, int(num_tokens))))
        call_on_cold_l2(variant, shape, int(num_tokens), config, routing=RoutingLaw.parse(law))
        cubins = sp._compile_up(shape, config, False)[0], sp._compile_down(shape, config, False)[0]
        up, down = (written_down(cubin, "traced", NUM_MARKS) for cubin in cubins)
        start = up[:, 0].min()
        print(case)
        for phase, marks, names in (("up", up, UP), ("down", down, DOWN)):
            for i, name in enumerate(names):
                us = (marks[:, i] - start) / 1000
                figures = "".join(f"{one:8.1f}" for one in (*numpy.percentile(us, [0, 5, 50, 95, 100]), us.mean()))
                print(f"  {phase:4} {name:25}{figures}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
