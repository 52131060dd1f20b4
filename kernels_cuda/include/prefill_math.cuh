// The consumers of a grouped product: sums over K of 256 weight rows by the rows of a tile, block-scaled, in fp32.
//
// The rows of a CTA are the N of wgmma and weight rows the M, so that no product is wasted on rows that are not there. Two
// warpgroups, each with 64 rows of each half of the weights.
//
// A piece of K that does not begin at 0 leaves its sums to the cluster whose piece does, through global memory.
#pragma once
#include "cluster.cuh"
#include "exchange.cuh"
#include "prefill_load.cuh"
#include "registers.cuh"
#include "wgmma.cuh"

constexpr uint32_t kWarpgroupBytes = 64 * kTileK;
constexpr uint32_t kPartVectors = kBlockM / 4;  // float4 that a thread leaves of its sums

static_assert(kBlockM <= 96, "registers for two partial sums");

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
//     ahead(piece)                                what this thread needs to know of the piece, asked for before its products
//     finish<kRows>(piece, ahead, first, second)  sums of weight rows by kRows rows: first and second half, wgmma's layout
template <uint32_t kNumK, typename Epilogue>
struct Math {
    LoadStorage& shared;
    const Share& share;
    const Parts parts;
    Epilogue epilogue;
    uint32_t next_step = 0;  // of all pieces; the only register that the ring takes

    __device__ __forceinline__ Math(LoadStorage& shared, const Share& share, const Parts& parts, const Epilogue& epilogue)
        : shared(shared), share(share), parts(parts), epilogue(epilogue) {}

    __device__ __forceinline__ uint32_t next_stage() const { return next_step % kNumStages; }
    __device__ __forceinline__ void wait_stage(uint32_t stage) {
        mbarrier::wait(shared.full[stage], next_step / kNumStages % 2);
        fence_async_proxy();  // rows came by cp.async
    }

    __device__ __forceinline__ void release(uint32_t stage, uint32_t lane) {
        mbarrier::arrive_warp(shared.empty[stage]);
        if (lane == 0) mbarrier::arrive_remote_relaxed(shared.empty[stage], cluster::cta_rank() ^ 1);
    }

    __device__ __forceinline__ uint64_t weights(uint32_t stage, uint32_t half, uint32_t warpgroup) const {
        return wgmma::descriptor(shared.weights[stage][half] + warpgroup * kWarpgroupBytes);
    }
    __device__ __forceinline__ uint64_t rows(uint32_t stage) const { return wgmma::descriptor(shared.rows[stage]); }

    // The rows' scales of this lane's columns. A 16-byte read takes as long for one address as for 32, so they are read once
    // for both halves, where there are registers to keep them.
    template <uint32_t kRows>
    struct RowScales {
        static constexpr uint32_t kCount = ceil_div(kRows, 16u);
        static constexpr bool kKept = kRows <= 80;
        const float4* source;
        float4 kept[kKept ? kCount : 1];

        __device__ __forceinline__ void read(const float* scale, uint32_t lane) {
            source = reinterpret_cast<const float4*>(scale) + lane % 4;
            if constexpr (kKept) {
#pragma unroll
                for (uint32_t i = 0; i < kCount; ++i) kept[i] = source[4 * i];
            }
        }
        __device__ __forceinline__ float4 at(uint32_t i) const { return kKept ? kept[kKept ? i : 0] : source[4 * i]; }
    };

    // sum += partial * scale of the weights * scale of the column's row.
    template <uint32_t kRows>
    __device__ __forceinline__ static void promote(float (&sum)[kRows / 2], float (&partial)[kRows / 2],
                                                   const RowScales<kRows>& scales, float weight_scale) {
        wgmma::pin(partial);
#pragma unroll
        for (uint32_t j = 0; j < RowScales<kRows>::kCount; ++j) {
            const float4 four = scales.at(j);
#pragma unroll
            for (uint32_t h = 0; h < 2; ++h) {
                const uint32_t i = 8 * j + 4 * h;
                if (i >= kRows / 2) break;
                const float left = (h == 0 ? four.x : four.z) * weight_scale;
                const float right = (h == 0 ? four.y : four.w) * weight_scale;
                sum[i + 0] += partial[i + 0] * left;
                sum[i + 1] += partial[i + 1] * right;
                sum[i + 2] += partial[i + 2] * left;
                sum[i + 3] += partial[i + 3] * right;
            }
        }
        wgmma::pin(sum);
    }

    // While one partial sum is promoted the product of the other is under way.
    template <uint32_t kRows>
    __device__ __forceinline__ void add_products(float (&first)[kRows / 2], float (&second)[kRows / 2], uint32_t num_steps) {
        const uint32_t thread = registers::thread_index(), lane = thread % 32, warpgroup = thread / 128;
        float a[kRows / 2], b[kRows / 2];
        RowScales<kRows> scales;
        uint32_t stage = next_stage();
        const auto promote_first = [&] {
            scales.read(shared.row_scale[stage], lane);
            const float weight_scale = shared.weight_scale[stage][0];
            wgmma::wait<1>();
            promote<kRows>(first, a, scales, weight_scale);
        };
        wait_stage(stage);
        wgmma::multiply_k128<kRows>(a, weights(stage, 0, warpgroup), rows(stage));
        wgmma::multiply_k128<kRows>(b, weights(stage, 1, warpgroup), rows(stage));
        promote_first();
#pragma unroll 1
        for (uint32_t step = 1; step < num_steps; ++step) {
            const uint32_t previous = stage;
            const float weight_scale = shared.weight_scale[previous][1];
            ++next_step;
            stage = next_stage();
            wait_stage(stage);
            wgmma::multiply_k128<kRows>(a, weights(stage, 0, warpgroup), rows(stage));
            wgmma::wait<1>();
            promote<kRows>(second, b, scales, weight_scale);
            wgmma::multiply_k128<kRows>(b, weights(stage, 1, warpgroup), rows(stage));
            release(previous, lane);
            promote_first();
        }
        const float weight_scale = shared.weight_scale[stage][1];
        wgmma::wait<0>();
        promote<kRows>(second, b, scales, weight_scale);
        release(stage, lane);
        ++next_step;
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

    // With the least height that holds num_rows, kRows or more.
    template <uint32_t kRows = 16>
    __device__ __forceinline__ void multiply_fitting(const PieceOfTile& piece, uint32_t num_rows) {
        if constexpr (next_height(kRows) <= kBlockM)
            if (num_rows > kRows) return multiply_fitting<next_height(kRows)>(piece, num_rows);
        const auto ahead = epilogue.ahead(piece);
        float first[kRows / 2], second[kRows / 2];
#pragma unroll
        for (uint32_t i = 0; i < kRows / 2; ++i) first[i] = second[i] = 0.f;
        add_products<kRows>(first, second, piece.last_k - piece.first_k);
        if (complete(piece, first, second)) epilogue.template finish<kRows>(piece, ahead, first, second);
    }

    __device__ __forceinline__ void run() {
        while (true) {
            const uint32_t stage = next_stage();
            mbarrier::wait(shared.full[stage], next_step / kNumStages % 2);
            const PieceOfTile& piece = shared.piece[shared.first_of_piece[stage]];
            if (piece.num_rows == 0) return;
            multiply_fitting(piece, rows_per_cta(piece.num_rows));
        }
    }
};
