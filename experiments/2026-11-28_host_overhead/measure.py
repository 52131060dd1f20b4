"""What a call costs on the host: a variant's `run`, a layer's call and `fused_moe`, for every CUDA variant.

    PYTHONPATH=. python experiments/2026-11-28_host_overhead/measure.py [--no-gpu] [variant ...]    default the three

On a GPU calls are enqueued back to back on an idle device, fewer than its queue of launches holds, so that none waits
for it; figures are medians. With --no-gpu tensors are small and on the CPU, compiling and loading are left out, and
each launch calls a function of the C library that returns 0: what is left is what Python and torch do. Other work on
the machine only adds to it, so figures are the least of all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from kernels_cuda import launch, sm90, tma
from workbench import MoELayer, fused_moe, registry
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEInputs, MoEShape, MoEWeights, Workload
from workbench.variant import Support

VARIANTS = ("cuda.sm90_fused", "cuda.sm90_stream", "cuda.sm90_prefill")
SHAPES, TOKENS = ("dsv3_tp8", "qwen3next_tp4"), (1, 64, 4096)
SMALL_SHAPE, FEW_TOKENS = MoEShape(16, 512, 128, 9, 1), (1, 64)
CALLS, ROUNDS, NUM_SMS = 100, 31, 132
COLUMNS = ("run", "run fp8", "run aligned", "layer", "fused_moe")
HEADER = f"{'layer':14}{'M':>6}  {'variant':26}" + "".join(f"{name:>12}" for name in (*COLUMNS, "l-run", "f-run"))

Step = Callable[[], Any]


def host_us(steps: dict[str, Step], on_gpu: bool) -> dict[str, float]:
    """Microseconds of the host for each step, measured in turns; waiting for the device is not counted."""
    synchronize: Step = torch.cuda.synchronize if on_gpu else int
    typical: Callable[[list[float]], float] = statistics.median if on_gpu else min
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter_ns()
            for _ in range(CALLS):
                step()
            samples[name].append((time.perf_counter_ns() - start) / 1e3 / CALLS)
    synchronize()
    return {name: typical(some) for name, some in samples.items()}


def measured(weights: MoEWeights, num_tokens: int, name: str) -> str:
    """One line of the table."""
    shape, device = weights.shape, weights.device
    tensors = (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale)
    shared = {"num_shared_experts": shape.num_shared_experts, "variant": name}
    layer = MoELayer(*tensors, top_k=shape.top_k, **shared)
    batch = make_inputs(Workload(shape, num_tokens), device)
    out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
    variant = registry.find(name)
    config = layer.choice(num_tokens)[1]
    layer.warm([num_tokens])
    prepared = layer.prepared[name]

    def run(inputs: MoEInputs) -> Step:
        return functools.partial(variant.run, prepared, inputs, out, config)

    quantised = batch.quantise()
    routed = (batch.topk_weights, batch.topk_ids)
    steps = {
        "run": run(batch),
        "run fp8": run(quantised),
        "run aligned": run(variant.align(prepared, quantised, config)),
        "layer": functools.partial(layer, batch.tokens, *routed, out=out),
        "fused_moe": functools.partial(fused_moe, batch.tokens, *tensors, *routed, out=out, **shared),
    }
    for step in steps.values():
        step()
    host = host_us(steps, on_gpu=device.type == "cuda")
    host |= {"l-run": host["layer"] - host["run"], "f-run": host["fused_moe"] - host["run"]}
    figures = "".join(f"{host[column]:>12.2f}" for column in (*COLUMNS, "l-run", "f-run"))
    return f"{shape.name or 'small':14}{num_tokens:>6}  {name:26}{figures}"


def returned(value: Any, *given: Any) -> Any:
    return value


@contextlib.contextmanager
def without_a_gpu() -> Iterator[None]:
    """CUDA variants run on CPU tensors, and launch nothing."""
    take = ctypes.CDLL(None).pthread_equal  # 0 for two addresses that differ
    take.argtypes = [ctypes.c_void_p] * 4

    def load(
        cubin: object,
        num_threads: int,
        cluster_size: int,
        dynamic_smem_bytes: int,
        device: torch.device,
        *,
        all_resident: bool = False,
    ) -> launch.Kernel:
        max_clusters = NUM_SMS // cluster_size
        return launch.kernel_of(
            "stub", 0xF00, num_threads, cluster_size, dynamic_smem_bytes, max_clusters, 0, all_resident
        )

    registry.variants()
    with contextlib.ExitStack() as stack:
        for module in [module for name, module in sys.modules.items() if name.startswith("kernels_cuda.sm90_")]:
            for name, stub in (("load", load), ("compile_kernel", functools.partial(returned, None))):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stub))
        for owner, name, value in (
            (launch, "_launcher", take),
            (sm90, "supports_device", Support.yes()),
            (tma, "encode", bytes(tma.TENSOR_MAP_BYTES)),
            (torch.cuda, "get_device_properties", SimpleNamespace(multi_processor_count=NUM_SMS)),
            (torch._C, "_cuda_getCurrentRawStream", 0),
        ):
            stack.enter_context(mock.patch.object(owner, name, functools.partial(returned, value), create=True))
        yield


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-gpu", action="store_true")
    parser.add_argument("variants", nargs="*", default=VARIANTS)
    given = parser.parse_args()
    if given.no_gpu:
        torch.set_num_threads(1)
        device, shapes, tokens, name = "cpu", [SMALL_SHAPE], FEW_TOKENS, "no GPU"
    else:
        device, shapes, tokens = "cuda:0", [shape_of_alias(alias) for alias in SHAPES], TOKENS
        name = torch.cuda.get_device_name(device)
    with without_a_gpu() if given.no_gpu else contextlib.nullcontext():
        print(f"{name}, torch {torch.__version__}; microseconds of the host")
        print(HEADER)
        for shape in shapes:
            weights = make_weights(shape, 0, device)
            for num_tokens in tokens:
                for variant in given.variants:
                    print(measured(weights, num_tokens, variant), flush=True)
            del weights


if __name__ == "__main__":
    main()
