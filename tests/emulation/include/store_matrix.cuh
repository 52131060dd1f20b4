// Matrices of a warp to shared memory by columns, emulated.
#pragma once
#include "types.cuh"

namespace emulation {

// Matrix `number` of a warp: lane 8 * number + i stores column i, of which row g is half i % 2 of what lane 4 g + i / 2 has.
inline void store_column(uint8_t* column, uint32_t matrix, uint32_t number, const Where& where) {
    exchange_in_warp(
        ~0u, matrix,
        [&](uint32_t lane, const uint64_t (&slot)[32]) {
            if (lane / 8 != number) return 0u;
            if (shared_offset(column) % 16 != 0) throw Fault{name_of(where) + ": a column is 16-byte aligned"};
            for (uint32_t row = 0; row < 8; ++row) {
                const uint16_t pair = static_cast<uint16_t>(slot[4 * row + lane % 8 / 2] >> 16 * (lane % 2));
                memcpy(column + 2 * row, &pair, 2);
            }
            return 0u;
        },
        where);
}

}  // namespace emulation

inline void store_transposed(uint8_t* column, uint32_t matrix, EMULATED_WHERE) {
    emulation::store_column(column, matrix, 0, where);
}

inline void store_transposed(uint8_t* column, uint32_t first, uint32_t second, EMULATED_WHERE) {
    emulation::store_column(column, first, 0, where);
    emulation::store_column(column, second, 1, where);
}
