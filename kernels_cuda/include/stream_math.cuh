// The consumers of sm90_stream.cu: two warpgroups that take pieces as they come and work through the stages of each.
#pragma once
#include "cluster.cuh"
#include "registers.cuh"
#include "stream_activations.cuh"
#include "stream_products.cuh"

// Two warpgroups: each 64 gate rows and the same 64 up rows of the chunk, then every other group of columns or half of the
// tokens. Products are of kMaxRows rows, whatever a tile has: forms for lower tiles would save nothing while weights are waited
// for, and each takes its place in the instruction caches (experiments/2026-11-28_order).
struct Math {
    const Params& p;
    SharedStorage& shared;
    const uint32_t thread = threadIdx.x;
    const uint32_t warpgroup = registers::uniform(threadIdx.x / 128);
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t lane = threadIdx.x % 32;
    WeightRing weights;
    TokenPosition token_ring;
    RingPosition<kNumBuffers> activation;
    const Activations activations;

    __device__ __forceinline__ Math(const Params& p, SharedStorage& shared)
        : p(p), shared(shared), weights{shared, {}}, activations(p, shared) {}

    // Some K tiles of one job: gate and up sums of 64 rows each, stored for whoever adds up the job's pieces. If these are all
    // of them (`whole`), on to the job's activations, for all CTAs or, of a fused tile, for this one. Row r has weight
    // row_weight[r].
    __device__ __forceinline__ void project_up(const Tile& tile, const Piece& piece, bool whole, const float* row_weight) {
        float gate[kMaxRows / 2], up[kMaxRows / 2];
#pragma unroll
        for (uint32_t i = 0; i < kMaxRows / 2; ++i) gate[i] = up[i] = 0.f;
        const uint32_t first_unit = registers::uniform(piece.first_unit), last_unit = registers::uniform(piece.last_unit);
#pragma unroll 1
        for (uint32_t k = first_unit; k < last_unit; ++k) {
            weights.wait();
            mbarrier::wait(shared.tokens_full[token_ring.stage], token_ring.parity);
            if constexpr (kMaxRows <= kMaxExactRows)
                add_exact_products<kMaxRows>(gate, up, weights, token_ring.stage, warp, lane);
            else
                add_products<kMaxRows>(gate, up, weights, token_ring.stage, warpgroup, lane);
            mbarrier::arrive_warp(shared.tokens_empty[token_ring.stage]);
            token_ring.advance();
        }
        grid_dependency::wait();  // the previous kernel zeroes `out` and fills what is exchanged with ones
        if (!kDeterministic && whole) {
            const uint32_t chunk = piece.item % kNumChunks;
            const bool for_all = !kFuses || piece.phase != kFusedUp;
            activations.of_own_sums(tile, gate, up,
                                    for_all ? shared.outgoing : shared.activation[activation.stage][chunk],
                                    for_all ? shared.outgoing_scale : shared.activation_scale[activation.stage][chunk],
                                    row_weight);
            if (for_all) activations.publish(tile, chunk, 1.f);
            return;
        }
        activations.store_sums(tile, piece, gate, up);
    }

    // Some groups of columns of a tile: each warpgroup every other one, or of many tokens half.
    //
    // The rows of a group of w2 are so ordered (weight_tiles.py) that this thread's accumulator rows of a token, two in each
    // block of 64, are adjacent columns, and those of 8 lanes 64 columns: additions of 128 adjacent bytes are 1.6 times as fast
    // as of 64 (experiments/2026-11-28_additions).
    __device__ __forceinline__ void project_down(const Tile& tile, const Piece& piece) {
        constexpr bool kSharesTokens = kMaxRows > 32;  // else there are registers for all
        constexpr uint32_t kTokens = kSharesTokens ? kMaxRows / 2 : kMaxRows;
        constexpr uint32_t kBlocks = kGroupColumns / 64;
        const uint32_t buffer = activation.stage, first_token = kSharesTokens ? warpgroup * kTokens : 0;
        const uint32_t num_tokens = max(registers::uniform(tile.num_rows), first_token) - first_token;
        const uint32_t first_unit = registers::uniform(piece.first_unit), last_unit = registers::uniform(piece.last_unit);
#pragma unroll 1
        for (uint32_t group = first_unit; group < last_unit; ++group) {
            if (kSharesTokens ? num_tokens == 0 : group % 2 != warpgroup) {
#pragma unroll 1
                for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
                    weights.wait();
                    weights.release();
                }
                continue;
            }
            const bool whole = (group + 1) * kGroupColumns <= kHiddenSize;  // the last group may be half: only the first blocks
            float sums[kBlocks][kTokens / 2] = {};
#pragma unroll 1
            for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
                weights.wait();
                float partial[kBlocks][kTokens / 2];
                const uint64_t tokens = wgmma::descriptor(shared.activation[buffer][chunk] + first_token * kGroupSize);
                const uint64_t rows = wgmma::descriptor(weights.rows(0));
#pragma unroll
                for (uint32_t block = 0; block < kBlocks; ++block)
                    wgmma::multiply_k128<kTokens>(partial[block], rows + block * (kWarpgroupBytes >> 4), tokens);
                const uint32_t scale_block = 2 * group + (whole ? warp % 4 / 2 : 0);
                const float weight_scale = shared.down_scale[buffer][scale_block * kNumChunks + chunk];
                wgmma::wait<0>();
#pragma unroll
                for (uint32_t block = 0; block < kBlocks; ++block) wgmma::pin(partial[block]);
                weights.release();
#pragma unroll
                for (uint32_t block = 0; block < kBlocks; ++block)
                    promote<kTokens>(sums[block], partial[block], shared.activation_scale[buffer][chunk] + first_token,
                                     weight_scale, lane);
            }
            const uint32_t column = whole ? warp % 4 * 64 + lane / 4 * 8 : warp % 4 * 32 + lane / 4 * 4;
            uint16_t* const columns = p.out + group * kGroupColumns + column;
#pragma unroll
            for (uint32_t i = 0; i < kTokens / 4; ++i) {
                const uint32_t j = i / 2, b = i % 2, token = 8 * j + 2 * (lane % 4) + b;
                if (token >= num_tokens) continue;
                uint16_t* const address =
                    columns + static_cast<uint64_t>(shared.output_row[buffer][first_token + token]) * kHiddenSize;
                uint32_t pairs[kBlocks];
#pragma unroll
                for (uint32_t block = 0; block < kBlocks; ++block)
                    pairs[block] = pack_bf16x2(sums[block][4 * j + b], sums[block][4 * j + 2 + b]);
                if (whole)
                    give(address, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
                else
                    give(address, make_uint2(pairs[0], pairs[1]));
            }
            __syncwarp();  // where lanes may have parted, see registers::uniform()
        }
    }

    // Adjacent columns of a row to `out`.
    __device__ __forceinline__ static void give(uint16_t* address, uint4 eight) {
        if constexpr (kDeterministic)
            *reinterpret_cast<uint4*>(address) = eight;
        else
            add_bf16x8(address, eight);
    }
    __device__ __forceinline__ static void give(uint16_t* address, uint2 four) {
        if constexpr (kDeterministic)
            *reinterpret_cast<uint2*>(address) = four;
        else
            add_bf16x4(address, four.x, four.y);
    }

    __device__ __forceinline__ void run() {
        const Schedule schedule(shared.num_tiles);
#pragma unroll 1
        for (QueuePosition queue;; queue.advance()) {
            mbarrier::wait(shared.queue_full[queue.stage], queue.parity);
            const Piece piece = shared.queue[queue.stage];
            if (piece.phase == kEnd) break;
            if (piece.phase <= kFusedUp)
                project_up(tile_at(p, shared, piece.item / kNumChunks), piece,
                           piece.phase == kFusedUp || piece.item < schedule.up.num_whole, shared.queue_weight[queue.stage]);
            else
                finish(piece, schedule);
            mbarrier::arrive_warp(shared.queue_empty[queue.stage]);
        }
    }

    // The activations of a job for all CTAs, or a piece of the down phase, which with few jobs begins with those of its tile.
    __device__ __forceinline__ void finish(const Piece& piece, const Schedule& schedule) {
        grid_dependency::wait();  // with few jobs a CTA may begin here
        const bool for_all = piece.phase == kActivate;
        const uint32_t first_job = for_all ? piece.item : piece.item * kNumChunks;
        const uint32_t num_jobs = for_all ? 1 : schedule.few ? kNumChunks : 0;
        const Tile tile = tile_at(p, shared, first_job / kNumChunks);
        const uint32_t buffer = activation.stage;
        const float weight = for_all ? activations.weight_of_own_row(tile) : 0.f;  // asked for before the wait for sums
        if (!for_all) mbarrier::wait(shared.activation_full[buffer], activation.parity);
#pragma unroll 1
        for (uint32_t job = first_job; job < first_job + num_jobs; ++job) {
            const uint32_t chunk = job % kNumChunks;
            activations.of_stored_sums(tile, job, schedule.up.num_parts(job),
                                       for_all ? shared.outgoing : shared.activation[buffer][chunk],
                                       for_all ? shared.outgoing_scale : shared.activation_scale[buffer][chunk],
                                       for_all ? nullptr : shared.row_weight[buffer]);
        }
        if (for_all) return activations.publish(tile, first_job % kNumChunks, weight);
        project_down(tile, piece);
        mbarrier::arrive_warp(shared.activation_empty[buffer]);
        activation.advance();
    }
};
