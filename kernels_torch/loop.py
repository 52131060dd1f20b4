"""torch.loop: some experts after the others, on fp32 values dequantised on the spot.

The simplest implementation: any shape in any form, any device, no memory beyond those dequantised experts. It asks the
device which experts were hit, so it cannot be captured in a CUDA graph. See grouped.py for what is gained by asking
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from reference import moe, quant
from reference.moe import swiglu
from reference.quant import dequantise_activations, dequantise_w13, dequantise_weights, quantise_as
from workbench.problem import MoEInputs, MoEShape, MoEWeights
from workbench.variant import Config, Support, Variant, register


@register
class TorchLoop(Variant):
    """Per expert: gather its tokens, two fp32 products, add the weighted rows into an fp32 sum."""

    name = "torch.loop"
    backend = "torch"
    graph_capturable = False
    tolerance = 0.005

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        return (Config(),)

    def prepare(self, weights: MoEWeights) -> MoEWeights:
        return weights

    def run(self, prepared: MoEWeights, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        weights, shape, inputs = prepared, prepared.shape, inputs.quantise()
        assert inputs.x_q is not None and inputs.x_scale is not None
        x = dequantise_activations(inputs.x_q, inputs.x_scale)
        total = torch.zeros_like(x)
        for expert in inputs.topk_ids.unique().tolist():
            if expert == -1:
                continue
            tokens, slots = (inputs.topk_ids == expert).nonzero(as_tuple=True)
            w13 = dequantise_w13(weights.w13[expert], weights.w13_scale[expert])
            projected = x[tokens] @ w13.T
            if weights.w13_bias is not None:
                projected += weights.w13_bias[expert]
            gate, up = projected.chunk(2, dim=1)
            activated = swiglu(gate, up, shape.swiglu_limit, shape.swiglu_alpha, shape.swiglu_beta)
            w2 = dequantise_weights(weights.w2[expert], weights.w2_scale[expert])
            rows = dequantise_activations(*quantise_as(activated, shape.activation_scales)) @ w2.T
            if weights.w2_bias is not None:
                rows += weights.w2_bias[expert]
            total.index_add_(0, tokens, rows * inputs.topk_weights[tokens, slots].unsqueeze(1))
        out.copy_(total * inputs.routed_scaling_factor)

    def sources(self) -> tuple[Path, ...]:
        return Path(__file__), Path(moe.__file__), Path(quant.__file__)
