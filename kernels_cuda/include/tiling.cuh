// How the rows of an expert are cut into tiles, and how tiles are listed: as reference.routing.tile_rows does it.
#pragma once
#include "types.cuh"

constexpr uint32_t kRowStep = 8;        // tiles differ in height by multiples of this
constexpr uint32_t kHeightClasses = 3;  // the highest tiles are listed first, as they take longest

// As few tiles of at most max_rows rows as hold num_rows, `height` rows each, the last what is left.
struct Tiling {
    uint32_t height, num_tiles;
    uint32_t height_class;  // 0: above 7/8 of max_rows, 1: above 5/8, 2; of no tile any

    // divide(dividend, divisor) for dividends up to num_rows + max_rows.
    template <typename Divide>
    __device__ __forceinline__ Tiling(uint32_t num_rows, uint32_t max_rows, Divide divide) {
        num_tiles = divide(num_rows + max_rows - 1, max_rows);
        const uint32_t even = num_tiles > 1 ? divide(num_rows + num_tiles - 1, num_tiles) : num_rows;
        height = ceil_div(even, kRowStep) * kRowStep;
        const bool varies = num_rows > 0 && max_rows > kRowStep;
        height_class = varies ? min((divide((max_rows - height) * 8, max_rows) + 1) / 2, kHeightClasses - 1) : 0u;
    }
};

// Numbers of tiles, or of those before, of each class, in kBits bits of one word each.
template <uint32_t kBits>
struct TilesOfClasses {
    static_assert(kBits * kHeightClasses <= 64);
    static constexpr uint64_t kMask = (uint64_t{1} << kBits) - 1;

    static __device__ __forceinline__ uint64_t of(const Tiling& tiling) {
        return uint64_t{tiling.num_tiles} << (kBits * tiling.height_class);
    }
    static __device__ __forceinline__ uint32_t all(uint64_t tiles) {
        uint32_t sum = 0;
#pragma unroll
        for (uint32_t i = 0; i < kHeightClasses; ++i) sum += static_cast<uint32_t>(tiles >> (kBits * i) & kMask);
        return sum;
    }
    // Where the list has the first of the tiles that have so many `before` them in their classes, of `total`.
    static __device__ __forceinline__ uint32_t place(uint64_t before, uint64_t total, uint32_t height_class) {
        const uint64_t higher = total & ((uint64_t{1} << (kBits * height_class)) - 1);
        return all(higher) + static_cast<uint32_t>(before >> (kBits * height_class) & kMask);
    }
};
