// Products of the up phase of sm90_stream.cu: gate and up of one K tile, either in FP8 by wgmma or in f16 by mma.sync.
//
// Sums of wgmma have 14 bits: gate and up are off by 1.3e-4 with sums over 128 of K, by 4.5e-5 with sums over 32. That flips
// codes of the activations, the largest part of the error of `out`. With few rows to a tile there is time for products in
// f16 while weights are waited for; with more, for short sums; tall tiles take long enough, and the registers, as it is.
//
// Accumulators are those of wgmma.cuh: gate[4j + 2h + b] is gate row 16w + l/4 + 8h and token 8j + 2(l%4) + b, for w the
// warp among all eight, l the lane.
#pragma once
#include "copy.cuh"
#include "mma.cuh"
#include "promote.cuh"
#include "stream_storage.cuh"
#include "wgmma.cuh"

constexpr uint32_t kMaxExactRows = 16;  // of products in f16

// The stages of weights, as a math thread goes through them.
struct WeightRing {
    SharedStorage& shared;
    Position position;

    __device__ __forceinline__ void wait() { mbarrier::wait(shared.full[position.stage], position.parity); }
    // The rows of the stage that has arrived, one half of it after the other.
    __device__ __forceinline__ const uint8_t* rows(uint32_t half) const { return shared.weights[position.stage][half]; }
    // All lanes of a warp, when they have read what they take of it.
    __device__ __forceinline__ void release() {
        mbarrier::arrive_warp(shared.empty[position.stage]);
        position.advance();
    }
};

// Products of 64 weight rows by kRows tokens over one K tile by wgmma, in kRounds rounds of kCount sums of kPromoteK each.
template <uint32_t kRows>
struct Products {
    static_assert(kRows > kMaxExactRows, "fewer rows are multiplied in f16");
    static constexpr uint32_t kPromoteK = kRows <= 24 ? 32 : kRows <= 32 ? 64 : kTileK;
    static constexpr uint32_t kPieces = kTileK / kPromoteK;
    static constexpr uint32_t kCount = kRows <= 24 ? 2 : 1;  // for which there are registers
    static constexpr uint32_t kRounds = kPieces / kCount;
    static constexpr uint32_t kSteps = kPromoteK / 32;
    float sums[kCount][kRows / 2];

    // As one committed group.
    __device__ __forceinline__ void start(uint64_t weights, uint64_t tokens, uint32_t round) {
        wgmma::fence();
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
            const uint64_t first = (round * kCount + i) * kSteps * wgmma::kStepK;
            wgmma::Product<kRows>::zero(sums[i], weights + first, tokens + first);
#pragma unroll
            for (uint32_t step = 1; step < kSteps; ++step)
                wgmma::Product<kRows>::add(sums[i], weights + first + step * wgmma::kStepK,
                                           tokens + first + step * wgmma::kStepK);
        }
        wgmma::commit();
    }

    __device__ __forceinline__ void pin() {
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) wgmma::pin(sums[i]);
    }

    // Of a round that was waited for.
    __device__ __forceinline__ void promote_into(float (&total)[kRows / 2], const float* token_scale, float weight_scale,
                                                 uint32_t lane) {
        pin();
#pragma unroll
        for (uint32_t i = 1; i < kCount; ++i)
#pragma unroll
            for (uint32_t j = 0; j < kRows / 2; ++j) sums[0][j] += sums[i][j];
        promote<kRows>(total, sums[0], token_scale, weight_scale, lane);
    }
};

// gate and up += products over a K tile that has arrived, of a warpgroup's 64 gate rows and the same 64 up rows. Releases
// the stage of the weights; that of the tokens is the caller's.
template <uint32_t kRows>
__device__ __forceinline__ void add_products(float (&gate)[kRows / 2], float (&up)[kRows / 2], WeightRing& weights,
                                             uint32_t token_stage, uint32_t warpgroup, uint32_t lane) {
    SharedStorage& shared = weights.shared;
    fence_async_proxy();  // the tokens came by cp.async
    const uint64_t tokens = wgmma::descriptor(shared.tokens[token_stage]);
    const uint64_t gate_rows = wgmma::descriptor(weights.rows(0) + warpgroup * kWarpgroupBytes);
    const uint64_t up_rows = wgmma::descriptor(weights.rows(1) + warpgroup * kWarpgroupBytes);
    const float* const token_scale = shared.token_scale[token_stage];
    const float gate_scale = shared.weight_scale[token_stage][0], up_scale = shared.weight_scale[token_stage][1];
    Products<kRows> gate_products, up_products;
    gate_products.start(gate_rows, tokens, 0);
    up_products.start(up_rows, tokens, 0);
#pragma unroll
    for (uint32_t round = 1; round < Products<kRows>::kRounds; ++round) {
        wgmma::wait<1>();
        gate_products.promote_into(gate, token_scale, gate_scale, lane);
        gate_products.start(gate_rows, tokens, round);
        wgmma::wait<1>();
        up_products.promote_into(up, token_scale, up_scale, lane);
        up_products.start(up_rows, tokens, round);
    }
    wgmma::wait<1>();
    gate_products.promote_into(gate, token_scale, gate_scale, lane);
    wgmma::wait<0>();
    up_products.pin();
    weights.release();
    up_products.promote_into(up, token_scale, up_scale, lane);
}

// The same in f16. A lane has 16 bytes of K of a row at a time, those of pieces 2q and 2q + 1 for q its place in the quad;
// each 4 of them are its part of 16 values of K. In which order K is added up does not matter.
template <uint32_t kRows>
__device__ __forceinline__ void add_exact_products(float (&gate)[kRows / 2], float (&up)[kRows / 2], WeightRing& weights,
                                                   uint32_t token_stage, uint32_t warp, uint32_t lane) {
    constexpr uint32_t kBlocks = kRows / 8;
    SharedStorage& shared = weights.shared;
    const uint32_t row = lane / 4;
    const uint8_t* const rows = weights.rows(0) + (warp * 16 + row) * kTileK;
    const uint8_t* const tokens = shared.tokens[token_stage] + row * kTileK;
    float partial[2][2][kRows / 2] = {};  // of each half of K: a sum waits for the one before
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t piece = ((2 * (lane % 4) + half) ^ row) * 16;
        uint4 token[kBlocks], above[2], below[2];
#pragma unroll
        for (uint32_t j = 0; j < kBlocks; ++j)
            token[j] = *reinterpret_cast<const uint4*>(tokens + j * 8 * kTileK + piece);
#pragma unroll
        for (uint32_t matrix = 0; matrix < 2; ++matrix) {
            above[matrix] = *reinterpret_cast<const uint4*>(rows + matrix * kHalfBytes + piece);
            below[matrix] = *reinterpret_cast<const uint4*>(rows + matrix * kHalfBytes + 8 * kTileK + piece);
        }
#pragma unroll
        for (uint32_t word = 0; word < 4; ++word) {
            uint2 b[kBlocks];
#pragma unroll
            for (uint32_t j = 0; j < kBlocks; ++j) b[j] = mma::f16_of_e4m3(mma::word_of(token[j], word));
#pragma unroll
            for (uint32_t matrix = 0; matrix < 2; ++matrix) {
                const uint2 a = mma::f16_of_e4m3(mma::word_of(above[matrix], word));
                const uint2 a_below = mma::f16_of_e4m3(mma::word_of(below[matrix], word));
#pragma unroll
                for (uint32_t j = 0; j < kBlocks; ++j)
                    mma::add(*reinterpret_cast<float(*)[4]>(partial[half][matrix] + 4 * j), a, a_below, b[j]);
            }
        }
    }
    const float* const token_scale = shared.token_scale[token_stage];
    const float* const weight_scale = shared.weight_scale[token_stage];
    weights.release();
#pragma unroll
    for (uint32_t matrix = 0; matrix < 2; ++matrix)
#pragma unroll
        for (uint32_t i = 0; i < kRows / 2; ++i) partial[0][matrix][i] += partial[1][matrix][i];
    promote<kRows>(gate, partial[0][0], token_scale, weight_scale[0], lane);
    promote<kRows>(up, partial[0][1], token_scale, weight_scale[1], lane);
}
