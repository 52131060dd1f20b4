"""Cycles in the parts of the launch that groups the choices, on a GPU, at revision 1eccf1c with stamps.patch applied:

    PYTHONPATH=. python experiments/2026-11-28_order/stamps.py

For three calls after each other, each on a cold L2: of the first and the last CTA of the cluster the cycles to zero its
counts, count, wait for the cluster, read the others' counts, sum up, scatter, write tiles, wait for the cluster.
"""

from __future__ import annotations

import torch

from kernels_cuda import sm90_prologue
from kernels_cuda.launch import current_stream
from workbench.generate import make_inputs
from workbench.models import shape_of_alias
from workbench.problem import Workload

CASES = (("qwen3next_tp4", 256, 16), ("qwen3next_tp4", 1024, 32), ("dsv3_tp8", 256, 48), ("dsv3_tp8", 1024, 64))
WORDS, STAMPS = 16, 9  # for each CTA
FLUSH_BYTES = 256 << 20


def main() -> None:
    device = torch.device("cuda", 0)
    flushed = torch.zeros(FLUSH_BYTES, dtype=torch.uint8, device=device)
    for alias, num_tokens, max_rows in CASES:
        shape = shape_of_alias(alias)
        topk_ids = make_inputs(Workload(shape, num_tokens), device).topk_ids
        stamps = torch.zeros(64, WORDS, dtype=torch.int64, device=device)
        routing = sm90_prologue.empty_tiles(topk_ids.numel(), shape.num_experts, max_rows, device)
        launch = sm90_prologue.bind(
            device, num_choices=topk_ids.numel(), num_experts=shape.num_experts, max_rows=max_rows
        )
        launch.params.poison, launch.params.topk_ids = stamps.data_ptr(), topk_ids.data_ptr()
        launch.params.sorted_choices, launch.params.tiles = routing.sorted_choices.data_ptr(), routing.tiles.data_ptr()
        for call in range(3):
            flushed.add_(1)
            launch.enqueue(current_stream(0))
            torch.cuda.synchronize()
            cycles = stamps[:8, :STAMPS].diff(dim=1).cpu()
            print(alias, num_tokens, "call", call, "all", cycles.sum(1).tolist())
            print("   first", cycles[0].tolist(), "last", cycles[-1].tolist())


if __name__ == "__main__":
    main()
