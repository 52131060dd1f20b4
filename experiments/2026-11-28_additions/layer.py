"""us of cuda.sm90_stream on a GPU: the kernel alone, a call on bf16 tokens, the difference, and the relative error, of
this tree and of copies of it (README.md says how to make one):

    PYTHONPATH=. python experiments/2026-11-28_additions/layer.py [--compile] [copy ...]

--compile only compiles and needs no GPU.
"""

import importlib
import sys

from workbench.models import shape_of_alias
from workbench.problem import Workload

ALIASES, TOKENS = ("dsv3_tp16", "qwen3next_tp4", "dsv3_tp8"), (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    packages = [*(argument for argument in sys.argv[1:] if argument != "--compile"), "kernels_cuda"]
    variants = {package: importlib.import_module(f"{package}.sm90_stream").SM90Stream() for package in packages}
    for shape in map(shape_of_alias, ALIASES):
        for variant in variants.values():
            variant.compile(shape, {next(iter(variant.configs(shape, tokens))): None for tokens in TOKENS})
    if "--compile" in sys.argv:
        return

    import torch

    from experiments.cold_l2 import graph_difference
    from workbench.generate import make_inputs, make_weights
    from workbench.verify import expected_output

    device = torch.device("cuda", 0)
    print(torch.cuda.get_device_name(device), packages)
    for alias in ALIASES:
        shape = shape_of_alias(alias)
        weights = make_weights(shape, seed=0, device=device)
        prepared = {package: variant.prepare(weights) for package, variant in variants.items()}
        for num_tokens in TOKENS:
            batches = [make_inputs(Workload(shape, num_tokens, seed=seed), device) for seed in range(4)]
            out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
            expected = expected_output(weights, batches[0]).float()
            line = f"{alias:14} {num_tokens:4}"
            for package, variant in variants.items():
                config, own = next(iter(variant.configs(shape, num_tokens))), prepared[package]
                aligned = [variant.align(own, batch, config) for batch in batches]
                out.fill_(torch.nan)
                variant.run(own, batches[0], out, config)
                error = ((out.float() - expected).norm() / expected.norm()).item()

                def us(calls: list, variant=variant, own=own, out=out, config=config) -> float:
                    return graph_difference(lambda i: variant.run(own, calls[i % 4], out, config), device, samples=15)

                kernel, layer = us(aligned), us(batches)
                line += f" | {kernel:6.1f} {layer:6.1f} +{layer - kernel:4.1f} ({error:.4f})"
            print(line, flush=True)
        del weights, prepared
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
