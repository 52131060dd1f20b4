// Between the phases of sm90_stream.cu: sums of gate and up, and the activations that they become, here or by way of memory.
#pragma once
#include "copy.cuh"
#include "exchange.cuh"
#include "stream_storage.cuh"

// Every function is called by all math threads, for the same job.
struct Activations {
    const Params& p;
    SharedStorage& shared;
    const uint32_t thread = threadIdx.x;
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t lane = threadIdx.x % 32;

    __device__ __forceinline__ Activations(const Params& p, SharedStorage& shared) : p(p), shared(shared) {}

    // Set when the sums that `writer` had of a job are written, one for each part.
    __device__ __forceinline__ uint32_t* flags(uint32_t job, uint32_t writer) const {
        return p.sums_written + (job * kNumMathWarps + writer) * kFlaggedParts;
    }

    // Where the sums of a piece of the up phase go: its first row, the next one kMaxParts * kRowVectors further.
    __device__ __forceinline__ float4* sums(const Tile& tile, uint32_t chunk, uint32_t part) const {
        const uint64_t first_row = tile.first_row * kNumChunks + chunk * tile.num_rows;
        return p.sums + (first_row * kMaxParts + part) * kRowVectors;
    }

    // Stores the sums of a piece of the up phase, 64 rows of gate and up for each warpgroup.
    __device__ __forceinline__ void store_sums(const Tile& tile, const Piece& piece, const float (&gate)[kMaxRows / 2],
                                               const float (&up)[kMaxRows / 2]) const {
        float4* const part = sums(tile, piece.item % kNumChunks, piece.part) + warp * 8 + lane / 4;
#pragma unroll
        for (uint32_t j = 0; j < kMaxRows / 8; ++j) {
#pragma unroll
            for (uint32_t b = 0; b < 2; ++b) {
                const uint32_t row = 8 * j + 2 * (lane % 4) + b;
                if (row < tile.num_rows)
                    exchange::store(part + row * kMaxParts * kRowVectors,
                                    make_float4(gate[4 * j + b], gate[4 * j + 2 + b], up[4 * j + b], up[4 * j + 2 + b]));
            }
        }
        if constexpr (kFlagged) {
            __syncwarp();
            if (lane == 0) exchange::signal(flags(piece.item, warp) + piece.part);
        }
    }

    // The weight in `out` of row `thread` of the tile.
    __device__ __forceinline__ float weight_of_own_row(const Tile& tile) const {
        if (thread >= tile.num_rows) return 0.f;
        return p.topk_weights[sorted_choice(p, shared, tile.first_row + thread)] * p.routed_scaling_factor;
    }

    // The activations of a job whose sums this CTA has, quantised per row: `target` as wgmma reads them, and their scales,
    // times the rows' weights in `out`. Written after a first barrier, before which other threads may still read both.
    __device__ __forceinline__ void of_own_sums(const Tile& tile, float (&gate)[kMaxRows / 2], const float (&up)[kMaxRows / 2],
                                                uint8_t* target, float* target_scale, const float* row_weight) const {
#pragma unroll
        for (uint32_t j = 0; j < kMaxRows / 8; ++j) {
            float amax[2] = {};
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                gate[4 * j + i] = p.form.swiglu(gate[4 * j + i], up[4 * j + i]);
                amax[i % 2] = fmaxf(amax[i % 2], fabsf(gate[4 * j + i]));
            }
#pragma unroll
            for (uint32_t offset = 4; offset < 32; offset *= 2) {
                amax[0] = fmaxf(amax[0], __shfl_xor_sync(~0u, amax[0], offset));
                amax[1] = fmaxf(amax[1], __shfl_xor_sync(~0u, amax[1], offset));
            }
            if (lane < 4)
                *reinterpret_cast<float2*>(&shared.row_amax[warp][8 * j + 2 * lane]) = make_float2(amax[0], amax[1]);
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        if (thread < tile.num_rows) {
            float amax = 0.f;
#pragma unroll
            for (uint32_t w = 0; w < kNumMathWarps; ++w) amax = fmaxf(amax, shared.row_amax[w][thread]);
            const float scale = p.form.scale(amax);
            shared.inverse_scale[thread] = 1.f / scale;  // with reciprocal() registers spill at 96 rows
            target_scale[thread] = scale * (row_weight[thread] * p.routed_scaling_factor);
        }
        named_barrier(kMathBarrier, kNumMathThreads);
#pragma unroll
        for (uint32_t j = 0; j < kMaxRows / 8; ++j) {
#pragma unroll
            for (uint32_t b = 0; b < 2; ++b) {
                const uint32_t row = 8 * j + 2 * (lane % 4) + b;
                if (row >= tile.num_rows) continue;
                const float inverse = shared.inverse_scale[row];
                const uint16_t packed = pack_e4m3x2(gate[4 * j + b] * inverse, gate[4 * j + 2 + b] * inverse);
                uint8_t* const piece = target + row * kGroupSize + (warp ^ row % 8) * 16 + lane / 4;
                piece[0] = static_cast<uint8_t>(packed);
                piece[8] = static_cast<uint8_t>(packed >> 8);
            }
        }
        fence_async_proxy();
        named_barrier(kMathBarrier, kNumMathThreads);
    }

    // The activations of a job from its num_parts parts, quantised per row: `target` as wgmma reads them, and their scales.
    // kPasses rows per group of 64 threads at a time, and up to 16 vectors in flight.
    template <uint32_t kPasses>
    __device__ __forceinline__ void of_stored_sums(const Tile& tile, uint32_t job, uint32_t num_parts, uint8_t* target,
                                                   float* target_scale, const float* row_weight) const {
        constexpr uint32_t kParts = kFlagged ? 4 : 16 / kPasses;
        constexpr uint32_t kRowsAtOnce = kNumMathThreads / kRowVectors;
        const uint32_t vector = thread % kRowVectors, first_row = thread / kRowVectors;
        const uint32_t channel = vector / 32 * 64 + vector / 8 % 4 * 16 + vector % 8;  // and channel + 8
        const float4* const parts = sums(tile, job % kNumChunks, 0) + vector;
        if constexpr (kFlagged) exchange::await(reinterpret_cast<const uint4*>(flags(job, vector / 8)), num_parts);
#pragma unroll 1
        for (uint32_t base = 0; base < tile.num_rows; base += kPasses * kRowsAtOnce) {
            float4 sum[kPasses];
#pragma unroll
            for (uint32_t pass = 0; pass < kPasses; ++pass) sum[pass] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
            for (uint32_t first_part = 0; first_part < num_parts; first_part += kParts) {
                float4 value[kPasses * kParts];
                const float4* const first = parts + ((base + first_row) * kMaxParts + first_part) * kRowVectors;
                const auto wanted = [&](uint32_t i) {
                    const uint32_t row = base + i / kParts * kRowsAtOnce + first_row, part = first_part + i % kParts;
                    return row < tile.num_rows && part < num_parts;
                };
                const auto address = [&](uint32_t i) {
                    return first + (i / kParts * kRowsAtOnce * kMaxParts + i % kParts) * kRowVectors;
                };
                if constexpr (kFlagged)
                    exchange::load_flagged(value, wanted, address);
                else
                    exchange::load(value, wanted, address);
#pragma unroll
                for (uint32_t pass = 0; pass < kPasses; ++pass)
#pragma unroll
                    for (uint32_t i = 0; i < kParts; ++i) add(sum[pass], value[pass * kParts + i]);
            }
            float low[kPasses], high[kPasses];
#pragma unroll
            for (uint32_t pass = 0; pass < kPasses; ++pass) {
                low[pass] = p.form.swiglu(sum[pass].x, sum[pass].z);
                high[pass] = p.form.swiglu(sum[pass].y, sum[pass].w);
                const float amax = largest_of_warp(fmaxf(fabsf(low[pass]), fabsf(high[pass])));
                if (lane == 0) shared.amax[pass][warp] = amax;
            }
            named_barrier(kMathBarrier, kNumMathThreads);
#pragma unroll
            for (uint32_t pass = 0; pass < kPasses; ++pass) {
                const uint32_t row = base + pass * kRowsAtOnce + first_row;
                if (row >= tile.num_rows) break;
                const float amax = fmaxf(shared.amax[pass][warp], shared.amax[pass][warp ^ 1]);
                const float scale = p.form.scale(amax);
                const float inverse = reciprocal(scale);
                const uint16_t packed = pack_e4m3x2(low[pass] * inverse, high[pass] * inverse);
                uint8_t* const piece = target + row * kGroupSize + (channel / 16 ^ row % 8) * 16 + channel % 16;
                piece[0] = static_cast<uint8_t>(packed);
                piece[8] = static_cast<uint8_t>(packed >> 8);
                if (vector == 0) target_scale[row] = row_weight == nullptr ? scale : scale * row_weight[row];
            }
            fence_async_proxy();
            named_barrier(kMathBarrier, kNumMathThreads);
        }
    }

    __device__ __forceinline__ void of_stored_sums(const Tile& tile, uint32_t job, uint32_t num_parts, uint8_t* target,
                                                   float* target_scale, const float* row_weight) const {
        if (kMaxRows == 8 && tile.num_rows <= 4)
            of_stored_sums<1>(tile, job, num_parts, target, target_scale, row_weight);
        else
            of_stored_sums<2>(tile, job, num_parts, target, target_scale, row_weight);
    }

    // Hands the activations of a job, in `outgoing`, to all CTAs: thread `row` has by what that row's scale is still to be
    // multiplied. When a thread returns, others may still read `outgoing`: until the first barrier of what fills it next.
    __device__ __forceinline__ void publish(const Tile& tile, uint32_t chunk, float weight) const {
        if (thread < tile.num_rows)
            exchange::store(p.activation_scales + (tile.first_row + thread) * kNumChunks + chunk,
                            shared.outgoing_scale[thread] * weight);
        constexpr uint32_t kPieces = kGroupSize / 16;
        uint4* const rows = p.activations + (static_cast<uint64_t>(tile.first_row) * kNumChunks + chunk) * kPieces;
#pragma unroll 1
        for (uint32_t i = thread; i < tile.num_rows * kPieces; i += kNumMathThreads) {
            const uint32_t row = i / kPieces, piece = i % kPieces;
            const uint8_t* const source = shared.outgoing + row * kGroupSize + (piece ^ row % 8) * 16;
            exchange::store(rows + row * kNumChunks * kPieces + piece, *reinterpret_cast<const uint4*>(source));
        }
    }

    __device__ __forceinline__ static void add(float4& sum, const float4& value) {
        sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
    }
};
