"""silu(gate) * up of every choice, quantised for the down projection; the shares of a split K are summed first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels_triton.ptx import wait_for_predecessor
from kernels_triton.quantise import quantise_rows
from reference.quant import GROUP_SIZE

GROUP = tl.constexpr(GROUP_SIZE)

ROWS_OF_SHARES = 16
"""Rows of `partial` that a program reads, all shares together: gate and up of 16 rows are 32 registers a thread."""


@triton.jit
def silu_multiply(gate, up):
    """silu(gate) * up, elementwise in fp32."""
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=["num_choices"])
def swiglu_kernel(
    partial,
    topk_ids,
    activated,
    activated_scale,
    num_choices,
    INTERMEDIATE_SIZE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
):
    wait_for_predecessor()
    groups: tl.constexpr = INTERMEDIATE_SIZE // GROUP
    choice = (tl.program_id(0) // groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(0) % groups
    # The row of a choice that is not on this rank was never written.
    present = tl.load(topk_ids + choice, mask=choice < num_choices, other=-1) >= 0
    column = group * GROUP + tl.arange(0, GROUP)
    split = tl.arange(0, SPLITS)
    row = split[:, None, None] * num_choices.to(tl.int64) + choice[None, :, None]
    gate_pointers = partial + row * (2 * INTERMEDIATE_SIZE) + column[None, None, :]
    mask = (split < SPLIT_K)[:, None, None] & present[None, :, None]
    gate = tl.sum(tl.load(gate_pointers, mask=mask, other=0.0), axis=0)  # [ROWS, 128]
    up = tl.sum(tl.load(gate_pointers + INTERMEDIATE_SIZE, mask=mask, other=0.0), axis=0)
    quantised, scale = quantise_rows(silu_multiply(gate, up))
    pointers = activated + choice[:, None] * INTERMEDIATE_SIZE + column[None, :]
    tl.store(pointers, quantised, mask=present[:, None])
    tl.store(activated_scale + choice * groups + group, scale, mask=present)


def swiglu(
    partial: torch.Tensor, topk_ids: torch.Tensor, activated: torch.Tensor, activated_scale: torch.Tensor
) -> None:
    """Sum `partial` fp32 [split_k, M * top_k, 2I] over its shares, apply SwiGLU and quantise.

    Writes `activated` e4m3 [M * top_k, I] and `activated_scale` fp32 [M * top_k, I/128], but for choices of expert -1.
    """
    split_k, num_choices, _ = partial.shape
    intermediate_size = activated.shape[1]
    splits = triton.next_power_of_2(split_k)
    rows = max(1, ROWS_OF_SHARES // splits)
    swiglu_kernel[(triton.cdiv(num_choices, rows) * (intermediate_size // GROUP_SIZE),)](
        partial,
        topk_ids,
        activated,
        activated_scale,
        num_choices,
        INTERMEDIATE_SIZE=intermediate_size,
        SPLIT_K=split_k,
        SPLITS=splits,
        ROWS=rows,
        launch_pdl=True,
    )
