"""cuda.sm90_prefill with its phases overlapped in different measure, on a GPU:

    git apply experiments/2026-11-28_overlapped_phases/overlap.patch
    PYTHONPATH=. python experiments/2026-11-28_overlapped_phases/splits.py [--compile] [--splits=0:66,128:44] [case ...]

A case is alias:M. A split is early parts of 256 and late clusters. us per call by graph difference on a cold L2, from
quantised tokens and aligned routing, and the relative error against the reference. --compile only compiles and needs no
GPU.
"""

import sys

import torch

from experiments.calls import compiled_cases
from experiments.cold_l2 import graph_difference
from kernels_cuda import sm90_prefill as sp
from workbench.generate import make_inputs, make_weights
from workbench.problem import Workload
from workbench.verify import expected_output

CASES = [
    *(f"{alias}:{tokens}" for alias in ("dsv3_tp16", "dsv3_tp8") for tokens in (1024, 2048, 4096, 8192)),
    *(f"qwen3next_tp4:{tokens}" for tokens in (2048, 4096, 8192)),
]
SPLITS = "0:66,128:44,128:55,96:44,96:50,160:44,128:38"


def main() -> None:
    options = [argument for argument in sys.argv[1:] if argument.startswith("--")]
    given = next((option.split("=")[1] for option in options if option.startswith("--splits=")), SPLITS)
    splits = [tuple(int(number) for number in split.split(":")) for split in given.split(",")]
    variant = sp.SM90Prefill()
    cases = compiled_cases(variant, [argument for argument in sys.argv[1:] if argument not in options] or CASES)
    if "--compile" in options:
        return

    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device))
    print(f"{'':20}" + "".join(f"{early:>5}:{late:<2}" for early, late in splits) + "   error", flush=True)
    weights, kept = None, None
    for case in cases:
        shape, num_tokens, config = case.shape, case.num_tokens, case.config
        if kept != shape:
            weights = prepared = None
            torch.cuda.empty_cache()
            weights, kept = make_weights(shape, seed=0, device=device), shape
        prepared = variant.prepare(weights)
        workloads = [Workload(shape, num_tokens, seed=seed, input_kind="fp8") for seed in range(2)]
        aligned = [variant.align(prepared, make_inputs(workload, device), config) for workload in workloads]
        out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
        expected = expected_output(weights, aligned[1]).float() if num_tokens <= 2048 else None
        line, worst, first = f"{case!s:20}", 0.0, expected
        for sp.OVERLAP in splits:
            prepared.calls = sp.ReadyCalls()
            out.fill_(float("nan"))
            variant.run(prepared, aligned[1], out, config)
            if first is None:
                first = out.float()  # what the others are held against
            worst = max(worst, float((out.float() - first).norm() / first.norm()))

            def call(i: int, prepared=prepared, aligned=aligned, out=out, config=config) -> None:
                variant.run(prepared, aligned[i % 2], out, config)

            line += f"{graph_difference(call, device):8.1f}"
        print(f"{line}  {worst:.4f}", flush=True)


if __name__ == "__main__":
    main()
