// Rows of 128 bytes, scattered in global memory, gathered in shared memory, where they lie swizzled as wgmma reads them.
#pragma once
#include "types.cuh"

// All kNumThreads threads, each for its 16-byte pieces of the first num_rows rows, of at most kMaxRows: copy(target, row,
// offset) is to copy the piece that lies `offset` bytes into the row.
template <uint32_t kMaxRows, uint32_t kNumThreads, typename Copy>
__device__ __forceinline__ void gather_rows(uint8_t* rows, uint32_t num_rows, uint32_t thread, Copy copy) {
    constexpr uint32_t kRowBytes = 128, kPiecesPerRow = kRowBytes / 16, kRowsPerPass = kNumThreads / kPiecesPerRow;
    static_assert(kNumThreads % kPiecesPerRow == 0, "a thread has the same piece of each of its rows");
    const uint32_t piece = thread % kPiecesPerRow;
#pragma unroll
    for (uint32_t pass = 0; pass < ceil_div(kMaxRows, kRowsPerPass); ++pass) {
        const uint32_t row = thread / kPiecesPerRow + pass * kRowsPerPass;
        if (row < num_rows) copy(rows + row * kRowBytes + (piece ^ row % 8) * 16, row, piece * 16);
    }
}
