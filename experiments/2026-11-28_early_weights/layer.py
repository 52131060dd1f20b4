"""us of cuda.sm90_stream on a GPU: the kernel alone, what a call on bf16 tokens takes more, and the relative error:

PYTHONPATH=. python experiments/2026-11-28_early_weights/layer.py [alias ...]
"""

import sys

import torch

from experiments.cold_l2 import graph_difference
from kernels_cuda.sm90_stream import SM90Stream
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import Workload
from workbench.verify import expected_output

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def main() -> None:
    device, variant = torch.device("cuda", 0), SM90Stream()
    print(torch.cuda.get_device_name(device))
    for alias in sys.argv[1:] or ("dsv3_tp16", "qwen3next_tp4"):
        shape = shape_of_alias(alias)
        weights = make_weights(shape, seed=0, device=device)
        prepared = variant.prepare(weights)
        for num_tokens in TOKENS:
            config = next(iter(variant.configs(shape, num_tokens)))
            batches = [make_inputs(Workload(shape, num_tokens, seed=seed), device) for seed in range(4)]
            aligned = [variant.align(prepared, batch, config) for batch in batches]
            out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
            variant.run(prepared, batches[0], out, config)
            expected = expected_output(weights, batches[0]).float()
            error = ((out.float() - expected).norm() / expected.norm()).item()

            def us(calls: list, prepared=prepared, out=out, config=config) -> float:
                return graph_difference(lambda i: variant.run(prepared, calls[i % 4], out, config), device)

            kernel, layer = us(aligned), us(batches)
            print(
                f"{alias} M={num_tokens}: kernel {kernel:.1f}, layer +{layer - kernel:.1f}, error {error:.4f}",
                flush=True,
            )
        del weights, prepared
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
