"""Runs every CUDA variant on small layers, for compute-sanitizer to watch; see sanitize.sh.

python sanitize.py [--compile] [small]      small: the first layer alone; --compile: build the kernels and leave
"""

from __future__ import annotations

import itertools
import sys

import torch

from workbench import registry
from workbench.generate import make_weights
from workbench.numerics import measure, passed
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.verify import make_case

# Few experts with many rows; K long enough that an item of the prefill up phase is shared; two chunks; a wide layer.
SHAPES = (
    MoEShape(8, 256, 128, 2),
    MoEShape(3, 7168, 128, 2, num_shared_experts=1),
    MoEShape(9, 1152, 256, 3, num_shared_experts=1),
    MoEShape(4, 1152, 384, 2),
)
TOKENS = (1, 7, 70, 300)
NUM_CONFIGS = 2


def main(arguments: list[str]) -> None:
    variants = [variant for name, variant in registry.variants().items() if name.startswith("cuda.")]
    shapes = SHAPES[:1] if "small" in arguments else SHAPES
    if "--compile" in arguments:
        for variant, shape, num_tokens in itertools.product(variants, shapes, TOKENS):
            variant.compile(shape, itertools.islice(variant.configs(shape, num_tokens), NUM_CONFIGS))
        return
    device = torch.device("cuda", 0)
    for shape in shapes:
        weights = make_weights(shape, seed=0, device=device)
        cases = [
            make_case(Workload(shape, num_tokens, RoutingLaw.parse(law), dropped=0.2), weights)
            for num_tokens, law in itertools.product(TOKENS, ("uniform", "one-expert"))
        ]
        for variant in variants:
            prepared = variant.prepare(weights)
            for case in cases:
                for config in itertools.islice(variant.configs(shape, case.inputs.num_tokens), NUM_CONFIGS):
                    for given in (case.inputs, variant.align(prepared, case.inputs, config)):
                        out = torch.full_like(case.expected, torch.nan, dtype=torch.bfloat16)
                        variant.run(prepared, given, out, config)
                        accuracy = measure(out, case.expected, variant.tolerance)
                        if not passed(accuracy):
                            sys.exit(f"{variant.name} {shape} M={case.inputs.num_tokens} {config}: {accuracy}")
        print(f"{shape}: {len(variants)} variants are right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
