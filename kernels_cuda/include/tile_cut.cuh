// How the rows of an expert are cut into tiles.
#pragma once
#include "types.cuh"

constexpr uint32_t kRowStep = 8;  // tiles differ in height by multiples of this

// Tiles of `height` rows, at most max_rows, the last of what is left. Lists of tiles have higher ones first, and those of
// experts with tiles as high in the order of the experts.
struct TileCut {
    uint32_t height, num_tiles;

    __device__ __forceinline__ TileCut(uint32_t num_rows, uint32_t max_rows) : height(0), num_tiles(0) {
        if (num_rows == 0) return;
        if (num_rows <= max_rows) {  // nearly always, and two divisions less
            height = ceil_div(num_rows, kRowStep) * kRowStep, num_tiles = 1;
        } else {
            const uint32_t even = ceil_div(num_rows, ceil_div(num_rows, max_rows));
            height = ceil_div(even, kRowStep) * kRowStep, num_tiles = ceil_div(num_rows, height);
        }
    }
};
