"""Times the up phase of cuda.sm90_prefill with one thing left out at a time, on a GPU (results are wrong, of course):

    PYTHONPATH=. python experiments/2026-11-28_prefill_producers/ablate.py [--compile] [alias:M:height ...]

us of the up phase with the launch before it, by graph difference on a cold L2, from quantised tokens and aligned
routing. --compile only compiles, in parallel, and needs no GPU. Each ablation replaces text in a copy of the sources,
and fails where that text is no longer there.
"""

import concurrent.futures
import os
import shutil
import sys
import tempfile
from pathlib import Path

from kernels_cuda import compile as cuda_compile
from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias
from workbench.problem import Workload

CASES = ("dsv3_tp8:8192:272", "dsv3_tp16:8192:272", "dsv3_tp16:4096:160", "qwen3next_tp4:4096:128")
ROWS = ("prefill_load.cuh", "pass * 16 < end_row) cp_async_16", "pass * 16 < end_row && k == first_k) cp_async_16")
PROMOTION = (
    "prefill_math.cuh",
    "const float4 four = scales.at(j);",
    "if (j > 0) break;\nconst float4 four = scales.at(j);",
)
SCALES = ("prefill_math.cuh", "const float4 four = scales.at(j);", "const float4 four = scales.at(0);")
PRODUCTS = ("wgmma.cuh", "for (int step = 1; step < 4; ++step) Product", "for (int step = 1; step < 1; ++step) Product")
FENCE = ("prefill_math.cuh", "fence_async_proxy();  // rows came by cp.async", "")
ABLATIONS = {
    "nothing left out": [],
    "rows gathered once an item": [ROWS],
    "two columns of eight promoted": [PROMOTION],
    "scales read once a product": [SCALES],
    "one product of four": [PRODUCTS],
    "no fence for the rows": [FENCE],
    "one product, no promotion": [PRODUCTS, PROMOTION],
}
CACHE = Path(os.environ.get("MOE_WORKBENCH_CACHE", Path.home() / ".cache" / "moe-workbench"))
ORIGINAL = cuda_compile.SOURCE_FOLDER


def compiled(case: str, ablation: str) -> tuple[cuda_compile.Cubin, int]:
    alias, _, height = case.split(":")
    shape = shape_of_alias(alias)
    config = sp.Config(max_rows=int(height), **sp.downs(shape)[0])
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "kernels_cuda"
        shutil.copytree(ORIGINAL, sources, ignore=shutil.ignore_patterns("__pycache__"))
        for name, old, new in ABLATIONS[ablation]:
            header = sources / "include" / name
            text = header.read_text()
            if text.count(old) != 1:
                raise SystemExit(f"{ablation}: expected one {old!r} in {name}, got {text.count(old)}")
            header.write_text(text.replace(old, new))
        cuda_compile.SOURCE_FOLDER, cuda_compile.INCLUDE_FOLDER = sources, sources / "include"
        os.environ["MOE_WORKBENCH_CACHE"] = str(CACHE / ablation.replace(" ", "_").replace(",", ""))
        return sp._compile_up(shape, config, False)


def times(cases: list[str], cubins: dict[tuple[str, str], tuple[cuda_compile.Cubin, int]]) -> None:
    import torch

    from experiments.calls import no_kernel
    from experiments.cold_l2 import graph_difference
    from kernels_cuda.launch import load
    from workbench.generate import make_inputs, make_weights

    device, variant = torch.device("cuda", 0), sp.SM90Prefill()
    print(torch.cuda.get_device_name(device))
    for case in cases:
        alias, num_tokens, height = case.split(":")
        shape = shape_of_alias(alias)
        config = sp.Config(max_rows=int(height), **sp.downs(shape)[0])
        prepared = variant.prepare(make_weights(shape, seed=0, device=device))
        workloads = [Workload(shape, int(num_tokens), seed=seed, input_kind="fp8") for seed in range(2)]
        batches = [make_inputs(workload, device) for workload in workloads]
        out = torch.empty(int(num_tokens), shape.hidden_size, dtype=torch.bfloat16, device=device)
        print(case)
        for ablation in ABLATIONS:
            cubin, num_bytes = cubins[case, ablation]
            up = load(cubin, sp.GROUPED_THREADS, sp.CLUSTER_SIZE, num_bytes, device)
            prepared.kernels[config], prepared.calls = (up, no_kernel()), sp.ReadyCalls()
            aligned = [variant.align(prepared, batch, config) for batch in batches]

            def call(i: int, aligned=aligned, prepared=prepared, out=out, config=config) -> None:
                variant.run(prepared, aligned[i % 2], out, config)

            print(f"  {ablation:30} {graph_difference(call, device):7.1f}", flush=True)
        del prepared
        torch.cuda.empty_cache()


def main() -> None:
    cases = [argument for argument in sys.argv[1:] if argument != "--compile"] or list(CASES)
    wanted = [(case, ablation) for case in cases for ablation in ABLATIONS]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        cubins = dict(zip(wanted, pool.map(compiled, *zip(*wanted, strict=True)), strict=True))
    os.environ["MOE_WORKBENCH_CACHE"] = str(CACHE)
    if "--compile" not in sys.argv:
        times(cases, cubins)


if __name__ == "__main__":
    main()
