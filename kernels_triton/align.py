"""Group choices by expert into blocks of one expert each, as `reference.routing.align_block_size` defines it.

One program per expert places that expert's choices in ascending order, so that no atomics are needed and the result is
the reference's, entry for entry. Every program needs the counts of all experts to know where its own blocks start: a
small batch is counted by every program for itself, a large one by a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels_triton.ptx import wait_for_predecessor
from reference.routing import AlignedRouting

LARGEST_CHUNK = 4096


@triton.jit
def count_chunk(topk_ids, chunk, num_choices, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """How many choices of one chunk of `topk_ids` go to each expert: int32 [EXPERTS]. Ids of -1 are not counted."""
    choice = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(topk_ids + choice, mask=choice < num_choices, other=-1)
    return tl.histogram(tl.maximum(expert, 0), EXPERTS, mask=expert >= 0)


@triton.jit(do_not_specialize=["num_choices"])
def count_kernel(topk_ids, counts, num_choices, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    wait_for_predecessor()
    chunk = tl.program_id(0)
    count = count_chunk(topk_ids, chunk, num_choices, CHUNK, EXPERTS)
    tl.store(counts + chunk * EXPERTS + tl.arange(0, EXPERTS), count)


@triton.jit(do_not_specialize=["num_choices", "num_chunks", "capacity"])
def place_kernel(
    topk_ids,
    counts,
    sorted_token_ids,
    expert_ids,
    num_tokens_post_padded,
    num_choices,
    num_chunks,
    capacity,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    COUNTED: tl.constexpr,
):
    wait_for_predecessor()
    own = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    if COUNTED:
        count = tl.zeros((EXPERTS,), tl.int32)
        for chunk in range(num_chunks):
            count += tl.load(counts + chunk * EXPERTS + experts)
    else:
        count = count_chunk(topk_ids, 0, num_choices, CHUNK, EXPERTS)
    blocks = (count + BLOCK_SIZE - 1) // BLOCK_SIZE
    own_count = tl.sum(tl.where(experts == own, count, 0))
    own_blocks = tl.sum(tl.where(experts == own, blocks, 0))
    first_block = tl.sum(tl.where(experts < own, blocks, 0))
    first_entry = first_block * BLOCK_SIZE
    end_of_use = tl.sum(blocks) * BLOCK_SIZE

    lane = tl.arange(0, CHUNK)
    if own_count > 0:
        placed = first_entry
        for chunk in range(num_chunks):
            choice = chunk * CHUNK + lane
            chosen = (tl.load(topk_ids + choice, mask=choice < num_choices, other=-1) == own).to(tl.int32)
            rank = tl.cumsum(chosen, axis=0) - 1
            tl.store(sorted_token_ids + placed + rank, choice, mask=chosen == 1)
            placed += tl.sum(chosen)
        for start in range(first_entry + own_count, first_entry + own_blocks * BLOCK_SIZE, CHUNK):
            padding = start + lane
            tl.store(sorted_token_ids + padding, num_choices, mask=padding < first_entry + own_blocks * BLOCK_SIZE)
        for start in range(0, own_blocks, CHUNK):
            block = start + lane
            tl.store(expert_ids + first_block + block, own, mask=block < own_blocks)

    # What no expert uses is filled by all programs in turn.
    for start in range(end_of_use + own * CHUNK, capacity, tl.num_programs(0) * CHUNK):
        unused = start + lane
        tl.store(sorted_token_ids + unused, num_choices, mask=unused < capacity)
        block = unused // BLOCK_SIZE
        tl.store(expert_ids + block, -1, mask=(unused < capacity) & (unused % BLOCK_SIZE == 0))
    if own == 0:
        tl.store(num_tokens_post_padded, end_of_use)


def align(topk_ids: torch.Tensor, block_size: int, num_experts: int) -> AlignedRouting:
    """`reference.routing.align_block_size` of contiguous int32 `topk_ids` [M, top_k]; never waits for the device."""
    num_choices = topk_ids.numel()
    capacity = min(num_choices + num_experts * (block_size - 1), num_choices * block_size)
    capacity = triton.cdiv(capacity, block_size) * block_size
    sorted_token_ids = torch.empty(capacity, dtype=torch.int32, device=topk_ids.device)
    expert_ids = torch.empty(capacity // block_size, dtype=torch.int32, device=topk_ids.device)
    if not num_choices:
        return AlignedRouting(sorted_token_ids, expert_ids, topk_ids.new_zeros(1), block_size)

    num_tokens_post_padded = torch.empty(1, dtype=torch.int32, device=topk_ids.device)
    chunk = min(max(triton.next_power_of_2(num_choices), 128), LARGEST_CHUNK)
    num_chunks = triton.cdiv(num_choices, chunk)
    experts = max(triton.next_power_of_2(num_experts), 128)
    num_warps = 8 if chunk > 1024 else 4
    counted = num_chunks > 1
    counts = torch.empty((num_chunks if counted else 0, experts), dtype=torch.int32, device=topk_ids.device)
    if counted:
        count_kernel[(num_chunks,)](
            topk_ids, counts, num_choices, CHUNK=chunk, EXPERTS=experts, num_warps=num_warps, launch_pdl=True
        )
    place_kernel[(num_experts,)](
        topk_ids,
        counts,
        sorted_token_ids,
        expert_ids,
        num_tokens_post_padded,
        num_choices,
        num_chunks,
        capacity,
        BLOCK_SIZE=block_size,
        CHUNK=chunk,
        EXPERTS=experts,
        COUNTED=counted,
        num_warps=num_warps,
        launch_pdl=True,
    )
    return AlignedRouting(sorted_token_ids, expert_ids, num_tokens_post_padded, block_size)
