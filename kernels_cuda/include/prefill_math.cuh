// The consumers of a grouped product: sums over K of 256 weight rows by the rows of a tile, block-scaled, in fp32.
//
// Two warpgroups. Up to kMostSwappedRows rows of a CTA they are the N of wgmma and weight rows the M: no product is
// wasted on rows that are not there, and each warpgroup has 64 rows of each half of the weights. More rows fill the M
// of two warpgroups, 64 each, against all weight rows: that reads shared memory less often, and a thread's sums have
// two row scales rather than one for every column.
//
// A piece of K that does not begin at 0 leaves its sums to the cluster whose piece does, through global memory.
#pragma once
#include "cluster.cuh"
#include "exchange.cuh"
#include "prefill_load.cuh"
#include "registers.cuh"
#include "wgmma.cuh"

constexpr uint32_t kMostSwappedRows = MOST_SWAPPED_ROWS;
constexpr uint32_t kMostPipelinedRows = 96;  // registers for two partial sums
constexpr uint32_t kWarpgroupBytes = 64 * kTileK;
constexpr uint32_t kPartVectors = kBlockM / 4;  // float4 that a thread leaves of its sums

static_assert(kMostSwappedRows >= kBlockM || kBlockM == 128, "two warpgroups of 64 rows");

// Heights that a CTA's part of a tile is padded to: 16, 32, then by 8.
__device__ __forceinline__ constexpr uint32_t next_height(uint32_t rows) { return rows + (rows < 32 ? 16 : 8); }

// Sums left by shares that begin inside an item; one for each CTA.
struct Parts {
    float4* sums;          // [clusters][2][kPartVectors][kNumMathThreads]
    uint32_t* written;     // [clusters][2], 0 at the start

    // This thread's vectors, kNumMathThreads apart.
    __device__ __forceinline__ float4* of(uint32_t part) const {
        return sums + static_cast<uint64_t>(part) * kPartVectors * kNumMathThreads + registers::thread_index();
    }

    template <uint32_t kCount>
    __device__ __forceinline__ void store(uint32_t share, const float (&first)[kCount],
                                          const float (&second)[kCount]) const {
        const uint32_t index = share * kClusterSize + cluster::cta_rank();
        float4* const part = of(index);
#pragma unroll
        for (uint32_t i = 0; i < kCount / 4; ++i) {
            part[2 * i * kNumMathThreads] =
                make_float4(first[4 * i], first[4 * i + 1], first[4 * i + 2], first[4 * i + 3]);
            part[(2 * i + 1) * kNumMathThreads] =
                make_float4(second[4 * i], second[4 * i + 1], second[4 * i + 2], second[4 * i + 3]);
        }
        __threadfence();
        named_barrier(kMathBarrier, kNumMathThreads);
        if (registers::thread_index() == 0) exchange::signal(written + index);
    }

    template <uint32_t kCount>
    __device__ __forceinline__ void add(uint32_t share, float (&first)[kCount], float (&second)[kCount]) const {
        const uint32_t index = share * kClusterSize + cluster::cta_rank();
        if (registers::thread_index() == 0) exchange::await(written + index);
        named_barrier(kMathBarrier, kNumMathThreads);
        const float4* const part = of(index);
#pragma unroll
        for (uint32_t i = 0; i < kCount / 4; ++i) {
            const float4 a = exchange::load_once(part + 2 * i * kNumMathThreads);
            const float4 b = exchange::load_once(part + (2 * i + 1) * kNumMathThreads);
            first[4 * i] += a.x, first[4 * i + 1] += a.y, first[4 * i + 2] += a.z, first[4 * i + 3] += a.w;
            second[4 * i] += b.x, second[4 * i + 1] += b.y, second[4 * i + 2] += b.z, second[4 * i + 3] += b.w;
        }
    }

};

// Epilogue is a type with
//     swapped<kRows>(piece, first, second)    sums of weight rows by kRows rows: first and second half, wgmma's layout
//     by_rows(piece, first, second)           sums of 64 rows by 128 weight rows: first and second half
template <uint32_t kNumK, typename Epilogue>
struct Math {
    LoadStorage& shared;
    const Share& share;
    const Parts parts;
    Epilogue epilogue;
    uint32_t next_step = 0;  // of all pieces; the only register that the ring takes

    __device__ __forceinline__ Math(LoadStorage& shared, const Share& share, const Parts& parts, const Epilogue& epilogue)
        : shared(shared), share(share), parts(parts), epilogue(epilogue) {}

    __device__ __forceinline__ uint32_t stage() const { return next_step % kNumStages; }
    __device__ __forceinline__ void wait_stage() {
        mbarrier::wait(shared.full[stage()], next_step / kNumStages % 2);
        fence_async_proxy();  // rows came by cp.async
    }

    // Each lane arrives for itself in this CTA: racecheck does not follow the order through __syncwarp(). The other CTA
    // overwrites weights alone, which the whole warp has read by then.
    __device__ __forceinline__ void release(uint32_t stage, uint32_t lane) {
        mbarrier::arrive(shared.empty[stage]);
        if (lane == 0) mbarrier::arrive_remote_relaxed(shared.empty[stage], cluster::cta_rank() ^ 1);
    }

    __device__ __forceinline__ uint64_t weights(uint32_t half, uint32_t warpgroup) const {
        return wgmma::descriptor(shared.weights[stage()][half] + warpgroup * kWarpgroupBytes);
    }
    __device__ __forceinline__ uint64_t rows() const { return wgmma::descriptor(shared.rows[stage()]); }

    // sum += partial * scale of the column's row.
    template <uint32_t kRows>
    __device__ __forceinline__ void promote(float (&sum)[kRows / 2], float (&partial)[kRows / 2], const float* scale,
                                            uint32_t lane) {
        wgmma::pin(partial);
        const float4* const scales = reinterpret_cast<const float4*>(scale) + lane % 4;
#pragma unroll
        for (uint32_t j = 0; j < ceil_div(kRows, 16u); ++j) {
            const float4 four = scales[4 * j];
#pragma unroll
            for (uint32_t h = 0; h < 2; ++h) {
                const uint32_t i = 8 * j + 4 * h;
                if (i >= kRows / 2) break;
                const float left = h == 0 ? four.x : four.z, right = h == 0 ? four.y : four.w;
                sum[i + 0] += partial[i + 0] * left;
                sum[i + 1] += partial[i + 1] * right;
                sum[i + 2] += partial[i + 2] * left;
                sum[i + 3] += partial[i + 3] * right;
            }
        }
        wgmma::pin(sum);
    }

    // Weight rows as M. While one partial sum is promoted the product of the other is under way.
    template <uint32_t kRows>
    __device__ __forceinline__ void sum_swapped(float (&first)[kRows / 2], float (&second)[kRows / 2], uint32_t num_steps) {
        const uint32_t thread = registers::thread_index(), lane = thread % 32, warpgroup = thread / 128;
        if constexpr (kRows <= kMostPipelinedRows) {
            float a[kRows / 2], b[kRows / 2];
            wait_stage();
            wgmma::multiply_k128<kRows>(a, weights(0, warpgroup), rows());
            wgmma::multiply_k128<kRows>(b, weights(1, warpgroup), rows());
            wgmma::wait<1>();
            promote<kRows>(first, a, shared.scale[stage()][0], lane);
#pragma unroll 1
            for (uint32_t step = 1; step < num_steps; ++step) {
                const uint32_t previous = stage();
                ++next_step;
                wait_stage();
                wgmma::multiply_k128<kRows>(a, weights(0, warpgroup), rows());
                wgmma::wait<1>();
                promote<kRows>(second, b, shared.scale[previous][1], lane);
                wgmma::multiply_k128<kRows>(b, weights(1, warpgroup), rows());
                release(previous, lane);
                wgmma::wait<1>();
                promote<kRows>(first, a, shared.scale[stage()][0], lane);
            }
            wgmma::wait<0>();
            promote<kRows>(second, b, shared.scale[stage()][1], lane);
            release(stage(), lane);
            ++next_step;
        } else {
#pragma unroll 1
            for (uint32_t step = 0; step < num_steps; ++step, ++next_step) {
                float partial[kRows / 2];
                wait_stage();
                wgmma::multiply_k128<kRows>(partial, weights(0, warpgroup), rows());
                wgmma::wait<0>();
                promote<kRows>(first, partial, shared.scale[stage()][0], lane);
                wgmma::multiply_k128<kRows>(partial, weights(1, warpgroup), rows());
                wgmma::wait<0>();
                promote<kRows>(second, partial, shared.scale[stage()][1], lane);
                release(stage(), lane);
            }
        }
    }

    // Rows as M, 64 of them, by the 128 weight rows of one half; then the other.
    __device__ __forceinline__ void sum_by_rows(float (&first)[64], float (&second)[64], uint32_t num_steps) {
        const uint32_t thread = registers::thread_index(), lane = thread % 32, warpgroup = thread / 128;
        const uint32_t slot = scale_slot(thread / 32 * 16 + lane / 4);  // and of the row 8 below: 2 further
#pragma unroll 1
        for (uint32_t step = 0; step < num_steps; ++step, ++next_step) {
            wait_stage();
            const uint64_t own_rows = rows() + warpgroup * (kWarpgroupBytes >> 4);
            float partial[64];
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                wgmma::multiply_k128<128>(partial, own_rows, wgmma::descriptor(shared.weights[stage()][half]));
                const float upper = shared.scale[stage()][half][slot], lower = shared.scale[stage()][half][slot + 2];
                wgmma::wait<0>();
                wgmma::pin(partial);
                float(&sum)[64] = half == 0 ? first : second;
#pragma unroll
                for (uint32_t i = 0; i < 64; ++i) sum[i] += partial[i] * (i & 2 ? lower : upper);
                wgmma::pin(sum);
            }
            release(stage(), registers::thread_index() % 32);
        }
    }

    // Whether this share has the epilogue of the piece: then `first` and `second` are the sums over all of K.
    template <uint32_t kCount>
    __device__ __forceinline__ bool complete(const PieceOfTile& piece, float (&first)[kCount], float (&second)[kCount]) {
        if (piece.first_k > 0) {
            parts.store(share.number, first, second);
            return false;
        }
        uint32_t other = share.number + 1;
#pragma unroll 1
        for (uint32_t k = piece.last_k; k < kNumK; ++other) {
            const uint32_t next_k = share.steps_before(other + 1, kNumK);
            if (next_k > k) parts.add(other, first, second);
            k = next_k;
        }
        return true;
    }

    template <uint32_t kRows>
    __device__ __forceinline__ void multiply_swapped(const PieceOfTile& piece) {
        float first[kRows / 2], second[kRows / 2];
#pragma unroll
        for (uint32_t i = 0; i < kRows / 2; ++i) first[i] = second[i] = 0.f;
        sum_swapped<kRows>(first, second, piece.last_k - piece.first_k);
        if (complete(piece, first, second)) epilogue.template swapped<kRows>(piece, first, second);
    }

    __device__ __forceinline__ void multiply_by_rows(const PieceOfTile& piece) {
        float first[64], second[64];
#pragma unroll
        for (uint32_t i = 0; i < 64; ++i) first[i] = second[i] = 0.f;
        sum_by_rows(first, second, piece.last_k - piece.first_k);
        if (complete(piece, first, second)) epilogue.by_rows(piece, first, second);
    }

    template <uint32_t kRows = 16>
    __device__ __forceinline__ void multiply_fitting(const PieceOfTile& piece, uint32_t num_rows) {
        constexpr uint32_t kMost = kMostSwappedRows < kBlockM ? kMostSwappedRows : kBlockM;
        if (num_rows <= kRows) return multiply_swapped<kRows>(piece);
        if constexpr (next_height(kRows) <= kMost)
            multiply_fitting<next_height(kRows)>(piece, num_rows);
        else if constexpr (kMost < kBlockM)
            multiply_by_rows(piece);
    }

    __device__ __forceinline__ void run() {
        while (true) {
            mbarrier::wait(shared.full[stage()], next_step / kNumStages % 2);
            const PieceOfTile& piece = shared.piece[shared.first_of_piece[stage()]];
            if (piece.num_rows == 0) return;
            multiply_fitting(piece, rows_per_cta(piece.num_rows));
        }
    }
};
