"""When the CTAs of cuda.sm90_prefill come to their steps, on a GPU, with the phases overlapped (see README.md):

    git apply experiments/2026-11-28_overlapped_phases/overlap.patch
    git apply experiments/2026-11-28_overlapped_phases/trace.patch
    PYTHONPATH=. python experiments/2026-11-28_overlapped_phases/trace.py [--compile]

Prints microseconds after the first CTA's start, the 0th, 10th, 50th, 90th and 100th percentile of CTAs, of one call on
a cold L2. --compile only compiles and needs no GPU.
"""

import sys

from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias
from workbench.problem import Workload

CASES = (("dsv3_tp16", 4096), ("dsv3_tp8", 8192))
SPLITS = ((0, 66), (128, 44), (128, 55))
UP_STEPS = ("up starts", "its early tiles are done", "up ends")
DOWN_STEPS = ("down starts", "early tiles are there", "waits for late ones", "late ones are there", "down ends")


def main() -> None:
    variant = sp.SM90Prefill()
    wanted = []
    for alias, num_tokens in CASES:
        shape = shape_of_alias(alias)
        config = next(iter(variant.configs(shape, num_tokens)))
        variant.compile(shape, [config])
        wanted.append((alias, shape, num_tokens, config))
    if "--compile" in sys.argv:
        return

    import cupy
    import numpy
    import torch

    from workbench.generate import make_inputs, make_weights

    def traced(compiled) -> numpy.ndarray:
        module = cupy.RawModule(path=str(compiled[0].path))
        found = cupy.ndarray((132, 8), dtype=cupy.uint64, memptr=module.get_global("traced"))
        return cupy.asnumpy(found).astype(numpy.int64)

    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device))
    flush = torch.zeros(96 << 20, dtype=torch.int32, device=device)
    for alias, shape, num_tokens, config in wanted:
        prepared = variant.prepare(make_weights(shape, seed=0, device=device))
        inputs = make_inputs(Workload(shape, num_tokens, seed=1, input_kind="fp8"), device)
        aligned = variant.align(prepared, inputs, config)
        out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
        for sp.OVERLAP in SPLITS:
            prepared.calls = sp.ReadyCalls()
            for _ in range(3):
                flush.sum()
                variant.run(prepared, aligned, out, config)
            torch.cuda.synchronize()
            up, down = traced(sp._compile_up(shape, config, False)), traced(sp._compile_down(shape, config, False))
            print(f"{alias} M={num_tokens}, {sp.OVERLAP[0]} of 256 early, {sp.OVERLAP[1]} late clusters")
            for times, steps in ((up, UP_STEPS), (down, DOWN_STEPS)):
                for step, name in enumerate(steps):
                    after = (times[:, step] - up[:, 0].min()) / 1000
                    spread = numpy.percentile(after, [0, 10, 50, 90, 100])
                    print(f"  {name:26}" + "".join(f"{us:8.1f}" for us in spread))
        del prepared
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
