"""The layer itself.

    out[m] = factor * sum_k topk_weights[m, k] * W2[e] . Q(silu(W13gate[e] . x[m]) * (W13up[e] . x[m]))
             where e = topk_ids[m, k]

All products are of dequantised values and all sums in `dtype`; Q rounds each 128-wide group of each row to e4m3. Expert
by expert, so that only one expert's weights exist dequantised, and in bounded runs of its tokens. A choice of expert -1
contributes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reference.quant import dequantise_activations, dequantise_w13, dequantise_weights, quantise_activations

TOKENS_AT_ONCE = 8192


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
) -> torch.Tensor:
    """The layer on quantised tokens; returns [M, H] in `dtype`, fp32 or (the oracle of the oracle) fp64.

    x_q e4m3 [M, H], x_scale [M, ceil(H/128)], w13 e4m3 [E, 2I, H], w13_scale [E, 2*ceil(I/128), ceil(H/128)],
    w2 e4m3 [E, H, I], w2_scale [E, ceil(H/128), ceil(I/128)], topk_weights [M, top_k], topk_ids int [M, top_k].
    """
    x = dequantise_activations(x_q, x_scale, dtype)
    out = torch.zeros_like(x)
    with _true_fp32_products():
        for expert in topk_ids.unique().tolist():
            if expert == -1:
                continue
            expert_w13 = dequantise_w13(w13[expert], w13_scale[expert], dtype)
            expert_w2 = dequantise_weights(w2[expert], w2_scale[expert], dtype)
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            for some in torch.arange(len(tokens), device=tokens.device).split(TOKENS_AT_ONCE):
                token, slot = tokens[some], slots[some]
                weight = topk_weights[token, slot].to(dtype).unsqueeze(1)
                out.index_add_(0, token, weight * _expert(x[token], expert_w13, expert_w2))
    return out.mul_(routed_scaling_factor)


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
) -> torch.Tensor:
    """The layer on bf16 tokens `x` [M, H]: quantises them, then as `moe`."""
    x_q, x_scale = quantise_activations(x)
    return moe(x_q, x_scale, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, routed_scaling_factor, dtype)


def _expert(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """One expert's feed-forward: x [T, H], w13 [2I, H], w2 [H, I] -> [T, H]."""
    gate, up = (x @ w13.T).chunk(2, dim=1)  # [T, I] each
    activated = torch.nn.functional.silu(gate) * up
    return dequantise_activations(*quantise_activations(activated), x.dtype) @ w2.T


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
