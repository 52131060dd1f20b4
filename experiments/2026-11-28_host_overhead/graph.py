"""What `fused_moe` costs in a CUDA graph more than the variant that it chooses, on a GPU:

    PYTHONPATH=. python experiments/2026-11-28_host_overhead/graph.py

Each graph holds the same calls, of `fused_moe` or of the variant's `run` with the choice's config. They are replayed in
turns; figures are medians.
"""

from __future__ import annotations

import functools
import statistics

import torch

from experiments.cold_l2 import captured
from workbench import MoELayer, fused_moe, registry
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import Workload

SHAPES, TOKENS = ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4"), (1, 8, 64, 512, 4096)
CALLS, ROUNDS = 16, 41


def microseconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / CALLS


def main() -> None:
    device = torch.device("cuda", 0)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}; microseconds a call in a graph")
    print(f"{'layer':14}{'M':>6}  {'chosen':26}{'alone':>10}{'fused_moe':>11}{'ratio':>8}")
    for alias in SHAPES:
        shape = shape_of_alias(alias)
        weights = make_weights(shape, 0, device)
        tensors = (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
        layer = MoELayer(*tensors, top_k=shape.top_k, num_shared_experts=shape.num_shared_experts)
        for num_tokens in TOKENS:
            batch = make_inputs(Workload(shape, num_tokens), device)
            out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
            name, config = layer.choice(num_tokens)
            layer.warm([num_tokens])
            run = functools.partial(registry.find(name).run, layer.prepared[name], batch, out, config)
            call = functools.partial(
                fused_moe,
                batch.tokens,
                *tensors,
                batch.topk_weights,
                batch.topk_ids,
                out=out,
                num_shared_experts=shape.num_shared_experts,
            )
            graphs = [captured(lambda _, enqueue=enqueue: enqueue(), CALLS) for enqueue in (run, call)]
            times = [[microseconds(graph) for graph in graphs] for _ in range(ROUNDS)]
            alone, ours = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{alias:14}{num_tokens:>6}  {name:26}{alone:>10.2f}{ours:>11.2f}{ours / alone:>8.3f}", flush=True)
        del layer, weights, tensors


if __name__ == "__main__":
    main()
