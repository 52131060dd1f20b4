// The consumers of sm90_stream.cu: two warpgroups that take pieces as they come and work through the stages of each.
#pragma once
#include "cluster.cuh"
#include "registers.cuh"
#include "stream_activations.cuh"
#include "stream_products.cuh"

// The heights that products have: a multiple of 16 rows, or kMaxRows. More of them would save nothing while weights are
// waited for, and each takes its place in the instruction caches.
constexpr uint32_t kLeastHeight = kMaxRows < 16 ? kMaxRows : 16;
__device__ __forceinline__ constexpr uint32_t next_height(uint32_t rows) {
    return rows + 16 < kMaxRows ? rows + 16 : kMaxRows;
}

// Two warpgroups: each 64 gate rows and the same 64 up rows of the chunk, then 128 of each group's 256 columns.
struct Math {
    const Params& p;
    SharedStorage& shared;
    const uint32_t thread = threadIdx.x;
    const uint32_t warpgroup = registers::uniform(threadIdx.x / 128);
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t lane = threadIdx.x % 32;
    WeightRing weights;
    TokenPosition token_ring;
    RingPosition<2> activation;
    const Activations activations;

    __device__ __forceinline__ Math(const Params& p, SharedStorage& shared)
        : p(p), shared(shared), weights{shared, {}}, activations(p, shared) {}

    // Some K tiles of one job: gate and up sums of 64 rows each, stored for whoever adds up the job's pieces. If these are all
    // of them (`whole`), on to the job's activations, for all CTAs or, of a fused tile, for this one. Row r has row_weight[r].
    template <uint32_t kRows>
    __device__ __forceinline__ void project_up(const Tile& tile, const Piece& piece, bool whole, const float* row_weight) {
        float gate[kRows / 2], up[kRows / 2];
#pragma unroll
        for (uint32_t i = 0; i < kRows / 2; ++i) gate[i] = up[i] = 0.f;
        const uint32_t first_unit = registers::uniform(piece.first_unit), last_unit = registers::uniform(piece.last_unit);
#pragma unroll 1
        for (uint32_t k = first_unit; k < last_unit; ++k) {
            weights.wait();
            mbarrier::wait(shared.tokens_full[token_ring.stage], token_ring.parity);
            if constexpr (kRows <= kMaxExactRows)
                add_exact_products<kRows>(gate, up, weights, token_ring.stage, warp, lane);
            else
                add_products<kRows>(gate, up, weights, token_ring.stage, warpgroup, lane);
            mbarrier::arrive_warp(shared.tokens_empty[token_ring.stage]);
            token_ring.advance();
        }
        grid_dependency::wait();  // the previous kernel zeroes `out` and fills what is exchanged with ones
        if (whole) {
            const uint32_t chunk = piece.item % kNumChunks;
            const float weight = thread < tile.num_rows ? row_weight[thread] * p.routed_scaling_factor : 0.f;
            if (kFuses && piece.phase == kFusedUp)
                return activations.of_own_sums<kRows>(tile, gate, up, shared.activation[activation.stage][chunk],
                                                      shared.activation_scale[activation.stage][chunk], weight);
            activations.of_own_sums<kRows>(tile, gate, up, shared.outgoing, shared.outgoing_scale, 1.f);
            return activations.publish(tile, chunk, weight);
        }
        activations.store_sums<kRows>(tile, piece, gate, up);
    }

    // Some groups of columns of a tile. The rows of a tile of w2 are so ordered that this thread's four accumulator rows
    // of a token are four adjacent columns: row 64 t + 16 w + 8 h + g is column 32 w + 4 g + 2 t + h.
    template <uint32_t kRows>
    __device__ __forceinline__ void project_down(const Tile& tile, const Piece& piece) {
        const uint32_t buffer = activation.stage;
        const uint32_t first_unit = registers::uniform(piece.first_unit), last_unit = registers::uniform(piece.last_unit);
#pragma unroll 1
        for (uint32_t group = first_unit; group < last_unit; ++group) {
            const uint32_t first_column = group * kGroupColumns + warpgroup * kTileRows;
            if (first_column >= kHiddenSize) {  // the last group may be half
#pragma unroll 1
                for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
                    weights.wait();
                    weights.release();
                }
                continue;
            }
            float sums[2][kRows / 2];
#pragma unroll
            for (uint32_t i = 0; i < kRows / 2; ++i) sums[0][i] = sums[1][i] = 0.f;
#pragma unroll 1
            for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
                weights.wait();
                float partial[2][kRows / 2];
                const uint64_t activation = wgmma::descriptor(shared.activation[buffer][chunk]);
                const uint64_t rows = wgmma::descriptor(weights.rows(warpgroup));
                wgmma::multiply_k128<kRows>(partial[0], rows, activation);
                wgmma::multiply_k128<kRows>(partial[1], rows + (kWarpgroupBytes >> 4), activation);
                const float weight_scale = shared.down_scale[buffer][(2 * group + warpgroup) * kNumChunks + chunk];
                wgmma::wait<0>();
                wgmma::pin(partial[0]);
                wgmma::pin(partial[1]);
                weights.release();
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half)
                    promote<kRows>(sums[half], partial[half], shared.activation_scale[buffer][chunk], weight_scale, lane);
            }
            // Lanes 4 apart hold columns 4 apart of the same two tokens: they swap, and each adds 8 columns of one.
            const bool odd = lane & 4;
            uint16_t* const columns = p.out + first_column + (warp % 4) * 32 + lane / 8 * 8;
#pragma unroll
            for (uint32_t j = 0; j < kRows / 8; ++j) {
                uint32_t low[2], high[2];
#pragma unroll
                for (uint32_t b = 0; b < 2; ++b) {
                    low[b] = pack_bf16x2(sums[0][4 * j + b], sums[0][4 * j + 2 + b]);
                    high[b] = pack_bf16x2(sums[1][4 * j + b], sums[1][4 * j + 2 + b]);
                }
                const uint32_t other_low = __shfl_xor_sync(~0u, odd ? low[0] : low[1], 4);
                const uint32_t other_high = __shfl_xor_sync(~0u, odd ? high[0] : high[1], 4);
                const uint32_t row = 8 * j + 2 * (lane % 4) + odd;
                if (row >= tile.num_rows) continue;
                uint16_t* const address = columns + static_cast<uint64_t>(shared.output_row[buffer][row]) * kHiddenSize;
                const uint4 values = odd ? make_uint4(other_low, other_high, low[1], high[1])
                                         : make_uint4(low[0], high[0], other_low, other_high);
                if constexpr (kDeterministic)
                    *reinterpret_cast<uint4*>(address) = values;
                else
                    add_bf16x8(address, values);
            }
            __syncwarp();  // where lanes may have parted, see registers::uniform()
        }
    }

    // project_up() and project_down() with the least height that holds the tile's rows, kRows or more.
    template <uint32_t kRows = kLeastHeight>
    __device__ __forceinline__ void project_up_fitting(const Tile& tile, const Piece& piece, bool whole,
                                                       const float* row_weight) {
        if constexpr (kRows < kMaxRows)
            if (tile.num_rows > kRows) return project_up_fitting<next_height(kRows)>(tile, piece, whole, row_weight);
        project_up<kRows>(tile, piece, !kDeterministic && whole, row_weight);
    }

    template <uint32_t kRows = kLeastHeight>
    __device__ __forceinline__ void project_down_fitting(const Tile& tile, const Piece& piece) {
        if constexpr (kRows < kMaxRows)
            if (tile.num_rows > kRows) return project_down_fitting<next_height(kRows)>(tile, piece);
        project_down<kRows>(tile, piece);
    }

    __device__ __forceinline__ void run() {
        const Schedule schedule(shared.num_tiles);
#pragma unroll 1
        for (QueuePosition queue;; queue.advance()) {
            mbarrier::wait(shared.queue_full[queue.stage], queue.parity);
            const Piece piece = shared.queue[queue.stage];
            if (piece.phase == kEnd) break;
            if (piece.phase <= kFusedUp)
                project_up_fitting(tile_at(p, shared, piece.item / kNumChunks), piece,
                                   piece.phase == kFusedUp || piece.item < schedule.up.num_whole,
                                   shared.queue_weight[queue.stage]);
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
        project_down_fitting(tile, piece);
        mbarrier::arrive_warp(shared.activation_empty[buffer]);
        activation.advance();
    }
};
