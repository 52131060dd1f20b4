// The producers of a grouped product whose rows are scattered: for every step of K a stage with 256 weight rows, up to
// kBlockM gathered rows, and their scales.
//
// A cluster of two CTAs works on one tile of rows: each gathers half of them, and loads half of the weights into both.
// What is read, and from where, an `Operands` type says:
//
//     kNumK                                     steps of K
//     tile(item), column(item)                  the tile of an item and which 256 weight rows it multiplies
//     source_row(tile, row)                     where row `row` of the tile lies
//     begin_row(tile, column, row, source_row)  called once for each row of an item
//     pieces()                                  16-byte pieces: all rows, all steps
//     row_piece(source_row, piece, k)           the number among them of a row's piece `piece` of step k
//     k_stride()                                from there to that of step k + 1
//     row_scale(source_row)                     its scales, one for each step
//     weight_scale(expert, column, half)        those of the first or second 128 weight rows, one for each step
//     load_weights(target, full, expert, column, k, half, policy)   multicast of 128 weight rows
//     prefetch_weights(expert, column, k, half)                     the same into L2; for Prefetch
#pragma once
#include "cluster.cuh"
#include "copy.cuh"
#include "elect.cuh"
#include "mbarrier.cuh"
#include "prefetch.cuh"
#include "prefill_schedule.cuh"
#include "registers.cuh"

constexpr uint32_t kBlockM = BLOCK_M;  // rows of a CTA
constexpr uint32_t kNumStages = NUM_STAGES;

constexpr uint32_t kTileK = 128;  // bytes of K in a stage: one swizzle row
constexpr uint32_t kHalfBytes = 128 * kTileK;
constexpr uint32_t kNumMathThreads = 256;
constexpr uint32_t kNumMathWarps = kNumMathThreads / 32;
constexpr uint32_t kNumLoadThreads = 128;
constexpr uint32_t kNumThreads = kNumMathThreads + kNumLoadThreads;
constexpr uint32_t kRowsPerLoadThread = ceil_div(kBlockM, kNumLoadThreads);  // whose scales it has
constexpr uint32_t kMathBarrier = 1;
constexpr uint32_t kLoadBarrier = 2;
constexpr uint32_t kClusterSize = 2;
constexpr uint32_t kNumPieces = kNumStages + 2;  // one that is finished, one in each stage, the one being written

constexpr uint32_t kScaleSlots = ceil_div(kBlockM, 16u) * 16;  // scales lie in groups of 16

static_assert(kBlockM % 8 == 0, "rows are swizzled by 8");

// What consumers need of a piece; ready with the stage of its first step. num_rows 0: there are no more.
struct PieceOfTile {
    uint32_t first_row, first_h_row, num_rows, column, first_k, last_k;

    // This CTA's rows.
    __device__ __forceinline__ uint32_t first_of_cta() const { return cluster::cta_rank() * rows_per_cta(num_rows); }
    __device__ __forceinline__ uint32_t rows_of_cta() const {
        const uint32_t first = first_of_cta();
        return num_rows <= first ? 0u : min(num_rows - first, rows_per_cta(num_rows));
    }
};

// Lies first in shared memory: the swizzle counts from multiples of 1024 bytes. (An alignment of its own would round up the
// size of each struct around it.)
template <uint32_t kNumK>
struct LoadStorage {
    uint8_t weights[kNumStages][2][kHalfBytes];
    uint8_t rows[kNumStages][kBlockM * kTileK];
    alignas(16) float scale[kNumStages][2][kScaleSlots];  // of a row, at its scale_slot(), times that of half of the weights
    PieceOfTile piece[kNumPieces];
    uint32_t first_of_piece[kNumStages];  // where a piece begins: its place in `piece`
    uint32_t source_row[2][kBlockM];
    float4 own_scales[kBlockM];  // of a thread's rows, for the four steps that the present one is among
    float weight_scales[2][2][kNumK];  // of two pieces, the two halves of the weights
    uint64_t full[kNumStages];
    uint64_t empty[kNumStages];
};

// Scales are so ordered that the four that a lane needs of 16 rows as wgmma's N are adjacent: rows 2c+1, 2c, 9+2c, 8+2c. The
// odd row comes first: sums and products of even rows lie in even registers, and a third operand from an even one would have to
// wait for them.
__device__ __forceinline__ constexpr uint32_t scale_slot(uint32_t row) {
    return row / 16 * 16 + row / 2 % 4 * 4 + row / 8 % 2 * 2 + (row % 2 ^ 1);
}

using Ring = RingPosition<kNumStages>;

// One thread, before a cluster barrier.
template <uint32_t kNumK>
__device__ __forceinline__ void init_ring(LoadStorage<kNumK>& shared) {
    for (uint32_t stage = 0; stage < kNumStages; ++stage) {
        constexpr uint32_t kScaleArrivals = kNumLoadThreads / 32 * mbarrier::kArrivalsPerWarp;
        mbarrier::init(shared.full[stage], kNumLoadThreads + kScaleArrivals + 1);  // rows, scales, weights
        mbarrier::init(shared.empty[stage], kNumMathWarps * (mbarrier::kArrivalsPerWarp + 1));  // own, the other CTA's
    }
}

// 128 threads. Thread t gathers piece t % 8 of rows t / 8, t / 8 + 16, ..., and has the scales of rows t, t + 128, ...
template <typename Operands>
struct Loader {
    static constexpr uint32_t kNumK = Operands::kNumK;
    static constexpr uint32_t kPasses = ceil_div(kBlockM, 16u);
    static constexpr uint32_t kScalesPerThread = ceil_div(2 * kNumK, kNumLoadThreads);
    static constexpr uint32_t kNoRow = ~0u;
    static constexpr uint32_t kFirstSteps = kNumStages < kNumK ? kNumStages : kNumK;  // that are prefetched
    static constexpr uint32_t kLead = 8;  // steps before its end at which a piece fetches the rows of the next

    const Operands& operands;
    LoadStorage<kNumK>& shared;
    const uint32_t rank = cluster::cta_rank();
    const uint32_t thread = registers::thread_index() - kNumMathThreads;
    const uint32_t warp = registers::uniform(thread / 32);

    __device__ __forceinline__ Loader(const Operands& operands, LoadStorage<kNumK>& shared)
        : operands(operands), shared(shared) {}

    struct Job {
        Tile tile;
        uint32_t column;
        Piece piece;

        __device__ __forceinline__ bool end() const { return piece.item == kNoItem; }
    };
    struct Rows {
        uint32_t own_row[kRowsPerLoadThread];  // the sources of this thread's rows
        float weight_scale[kScalesPerThread];
    };

    // Without a branch: where there was one, ptxas 13.0 has been seen to make uniform what it holds by another predicate.
    __device__ __forceinline__ Job take(Pieces& pieces) const {
        using registers::uniform;
        const Piece piece = pieces.take();
        Job job{{}, 0, {uniform(piece.item), uniform(piece.first_k), uniform(piece.last_k)}};
        const uint32_t item = job.end() ? 0 : job.piece.item;
        const Tile tile = operands.tile(item);
        job.tile = {uniform(tile.expert), uniform(tile.first_row), uniform(tile.num_rows), uniform(tile.tiles_of_expert)};
        job.column = operands.column(item);
        return job;
    }

    // The number of the thread's row `i`, and whether a CTA has as many.
    __device__ __forceinline__ uint32_t own(uint32_t i) const { return i * kNumLoadThreads + thread; }
    __device__ __forceinline__ bool has(uint32_t i) const {
        return i * kNumLoadThreads + kNumLoadThreads <= kBlockM || own(i) < kBlockM;
    }

    // The rows of the tile that are this CTA's.
    __device__ __forceinline__ uint32_t first_row(const Job& job) const { return rank * rows_per_cta(job.tile.num_rows); }
    __device__ __forceinline__ uint32_t num_rows(const Job& job) const {
        const uint32_t first = first_row(job);
        return job.tile.num_rows > first ? min(job.tile.num_rows - first, rows_per_cta(job.tile.num_rows)) : 0u;
    }

    __device__ __forceinline__ Rows fetch_rows(const Job& job) const {
        Rows rows;
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerLoadThread; ++i) rows.own_row[i] = kNoRow;
        if (job.end()) return rows;
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerLoadThread; ++i)
            if (own(i) < num_rows(job)) rows.own_row[i] = operands.source_row(job.tile, first_row(job) + own(i));
#pragma unroll
        for (uint32_t i = 0; i < kScalesPerThread; ++i) {
            const uint32_t index = i * kNumLoadThreads + thread, half = index >= kNumK;
            if (index < 2 * kNumK)
                rows.weight_scale[i] = operands.weight_scale(job.tile.expert, job.column, half)[index - half * kNumK];
        }
        return rows;
    }

    // What the first stages of an item take comes into L2, one access of memory after another, while its share is found: see
    // find_share().
    struct Prefetch {
        const Loader& loader;
        const uint32_t item;
        const bool is_mine;  // one of the load threads, and there is such an item
        Job job;
        uint32_t own_row[kRowsPerLoadThread];

        __device__ __forceinline__ void first() {
            if (is_mine) job = {loader.operands.tile(item), loader.operands.column(item), {}};
        }
        __device__ __forceinline__ void second() {
            if (!is_mine) return;
            if (loader.thread < kFirstSteps)
                loader.operands.prefetch_weights(job.tile.expert, job.column, loader.thread, loader.rank);
            if (loader.thread < 2)
                prefetch::line(loader.operands.weight_scale(job.tile.expert, job.column, loader.thread));
#pragma unroll
            for (uint32_t i = 0; i < kRowsPerLoadThread; ++i)
                if (loader.own(i) < loader.num_rows(job))
                    own_row[i] = loader.operands.source_row(job.tile, loader.first_row(job) + loader.own(i));
        }
        __device__ __forceinline__ void third() {
            if (!is_mine) return;
#pragma unroll
            for (uint32_t i = 0; i < kRowsPerLoadThread; ++i) {
                if (loader.own(i) >= loader.num_rows(job)) continue;
                prefetch::line(loader.operands.row_scale(own_row[i]));
#pragma unroll
                for (uint32_t k = 0; k < kFirstSteps; ++k)
                    prefetch::line(loader.operands.pieces() + loader.operands.row_piece(own_row[i], 0) +
                                   k * loader.operands.k_stride());
            }
        }
    };

    // The row's scales of the four steps that step k is one of.
    __device__ __forceinline__ float4 fetch_scales(uint32_t row, uint32_t k) const {
        float4 scales = make_float4(0.f, 0.f, 0.f, 0.f);
        if (row == kNoRow) return scales;
        const float* const group = operands.row_scale(row) + k / 4 * 4;
        if constexpr (kNumK % 4 == 0) return *reinterpret_cast<const float4*>(group);
        const uint32_t left = kNumK - k / 4 * 4;
        scales.x = group[0];
        if (left > 1) scales.y = group[1];
        if (left > 2) scales.z = group[2];
        if (left > 3) scales.w = group[3];
        return scales;
    }

    // A step's instructions come one after another in each warp, and math waits for the last of them: so what can be is read
    // before the wait for a free stage, and what is the same for all is known to be (registers::uniform()). Rows are numbers of
    // pieces from one base that moves with K, in uniform registers: a row is a shift and an addition. Of a base that stands
    // still the compiler loads and multiplies anew for each row, and the rows wait for each other.
    __device__ __forceinline__ void run(Pieces pieces) {
        Ring ring;
        uint32_t buffer = 0, piece = 0;
        Job job = take(pieces);
        Rows rows = fetch_rows(job);
        float4 ahead[kRowsPerLoadThread];
#pragma unroll
        for (uint32_t i = 0; i < kRowsPerLoadThread; ++i) ahead[i] = fetch_scales(rows.own_row[i], job.piece.first_k);
        const uint32_t first_target =
            shared_address(shared.rows) + thread / 8 * kTileK + (thread % 8 ^ thread / 8 % 8) * 16;
        while (!job.end()) {
            const uint32_t first_k = job.piece.first_k, last_k = job.piece.last_k, end_row = num_rows(job);
            // A thread is at most one piece ahead of another, so two buffers suffice.
            buffer ^= 1;
            uint32_t own_row[kRowsPerLoadThread];
#pragma unroll
            for (uint32_t i = 0; i < kRowsPerLoadThread; ++i) {
                own_row[i] = rows.own_row[i];
                if (has(i)) shared.source_row[buffer][own(i)] = own_row[i];
                if (first_k == 0 && own(i) < end_row)
                    operands.begin_row(job.tile, job.column, first_row(job) + own(i), own_row[i]);
            }
#pragma unroll
            for (uint32_t i = 0; i < kScalesPerThread; ++i) {
                const uint32_t index = i * kNumLoadThreads + thread, half = index >= kNumK;
                if (index < 2 * kNumK) shared.weight_scales[buffer][half][index - half * kNumK] = rows.weight_scale[i];
            }
            named_barrier(kLoadBarrier, kNumLoadThreads);
            uint32_t source[kPasses];
#pragma unroll
            for (uint32_t pass = 0; pass < kPasses; ++pass) {
                // Rows of the last pass past the end are copies of the last one: their products are not used.
                const uint32_t row = min(pass * 16 + thread / 8, max(end_row, 1u) - 1);
                source[pass] = operands.row_piece(shared.source_row[buffer][row], thread % 8);
            }
            const uint4* pieces_of_k = operands.pieces() + static_cast<uint64_t>(first_k) * operands.k_stride();
            // Rows are read again for each choice of a token: weights that no other tile reads make room for them.
            const uint64_t policy = job.tile.tiles_of_expert == 1 ? evict_first_policy() : evict_normal_policy();
            const uint32_t rows_at = max(last_k, first_k + kLead) - kLead;
            Job next;
#pragma unroll 1
            for (uint32_t k = first_k; k < last_k; ++k, ring.advance()) {
                if (k == first_k) next = take(pieces);
                if (k == rows_at) rows = fetch_rows(next);
                if (k % 4 == 0 || k == first_k) {
                    const uint32_t next_group = k / 4 * 4 + 4;
                    const bool within = next_group < last_k;
#pragma unroll
                    for (uint32_t i = 0; i < kRowsPerLoadThread; ++i) {
                        if (has(i)) shared.own_scales[own(i)] = ahead[i];
                        ahead[i] = fetch_scales(within ? own_row[i] : rows.own_row[i], within ? next_group : next.piece.first_k);
                    }
                }
                float scale[kRowsPerLoadThread];
#pragma unroll
                for (uint32_t i = 0; i < kRowsPerLoadThread; ++i)
                    if (has(i)) scale[i] = reinterpret_cast<const float*>(&shared.own_scales[own(i)])[k % 4];
                const float first_scale = shared.weight_scales[buffer][0][k], second_scale = shared.weight_scales[buffer][1][k];
                mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
                uint64_t& full = shared.full[ring.stage];
                if (warp == 0 && elect_one()) {
                    if (k == first_k) {
                        shared.first_of_piece[ring.stage] = piece;
                        shared.piece[piece] = {job.tile.first_row,
                                               first_h_row(job.tile.expert, job.tile.first_row),
                                               job.tile.num_rows,
                                               job.column,
                                               first_k,
                                               last_k};
                    }
                    mbarrier::arrive_expect_bytes(full, 2 * kHalfBytes);
                    operands.load_weights(shared.weights[ring.stage][rank], full, job.tile.expert, job.column, k, rank, policy);
                }
                const uint32_t target = first_target + ring.stage * (kBlockM * kTileK);
#pragma unroll
                for (uint32_t pass = 0; pass < kPasses; ++pass) {
                    const bool within = pass * 16 + thread / 8 < kBlockM;  // of half a pass there may be room only
                    if (within && pass * 16 < end_row) cp_async_16(target + pass * 16 * kTileK, pieces_of_k + source[pass]);
                }
                pieces_of_k += operands.k_stride();
                cp_async_arrive(full);
#pragma unroll
                for (uint32_t i = 0; i < kRowsPerLoadThread; ++i) {
                    if (!has(i)) continue;
                    shared.scale[ring.stage][0][scale_slot(own(i))] = scale[i] * first_scale;
                    shared.scale[ring.stage][1][scale_slot(own(i))] = scale[i] * second_scale;
                }
                mbarrier::arrive_warp(full);
            }
            job = next;
            piece = piece + 1 < kNumPieces ? piece + 1 : 0;
        }
        mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
        if (thread == 0) {
            shared.first_of_piece[ring.stage] = piece;
            shared.piece[piece].num_rows = 0;
            mbarrier::arrive(shared.full[ring.stage]);
        }
        cp_async_arrive(shared.full[ring.stage]);
        mbarrier::arrive_warp(shared.full[ring.stage]);
        cp_async_wait_all();
    }
};
