"""Runs cuda.sm90_fused on small layers, for compute-sanitizer to watch; see sanitize.sh.

python sanitize.py            blocks of 8, 16, 64 and 128 tokens, clusters of 1 to 8, rings that wrap around
python sanitize.py small      the smallest of these
"""

from __future__ import annotations

import sys

import torch

from kernels_cuda.sm90_fused import SM90Fused, most_stages
from workbench.generate import make_weights
from workbench.numerics import measure, passed
from workbench.problem import MoEShape, Workload
from workbench.variant import Config
from workbench.verify import make_case

CASES = [
    (MoEShape(8, 256, 128, 2), [(8, 1), (8, 2)]),
    (MoEShape(9, 1152, 256, 3, num_shared_experts=1), [(8, 8), (16, 4), (64, 1), (128, 1)]),
]


def main() -> None:
    device = torch.device("cuda", 0)
    variant = SM90Fused()
    for shape, blocks in CASES[:1] if "small" in sys.argv else CASES:
        weights = make_weights(shape, seed=0, device=device)
        prepared = variant.prepare(weights)
        for num_tokens, input_kind in ((7, "bf16"), (70, "fp8")):
            workload = Workload(shape, num_tokens, input_kind=input_kind, dropped=0.2)
            case = make_case(workload, weights)
            for block_m, cluster_size in blocks:
                config = Config(
                    block_m=block_m, cluster_size=cluster_size, num_stages=most_stages(block_m, cluster_size)
                )
                for given in (case.inputs, variant.align(prepared, case.inputs, config)):
                    out = torch.full_like(case.expected, torch.nan, dtype=torch.bfloat16)
                    variant.run(prepared, given, out, config)
                    accuracy = measure(out, case.expected, variant.tolerance)
                    print(f"{workload} {config}: relative error {accuracy.rel_err:.4f}")
                    if not passed(accuracy):
                        sys.exit("wrong")


if __name__ == "__main__":
    main()
