"""Checks and times cuda.sm90_stream, or with the argument prefill cuda.sm90_prefill, against copies of it, interleaved,
on a GPU:

    python experiments/2026-11-27_fused_tickets/measure.py compile cells...   # without a GPU: all kernels of the rest
    python experiments/2026-11-27_fused_tickets/measure.py check mixed cells=dsv3_tp16:64,256 cells=qwen3next_tp4:512

check   against the reference on small shapes, several laws of routing, choices dropped, aligned ahead or not
mixed   many calls of mixed sizes on one stream without a wait between, each held against the result of a quiet call
cells   us per call by the workbench's timing, kernel scope: each copy with its default config, and with options=
        rows=24,32 in_flight=4 parts=8,16 also this tree with other ones; under laws=uniform,zipf:1.2 or the first alone
own_w2  for copies that lay out w2 in another way
layer   cells are calls on bf16 tokens
quantised  cells are calls on quantised tokens whose choices are not grouped

A copy is a package beside this tree, named on the command line as copy=NAME: kernels_cuda of another revision with its
package renamed, for example by

    git archive REVISION kernels_cuda | tar x && mv kernels_cuda base_kernels
    sed -i 's/kernels_cuda/base_kernels/g; s/"cuda\\.sm90/"base.sm90/g' base_kernels/*.py
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from workbench import timing
from workbench.generate import make_inputs, make_weights
from workbench.models import MODELS, shape_of_alias, shape_of_model
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.roofline import floor_us
from workbench.variant import Config
from workbench.verify import expected_output

DEVICE = torch.device("cuda", 0)
SMALL_SHAPES = (
    MoEShape(300, 512, 256, 5, num_shared_experts=1),
    MoEShape(33, 7168, 128, 9, num_shared_experts=1),
    MoEShape(600, 1152, 128, 4),
    MoEShape(8, 1152, 1024, 2),
)
SMALL_TOKENS = (1, 9, 129, 700)
LAWS = ("uniform", "zipf:1.2", "one-expert")
NEW = "kernels_cuda"


def plain_and_deterministic(package: str) -> list:
    """The variant of a package in its two forms."""
    kernel = "Prefill" if "prefill" in sys.argv else "Stream"
    module = importlib.import_module(f"{package}.sm90_{kernel.lower()}")
    return [getattr(module, f"SM90{kernel}{form}")() for form in ("", "Deterministic")]


def relative(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.float() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def small_configs(variant, shape: MoEShape, num_tokens: int) -> list[Config]:
    return list(itertools.islice(variant.configs(shape, num_tokens), 1 if variant.deterministic else 2))


def check() -> bool:
    worst, failures, number = 0.0, 0, 0
    for variant, shape in itertools.product(plain_and_deterministic(NEW), SMALL_SHAPES):
        weights = make_weights(shape, seed=0, device=DEVICE)
        prepared = variant.prepare(weights)
        for law, num_tokens, dropped in itertools.product(LAWS, SMALL_TOKENS, (0.0, 0.4)):
            workload = Workload(shape, num_tokens, RoutingLaw.parse(law), seed=number, dropped=dropped)
            inputs = make_inputs(workload, DEVICE)
            expected = expected_output(weights, inputs)
            for config in small_configs(variant, shape, num_tokens):
                for batch in (inputs, variant.align(prepared, inputs, config)):
                    number += 1
                    out = torch.full(expected.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
                    variant.run(prepared, batch, out, config)
                    error = relative(out, expected)
                    worst = max(worst, error)
                    if not error < 0.03:
                        failures += 1
                        print("FAILED", variant.name, workload, config, batch is inputs, error, flush=True)
    print(f"check: {number} calls, largest error {worst:.4f}, {failures} failures", flush=True)
    return failures == 0


def mixed(num_calls: int = 4000) -> bool:
    failures = 0
    variant = plain_and_deterministic(NEW)[0]
    for shape in SMALL_SHAPES[:3]:
        weights = make_weights(shape, seed=0, device=DEVICE)
        prepared = variant.prepare(weights)
        cases = []
        for num_tokens, law in itertools.product(SMALL_TOKENS, LAWS):
            inputs = make_inputs(Workload(shape, num_tokens, RoutingLaw.parse(law), seed=num_tokens), DEVICE)
            config = next(iter(variant.configs(shape, num_tokens)))
            cases.append((inputs, config, expected_output(weights, inputs)))
        order = torch.randint(len(cases), (num_calls,), generator=torch.Generator().manual_seed(0)).tolist()
        errors = []
        for index in order:
            inputs, config, expected = cases[index]
            out = torch.full(expected.shape, torch.nan, dtype=torch.bfloat16, device=DEVICE)
            variant.run(prepared, inputs, out, config)
            errors.append((out.float() - expected).norm() / expected.norm())
        largest = torch.stack(errors).nan_to_num(torch.inf).max().item()
        failures += not largest < 0.03
        print(f"mixed: {num_calls} calls of {shape}, largest error {largest:.4f}", flush=True)
    return failures == 0


def shape_named(name: str) -> MoEShape:
    """A model's name with _tp and the number of ranks, or an alias."""
    model, separator, ranks = name.rpartition("_tp")
    return shape_of_model(model, int(ranks)) if separator and model in MODELS else shape_of_alias(name)


def candidates(arguments: list[str], shape: MoEShape, num_tokens: int) -> list[tuple[str, object, Config]]:
    """Label, variant and config."""
    kinds = ("rows=", "in_flight=", "parts=")
    options = dict(argument.split("=") for argument in arguments if argument.startswith(kinds))
    found = []
    for package in (NEW, *(argument.removeprefix("copy=") for argument in arguments if argument.startswith("copy="))):
        variant = plain_and_deterministic(package)[0]
        config = next(iter(variant.configs(shape, num_tokens)))
        found.append((package.removesuffix("_kernels").replace(NEW, "new"), variant, config))
    new = found[0][1]
    default = found[0][2]
    wanted = {int(rows) for rows in options.get("rows", "").split(",") if rows}
    rows_that_are_near = [
        config
        for config in new.configs(shape, num_tokens)
        if config.integer("max_rows") in wanted and config != default and config["max_rows"] >= default["max_rows"] / 2
    ]
    found += [(f"rows {config['max_rows']}", new, config) for config in rows_that_are_near]
    for in_flight in options.get("in_flight", "").split(","):
        if in_flight and int(in_flight) < default.integer("num_stages"):
            found.append((f"in flight {in_flight}", new, Config(**{**dict(default), "num_in_flight": int(in_flight)})))
    for parts in options.get("parts", "").split(","):
        if parts and 4 <= num_tokens <= 128 and int(parts) != default["max_parts"]:
            found.append((f"parts {parts}", new, Config(**{**dict(default), "max_parts": int(parts)})))
    return found


def cells_of(arguments: list[str]) -> list[tuple[str, int]]:
    lists = [argument.removeprefix("cells=").split(":") for argument in arguments if argument.startswith("cells=")]
    return [(alias, int(tokens)) for alias, numbers in lists for tokens in numbers.split(",")]


def time_cells(arguments: list[str]) -> None:
    backend = timing.CudaBackend(DEVICE)
    name = torch.cuda.get_device_name(DEVICE)
    named = [argument.removeprefix("laws=").split(",") for argument in arguments if argument.startswith("laws=")]
    laws = named[0] if named else ["uniform"]
    for alias, group in itertools.groupby(cells_of(arguments), key=lambda cell: cell[0]):
        shape = shape_named(alias)
        weights = make_weights(shape, seed=0, device=DEVICE)
        prepared: dict[object, object] = {}
        for (_, num_tokens), law in itertools.product(group, laws):
            started = time.monotonic()
            workloads = [Workload(shape, num_tokens, RoutingLaw.parse(law), seed=seed) for seed in range(6)]
            batches = [make_inputs(workload, DEVICE) for workload in workloads]
            out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=DEVICE)
            expected = expected_output(weights, batches[0])
            armed, errors, configs = [], {}, {}
            for label, variant, config in candidates(arguments, shape, num_tokens):
                if variant.name not in prepared:
                    own = prepared[variant.name] = variant.prepare(weights)
                    shared = next(iter(prepared.values()))
                    if "prefill" not in arguments:  # where weights lie is worth up to 1.5 us at small batches
                        own.tiles, own.params.w13 = (shared.tiles[0], own.tiles[1]), shared.params.w13
                        if "own_w2" not in arguments:
                            own.tiles, own.params.w2 = shared.tiles, shared.params.w2
                own = prepared[variant.name]
                if "layer" in arguments:
                    aligned = batches
                elif "quantised" in arguments:
                    aligned = [batch.quantise() for batch in batches]
                else:
                    aligned = [variant.align(own, batch, config) for batch in batches]
                calls = [
                    lambda batch=batch, variant=variant, own=own, config=config, out=out: variant.run(
                        own, batch, out, config
                    )
                    for batch in aligned
                ]
                armed.append(timing.arm(timing.Candidate(label, calls, True), backend))
                calls[0]()
                errors[label], configs[label] = relative(out, expected), config
            measured = timing.measure(armed, backend, timing.Effort(num_samples=16))
            floor = statistics.mean(floor_us(shape, batch.topk_ids, "bf16", name) or 0.0 for batch in batches)
            figures = "  ".join(
                f"{label} {found.median_us:.1f} ({configs[label]['max_rows']})" for label, found in measured.items()
            )
            error, seconds = max(errors.values()), time.monotonic() - started
            print(
                f"{alias} {num_tokens} {law}: floor {floor:.1f}  {figures}  error {error:.4f} [{seconds:.1f} s]",
                flush=True,
            )


def compile_all(arguments: list[str]) -> None:
    """What the other arguments would need, for 132 SMs."""
    wanted = {}
    for alias, num_tokens in cells_of(arguments):
        shape = shape_named(alias)
        for _, variant, config in candidates(arguments, shape, num_tokens):
            wanted[variant.name, shape, config] = (variant, shape, config)
    if "check" in arguments or "mixed" in arguments:
        for variant, shape, num_tokens in itertools.product(plain_and_deterministic(NEW), SMALL_SHAPES, SMALL_TOKENS):
            for config in small_configs(variant, shape, num_tokens):
                wanted[variant.name, shape, config] = (variant, shape, config)
    print(len(wanted), "to compile", flush=True)
    with ThreadPoolExecutor(2) as pool:
        reports = pool.map(lambda each: each[0].compile(each[1], [each[2]])[-1], wanted.values())
        for (name, shape, config), report in zip(wanted, reports, strict=True):
            if not report.clean:
                print("NOT CLEAN", name, shape, config, report, flush=True)


def main(arguments: list[str]) -> int:
    if "compile" in arguments:
        compile_all(arguments)
        return 0
    print(torch.cuda.get_device_name(DEVICE), flush=True)
    if "check" in arguments and not check():
        return 1
    if "mixed" in arguments and not mixed():
        return 1
    time_cells(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
