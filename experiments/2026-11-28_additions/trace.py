"""When the CTAs of cuda.sm90_stream come to their pieces, on a GPU, with the kernel patched to write it down:

    git checkout 0d909c9 -- kernels_cuda
    git apply experiments/2026-11-28_additions/trace.patch
    PYTHONPATH=. python experiments/2026-11-28_additions/trace.py [--compile] [alias:M ...]
    git checkout HEAD -- kernels_cuda

Microseconds after the first CTA's start, the 0th, 10th, 50th, 90th and 100th percentile of CTAs or pieces, of one call
on a cold L2. Of a piece: when it is begun, until its products are done or what it waits for is there, until it is
finished, and when that is. --compile only compiles and needs no GPU.
"""

import sys

import cupy
import numpy
import torch

from experiments.calls import FLUSH_BYTES, NUM_CTAS, compiled_cases, memory_of, written_down
from kernels_cuda import sm90_stream as ss
from workbench.generate import make_inputs, make_weights
from workbench.problem import Workload

CASES = [
    *(f"qwen3next_tp4:{tokens}" for tokens in (1, 8, 16)),
    *(f"dsv3_tp16:{tokens}" for tokens in (8, 256, 1024)),
    "dsv3_tp8:1024",
]
PHASES = {0: "up", 5: "activations", 3: "down", 1: "fused up", 2: "fused down"}
ENTRIES = 256


def main() -> None:
    variant = ss.SM90Stream()
    cases = compiled_cases(variant, [argument for argument in sys.argv[1:] if argument != "--compile"] or CASES)
    if "--compile" in sys.argv:
        return

    def spread(ns: numpy.ndarray) -> str:
        return "".join(f"{us / 1000:7.1f}" for us in numpy.percentile(ns, [0, 10, 50, 90, 100]))

    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device))
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    prepared_for, prepared = None, None
    for case in cases:
        alias, shape, num_tokens, config = case.alias, case.shape, case.num_tokens, case.config
        if alias != prepared_for:
            prepared = None
            torch.cuda.empty_cache()
            prepared_for, prepared = alias, variant.prepare(make_weights(shape, seed=0, device=device))
        inputs = make_inputs(Workload(shape, num_tokens, seed=1, input_kind="fp8"), device)
        aligned = variant.align(prepared, inputs, config)
        out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
        variant.run(prepared, aligned, out, config)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flush.sum()
            variant.run(prepared, aligned, out, config)
        cubin = ss._compile(config, shape, NUM_CTAS, False)[0]
        for _ in range(4):
            for name in ("traced_math", "traced_loads"):
                memory_of(cubin, name, ENTRIES)[...] = 0
            cupy.cuda.Device().synchronize()
            graph.replay()
            torch.cuda.synchronize()
        math, loads = (written_down(cubin, name, ENTRIES) for name in ("traced_math", "traced_loads"))
        ends = written_down(cubin, "traced_start", 4)
        start = ends[:, 0].min()
        print(f"{alias} M={num_tokens}, {int(aligned.aligned.tiles[0, 0])} tiles")
        first, last, end = (spread(ns - start) for ns in (loads[:, 0], loads.max(1), ends[:, 1]))
        print(f"  first load {first}  last {last}  end {end}")
        pieces: dict[str, list[tuple[int, ...]]] = {}
        for row in math:
            for i in range(0, ENTRIES - 3, 4):
                if row[i + 1] > 0 and row[i + 3] > 0:
                    pieces.setdefault(PHASES[int(row[i]) & 255], []).append(tuple(row[i + 1 : i + 4] - start))
        for name, times in pieces.items():
            begun, ready, finished = numpy.array(times).T
            print(f"  {name:11} {len(times):5}  begun {spread(begun)}  ready after {spread(ready - begun)}", end="")
            print(f"  finished after {spread(finished - ready)}  at {spread(finished)}")


if __name__ == "__main__":
    main()
