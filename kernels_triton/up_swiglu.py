"""The up projection with SwiGLU and quantisation in its epilogue: the product stays in fp32 registers until it is e4m3.

One program computes the gate rows and the up rows of one 128-wide group of I for one block of choices. Against
`grouped_gemm` followed by `swiglu` it saves a launch and a round trip of M * top_k * 2I values, and gives up split K:
it wins where blocks are many.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels_triton.grouped_gemm import GemmConfig, along_tokens, block_expert, multiply
from kernels_triton.ptx import wait_for_predecessor
from kernels_triton.quantise import quantise_rows
from kernels_triton.swiglu import silu_multiply
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting

GROUP = tl.constexpr(GROUP_SIZE)


@triton.jit(do_not_specialize=["num_choices"])
def up_swiglu_kernel(
    x_q,
    x_scale,
    w13,
    w13_scale,
    activated,
    activated_scale,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    num_choices,
    HIDDEN_SIZE: tl.constexpr,
    INTERMEDIATE_SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SWAP: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    k_blocks: tl.constexpr = HIDDEN_SIZE // GROUP
    groups: tl.constexpr = INTERMEDIATE_SIZE // GROUP
    group = tl.program_id(0) % groups
    block = tl.program_id(0) // groups
    wait_for_predecessor()
    expert = block_expert(expert_ids, num_tokens_post_padded, block, BLOCK_M).to(tl.int64)
    if expert < 0:
        return

    choice = tl.load(sorted_token_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = choice < num_choices
    token = (choice // TOP_K).to(tl.int64)
    k = tl.arange(0, GROUP)
    x_pointers = x_q + token[:, None] * HIDDEN_SIZE + k[None, :]
    x_scale_pointers = x_scale + token * k_blocks
    gate_row = expert * (2 * INTERMEDIATE_SIZE) + group * GROUP
    gate_pointers = w13 + gate_row * HIDDEN_SIZE + tl.arange(0, GROUP)[:, None] * HIDDEN_SIZE + k[None, :]
    up_pointers = gate_pointers + INTERMEDIATE_SIZE * HIDDEN_SIZE
    gate_scales = w13_scale + (expert * (2 * groups) + group) * k_blocks
    up_scales = gate_scales + groups * k_blocks

    gate = tl.zeros((GROUP, BLOCK_M) if SWAP else (BLOCK_M, GROUP), tl.float32)
    up = tl.zeros((GROUP, BLOCK_M) if SWAP else (BLOCK_M, GROUP), tl.float32)
    for k_block in tl.range(0, k_blocks, num_stages=NUM_STAGES):
        tokens = tl.load(x_pointers + k_block * GROUP, mask=valid[:, None], other=0.0)
        scale = tl.load(x_scale_pointers + k_block, mask=valid, other=0.0)
        gate_weights = tl.load(gate_pointers + k_block * GROUP)
        up_weights = tl.load(up_pointers + k_block * GROUP)
        gate_scale = scale * tl.load(gate_scales + k_block)
        up_scale = scale * tl.load(up_scales + k_block)
        gate += multiply(tokens, gate_weights, SWAP) * along_tokens(gate_scale, SWAP)
        up += multiply(tokens, up_weights, SWAP) * along_tokens(up_scale, SWAP)

    value = silu_multiply(gate, up)
    quantised, value_scale = quantise_rows(tl.trans(value) if SWAP else value)
    row = choice.to(tl.int64)
    tl.store(activated + row[:, None] * INTERMEDIATE_SIZE + group * GROUP + k[None, :], quantised, mask=valid[:, None])
    tl.store(activated_scale + row * groups + group, value_scale, mask=valid)


def up_swiglu(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    activated: torch.Tensor,
    activated_scale: torch.Tensor,
    routing: AlignedRouting,
    top_k: int,
    config: GemmConfig,
) -> None:
    """Q(silu(gate) * up) of every choice: `activated` e4m3 [M * top_k, I], `activated_scale` fp32 [M * top_k, I/128].

    Inputs as at the head of workbench/problem.py; rows of choices that `routing` leaves out are not written. Of
    `config`, swap, num_warps and num_stages count: a tile is one group, and K is not shared.
    """
    num_choices, intermediate_size = activated.shape
    up_swiglu_kernel[(routing.expert_ids.numel() * (intermediate_size // GROUP_SIZE),)](
        x_q,
        x_scale,
        w13,
        w13_scale,
        activated,
        activated_scale,
        routing.sorted_token_ids,
        routing.expert_ids,
        routing.num_tokens_post_padded,
        num_choices,
        HIDDEN_SIZE=x_q.shape[1],
        INTERMEDIATE_SIZE=intermediate_size,
        TOP_K=top_k,
        BLOCK_M=routing.block_size,
        SWAP=config.swap,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        launch_pdl=True,
    )
