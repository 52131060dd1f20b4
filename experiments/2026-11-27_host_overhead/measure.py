"""What a call of the layer costs on the host, above the launches that it is made of, and what it costs in a CUDA graph.

    python experiments/2026-11-27_host_overhead/measure.py [variant ...]    default auto; a minute on an H200

Host times are of calls that are enqueued back to back on an idle device, fewer than its queue of launches holds, so
that none waits for the device. Every figure is a median.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from kernels_cuda.launch import Launch
from workbench import MoELayer, fused_moe, timing
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEInputs, MoEWeights, Workload

DEVICE = torch.device("cuda", 0)
SHAPES, TOKENS = ("dsv3_tp16", "qwen3next_tp4"), (1, 64, 4096)
CALLS, ROUNDS = 100, 31
GRAPH_EFFORT = timing.Effort(num_samples=60)
HEADER = (
    f"{'layer':14}{'M':>6}  {'runs':26}{'fused_moe':>10}{'layer':>8}{'run':>8}{'launches':>12}{'f-run':>8}{'l-run':>8}"
    f"{'graph':>10}{'alone':>10}{'ratio':>8}"
)

Step = Callable[[], Any]


def host_us(steps: dict[str, Step]) -> dict[str, float]:
    """Microseconds of the host for each step, measured in turns."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                step()
            samples[name].append((time.perf_counter_ns() - start) / 1e3 / CALLS)
    torch.cuda.synchronize()
    return {name: statistics.median(some) for name, some in samples.items()}


def launches_of(step: Step) -> list[Step]:
    """The driver's launches that `step` makes, each with its arguments ready; none where they are not ours.

    They work on the memory that `step` has given back, which others use before and after them in the stream, not
    meanwhile.
    """
    made: list[Step] = []
    usual = Launch.enqueue

    def recording(launch: Launch, stream: int) -> None:
        made.append(functools.partial(usual, launch, stream))
        usual(launch, stream)

    with mock.patch.object(Launch, "enqueue", recording):
        step()
    torch.cuda.synchronize()
    return made


def measured(name: str, weights: MoEWeights, num_tokens: int, variant: str) -> str:
    """One line of the table."""
    shape = weights.shape
    tensors = (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
    shared = {"num_shared_experts": shape.num_shared_experts, "variant": variant}
    layer = MoELayer(*tensors, top_k=shape.top_k, **shared)
    batches = [make_inputs(Workload(shape, num_tokens, seed=seed), DEVICE) for seed in range(6)]
    out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)

    def whole(batch: MoEInputs) -> None:
        fused_moe(batch.tokens, *tensors, batch.topk_weights, batch.topk_ids, out=out, **shared)

    def of_layer(batch: MoEInputs) -> None:
        layer(batch.tokens, batch.topk_weights, batch.topk_ids, out=out)

    def alone(batch: MoEInputs) -> None:
        plan.variant.run(plan.prepared, batch, out, plan.config)

    for batch in batches:
        whole(batch)
        of_layer(batch)
    plan = layer._plans[num_tokens, False]
    driver_launches = launches_of(functools.partial(alone, batches[0])) if plan.variant.backend == "cuda" else []

    def bare() -> None:
        for each in driver_launches:
            each()

    steps = {"fused_moe": whole, "layer": of_layer, "run": alone}
    bound: dict[str, Step] = {step: functools.partial(call, batches[0]) for step, call in steps.items()}
    host = host_us(bound | ({"launches": bare} if driver_launches else {}))
    backend = timing.backend_of(DEVICE)
    armed = [
        timing.arm(timing.Candidate(label, [functools.partial(step, batch) for batch in batches], graph=True), backend)
        for label, step in (("fused_moe", whole), ("alone", alone))
    ]
    graph = {label: found.median_us for label, found in timing.measure(armed, backend, GRAPH_EFFORT).items()}
    launches = f"{host['launches']:.1f} ({len(driver_launches)})" if driver_launches else "-"
    return (
        f"{name:14}{num_tokens:>6}  {plan.variant.name:26}{host['fused_moe']:>10.1f}{host['layer']:>8.1f}"
        f"{host['run']:>8.1f}{launches:>12}{host['fused_moe'] - host['run']:>8.1f}{host['layer'] - host['run']:>8.1f}"
        f"{graph['fused_moe']:>10.2f}{graph['alone']:>10.2f}{graph['fused_moe'] / graph['alone']:>8.3f}"
    )


def main() -> None:
    variants = sys.argv[1:] or ["auto"]
    lines = []
    for name in SHAPES:
        weights = make_weights(shape_of_alias(name), 0, DEVICE)
        for num_tokens in TOKENS:
            lines += [measured(name, weights, num_tokens, variant) for variant in variants]
        del weights
    print(f"{torch.cuda.get_device_name(DEVICE)}; microseconds; f-run and l-run are what selection and checks cost")
    print(HEADER)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
