"""Times and errors of the CUDA kernels, of which those of two checkouts can be held against each other:

    PYTHONPATH=<checkout>:. python experiments/2026-11-27_uniform_registers/measure.py times
    PYTHONPATH=<checkout>:. python experiments/2026-11-27_uniform_registers/measure.py errors

times   us of the fastest of the first three configs (of sm90_stream: the default), kernel scope, cold L2, four
        batches, and the largest error of the configs
errors  of sm90_stream, over 20 batches up to M=8 and 5 from there: the largest and the mean, and the time of the
        default
"""

from __future__ import annotations

import sys

import torch

from experiments.cold_l2 import graph_difference
from workbench import registry
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.numerics import measure
from workbench.precompile import Request, precompile
from workbench.problem import Workload
from workbench.verify import expected_output

ALIASES = ("dsv3_tp16", "qwen3next_tp4", "dsv3_tp8")
TOKENS = {
    "cuda.sm90_stream": (1, 2, 8, 64, 256, 512, 1024, 2048),
    "cuda.sm90_fused": (1, 8, 2048, 4096),
    "cuda.sm90_prefill": (1024, 2048, 4096, 8192),
}
STREAM_TOKENS = (1, 2, 8, 32, 64, 128, 256, 512)
DEVICE = torch.device("cuda", 0)


def configs(name, shape, num_tokens):
    return list(registry.find(name).configs(shape, num_tokens))[: 1 if name == "cuda.sm90_stream" else 3]


def batch(shape, num_tokens, seed):
    return make_inputs(Workload(shape, num_tokens, seed=seed, input_kind="fp8"), DEVICE)


def error(variant, prepared, weights, inputs, config, out):
    reference = expected_output(weights, inputs)
    variant.run(prepared, variant.align(prepared, inputs, config), out, config)
    return measure(out, reference, variant.tolerance).rel_err


def time_of(variant, prepared, batches, config, out):
    aligned = [variant.align(prepared, each, config) for each in batches]
    return graph_difference(lambda i: variant.run(prepared, aligned[i % 4], out, config), DEVICE)


def times(alias, shape, weights):
    for name, tokens in TOKENS.items():
        variant = registry.find(name)
        prepared = variant.prepare(weights)
        for m in tokens:
            batches = [batch(shape, m, seed) for seed in range(4)]
            out = torch.empty(m, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)
            found = []
            for config in configs(name, shape, m):
                off = error(variant, prepared, weights, batches[0], config, out)
                found.append((time_of(variant, prepared, batches, config, out), off, config))
            best = min(found, key=lambda each: each[0])
            worst = max(off for _, off, _ in found)
            print(alias, name.removeprefix("cuda.sm90_"), m, f"{best[0]:.1f} err {worst:.4f} {best[2]}", flush=True)


def errors(alias, shape, weights):
    variant = registry.find("cuda.sm90_stream")
    prepared = variant.prepare(weights)
    for m in STREAM_TOKENS:
        batches = [batch(shape, m, seed) for seed in (*range(4), *range(10, 26 if m <= 8 else 11))]
        out = torch.empty(m, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)
        config = next(iter(variant.configs(shape, m)))
        off = [error(variant, prepared, weights, each, config, out) for each in batches]
        us = time_of(variant, prepared, batches[:4], config, out)
        print(alias, m, config, f"{us:.1f} us  err max {max(off):.4f} mean {sum(off) / len(off):.4f}", flush=True)


def main():
    what = {"times": times, "errors": errors}[sys.argv[1]]
    shapes = {alias: shape_of_alias(alias) for alias in ALIASES}
    precompile(
        Request(name, shape, config)
        for name, tokens in TOKENS.items()
        for shape in shapes.values()
        for m in tokens
        for config in configs(name, shape, m)
    )
    for alias, shape in shapes.items():
        what(alias, shape, make_weights(shape, seed=0, device=DEVICE))


if __name__ == "__main__":
    main()
