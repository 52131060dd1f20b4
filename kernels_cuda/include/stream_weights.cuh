// Where sm90_stream.cu has its weights from, a stage at a time: from a copy re-laid as tiles or, IN_PLACE, from where they are
// served. A stage holds the same bytes either way.
#pragma once
#include "copy.cuh"
#include "stream_constants.cuh"

template <bool kServed>
struct StreamWeights;

// Tiles as weight_tiles.py makes them: the bytes of a stage lie behind each other, and those of the next chunk of a group too.
template <>
struct StreamWeights<false> {
    const uint8_t* w13;
    const uint8_t* w2;

    struct Source {
        const uint8_t* bytes;

        __device__ __forceinline__ void load(void* stage, uint32_t num_bytes, uint64_t& barrier, uint64_t policy) const {
            bulk_load(stage, bytes, num_bytes, barrier, policy);
        }
        __device__ __forceinline__ void advance(uint32_t num_bytes) { bytes += num_bytes; }
    };

    __device__ __forceinline__ void prefetch_maps() const {}

    __device__ __forceinline__ Source up(uint64_t expert, uint32_t chunk, uint32_t k) const {
        return {w13 + ((expert * kNumChunks + chunk) * kNumK + k) * kStageBytes};
    }
    __device__ __forceinline__ Source down(uint64_t expert, uint32_t group) const {  // of the first chunk
        return {w2 + (expert * kNumK * kHalfBytes + group * kStageBytes) * kNumChunks};
    }
};

// Boxes of the served layout: a stage is one box, of gate and up rows, or of rows of w2 in the order of the tiles. What lies past
// I in either direction comes as zeros and counts among the bytes of the box.
template <>
struct StreamWeights<true> {
    TensorMap w13;            // [1, E, 2, I, H], boxes of 1 x 1 x 2 x 128 rows
    TensorMap w2;             // [4, E * H / 64, 2, 8, I], boxes of 4 x 4 x 2 x 8 rows: a group
    TensorMap w2_half_group;  // [2, E * H / 32, 2, 8, I], boxes of 2 x 4 x 2 x 8 rows

    struct Source {
        const TensorMap* map;
        int32_t column, row, outer_row;  // in the first, second and fourth dimension

        __device__ __forceinline__ void load(void* stage, uint32_t, uint64_t& barrier, uint64_t policy) const {
            tma_load_5d(stage, *map, barrier, column, row, 0, outer_row, 0, policy);
        }
        __device__ __forceinline__ void advance(uint32_t) { column += kTileK; }
    };

    __device__ __forceinline__ void prefetch_maps() const {
        prefetch_tensor_map(w13);
        prefetch_tensor_map(w2);
        if (kHiddenSize % kGroupColumns) prefetch_tensor_map(w2_half_group);
    }

    __device__ __forceinline__ Source up(uint32_t expert, uint32_t chunk, uint32_t k) const {
        return {&w13, static_cast<int32_t>(k * kTileK), static_cast<int32_t>(chunk * kTileRows), static_cast<int32_t>(expert)};
    }
    __device__ __forceinline__ Source down(uint32_t expert, uint32_t group) const {
        const uint32_t row = expert * kHiddenSize + group * kGroupColumns;
        if ((group + 1) * kGroupColumns <= kHiddenSize) return {&w2, 0, 0, static_cast<int32_t>(row / 64)};
        return {&w2_half_group, 0, 0, static_cast<int32_t>(row / 32)};
    }
};

using Weights = StreamWeights<kInPlace>;
