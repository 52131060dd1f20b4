"""A small layer on the CPU, and the ways to call it: what the tests of layer.py and of ops.py share."""

from __future__ import annotations

from typing import Any

import recorded
import torch

from workbench import MoELayer, ops, registry
from workbench import table as tables
from workbench.generate import make_inputs
from workbench.problem import InputKind, MoEInputs, MoEShape, MoEWeights, Workload
from workbench.table import Table
from workbench.variant import Config

CPU = torch.device("cpu")
SHAPE = MoEShape(8, 256, 128, 2)
SHARED = MoEShape(9, 256, 192, 3, num_shared_experts=1)
EMPTY = Table(recorded.HERE, (), {})
TORCH_VARIANTS = ("torch.loop", "torch.grouped")


def tensors(weights: MoEWeights) -> tuple[torch.Tensor, ...]:
    return weights.w13, weights.w13_scale, weights.w2, weights.w2_scale


def make_layer(weights: MoEWeights, **options: Any) -> MoELayer:
    shape = weights.shape
    defaults = {"top_k": shape.top_k, "num_shared_experts": shape.num_shared_experts, "variant": "torch.loop"}
    return MoELayer(*tensors(weights), **{**defaults, **options})


def call(layer: MoELayer, inputs: MoEInputs, **options: Any) -> torch.Tensor:
    factor = inputs.routed_scaling_factor
    return layer(
        inputs.tokens,
        inputs.topk_weights,
        inputs.topk_ids,
        **{"x_scale": inputs.x_scale, "routed_scaling_factor": factor, **options},
    )


def call_on_tensors(weights: MoEWeights, inputs: MoEInputs, **options: Any) -> torch.Tensor:
    return ops.fused_moe(
        inputs.tokens, *tensors(weights), inputs.topk_weights, inputs.topk_ids, **{"x_scale": inputs.x_scale, **options}
    )


def directly(name: str, weights: MoEWeights, inputs: MoEInputs, config: Config | None = None) -> torch.Tensor:
    """The variant's own run, around the public call."""
    variant = registry.find(name)
    out = torch.empty(inputs.num_tokens, weights.shape.hidden_size, dtype=torch.bfloat16)
    variant.run(variant.prepare(weights), inputs, out, config or Config())
    return out


def batch(shape: MoEShape, num_tokens: int = 5, input_kind: InputKind = "bf16", dropped: float = 0.0) -> MoEInputs:
    return make_inputs(Workload(shape, num_tokens, input_kind=input_kind, dropped=dropped), CPU)


def recorded_run() -> Any:
    """A variant whose run does nothing, for what must not reach a kernel."""
    variant: Any = recorded.variant("torch.nothing")
    variant.run = lambda *arguments: None
    return variant


def measured(*figures: tuple[str, float], num_tokens: int = 5, input_kind: InputKind = "bf16") -> Table:
    """A table in which each variant's layer takes so many microseconds."""
    variants = registry.variants()
    traces = [
        trace
        for name, median_us in figures
        for trace in recorded.both(
            recorded.key(
                variants[name],
                Config(),
                num_tokens,
                shape=SHAPE,
                input_kind=input_kind,
                sources=tables.sources_digest(variants[name]),
            ),
            median_us,
        )
    ]
    return tables.build(traces, recorded.HERE, variants)
