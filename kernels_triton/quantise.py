"""Quantise bf16 tokens to e4m3 with one scale per 128-wide group: the layer's Q."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels_triton.ptx import wait_for_predecessor
from reference.quant import FP8_MAX, GROUP_SIZE, SMALLEST_AMAX

GROUP = tl.constexpr(GROUP_SIZE)
LARGEST = tl.constexpr(FP8_MAX)
SMALLEST = tl.constexpr(SMALLEST_AMAX)

GROUPS_PER_PROGRAM = 16


@triton.jit
def quantise_rows(values):
    """Quantise each row of `values` fp32 [R, 128] as one group; returns (e4m3 [R, 128], scale fp32 [R]).

    Divisions are rounded to nearest, so that codes equal the reference's.
    """
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(values), axis=1), SMALLEST), LARGEST)
    scaled = tl.div_rn(values, tl.broadcast_to(scale[:, None], values.shape))
    return tl.clamp(scaled, -LARGEST, LARGEST).to(tl.float8e4nv), scale


@triton.jit(do_not_specialize=["num_groups"])
def quantise_kernel(x, x_q, x_scale, num_groups, GROUPS: tl.constexpr):
    wait_for_predecessor()
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < num_groups
    element = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + element, mask=inside[:, None], other=0.0).to(tl.float32)
    quantised, scale = quantise_rows(values)
    tl.store(x_q + element, quantised, mask=inside[:, None])
    tl.store(x_scale + group, scale, mask=inside)


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quant.quantise_activations` for contiguous bf16 `x` [M, H] with H a multiple of 128."""
    num_tokens, hidden_size = x.shape
    x_q = torch.empty_like(x, dtype=torch.float8_e4m3fn)
    x_scale = torch.empty((num_tokens, hidden_size // GROUP_SIZE), dtype=torch.float32, device=x.device)
    num_groups = x_scale.numel()
    if num_groups:
        grid = (triton.cdiv(num_groups, GROUPS_PER_PROGRAM),)
        quantise_kernel[grid](x, x_q, x_scale, num_groups, GROUPS=GROUPS_PER_PROGRAM, launch_pdl=True)
    return x_q, x_scale
