"""Many launches of mixed sizes on one stream without a wait between, each held against the reference:

    python experiments/2026-11-27_mixed_launches/measure.py --compile      build the kernels, in parallel; needs no GPU
    python experiments/2026-11-27_mixed_launches/measure.py [launches] [variant ...]

One line for each variant, and one for all of them in turns. Exit status 1 when a launch was wrong.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from workbench import registry
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEInputs, RoutingLaw, Workload
from workbench.variant import Config, Variant
from workbench.verify import expected_output

SHAPE = shape_of_alias("dsv3_tp16")
VARIANTS = ("cuda.sm90_stream", "cuda.sm90_prefill", "cuda.sm90_fused")
NUM_LAUNCHES = 10_000
BATCHES = (
    *((num_tokens, "uniform", 0.0) for num_tokens in (1, 2, 3, 8, 24, 64, 130, 300, 700, 2500)),
    *((num_tokens, "zipf:1.2", 0.3) for num_tokens in (5, 96, 1024)),
    *((num_tokens, "one-expert", 0.0) for num_tokens in (4, 200)),
)
"""M, law of routing, part of the choices that is dropped."""
MOST_BATCH_ERROR, MOST_ROW_ERROR = 0.03, 0.1
"""An expert of 9 or a step of K that is left out of a row is more than the latter."""


@dataclass(frozen=True)
class Batch:
    inputs: MoEInputs
    expected: torch.Tensor
    row_norms: torch.Tensor
    out: torch.Tensor


@dataclass(frozen=True)
class Call:
    """One way to compute a batch: by a variant, from the caller's inputs or from aligned ones."""

    variant: Variant
    prepared: Any
    inputs: MoEInputs
    config: Config
    batch: Batch


def some_configs(variant: Variant, num_tokens: int) -> list[Config]:
    """The default and its nearest neighbour."""
    return list(itertools.islice(variant.configs(SHAPE, num_tokens), 2))


def compile_all(variants: Sequence[Variant]) -> None:
    wanted = {
        (variant, config)
        for variant in variants
        for num_tokens, _, _ in BATCHES
        for config in some_configs(variant, num_tokens)
    }
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda each: each[0].compile(SHAPE, [each[1]]), wanted))


def make_batch(weights: Any, num_tokens: int, law: str, dropped: float) -> Batch:
    workload = Workload(SHAPE, num_tokens, RoutingLaw.parse(law), seed=num_tokens, dropped=dropped)
    inputs = make_inputs(workload, weights.device)
    expected = expected_output(weights, inputs)
    out = torch.empty(expected.shape, dtype=torch.bfloat16, device=expected.device)
    return Batch(inputs, expected, expected.norm(dim=1).clamp(min=1e-30), out)


def calls_of(variant: Variant, weights: Any, batches: Sequence[Batch]) -> list[Call]:
    prepared = variant.prepare(weights)
    calls = []
    for batch in batches:
        for config in some_configs(variant, batch.inputs.num_tokens):
            for inputs in (batch.inputs, variant.align(prepared, batch.inputs, config)):
                calls.append(Call(variant, prepared, inputs, config, batch))
    return calls


def launch_all(label: str, calls: Sequence[Call], num_launches: int, device: torch.device) -> bool:
    """Whether all of `num_launches` of `calls`, in a random order, were right."""
    order = torch.randint(len(calls), (num_launches,), generator=torch.Generator().manual_seed(0)).tolist()
    for call in calls:  # loads the kernels
        call.variant.run(call.prepared, call.inputs, call.batch.out, call.config)
    errors = torch.full((num_launches, 2), torch.inf, device=device)  # of the batch, of its worst row
    start = time.monotonic()
    for index, which in enumerate(order):
        call = calls[which]
        batch = call.batch
        batch.out.fill_(torch.nan)
        call.variant.run(call.prepared, call.inputs, batch.out, call.config)
        row_errors = torch.linalg.vector_norm(batch.out - batch.expected, dim=1)
        torch.div(row_errors.norm(), batch.row_norms.norm(), out=errors[index, 0])
        torch.amax(row_errors / batch.row_norms, dim=0, out=errors[index, 1])
    found = errors.cpu()
    seconds = time.monotonic() - start
    wrong = ~((found[:, 0] <= MOST_BATCH_ERROR) & (found[:, 1] <= MOST_ROW_ERROR))  # NaN is wrong
    largest = found.nan_to_num(torch.inf).amax(dim=0)
    print(
        f"{label}: {num_launches} launches, {int(wrong.sum())} wrong, largest error {largest[0]:.4f} of a batch, "
        f"{largest[1]:.4f} of a row [{seconds:.1f} s]",
        flush=True,
    )
    for index in wrong.nonzero()[:5].flatten().tolist():
        call = calls[order[index]]
        aligned = "aligned" if call.inputs.aligned is not None else "not aligned"
        name, num_tokens = call.variant.name, call.inputs.num_tokens
        print(f"  launch {index}: {name} M={num_tokens} {aligned} {call.config}: {found[index].tolist()}", flush=True)
    return not wrong.any()


def main(arguments: list[str]) -> int:
    numbers = [int(argument) for argument in arguments if argument.isdigit()]
    names = [argument for argument in arguments if argument.startswith("cuda.")] or VARIANTS
    variants = [registry.find(name) for name in names]
    if "--compile" in arguments:
        compile_all(variants)
        return 0
    num_launches = numbers[0] if numbers else NUM_LAUNCHES
    device = torch.device("cuda", 0)
    start = time.monotonic()
    weights = make_weights(SHAPE, seed=0, device=device)
    batches = [make_batch(weights, *batch) for batch in BATCHES]
    calls = [calls_of(variant, weights, batches) for variant in variants]
    print(f"{torch.cuda.get_device_name(device)}, {SHAPE}: ready after {time.monotonic() - start:.1f} s", flush=True)
    groups = [*zip(names, calls, strict=True)]
    if len(calls) > 1:
        groups.append(("in turns", [call for some in calls for call in some]))
    right = [launch_all(label, some, num_launches, device) for label, some in groups]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
