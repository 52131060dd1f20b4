"""Runs every CUDA kernel on tiny layers, for compute-sanitizer to watch; see sanitize.sh.

    python sanitize.py              on the GPU, each result held against the reference
    python sanitize.py --compile    build the kernels, in parallel, and leave; needs no GPU

MOE_WORKBENCH_ONLY=<variant> leaves out what is not a form of it. Layers, batches and what is expected are made on the
CPU: a sanitizer then sees little but our kernels.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from kernels_cuda import sm90_prologue
from kernels_cuda.sm90_fused import SM90Fused, most_stages
from kernels_cuda.sm90_prefill import SM90Prefill, SM90PrefillDeterministic
from kernels_cuda.sm90_stream import FLAGGED_PARTS, SM90Stream, SM90StreamDeterministic, SM90StreamInPlace
from reference.routing import align_block_size, tile_rows
from workbench.generate import make_inputs, make_weights
from workbench.numerics import measure, passed
from workbench.problem import MoEInputs, MoEShape, MoEWeights, RoutingLaw, Workload
from workbench.variant import Config, Variant
from workbench.verify import expected_output

CPU = torch.device("cpu")
SMALL = MoEShape(3, 512, 128, 2)
TWO_CHUNKS = MoEShape(3, 512, 256, 3, num_shared_experts=1)
WIDE = MoEShape(2, 512, 384, 2)
LONG_K = MoEShape(2, 4096, 128, 2)
SHARED = MoEShape(5, 1280, 128, 3, num_shared_experts=1)

Configs = Callable[[Variant, MoEShape, int], list[Config]]


def fused_blocks(*blocks: tuple[int, int]) -> Configs:
    """Rows of a block and CTAs that share it."""
    return lambda variant, shape, num_tokens: [
        Config(block_m=block_m, cluster_size=cluster_size, num_stages=most_stages(block_m, cluster_size))
        for block_m, cluster_size in blocks
    ]


def stream_heights(*heights: int, max_parts: int = 0) -> Configs:
    """Tiles of these heights; `max_parts` in place of the default one, for variants that leave a choice."""

    def configs(variant: Variant, shape: MoEShape, num_tokens: int) -> list[Config]:
        offered = [config for config in variant.configs(shape, num_tokens) if config["max_rows"] in heights]
        if not max_parts or variant.deterministic:
            return offered
        return [Config(**{**config, "max_parts": max_parts}) for config in offered]

    return configs


def everything(variant: Variant, shape: MoEShape, num_tokens: int) -> list[Config]:
    return list(variant.configs(shape, num_tokens))


def lowest_tiles(variant: Variant, shape: MoEShape, num_tokens: int) -> list[Config]:
    return [min(variant.configs(shape, num_tokens), key=lambda config: config.integer("max_rows"))]


@dataclass(frozen=True)
class Case:
    """A batch, and what runs on it."""

    shape: MoEShape
    num_tokens: int
    variants: tuple[Variant, ...]
    configs: Configs
    law: str = "uniform"

    def __str__(self) -> str:
        return f"{self.shape} M={self.num_tokens} {self.law}"

    def calls(self) -> Iterator[tuple[Variant, Config]]:
        for variant in self.variants:
            if not variant.name.startswith(os.environ.get("MOE_WORKBENCH_ONLY", "")):
                continue
            for config in self.configs(variant, self.shape, self.num_tokens):
                yield variant, config


FUSED = (SM90Fused(),)
STREAM = (SM90Stream(), SM90StreamDeterministic())
IN_PLACE = (SM90StreamInPlace(),)
PREFILL = (SM90Prefill(), SM90PrefillDeterministic())
MANY_CHUNKS = MoEShape(4, 512, 640, 2)
CASES = (
    Case(SMALL, 1, FUSED, fused_blocks((8, 1), (8, 4))),
    Case(TWO_CHUNKS, 70, FUSED, fused_blocks((16, 2), (64, 2), (128, 1))),
    Case(LONG_K, 40, FUSED, fused_blocks((8, 8), (48, 1)), "one-expert"),
    Case(SMALL, 1, STREAM, stream_heights(8)),  # each CTA has at most one piece of a phase
    Case(TWO_CHUNKS, 60, STREAM, stream_heights(16, 32, max_parts=16)),  # sums are their own signal
    Case(TWO_CHUNKS, 60, STREAM, stream_heights(16, 48, max_parts=FLAGGED_PARTS)),
    # Some 230 tiles, of which 132 pass both phases in one CTA; 250, of which the others' jobs are whole.
    Case(SMALL, 1150, STREAM, stream_heights(8, max_parts=FLAGGED_PARTS)),
    Case(SMALL, 1250, STREAM[:1], stream_heights(8, max_parts=FLAGGED_PARTS)),
    Case(TWO_CHUNKS, 900, STREAM, stream_heights(8, 64, max_parts=FLAGGED_PARTS), "one-expert"),
    Case(SMALL, 8500, STREAM[:1], stream_heights(64, max_parts=FLAGGED_PARTS)),  # choices in order by a large cluster
    Case(SMALL, 400, STREAM, stream_heights(80, 96, max_parts=FLAGGED_PARTS)),
    Case(MoEShape(3, 384, 192, 2), 40, STREAM, stream_heights(24)),  # half a chunk, half a group of columns
    Case(MANY_CHUNKS, 1, STREAM[:1], stream_heights(8)),  # few jobs, but their CTAs share activations
    Case(SMALL, 1, IN_PLACE, stream_heights(8)),
    Case(SMALL, 1150, IN_PLACE, stream_heights(8, max_parts=FLAGGED_PARTS)),
    Case(MoEShape(3, 384, 176, 2), 40, IN_PLACE, stream_heights(24)),  # boxes beyond the weights, as above
    # All heights of tiles, all slabs; the last items are shared to the step of K.
    Case(LONG_K, 600, PREFILL, everything),
    Case(TWO_CHUNKS, 300, PREFILL, everything, "one-expert"),  # slabs of two chunks
    Case(SHARED, 700, PREFILL, everything),  # most rows of the shared expert are stored, a fifth of the tokens lack it
    Case(WIDE, 500, PREFILL, everything),  # the wide down phase
    Case(WIDE, 5, PREFILL, everything),
    Case(SMALL, 9000, PREFILL, lowest_tiles),  # more items than CTAs: some are dealt out whole
)
ROUTED_CHOICES = (40, 3000, 17_000)
"""For the launch before on its own: one CTA routes, a cluster, all clusters."""


def compile_all() -> None:
    wanted = dict.fromkeys((variant, case.shape, config) for case in CASES for variant, config in case.calls())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = list(pool.map(lambda call: call[0].compile(call[1], [call[2]]), wanted))
    print(f"{len(reports)} configs compiled")


def tensors_on(value: MoEWeights | MoEInputs, device: torch.device) -> dict[str, torch.Tensor]:
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: each.to(device) for name, each in fields.items() if isinstance(each, torch.Tensor)}


def run_case(case: Case, device: torch.device) -> tuple[int, float]:
    """The number of calls and the largest error; leaves when a result is wrong."""
    weights = make_weights(case.shape, seed=0, device=CPU)
    inputs = make_inputs(Workload(case.shape, case.num_tokens, RoutingLaw.parse(case.law), dropped=0.2), CPU)
    expected = expected_output(weights, inputs)
    quantised = inputs.quantise()
    weights, inputs, quantised = (
        dataclasses.replace(value, **tensors_on(value, device)) for value in (weights, inputs, quantised)
    )
    prepared: dict[Variant, object] = {}
    errors = []
    for variant, config in case.calls():
        if variant not in prepared:
            prepared[variant] = variant.prepare(weights)
        for given in (inputs, variant.align(prepared[variant], quantised, config)):
            out = torch.full(expected.shape, torch.nan, dtype=torch.bfloat16).to(device)
            variant.run(prepared[variant], given, out, config)
            accuracy = measure(out.cpu(), expected, variant.tolerance)
            if not passed(accuracy):
                sys.exit(f"WRONG {variant.name} {case} {config}: {accuracy}")
            errors.append(accuracy.rel_err)
    return len(errors), max(errors)


def run_routing(num_choices: int, device: torch.device) -> None:
    """Both forms of routing, which the reference gives too but for the order of an expert's choices. Copies to the host
    are of what is defined."""
    num_experts = 3
    given = torch.randint(-1, num_experts, (num_choices // 2, 2), generator=torch.Generator().manual_seed(0)).int()
    topk_ids, flat = given.to(device), given.flatten()
    tiled = sm90_prologue.empty_tiles(num_choices, num_experts, 64, device)
    aligned = sm90_prologue.empty_alignment(num_choices, num_experts, 16, device)
    for routing in (tiled, aligned):
        sm90_prologue.launch(topk_ids=topk_ids, num_experts=num_experts, aligned=routing)
    tiles = tile_rows(given, 64, num_experts)
    blocks = align_block_size(given, 16, num_experts)
    num_rows = int(tiles.tiles[0, 1])
    num_blocks = int(blocks.num_tokens_post_padded) // 16
    found = tiled.sorted_choices[:num_rows].cpu().long()
    padded = torch.cat((flat, torch.full((1,), num_experts, dtype=torch.int32)))  # a choice that is padding
    in_blocks = [each.sorted_token_ids[: num_blocks * 16].cpu().long() for each in (aligned, blocks)]
    right = (
        torch.equal(tiled.tiles.cpu(), tiles.tiles)
        and torch.equal(flat[found], flat[tiles.sorted_choices[:num_rows].long()])
        and len(found.unique()) == num_rows
        and torch.equal(aligned.expert_ids[:num_blocks].cpu(), blocks.expert_ids[:num_blocks])
        and torch.equal(padded[in_blocks[0]], padded[in_blocks[1]])
        and torch.equal(in_blocks[0].unique(), in_blocks[1].unique())
    )
    if not right:
        sys.exit(f"WRONG routing of {num_choices} choices")


def run(device: torch.device) -> None:
    for num_choices in ROUTED_CHOICES:
        run_routing(num_choices, device)
    total = 0
    for case in CASES:
        if not any(case.calls()):
            continue
        start = time.monotonic()
        num_calls, largest = run_case(case, device)
        total += num_calls
        seconds = time.monotonic() - start
        print(f"{case}: {num_calls} calls right, largest error {largest:.4f} [{seconds:.1f} s]", flush=True)
    print(f"{total} calls and {len(ROUTED_CHOICES)} routings are right", flush=True)


def main() -> None:
    if "--compile" in sys.argv:
        compile_all()
    else:
        run(torch.device("cuda", 0))


if __name__ == "__main__":
    main()
