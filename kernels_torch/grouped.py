"""torch.grouped: all experts in two grouped bf16 matrix products.

Over loop.py it adds that the host never waits: choices are sorted by expert on the device, and the products take the
ends of the groups from device memory, so `run` can be captured in a CUDA graph. The price is a bf16 copy of the
weights, twice the bytes of the FP8 ones, and accuracy: operands and what the up projection returns are rounded to
bf16, which moves some values across a rounding boundary of Q. Over a batch that is a relative error of about 0.017, for
a single token up to 0.04.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import grouped_mm

from reference import moe, quant
from reference.moe import swiglu
from reference.quant import dequantise_activations, dequantise_w13, dequantise_weights, quantise_as
from workbench.problem import MoEInputs, MoEShape, MoEWeights
from workbench.variant import Config, Support, Variant, register

ALIGNMENT = 8
"""grouped_mm wants rows of 16 bytes, 8 bf16 elements, or a multiple."""


@dataclass(frozen=True)
class Prepared:
    """The weights in bf16, transposed as grouped_mm takes its right operand."""

    shape: MoEShape
    w13: torch.Tensor
    """bf16 [E, H, 2I]"""
    w2: torch.Tensor
    """bf16 [E, I, H]"""
    experts: torch.Tensor
    """int64 [E], 0, 1, 2, ..."""
    w13_bias: torch.Tensor | None
    """fp32 [E, 2I]"""
    w2_bias: torch.Tensor | None
    """fp32 [E, H]"""


@register
class TorchGrouped(Variant):
    """Sort choices by expert, grouped up product, SwiGLU and Q, grouped down product, weighted sum slot by slot."""

    name = "torch.grouped"
    backend = "torch"
    tolerance = 0.05

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        for name, size in (("H", shape.hidden_size), ("I", shape.intermediate_size)):
            if size % ALIGNMENT:
                return Support.no(f"grouped_mm needs {name} to be a multiple of {ALIGNMENT}, got {size}")
        if device.type == "cpu":
            return Support.yes()
        if device.type != "cuda" or not torch.cuda.is_available():
            return Support.no(f"needs a CPU or a CUDA device, got {device}")
        if torch.cuda.get_device_capability(device)[0] not in (9, 10):
            return Support.no("grouped_mm reads the group ends on the host on GPUs other than sm_90 and sm_100")
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        return (Config(),)

    def prepare(self, weights: MoEWeights) -> Prepared:
        w13 = torch.empty(weights.w13.shape, dtype=torch.bfloat16, device=weights.device)
        w2 = torch.empty(weights.w2.shape, dtype=torch.bfloat16, device=weights.device)
        for expert in range(weights.shape.num_experts):  # one fp32 expert at a time
            w13[expert] = dequantise_w13(weights.w13[expert], weights.w13_scale[expert])
            w2[expert] = dequantise_weights(weights.w2[expert], weights.w2_scale[expert])
        experts = torch.arange(weights.shape.num_experts, device=weights.device)
        biases = weights.w13_bias, weights.w2_bias
        return Prepared(weights.shape, w13.transpose(1, 2), w2.transpose(1, 2), experts, *biases)

    def run(self, prepared: Prepared, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        if inputs.num_tokens == 0:
            return
        inputs = inputs.quantise()
        assert inputs.x_q is not None and inputs.x_scale is not None
        x = dequantise_activations(inputs.x_q, inputs.x_scale, torch.bfloat16)

        shape = prepared.shape
        num_experts, top_k = shape.num_experts, shape.top_k
        absent = inputs.topk_ids < 0  # [M, top_k]; sorted behind every expert
        experts, choices = inputs.topk_ids.masked_fill(absent, num_experts).flatten().long().sort(stable=True)
        ends = torch.searchsorted(experts, prepared.experts, right=True, out_int32=True)

        # Rows behind the last group are left as they were allocated: never read but under `absent`.
        projected = grouped_mm(x[choices // top_k], prepared.w13, offs=ends).float()
        if prepared.w13_bias is not None:
            projected += prepared.w13_bias[experts.clamp(max=num_experts - 1)]
        gate, up = projected.chunk(2, dim=1)
        activated = swiglu(gate, up, shape.swiglu_limit, shape.swiglu_alpha, shape.swiglu_beta)
        activated = dequantise_activations(*quantise_as(activated, shape.activation_scales), torch.bfloat16)
        rows = grouped_mm(activated, prepared.w2, offs=ends)  # [M * top_k, H] in sorted order
        if prepared.w2_bias is not None:
            rows = rows + prepared.w2_bias[experts.clamp(max=num_experts - 1)]

        row_of_choice = torch.empty_like(choices).scatter_(0, choices, torch.arange(len(choices), device=out.device))
        total = torch.zeros_like(out, dtype=torch.float32)
        for row, weight, missing in zip(row_of_choice.view(-1, top_k).T, inputs.topk_weights.T, absent.T, strict=True):
            present = rows[row].float().masked_fill_(missing.unsqueeze(1), 0.0)
            total.addcmul_(present, weight.unsqueeze(1))
        out.copy_(total.mul_(inputs.routed_scaling_factor))

    def sources(self) -> tuple[Path, ...]:
        return Path(__file__), Path(moe.__file__), Path(quant.__file__)
