"""Checks and times cuda.sm90_stream on a GPU:

    python experiments/2026-11-23_weight_stream/measure.py check
    python experiments/2026-11-23_weight_stream/measure.py [layer] times=dsv3_tp16,qwen3next_tp4:1,8,64,256

check   against the reference on small shapes, with choices dropped, aligned ahead or not
times   by the workbench's timing, kernel scope, the default config; with `layer` also from bf16 tokens and top-k ids
"""

from __future__ import annotations

import itertools
import statistics
import sys

import torch

from kernels_cuda.sm90_stream import SM90Stream
from workbench import timing
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.roofline import floor_us
from workbench.verify import expected_output

DEVICE = torch.device("cuda", 0)
SMALL_SHAPES = (
    MoEShape(17, 512, 256, 5, num_shared_experts=1),
    MoEShape(33, 7168, 128, 9, num_shared_experts=1),
    MoEShape(8, 1152, 1024, 2),
)
VARIANT = SM90Stream()


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.float() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check() -> bool:
    worst, failures = 0.0, 0
    for shape in SMALL_SHAPES:
        weights = make_weights(shape, seed=0, device=DEVICE)
        prepared = VARIANT.prepare(weights)
        for law, num_tokens, dropped in itertools.product(("uniform", "one-expert"), (1, 2, 9, 129, 700), (0.0, 0.4)):
            workload = Workload(shape, num_tokens, RoutingLaw.parse(law), seed=1, dropped=dropped)
            inputs = make_inputs(workload, DEVICE)
            expected = expected_output(weights, inputs)
            for config in itertools.islice(VARIANT.configs(shape, num_tokens), 2):
                for batch in (inputs, VARIANT.align(prepared, inputs, config)):
                    out = torch.full(expected.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
                    VARIANT.run(prepared, batch, out, config)
                    error = relative(out, expected)
                    worst = max(worst, error)
                    if not error < 0.03:
                        failures += 1
                        print("FAILED", workload, config, batch is inputs, error, flush=True)
    print(f"check: largest error {worst:.4f}, {failures} failures", flush=True)
    return failures == 0


def times(aliases: list[str], tokens: list[int], with_layer: bool) -> None:
    backend = timing.CudaBackend(DEVICE)
    for alias in aliases:
        shape = shape_of_alias(alias)
        weights = make_weights(shape, seed=0, device=DEVICE)
        prepared = VARIANT.prepare(weights)
        for num_tokens in tokens:
            batches = [make_inputs(Workload(shape, num_tokens, seed=seed), DEVICE) for seed in range(6)]
            config = next(iter(VARIANT.configs(shape, num_tokens)))
            scopes = {"kernel": [VARIANT.align(prepared, batch, config) for batch in batches]}
            if with_layer:
                scopes["layer"] = batches
            out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)

            candidates = []
            for scope, inputs in scopes.items():
                calls = [lambda batch=batch: VARIANT.run(prepared, batch, out, config) for batch in inputs]  # noqa: B023
                candidates.append(timing.arm(timing.Candidate(scope, calls, True), backend))
            measured = timing.measure(candidates, backend, timing.Effort(num_samples=16))
            VARIANT.run(prepared, batches[0], out, config)
            error = relative(out, expected_output(weights, batches[0]))
            name = torch.cuda.get_device_name(DEVICE)
            floor = statistics.mean(floor_us(shape, batch.topk_ids, "bf16", name) or 0.0 for batch in batches)
            figures = "  ".join(f"{scope} {found.median_us:.1f}" for scope, found in measured.items())
            print(f"{alias} M={num_tokens} floor {floor:.1f}  {figures} us  error {error:.4f}  {config}", flush=True)


def main(arguments: list[str]) -> int:
    for argument in arguments:
        name, _, rest = argument.partition("=")
        if name == "check" and not check():
            return 1
        if name == "times":
            aliases, _, tokens = rest.partition(":")
            times(aliases.split(","), [int(token) for token in tokens.split(",")], "layer" in arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["check", "times=dsv3_tp16,dsv3_tp8,qwen3next_tp4:1,2,8,16,64,256,512,1024"]))
