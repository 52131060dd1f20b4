"""The layer itself.

    out[m] = factor * sum_k topk_weights[m, k] * (W2[e] . Q(swiglu(gate, up)) + b2[e])    where e = topk_ids[m, k],
             gate = W13gate[e] . x[m] + b13gate[e],  up = W13up[e] . x[m] + b13up[e]

All products are of dequantised values and all sums in `dtype`; Q rounds each 128-wide group of each row to e4m3, or
each row as a whole. Most layers have no biases and the plain SwiGLU, silu(gate) * up. Some experts at a time, with
about as many tokens each, so that little exists dequantised and little is padded. A choice of expert -1 contributes
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reference.quant import ActivationScales, dequantise_activations, dequantise_w13, dequantise_weights, quantise_as

ROWS_AT_ONCE = 8192
WEIGHTS_AT_ONCE = {"cpu": 2**22, "cuda": 2**26}
"""Values of w13: what caches hold, or enough for a GPU to be busy."""


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, limit: float | None = None, alpha: float = 1.0, beta: float = 0.0
) -> torch.Tensor:
    """gate * sigmoid(alpha * gate) * (up + beta), of gate clamped to at most `limit` and up to -limit..limit.

    The three numbers are vLLM's swiglu_limit, swiglu_alpha and swiglu_beta: DeepSeek-V4 has a limit of 10 alone,
    gpt-oss and MiniMax-M3 have 7, 1.702 and 1. Both are clamped before the sigmoid; Step-3.5, which clamps silu(gate),
    is another function.
    """
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    gated = torch.nn.functional.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(alpha * gate)
    return gated * (up + beta if beta else up)


def moe(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    routed_scaling_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    swiglu_limit: float | None = None,
    swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0,
    activation_scales: ActivationScales = "group",
) -> torch.Tensor:
    """The layer on quantised tokens; returns [M, H] in `dtype`, fp32 or (the oracle of the oracle) fp64.

    x_q e4m3 [M, H], x_scale [M, ceil(H/128)] or [M, 1], w13 e4m3 [E, 2I, H] with w13_scale
    [E, 2*ceil(I/128), ceil(H/128)] or [E, 2I, 1], w2 e4m3 [E, H, I] with w2_scale [E, ceil(H/128), ceil(I/128)] or
    [E, H, 1], topk_weights [M, top_k], topk_ids int [M, top_k], w13_bias [E, 2I], w2_bias [E, H]. `activation_scales`
    is how Q quantises.
    """

    def outputs(x: torch.Tensor, experts: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        """x [G, T, H] of `experts` [G], w13 [G, 2I, H], w2 [G, H, I] -> [G, T, H]."""
        up_projection = x @ w13.mT
        if w13_bias is not None:
            up_projection += w13_bias[experts, None].to(dtype)
        gate, up = up_projection.chunk(2, dim=-1)  # [G, T, I] each
        values = swiglu(gate, up, swiglu_limit, swiglu_alpha, swiglu_beta)
        activated = quantise_as(values.flatten(0, 1), activation_scales)
        rows = dequantise_activations(*activated, dtype).view_as(values) @ w2.mT
        return rows if w2_bias is None else rows + w2_bias[experts, None].to(dtype)

    x = dequantise_activations(x_q, x_scale, dtype)
    out = torch.zeros_like(x)
    ids, order = topk_ids.flatten().sort(stable=True)  # an expert's choices lie behind each other
    weights = topk_weights.flatten().to(dtype)
    with _true_fp32_products():
        for experts, first, count, most in _groups(ids, w13.shape[1] * w13.shape[2]):
            group_w13 = dequantise_w13(_of(w13, experts), w13_scale[experts], dtype)
            group_w2 = dequantise_weights(_of(w2, experts), w2_scale[experts], dtype)
            for rows in torch.arange(most, device=x.device).split(ROWS_AT_ONCE // len(experts)):
                is_choice = rows < count[:, None]  # [G, T]; the other rows are any
                choice = order[torch.where(is_choice, first[:, None] + rows, 0)]
                token = choice // topk_ids.shape[1]
                rows_out = weights[choice].unsqueeze(-1) * outputs(x[token], experts, group_w13, group_w2)
                out.index_add_(0, token[is_choice], rows_out[is_choice])
    return out.mul_(routed_scaling_factor)


def _of(weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """weights[experts], which not every release of torch has for e4m3."""
    return weights.view(torch.uint8)[experts].view(weights.dtype)


def _groups(
    sorted_ids: torch.Tensor, expert_values: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
    """Experts with about as many choices; where those begin among the sorted ones; how many they are, [G] each; and the
    most of these."""
    ids, counts = sorted_ids.unique_consecutive(return_counts=True)
    begins = counts.cumsum(0) - counts
    by_count = counts.argsort(descending=True)
    by_count = by_count[ids[by_count] >= 0]
    ids, counts, begins = ids[by_count], counts[by_count], begins[by_count]
    sizes = counts.tolist()
    start = 0
    while start < len(sizes):
        at_most = min(WEIGHTS_AT_ONCE[ids.device.type] // expert_values, ROWS_AT_ONCE // sizes[start])
        alike = sum(2 * size >= sizes[start] for size in sizes[start : start + at_most])
        group = slice(start, start + max(alike, 1))
        yield ids[group], begins[group], counts[group], sizes[start]
        start = group.stop


def moe_from_bf16(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    routed_scaling_factor: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **form: Any,
) -> torch.Tensor:
    """The layer on bf16 tokens `x` [M, H]: quantises them, then as `moe`, whose keyword arguments `form` holds."""
    x_q, x_scale = quantise_as(x, form.get("activation_scales", "group"))
    tensors = (x_q, x_scale, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids)
    return moe(*tensors, routed_scaling_factor, dtype, **form)


@contextmanager
def _true_fp32_products() -> Iterator[None]:
    """No TF32 in CUDA's matrix products meanwhile, whatever the caller chose."""
    matmul = torch.backends.cuda.matmul
    chosen = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = chosen
