"""The weighted sum of each token's expert outputs: a gather, so that the result is the same bit for bit every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels_triton.ptx import wait_for_predecessor

COLUMNS = 1024


@triton.jit
def combine_kernel(
    expert_out,
    topk_ids,
    topk_weights,
    out,
    factor,
    HIDDEN_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    wait_for_predecessor()
    num_slabs: tl.constexpr = (HIDDEN_SIZE + COLUMNS - 1) // COLUMNS
    token = (tl.program_id(0) // num_slabs).to(tl.int64)
    column = (tl.program_id(0) % num_slabs) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HIDDEN_SIZE
    total = tl.zeros((COLUMNS,), tl.float32)
    for slot in tl.static_range(TOP_K):
        choice = token * TOP_K + slot
        # The row of a choice that is not on this rank was never written.
        present = tl.load(topk_ids + choice) >= 0
        row = tl.load(expert_out + choice * HIDDEN_SIZE + column, mask=inside & present, other=0.0)
        weight = tl.load(topk_weights + choice, mask=present, other=0.0)
        total += weight * row.to(tl.float32)
    tl.store(out + token * HIDDEN_SIZE + column, (total * factor).to(tl.bfloat16), mask=inside)


def combine(
    expert_out: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
    routed_scaling_factor: float,
) -> None:
    """out[m] = factor * sum of topk_weights[m, k] * expert_out[m, k] over the choices with an id >= 0.

    `expert_out` bf16 [M, top_k, H], `out` bf16 [M, H], sums in fp32.
    """
    num_tokens, hidden_size = out.shape
    combine_kernel[(num_tokens * triton.cdiv(hidden_size, COLUMNS),)](
        expert_out,
        topk_ids,
        topk_weights,
        out,
        routed_scaling_factor,
        HIDDEN_SIZE=hidden_size,
        TOP_K=topk_ids.shape[1],
        COLUMNS=COLUMNS,
        launch_pdl=True,
    )
