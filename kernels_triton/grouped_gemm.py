"""FP8 matrix products of grouped rows with each group's expert: `out[choice] = a[choice // rows_per_token] . W[e]^T`.

A block holds up to BLOCK_M choices of one expert (`align.py`). The tensor cores take at least 64 rows of their first
operand: when blocks are shorter, SWAP makes the weights that operand and the choices the columns, because Triton 3.6
compiles a short first operand to HMMA on fp8 unpacked to fp16.

One program computes TILES neighbouring tiles of BLOCK_N columns for one block. The programs of a block, and then those
of the expert's next block, follow each other, so that an expert's weights come from L2 after their first use. With
SPLIT_K > 1 a program sums a share of K, for batches that hit too few experts to fill the GPU; the reader of `out` sums
the shares.

The number of stages is given to each loop rather than to the launch: Triton then fetches the scales ahead too, not only
the operands of the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernels_triton.ptx import prefetch_l2, wait_for_predecessor
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting

GROUP = tl.constexpr(GROUP_SIZE)


@triton.jit
def multiply(tokens, weights, SWAP: tl.constexpr):
    """[BLOCK_M, K] with [BLOCK_N, K]: fp32 [BLOCK_M, BLOCK_N], or [BLOCK_N, BLOCK_M] when swapped."""
    if SWAP:
        return tl.dot(weights, tl.trans(tokens))
    else:
        return tl.dot(tokens, tl.trans(weights))


@triton.jit
def along_tokens(vector, SWAP: tl.constexpr):
    """A vector over a block's choices, shaped to broadcast over `multiply`'s result."""
    return vector[None, :] if SWAP else vector[:, None]


@triton.jit
def along_columns(vector, SWAP: tl.constexpr):
    """A vector over a tile's output columns, shaped to broadcast over `multiply`'s result."""
    return vector[:, None] if SWAP else vector[None, :]


@triton.jit
def block_expert(expert_ids, num_tokens_post_padded, block, BLOCK_M: tl.constexpr):
    """The expert of a block, or -1 when the block is past the end of the routing."""
    in_use = block * BLOCK_M < tl.load(num_tokens_post_padded)
    return tl.load(expert_ids + block, mask=in_use, other=-1)


@triton.jit
def prefetch_tiles(w, first_row, K: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr):
    """Ask L2 for the weights of `TILES` tiles, rows `first_row` onwards of `w` [., K]."""
    line = tl.arange(0, BLOCK_N) * K
    for tile in range(TILES):
        for k_block in range(K // GROUP):
            prefetch_l2(w + (first_row + tile * BLOCK_N).to(tl.int64) * K + k_block * GROUP + line)


@triton.jit
def store_tile(out, result, row, valid, first_column, N: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    """Store `multiply`'s result as columns `first_column` onwards of the rows `row` of `out` [., N]."""
    column = first_column + tl.arange(0, BLOCK_N)
    pointers = out + along_tokens(row * N, SWAP) + along_columns(column, SWAP)
    tl.store(pointers, result.to(out.dtype.element_ty), mask=along_tokens(valid, SWAP))


@triton.jit(do_not_specialize=["num_choices"])
def grouped_gemm_kernel(
    a,
    a_scale,
    w,
    w_scale,
    out,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    num_choices,
    N: tl.constexpr,
    K: tl.constexpr,
    CHOICES_PER_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    SPLIT_K: tl.constexpr,
    SWAP: tl.constexpr,
    PREFETCH: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    k_blocks: tl.constexpr = K // GROUP
    programs_along_n: tl.constexpr = N // (BLOCK_N * TILES)
    split = tl.program_id(0) % SPLIT_K
    first_tile = tl.program_id(0) // SPLIT_K % programs_along_n * TILES
    block = tl.program_id(0) // (SPLIT_K * programs_along_n)

    if PREFETCH:  # the routing is older than the preceding kernel and may be read before the wait
        early_expert = block_expert(expert_ids, num_tokens_post_padded, block, BLOCK_M)
        if early_expert >= 0:
            prefetch_tiles(w + early_expert.to(tl.int64) * (N * K), first_tile * BLOCK_N, K, BLOCK_N, TILES)
    wait_for_predecessor()
    expert = block_expert(expert_ids, num_tokens_post_padded, block, BLOCK_M).to(tl.int64)
    if expert < 0:
        return

    choice = tl.load(sorted_token_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = choice < num_choices
    a_row = (choice // CHOICES_PER_ROW).to(tl.int64)
    out_row = split.to(tl.int64) * num_choices + choice
    k = tl.arange(0, GROUP)
    a_pointers = a + a_row[:, None] * K + k[None, :]
    a_scale_pointers = a_scale + a_row * k_blocks
    w_pointers = w + expert * (N * K) + tl.arange(0, BLOCK_N)[:, None] * K + k[None, :]
    w_scale_expert = w_scale + expert * (N // GROUP * k_blocks)

    if k_blocks <= 2 and SPLIT_K == 1:  # the tokens serve all tiles, and loads run ahead over tiles rather than over K
        last = k_blocks - 1
        tokens = tl.load(a_pointers, mask=valid[:, None], other=0.0)
        scale = tl.load(a_scale_pointers, mask=valid, other=0.0)
        last_tokens = tl.load(a_pointers + last * GROUP, mask=valid[:, None], other=0.0)
        last_scale = tl.load(a_scale_pointers + last, mask=valid, other=0.0)
        for tile in tl.range(first_tile, first_tile + TILES, num_stages=NUM_STAGES):
            weights = tl.load(w_pointers + tile * (BLOCK_N * K))
            tile_scale = tl.load(w_scale_expert + tile * BLOCK_N // GROUP * k_blocks)
            result = multiply(tokens, weights, SWAP) * along_tokens(scale * tile_scale, SWAP)
            if k_blocks == 2:
                weights = tl.load(w_pointers + tile * (BLOCK_N * K) + GROUP)
                tile_scale = tl.load(w_scale_expert + tile * BLOCK_N // GROUP * k_blocks + 1)
                result += multiply(last_tokens, weights, SWAP) * along_tokens(last_scale * tile_scale, SWAP)
            store_tile(out, result, out_row, valid, tile * BLOCK_N, N, BLOCK_N, SWAP)
    else:
        first_k = split * k_blocks // SPLIT_K
        end_k = (split + 1) * k_blocks // SPLIT_K
        for tile in range(first_tile, first_tile + TILES):
            total = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
            for k_block in tl.range(first_k, end_k, num_stages=NUM_STAGES):
                tokens = tl.load(a_pointers + k_block * GROUP, mask=valid[:, None], other=0.0)
                weights = tl.load(w_pointers + tile * (BLOCK_N * K) + k_block * GROUP)
                scale = tl.load(a_scale_pointers + k_block, mask=valid, other=0.0)
                scale *= tl.load(w_scale_expert + tile * BLOCK_N // GROUP * k_blocks + k_block)
                total += multiply(tokens, weights, SWAP) * along_tokens(scale, SWAP)
            store_tile(out, total, out_row, valid, tile * BLOCK_N, N, BLOCK_N, SWAP)


@dataclass(frozen=True)
class GemmConfig:
    """How one grouped product is cut into programs, and how those are compiled."""

    block_n: int
    """Columns of a tile: 64 or 128, so that one weight scale serves a K block of it."""
    tiles: int
    """Tiles a program computes one after the other; lowered to what divides the number of tiles."""
    split_k: int
    swap: bool
    num_warps: int
    num_stages: int


def grouped_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    out: torch.Tensor,
    routing: AlignedRouting,
    choices_per_row: int,
    config: GemmConfig,
    prefetch: bool,
) -> None:
    """Every choice's row of `a`, times its expert's weights.

    a e4m3 [num_choices / choices_per_row, K], a_scale fp32 [., K/128], w e4m3 [E, N, K],
    w_scale fp32 [E, N/128, K/128], out [split_k, num_choices, N] in fp32 or bf16. N and K are multiples of 128. Rows of
    choices that `routing` leaves out are not written.
    `prefetch`: fetch weights ahead of the wait for the preceding kernel, which must not be the one that made `routing`.
    """
    _, n, k = w.shape
    num_choices = out.shape[-2]
    tiles = math.gcd(config.tiles, n // config.block_n)
    programs = routing.expert_ids.numel() * (n // (config.block_n * tiles)) * config.split_k
    grouped_gemm_kernel[(programs,)](
        a,
        a_scale,
        w,
        w_scale,
        out,
        routing.sorted_token_ids,
        routing.expert_ids,
        routing.num_tokens_post_padded,
        num_choices,
        N=n,
        K=k,
        CHOICES_PER_ROW=choices_per_row,
        BLOCK_M=routing.block_size,
        BLOCK_N=config.block_n,
        TILES=tiles,
        SPLIT_K=config.split_k,
        SWAP=config.swap,
        PREFETCH=prefetch,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        launch_pdl=True,
    )
