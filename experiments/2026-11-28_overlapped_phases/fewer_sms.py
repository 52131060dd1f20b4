"""How the two phases of cuda.sm90_prefill slow down with fewer SMs, on a GPU: what could run beside them.

    PYTHONPATH=. python experiments/2026-11-28_overlapped_phases/fewer_sms.py [--compile] [alias:M ...]

us of each phase by graph difference on a cold L2, from quantised tokens and aligned routing; the down phase is the
difference between calls with and without it. --compile only compiles and needs no GPU.
"""

import dataclasses
import sys

import torch

from experiments.calls import compiled_cases, no_kernel
from experiments.cold_l2 import graph_difference
from kernels_cuda import sm90_prefill as sp
from workbench.generate import make_inputs, make_weights
from workbench.problem import Workload

CASES = ("dsv3_tp16:1024", "dsv3_tp16:4096", "dsv3_tp16:8192", "dsv3_tp8:4096", "dsv3_tp8:8192", "qwen3next_tp4:4096")
CLUSTERS = (66, 55, 44, 33)
CTAS = (132, 110, 88, 66, 44)


def main() -> None:
    variant = sp.SM90Prefill()
    cases = compiled_cases(variant, [argument for argument in sys.argv[1:] if argument != "--compile"] or CASES)
    if "--compile" in sys.argv:
        return

    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device))
    print(f"{'':22}" + "".join(f"up {n:4}" for n in CLUSTERS) + "".join(f"dn {n:4}" for n in CTAS))
    for case in cases:
        shape, num_tokens, config = case.shape, case.num_tokens, case.config
        prepared = variant.prepare(make_weights(shape, seed=0, device=device))
        workloads = [Workload(shape, num_tokens, seed=seed, input_kind="fp8") for seed in range(2)]
        aligned = [variant.align(prepared, make_inputs(workload, device), config) for workload in workloads]
        out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
        up, down = prepared.pair(config)

        def timed(up_clusters, down_ctas, up=up, down=down, prepared=prepared, aligned=aligned, out=out, config=config):
            smaller_up = dataclasses.replace(up, max_clusters=up_clusters)
            smaller_down = dataclasses.replace(down, max_clusters=down_ctas) if down_ctas else no_kernel()
            prepared.kernels[config], prepared.calls = (smaller_up, smaller_down), sp.ReadyCalls()
            return graph_difference(lambda i: variant.run(prepared, aligned[i % 2], out, config), device)

        ups = [timed(n, 0) for n in CLUSTERS]
        downs = [timed(66, n) - ups[0] for n in CTAS]
        print(f"{case!s:20}" + "".join(f"{us:7.1f}" for us in (*ups, *downs)), flush=True)
        del prepared
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
