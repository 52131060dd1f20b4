"""Checks and times the heights of tiles and the widths of slabs of cuda.sm90_prefill on a GPU:

    PYTHONPATH=. python experiments/2026-11-27_prefill_tiles/measure.py [--compile] [alias ...]

For each real layer every height of tiles and width of slabs is checked against the reference under three routing laws,
with choices dropped and without; then the up phase (with the launch before it) is timed for each height, and the down
phase for each width, by graph difference on a cold L2, from quantised tokens and aligned routing. --compile only
compiles, in parallel, and needs no GPU.
"""

# ruff: noqa: B023  (what is captured is timed before the loop goes on)

import concurrent.futures
import sys
from types import SimpleNamespace

import torch

from experiments.cold_l2 import graph_difference
from kernels_cuda import sm90_prefill as sp
from workbench.models import shape_of_alias
from workbench.problem import RoutingLaw, Workload

ALIASES = ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4")
TOKENS = (512, 1024, 2048, 4096, 8192)
HEIGHTS = (128, 192, 272)
CHECKED_TOKENS = (3, 129, 1000, 2500)


def up_configs(shape):
    return [sp.Config(max_rows=height, **sp.downs(shape)[0]) for height in HEIGHTS]


def down_configs(shape):
    return [sp.Config(max_rows=HEIGHTS[0], **down) for down in sp.downs(shape)]


def compile_one(request):
    alias, config, down = request
    shape = shape_of_alias(alias)
    (sp._compile_down if down else sp._compile_up)(shape, config, False)


def compile_all(aliases):
    requests = [(a, c, False) for a in aliases for c in up_configs(shape_of_alias(a))]
    requests += [(a, c, True) for a in aliases for c in down_configs(shape_of_alias(a))]
    for other in (sp.sm90_prologue, sp.sm90_fill, sp.sm90_combine):
        other.compiled()
    with concurrent.futures.ProcessPoolExecutor() as pool:
        list(pool.map(compile_one, requests))


def relative(out, reference):
    return ((out.float() - reference.float()).norm() / reference.float().norm().clamp(min=1e-30)).item()


def check(shape, weights, prepared, variant, device):
    from workbench.generate import make_inputs
    from workbench.verify import expected_output

    worst = 0.0
    for law in ("uniform", "zipf:1.2", "one-expert"):
        for m in CHECKED_TOKENS:
            for dropped in (0.0, 0.4):
                workload = Workload(shape, m, RoutingLaw.parse(law), seed=1, input_kind="fp8", dropped=dropped)
                inputs = make_inputs(workload, device)
                reference = expected_output(weights, inputs)
                for config in (*up_configs(shape), *down_configs(shape)):
                    for _ in range(2):
                        out = torch.full_like(reference, float("nan"), dtype=torch.bfloat16)
                        variant.run(prepared, inputs, out, config)
                        error = relative(out, reference)
                        worst = max(worst, error if error == error else 9.0)
                        if not error < 0.02:
                            print("BAD", shape, law, m, dropped, config, error, flush=True)
    return worst


class Skipped:
    """A kernel that is not launched."""

    def __init__(self, kernel):
        self.max_clusters = kernel.max_clusters

    def bind(self, params, *_, **__):
        return SimpleNamespace(params=params, enqueue=lambda stream: None)


def times(alias, shape, weights, prepared, variant, device):
    from workbench.generate import make_inputs
    from workbench.verify import expected_output

    for m in TOKENS:
        batches = [make_inputs(Workload(shape, m, seed=s, input_kind="fp8"), device) for s in range(4)]
        reference = expected_output(weights, batches[0])
        out = torch.empty(m, shape.hidden_size, dtype=torch.bfloat16, device=device)

        def timed(config):
            aligned = [variant.align(prepared, b, config) for b in batches]
            variant.run(prepared, aligned[0], out, config)
            return graph_difference(lambda i: variant.run(prepared, aligned[i % 4], out, config), device)

        found = {}
        for config in up_configs(shape):
            up, down = prepared.pair(config)
            variant.run(prepared, variant.align(prepared, batches[0], config), out, config)
            error = relative(out, reference)
            prepared.kernels[config], prepared.calls = (up, Skipped(down)), sp.ReadyCalls()
            found[f"up {config['max_rows']}"] = timed(config)
            prepared.kernels[config], prepared.calls = (up, down), sp.ReadyCalls()
        first = f"up {HEIGHTS[0]}"
        for config in down_configs(shape):
            found[f"down {config['slab_columns']}"] = timed(config) - found[first]
        print(f"{alias} M={m} error {error:.4f} ", "  ".join(f"{k}: {v:.1f}" for k, v in found.items()), flush=True)


def main():
    aliases = [argument for argument in sys.argv[1:] if argument != "--compile"] or ALIASES
    compile_all(aliases)
    if "--compile" in sys.argv:
        return
    from workbench.generate import make_weights

    device, variant = torch.device("cuda", 0), sp.SM90Prefill()
    print(torch.cuda.get_device_name(device))
    for alias in aliases:
        shape = shape_of_alias(alias)
        weights = make_weights(shape, seed=0, device=device)
        prepared = variant.prepare(weights)
        print(alias, "checked, worst error", round(check(shape, weights, prepared, variant, device), 4), flush=True)
        times(alias, shape, weights, prepared, variant, device)
        del weights, prepared
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
