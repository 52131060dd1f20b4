"""Calls of a variant as the experiments make them: with its default configuration, without one of its kernels, or of
kernels that are patched to write down what they do. Scripts find it with the repository's root on PYTHONPATH."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import cupy
import numpy
import torch

from kernels_cuda.compile import Cubin
from workbench.generate import make_inputs, make_weights
from workbench.models import shape_of_alias
from workbench.problem import MoEShape, RoutingLaw, Workload
from workbench.variant import Config, Variant

NUM_CTAS = 132
FLUSH_BYTES = 384 << 20
UNIFORM = RoutingLaw("uniform")


@dataclass(frozen=True)
class Case:
    """A batch size of a layer, and the configuration that a variant starts with there."""

    alias: str
    shape: MoEShape
    num_tokens: int
    config: Config

    def __str__(self) -> str:
        return f"{self.alias}:{self.num_tokens}"


def compiled_cases(variant: Variant, cases: Iterable[str]) -> list[Case]:
    """Those named alias:M, their kernels compiled, which needs no GPU."""
    found = []
    for case in cases:
        alias, num_tokens = case.split(":")
        shape = shape_of_alias(alias)
        config = next(iter(variant.configs(shape, int(num_tokens))))
        variant.compile(shape, [config])
        found.append(Case(alias, shape, int(num_tokens), config))
    return found


def no_kernel() -> Any:
    """In the place of a kernel: its launches do nothing."""
    return SimpleNamespace(
        max_clusters=NUM_CTAS, bind=lambda params, *_, **__: SimpleNamespace(params=params, enqueue=lambda stream: None)
    )


def call_on_cold_l2(
    variant: Variant,
    shape: MoEShape,
    num_tokens: int,
    config: Config,
    *,
    routing: RoutingLaw = UNIFORM,
    times: int = 3,
) -> None:
    """Calls of the kernels on aligned inputs, of which the last is what a patched kernel has written down."""
    device = torch.device("cuda", 0)
    prepared = variant.prepare(make_weights(shape, seed=0, device=device))
    inputs = make_inputs(Workload(shape, num_tokens, routing, seed=1, input_kind="fp8"), device)
    aligned = variant.align(prepared, inputs, config)
    out = torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=device)
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    for _ in range(times):
        flush.sum()
        variant.run(prepared, aligned, out, config)
    torch.cuda.synchronize()


def memory_of(cubin: Cubin, name: str, columns: int) -> cupy.ndarray:
    """The variable `name` of a loaded kernel, 64-bit words [NUM_CTAS, columns]."""
    module = cupy.RawModule(path=str(cubin.path))
    return cupy.ndarray((NUM_CTAS, columns), dtype=cupy.uint64, memptr=module.get_global(name))


def written_down(cubin: Cubin, name: str, columns: int) -> numpy.ndarray:
    """What memory_of() holds, signed."""
    return cupy.asnumpy(memory_of(cubin, name, columns)).astype(numpy.int64)
