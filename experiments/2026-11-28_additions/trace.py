"""When the CTAs of cuda.sm90_stream come to their pieces, on a GPU, with the kernel patched to write it down:

    git apply experiments/2026-11-28_additions/trace.patch
    PYTHONPATH=. python experiments/2026-11-28_additions/trace.py [--compile] [alias:M ...]
    git apply -R experiments/2026-11-28_additions/trace.patch

Microseconds after the first CTA's start, the 0th, 10th, 50th, 90th and 100th percentile of CTAs or pieces, of one call
on a cold L2. Of a piece: when it is begun, until its products are done or what it waits for is there, until it is
finished, and when that is. --compile only compiles and needs no GPU.
"""

import sys

from kernels_cuda import sm90_stream as ss
from workbench.models import shape_of_alias
from workbench.problem import Workload

CASES = [
    *(f"qwen3next_tp4:{tokens}" for tokens in (1, 8, 16)),
    *(f"dsv3_tp16:{tokens}" for tokens in (8, 256, 1024)),
    "dsv3_tp8:1024",
]
PHASES = {0: "up", 5: "activations", 3: "down", 1: "fused up", 2: "fused down"}
NUM_CTAS, ENTRIES = 132, 256


def main() -> None:
    variant, wanted = ss.SM90Stream(), []
    for case in [argument for argument in sys.argv[1:] if argument != "--compile"] or CASES:
        alias, num_tokens = case.split(":")
        shape = shape_of_alias(alias)
        config = next(iter(variant.configs(shape, int(num_tokens))))
        variant.compile(shape, [config])
        wanted.append((alias, shape, int(num_tokens), config))
    if "--compile" in sys.argv:
        return

    import cupy
    import numpy
    import torch

    from workbench.generate import make_inputs, make_weights

    def spread(ns: numpy.ndarray) -> str:
        return "".join(f"{us / 1000:7.1f}" for us in numpy.percentile(ns, [0, 10, 50, 90, 100]))

    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device))
    flush = torch.zeros(96 << 20, dtype=torch.int32, device=device)
    prepared_for, prepared = None, None
    for alias, shape, num_tokens, config in wanted:
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
        module = cupy.RawModule(path=str(ss._compile(config, shape, NUM_CTAS, False)[0].path))

        def found(name: str, width: int, module=module) -> cupy.ndarray:
            return cupy.ndarray((NUM_CTAS, width), dtype=cupy.uint64, memptr=module.get_global(name))

        for _ in range(4):
            for name in ("traced_math", "traced_loads"):
                found(name, ENTRIES)[...] = 0
            cupy.cuda.Device().synchronize()
            graph.replay()
            torch.cuda.synchronize()
        math, loads, ends = (
            cupy.asnumpy(found(name, width)).astype(numpy.int64)
            for name, width in (("traced_math", ENTRIES), ("traced_loads", ENTRIES), ("traced_start", 4))
        )
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
