"""Checks and times cuda.sm90_prefill on a GPU:

    PYTHONPATH=. python experiments/2026-11-23_prefill/measure.py \\
        [check] [time[=alias,alias:M,M]] [det] [layer] [--compile]

check   against the reference on small shapes
time    up, down and total by graph difference, cold L2, for each config (the default: check and time)
det     of the deterministic variant
layer   from bf16 tokens and top-k ids
"""

# ruff: noqa: B023  (what is captured is timed before the loop goes on)

import dataclasses
import sys
import time
from types import SimpleNamespace

import torch

from experiments.cold_l2 import graph_difference
from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias
from workbench.problem import MoEShape, RoutingLaw, Workload

SHAPES = (
    MoEShape(8, 256, 128, 2),
    MoEShape(17, 512, 256, 5, 1),
    MoEShape(33, 7168, 128, 9, 1),
    MoEShape(16, 640, 512, 4),
    MoEShape(8, 1152, 2048, 2),
)
PEERS = {
    "dsv3_tp16": {1024: 271, 2048: 364, 4096: 592, 8192: 1053},
    "dsv3_tp8": {1024: 502, 2048: 620, 4096: 1007, 8192: 1801},
    "qwen3next_tp4": {1024: 121, 2048: 171, 4096: 246, 8192: 409},
}


def options(shape):
    return sp.SM90Prefill().configs(shape, 4096)


def precompile():
    for shape in (*SHAPES, *(shape_of_alias(a) for a in PEERS)):
        for config in options(shape):
            for deterministic in (False, True):
                sp._compile_up(shape, config, deterministic), sp._compile_down(shape, config, deterministic)
    for other in (sp.sm90_prologue, sp.sm90_fill, sp.sm90_combine):
        other.compiled()


def relative(out, reference):
    return ((out.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-30)).item()


def check(device, laws=("uniform", "zipf:1.2", "one-expert"), tokens=(1, 3, 9, 129, 1000, 4096)):
    from workbench.generate import make_inputs, make_weights
    from workbench.verify import expected_output

    bad, start = 0, time.time()
    for shape in SHAPES:
        weights, worst = make_weights(shape, seed=0, device=device), {}
        for variant in (sp.SM90Prefill(), sp.SM90PrefillDeterministic()):
            prepared = variant.prepare(weights)
            for law in laws:
                for m in tokens:
                    if m == 4096 and shape.hidden_size == 7168 and law != "uniform":
                        continue
                    for dropped in (0.0, 0.4):
                        workload = Workload(shape, m, RoutingLaw.parse(law), seed=1, input_kind="fp8", dropped=dropped)
                        inputs = make_inputs(workload, device)
                        reference = expected_output(weights, inputs)
                        for config in options(shape):
                            for batch in (inputs, variant.align(prepared, inputs, config)):
                                out = torch.full_like(reference, float("nan"), dtype=torch.bfloat16)
                                variant.run(prepared, batch, out, config)
                                try:
                                    torch.cuda.synchronize()
                                except Exception as error:
                                    sys.exit(
                                        f"CRASH {variant.name} {shape} {law} M={m} dropped={dropped} {config}: {error}"
                                    )
                                empty = reference.abs().max().item() == 0
                                error = out.float().abs().max().item() if empty else relative(out, reference)
                                key = variant.name[-13:], config["max_rows"]
                                worst[key] = max(worst.get(key, 0.0), error if error == error else 9.0)
                                if not error < 0.03:
                                    bad += 1
                                    if bad < 20:
                                        print(
                                            "BAD", variant.name, shape, law, m, dropped, config, batch is inputs, error
                                        )
                        if variant.deterministic and m > 3:
                            first, second = torch.empty_like(out), torch.empty_like(out)
                            config = next(iter(options(shape)))
                            variant.run(prepared, inputs, first, config)
                            half = dataclasses.replace(
                                inputs,
                                topk_ids=inputs.topk_ids[: m // 2].contiguous(),
                                topk_weights=inputs.topk_weights[: m // 2].contiguous(),
                                x_q=inputs.x_q[: m // 2].contiguous(),
                                x_scale=inputs.x_scale[: m // 2].contiguous(),
                            )
                            variant.run(prepared, half, second[: m // 2], config)
                            if not torch.equal(first[: m // 2], second[: m // 2]):
                                bad += 1
                                print("BAD: bits differ", shape, law, m, dropped)
        print(shape, {str(k): round(v, 4) for k, v in worst.items()}, f"{time.time() - start:.0f} s", flush=True)
    print("check:", "FAILED" if bad else "ok", bad)
    return bad


def times(device, aliases, tokens, flags):
    from workbench.generate import make_inputs, make_weights
    from workbench.verify import expected_output

    variant = sp.SM90PrefillDeterministic() if "det" in flags else sp.SM90Prefill()
    for alias in aliases:
        shape = shape_of_alias(alias)
        weights = make_weights(shape, seed=0, device=device)
        prepared = variant.prepare(weights)
        for m in tokens:
            kind = "bf16" if "layer" in flags else "fp8"
            batches = [make_inputs(Workload(shape, m, seed=s, input_kind=kind), device) for s in range(4)]
            reference = expected_output(weights, batches[0])
            out = torch.empty(m, shape.hidden_size, dtype=torch.bfloat16, device=device)
            for config in options(shape):
                aligned = batches if "layer" in flags else [variant.align(prepared, b, config) for b in batches]
                variant.run(prepared, aligned[0], out, config)
                error = relative(out, reference)
                total = graph_difference(lambda i: variant.run(prepared, aligned[i % 4], out, config), device)
                up_kernel, down_kernel = prepared.pair(config)

                class Skip:
                    max_clusters = down_kernel.max_clusters

                    @staticmethod
                    def bind(params, *_, **__):
                        return SimpleNamespace(params=params, enqueue=lambda stream: None)

                prepared.kernels[config], prepared.calls = (up_kernel, Skip), sp.ReadyCalls()
                up = graph_difference(lambda i: variant.run(prepared, aligned[i % 4], out, config), device)
                prepared.kernels[config], prepared.calls = (up_kernel, down_kernel), sp.ReadyCalls()
                peer = PEERS[alias].get(m, 0)
                print(
                    f"{alias} M={m} {config}: fill+up {up:.1f} down {total - up:.1f} total {total:.1f} us"
                    f"  peer/ours {peer / total:.2f}  error {error:.4f}",
                    flush=True,
                )
        torch.cuda.empty_cache()


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["check", "time"]
    if "--compile" in arguments:
        precompile()
        sys.exit()
    device = torch.device("cuda", 0)
    if "check" in arguments and check(device):
        sys.exit(1)
    for argument in arguments:
        if argument.startswith("time"):
            names, _, numbers = argument.removeprefix("time").removeprefix("=").partition(":")
            aliases = names.split(",") if names else list(PEERS)
            times(
                device,
                aliases,
                [int(v) for v in numbers.split(",")] if numbers else [1024, 2048, 4096, 8192],
                arguments,
            )
