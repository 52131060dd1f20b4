"""Two side measurements by the method that peers.json was made with: what the method changes, and where the prologue's
time goes. side_measurements.txt holds the output of the runs behind README.md.

    PYTHONPATH=. python experiments/2026-11-23_first_comparison/side_measurements.py fused|prologue
"""

from __future__ import annotations

import sys

import torch

from experiments.cold_l2 import graph_difference
from kernels_cuda import sm90_prologue
from kernels_cuda.sm90_fused import SM90Fused, most_stages
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEShape, Workload
from workbench.variant import Config

DEVICE = torch.device("cuda", 0)
FUSED_CELLS = [(1, 8, 8), (8, 8, 2), (64, 8, 2), (256, 32, 1), (1024, 48, 2), (8192, 128, 1)]
"""M, block_m, cluster_size"""


def fused() -> None:
    """cuda.sm90_fused on dsv3_tp16, kernel scope."""
    shape, variant = shape_of_alias("dsv3_tp16"), SM90Fused()
    prepared = variant.prepare(make_weights(shape, seed=0, device=DEVICE))
    for num_tokens, block_m, cluster_size in FUSED_CELLS:
        stages = most_stages(block_m, cluster_size)
        config = Config(block_m=block_m, cluster_size=cluster_size, num_stages=stages)
        workloads = [Workload(shape, num_tokens, seed=seed, input_kind="fp8") for seed in range(4)]
        batches = [variant.align(prepared, make_inputs(workload, DEVICE), config) for workload in workloads]
        out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)
        time_us = graph_difference(lambda i: variant.run(prepared, batches[i % 4], out, config))  # noqa: B023
        print(f"dsv3_tp16 M={num_tokens} {config}: {time_us:.1f} us")


def prologue_parts(shape: MoEShape, num_tokens: int) -> None:
    """Zeroing, quantising and aligning, each by itself, and all in one launch."""
    inputs = make_inputs(Workload(shape, num_tokens), DEVICE)
    size = num_tokens, shape.hidden_size
    out = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    x_q = torch.empty(size, dtype=torch.float8_e4m3fn, device=DEVICE)
    x_scale = torch.empty(num_tokens, shape.hidden_size // 128, device=DEVICE)
    aligned = sm90_prologue.empty_alignment(inputs.topk_ids.numel(), shape.num_experts, 32, DEVICE)
    zeroing = {"out": out}
    quantising = {"x": inputs.x, "quantised": (x_q, x_scale)}
    aligning = {"topk_ids": inputs.topk_ids, "num_experts": shape.num_experts, "aligned": aligned}
    parts = {
        "zero": zeroing,
        "quantise": quantising,
        "align": aligning,
        "all": {**zeroing, **quantising, **aligning},
    }
    times = {name: graph_difference(lambda _: sm90_prologue.launch(**part)) for name, part in parts.items()}  # noqa: B023
    print(f"{shape} M={num_tokens}: " + ", ".join(f"{name} {time_us:.1f}" for name, time_us in times.items()))


if __name__ == "__main__":
    if sys.argv[1:] == ["fused"]:
        fused()
    else:
        for alias in ("dsv3_tp16", "qwen3next_tp4"):
            for num_tokens in (1, 64, 1024, 2048, 8192):
                prologue_parts(shape_of_alias(alias), num_tokens)
