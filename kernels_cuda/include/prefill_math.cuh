// The consumers of a grouped product: sums over K of 256 weight rows by the rows of a tile, block-scaled, in fp32.
//
// Two warpgroups, of which each has 64 rows of each half of the weights. They are the M of wgmma, and the rows of a CTA its
// N, so that no product is wasted on rows that are not there.
//
// A piece of K that does not begin at 0 leaves its sums to the cluster whose piece does, through global memory.
//
// The products of each height are code of their own; what follows them is not, and leaves out the rows that are not there:
// code comes from DRAM the first time.
#pragma once
#include "cluster.cuh"
#include "exchange.cuh"
#include "prefill_load.cuh"
#include "registers.cuh"
#include "wgmma.cuh"

constexpr uint32_t kWarpgroupBytes = 64 * kTileK;
constexpr uint32_t kPartVectors = kBlockM / 4;  // float4 that a thread leaves of its sums

// Up to so many rows there are registers for two partial sums: while one is promoted the product of the other is under way.
// With more it is the other warpgroup's.
constexpr uint32_t kMostPairedRows = kBlockM < 96 ? kBlockM : 96;

// 64 K registers: 128 producer threads and 256 math threads.
constexpr uint32_t kProducerRegisters = 56;
constexpr uint32_t kMathRegisters = 224;

// Heights that a CTA's part of a tile is padded to.
constexpr uint32_t kLeastHeight = 16;
__device__ __forceinline__ constexpr uint32_t next_height(uint32_t rows) { return rows + (rows < 64 ? 16 : 8); }

// Sums left by shares that begin inside an item; one for each CTA.
struct Parts {
    float4* sums;          // [clusters][2][kPartVectors][kNumMathThreads]
    uint32_t* written;     // [clusters][2], 0 at the start

    // This thread's vectors, kNumMathThreads apart.
    __device__ __forceinline__ float4* of(uint32_t part) const {
        return sums + static_cast<uint64_t>(part) * kPartVectors * kNumMathThreads + registers::thread_index();
    }

    // The sums of `rows` rows, a multiple of 8.
    template <uint32_t kCount>
    __device__ __forceinline__ void store(uint32_t share, uint32_t rows, const float (&first)[kCount],
                                          const float (&second)[kCount]) const {
        const uint32_t index = share * kClusterSize + cluster::cta_rank();
        float4* const part = of(index);
#pragma unroll
        for (uint32_t i = 0; i < kCount / 4; ++i) {
            if (8 * i >= rows) break;
            part[2 * i * kNumMathThreads] =
                make_float4(first[4 * i], first[4 * i + 1], first[4 * i + 2], first[4 * i + 3]);
            part[(2 * i + 1) * kNumMathThreads] =
                make_float4(second[4 * i], second[4 * i + 1], second[4 * i + 2], second[4 * i + 3]);
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        if (registers::thread_index() == 0) exchange::signal(written + index);
    }

    template <uint32_t kCount>
    __device__ __forceinline__ void add(uint32_t share, uint32_t rows, float (&first)[kCount], float (&second)[kCount]) const {
        const uint32_t index = share * kClusterSize + cluster::cta_rank();
        if (registers::thread_index() == 0) exchange::await(written + index);
        named_barrier(kMathBarrier, kNumMathThreads);
        const float4* const part = of(index);
#pragma unroll
        for (uint32_t i = 0; i < kCount / 4; ++i) {
            if (8 * i >= rows) break;
            const float4 a = exchange::load_once(part + 2 * i * kNumMathThreads);
            const float4 b = exchange::load_once(part + (2 * i + 1) * kNumMathThreads);
            first[4 * i] += a.x, first[4 * i + 1] += a.y, first[4 * i + 2] += a.z, first[4 * i + 3] += a.w;
            second[4 * i] += b.x, second[4 * i + 1] += b.y, second[4 * i + 2] += b.z, second[4 * i + 3] += b.w;
        }
    }
};

// Epilogue is a type with
//     finish(piece, rows, first, second)  sums of weight rows by `rows` rows: first and second half, wgmma's layout
template <uint32_t kNumK, typename Epilogue>
struct Math {
    struct Steps {
        uint32_t first, end;

        __device__ __forceinline__ uint32_t count() const { return end - first; }
    };

    LoadStorage<kNumK>& shared;
    const Share& share;
    const Parts parts;
    Epilogue epilogue;
    Ring ring;
    const uint32_t warpgroup = registers::uniform(registers::thread_index() / 128);

    __device__ __forceinline__ Math(LoadStorage<kNumK>& shared, const Share& share, const Parts& parts, const Epilogue& epilogue)
        : shared(shared), share(share), parts(parts), epilogue(epilogue) {}

    __device__ __forceinline__ void wait_stage() {
        mbarrier::wait(shared.full[ring.stage], ring.parity);
        fence_async_proxy();  // rows came by cp.async
    }

    __device__ __forceinline__ void release(uint32_t stage) {
        mbarrier::arrive_warp(shared.empty[stage]);
        if (registers::thread_index() % 32 == 0)
            mbarrier::arrive_remote_relaxed(shared.empty[stage], cluster::cta_rank() ^ 1);
    }

    __device__ __forceinline__ uint64_t weights(uint32_t stage, uint32_t half) const {
        return wgmma::descriptor(shared.weights[stage][half] + warpgroup * kWarpgroupBytes);
    }
    __device__ __forceinline__ uint64_t rows(uint32_t stage) const { return wgmma::descriptor(shared.rows[stage]); }

    // The scales of this lane's columns. The first few are read before the wait for the product, the others meanwhile.
    template <uint32_t kRows>
    struct Scales {
        static constexpr uint32_t kCount = ceil_div(kRows, 16u);
        static constexpr uint32_t kAhead = kBlockM > 128 ? 1 : kBlockM > 64 ? 2 : 3;
        const float4* source;
        float4 ahead[kAhead];

        __device__ __forceinline__ explicit Scales(const float (&scale)[kScaleSlots])
            : source(reinterpret_cast<const float4*>(scale) + registers::thread_index() % 4) {
#pragma unroll
            for (uint32_t i = 0; i < kAhead && i < kCount; ++i) ahead[i] = source[4 * i];
        }
        __device__ __forceinline__ float4 at(uint32_t i) const { return i < kAhead ? ahead[i < kAhead ? i : 0] : source[4 * i]; }
    };

    // sum += partial * scale of the column's row and the weights.
    template <uint32_t kRows, uint32_t kCount>
    __device__ __forceinline__ static void promote(float (&sum)[kCount], float (&partial)[kRows / 2],
                                                   const Scales<kRows>& scales) {
        wgmma::pin(partial);
#pragma unroll
        for (uint32_t j = 0; j < Scales<kRows>::kCount; ++j) {
            const float4 four = scales.at(j);
#pragma unroll
            for (uint32_t h = 0; h < 2; ++h) {
                const uint32_t i = 8 * j + 4 * h;
                if (i >= kRows / 2) break;
                const float left = h == 0 ? four.y : four.w, right = h == 0 ? four.x : four.z;
                sum[i + 0] += partial[i + 0] * left;
                sum[i + 1] += partial[i + 1] * right;
                sum[i + 2] += partial[i + 2] * left;
                sum[i + 3] += partial[i + 3] * right;
            }
        }
        wgmma::pin(sum);
    }

    // One product after the other.
    template <uint32_t kRows, uint32_t kCount>
    __device__ __forceinline__ void add_products_singly(float (&first)[kCount], float (&second)[kCount], uint32_t num_steps) {
        float partial[kRows / 2] = {};
        wait_stage();
#pragma unroll 1
        for (uint32_t step = 1; step <= num_steps; ++step) {
            const uint32_t stage = ring.stage;
            wgmma::multiply_k128<kRows, true>(partial, weights(stage, 0), rows(stage));
            const Scales<kRows> first_scales(shared.scale[stage][0]);
            wgmma::wait<0>();
            promote<kRows>(first, partial, first_scales);
            wgmma::multiply_k128<kRows, true>(partial, weights(stage, 1), rows(stage));
            const Scales<kRows> second_scales(shared.scale[stage][1]);
            ring.advance();
            if (step < num_steps) wait_stage();  // meanwhile
            wgmma::wait<0>();
            promote<kRows>(second, partial, second_scales);
            release(stage);
        }
    }

    // While one partial sum is promoted the product of the other is under way. The first step, which has none of a step before,
    // promotes zeros: code of its own would cost more.
    template <uint32_t kRows, uint32_t kCount>
    __device__ __forceinline__ void add_products_in_pairs(float (&first)[kCount], float (&second)[kCount], uint32_t num_steps) {
        float a[kRows / 2], b[kRows / 2] = {};
        uint32_t previous = ring.stage;
        uint32_t step = 0;
#pragma unroll 1
        do {
            wait_stage();
            wgmma::multiply_k128<kRows>(a, weights(ring.stage, 0), rows(ring.stage));
            const Scales<kRows> second_scales(shared.scale[previous][1]);
            wgmma::wait<1>();
            promote<kRows>(second, b, second_scales);
            wgmma::multiply_k128<kRows>(b, weights(ring.stage, 1), rows(ring.stage));
            if (step > 0) release(previous);
            const Scales<kRows> first_scales(shared.scale[ring.stage][0]);
            wgmma::wait<1>();
            promote<kRows>(first, a, first_scales);
            previous = ring.stage;
            ring.advance();
        } while (++step < num_steps);
        const Scales<kRows> scales(shared.scale[previous][1]);
        wgmma::wait<0>();
        promote<kRows>(second, b, scales);
        release(previous);
    }

    // With the least height that holds `rows`, kRows or more.
    template <uint32_t kRows, uint32_t kCount>
    __device__ __forceinline__ void add_products(float (&first)[kCount], float (&second)[kCount], uint32_t rows,
                                                 uint32_t num_steps) {
        if constexpr (next_height(kRows) <= 2 * kCount)
            if (rows > kRows) return add_products<next_height(kRows)>(first, second, rows, num_steps);
        if constexpr (kRows <= kMostPairedRows)
            add_products_in_pairs<kRows>(first, second, num_steps);
        else
            add_products_singly<kRows>(first, second, num_steps);
    }

    // Whether this share has the epilogue of the piece: then `first` and `second` are the sums over all of K.
    template <uint32_t kCount>
    __device__ __forceinline__ bool complete(const Steps& steps, uint32_t rows, float (&first)[kCount], float (&second)[kCount]) {
        if (steps.first > 0) {
            parts.store(share.number, rows, first, second);
            return false;
        }
        uint32_t other = share.number + 1;
#pragma unroll 1
        for (uint32_t k = steps.end; k < kNumK; ++other) {
            const uint32_t next_k = registers::uniform(share.steps_before(other + 1, kNumK));
            if (next_k > k) parts.add(other, rows, first, second);
            k = next_k;
        }
        return true;
    }

    // With a height in kLeastRows..kMostRows.
    template <uint32_t kLeastRows, uint32_t kMostRows>
    __device__ __forceinline__ void multiply(const PieceOfTile& piece, uint32_t rows) {
        const Steps steps{registers::uniform(piece.first_k), registers::uniform(piece.last_k)};
        float first[kMostRows / 2] = {}, second[kMostRows / 2] = {};
        wgmma::pin(first), wgmma::pin(second);  // zeroed here, not by the code of each height
        add_products<kLeastRows>(first, second, rows, steps.count());
        if (complete(steps, rows, first, second)) epilogue.finish(piece, rows, first, second);
        __syncwarp();  // where lanes may have parted; else the compiler takes them for parted ever after
    }

    __device__ __forceinline__ void run() {
        while (true) {
            mbarrier::wait(shared.full[ring.stage], ring.parity);
            const PieceOfTile& piece = shared.piece[shared.first_of_piece[ring.stage]];
            const uint32_t num_rows = registers::uniform(piece.num_rows);
            if (num_rows == 0) return;
            const uint32_t rows = rows_per_cta(num_rows);
            if constexpr (kBlockM > kMostPairedRows) {
                if (rows > kMostPairedRows) {
                    multiply<next_height(kMostPairedRows), kBlockM>(piece, rows);
                    continue;
                }
            }
            multiply<kLeastHeight, kMostPairedRows>(piece, rows);
        }
    }
};
