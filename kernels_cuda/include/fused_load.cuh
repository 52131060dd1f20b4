// The producers of sm90_fused.cu: weights by the copy engine, tokens and scales by cp.async, into one ring of stages. What is
// the same in a warp is known to be, see registers::uniform(): else each copy and arrival runs in a loop over the lanes.
#pragma once
#include "copy.cuh"
#include "elect.cuh"
#include "fused_storage.cuh"
#include "gather.cuh"
#include "registers.cuh"

// One warp: the weight tiles of every item, gate and up halves of each K tile, then the groups of w2.
__device__ __forceinline__ void load_weights(const Params& p, SharedStorage& shared, const Schedule& schedule) {
    using registers::uniform;
    Position ring;
    const uint32_t num_items = uniform(schedule.num_items);
    const uint32_t first_k = uniform(schedule.first_k), last_k = uniform(schedule.last_k);
    for (uint32_t item = schedule.first_item; item < num_items; item += schedule.item_step) {
        const int32_t expert = uniform(p.expert_ids[item / schedule.num_chunks]);
        if (expert < 0) continue;
        const uint32_t chunk = item % schedule.num_chunks;
        const int32_t gate_row = expert * 2 * p.intermediate_size + chunk * kGroupSize;
        const int32_t up_row = gate_row + p.intermediate_size;
        for (uint32_t k = first_k; k < last_k; ++k, ring.advance()) {
            uint64_t& full = shared.full[ring.stage];
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            if (elect_one()) {
                mbarrier::arrive_expect_bytes(full, 2 * kHalfBytes);
                if (p.interleaved) {
                    const int32_t rows_of_8 = chunk * kGroupSize / 8;
                    tma_load_5d(shared.weights[ring.stage][0], p.w13, full, k * kTileK, 0, 0, rows_of_8, expert);
                    tma_load_5d(shared.weights[ring.stage][1], p.w13, full, k * kTileK, 0, 1, rows_of_8, expert);
                } else {
                    tma_load_2d(shared.weights[ring.stage][0], p.w13, full, k * kTileK, gate_row);
                    tma_load_2d(shared.weights[ring.stage][1], p.w13, full, k * kTileK, up_row);
                }
            }
            __syncwarp();
        }
        const int32_t column = chunk * kGroupSize;
        for (uint32_t group = schedule.first_group; group < schedule.num_groups; group += kClusterSize, ring.advance()) {
            // A warp's share of the box is 32 rows of w2: the fourth dimension of its map.
            const int32_t rows_of_32 = (expert * p.hidden_size + group * kGroupColumns) / 32;
            const bool whole = (group + 1) * kGroupColumns <= p.hidden_size;
            uint64_t& full = shared.full[ring.stage];
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            if (elect_one()) {
                mbarrier::arrive_expect_bytes(full, whole ? 2 * kHalfBytes : kHalfBytes);
                tma_load_5d(shared.weights[ring.stage][0], p.w2, full, column, 0, 0, rows_of_32, 0);
                if (whole) tma_load_5d(shared.weights[ring.stage][1], p.w2, full, column, 0, 0, rows_of_32 + 4, 0);
            }
            __syncwarp();
        }
    }
}

// 96 threads: for every stage of the up projection the tokens' K tile, swizzled as wgmma reads it, and the scales; for
// every stage of the down projection the scales.
__device__ __forceinline__ void gather_tokens(const Params& p, SharedStorage& shared, const Schedule& schedule,
                                              uint32_t thread) {
    using registers::uniform;
    const uint32_t num_k = p.hidden_size / kTileK;
    Position ring;
    uint32_t buffer = 0;  // a thread is at most one item ahead of another, so two tables of tokens suffice
    const uint32_t num_items = uniform(schedule.num_items);
    const uint32_t first_k = uniform(schedule.first_k), last_k = uniform(schedule.last_k);
    for (uint32_t item = schedule.first_item; item < num_items; item += schedule.item_step) {
        const uint32_t block = item / schedule.num_chunks;
        const int32_t expert = uniform(p.expert_ids[block]);
        if (expert < 0) continue;
        const uint32_t chunk = item % schedule.num_chunks;
        int32_t* const tokens = shared.gathered_token[buffer ^= 1];
        for (uint32_t row = thread; row < kBlockM; row += kNumGatherThreads) {
            const uint32_t choice = p.sorted_token_ids[block * kBlockM + row];
            tokens[row] = choice < p.num_choices ? static_cast<int32_t>(choice / p.top_k) : -1;
        }
        named_barrier(kGatherBarrier, kNumGatherThreads);

        const uint32_t scale_row = p.interleaved ? 2 * chunk + thread : chunk + thread * schedule.num_chunks;
        const float* w13_scale =
            p.w13_scale + static_cast<uint64_t>(expert * 2 * schedule.num_chunks + scale_row) * num_k;
#pragma unroll 1
        for (uint32_t k = first_k; k < last_k; ++k, ring.advance()) {
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            // Padding reads token 0 with no bytes, which writes zeros.
            const auto copy = [&](uint8_t* target, uint32_t row, uint32_t offset) {
                const int32_t token = tokens[row];
                cp_async_16(target, p.x_q + static_cast<uint64_t>(max(token, 0)) * p.hidden_size + k * kTileK + offset,
                            token >= 0);
            };
            gather_rows<kBlockM, kNumGatherThreads>(shared.tokens[ring.stage], kBlockM, thread, copy);
#pragma unroll
            for (uint32_t row = thread; row < kBlockM; row += kNumGatherThreads) {
                const int32_t token = tokens[row];
                cp_async_4(&shared.token_scale[ring.stage][row], p.x_scale + static_cast<uint64_t>(max(token, 0)) * num_k + k,
                           token >= 0);
            }
            if (thread < 2) cp_async_4(&shared.weight_scale[ring.stage][thread], w13_scale + k, true);
            __syncwarp();
            cp_async_arrive(shared.full[ring.stage]);
        }
        for (uint32_t group = schedule.first_group; group < schedule.num_groups; group += kClusterSize, ring.advance()) {
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            const uint32_t scale_row = group * 2 + thread;
            if (thread < 2 && scale_row < num_k)
                cp_async_4(&shared.weight_scale[ring.stage][thread],
                           p.w2_scale + static_cast<uint64_t>(expert * num_k + scale_row) * schedule.num_chunks + chunk, true);
            __syncwarp();
            cp_async_arrive(shared.full[ring.stage]);
        }
    }
    cp_async_wait_all();
}
