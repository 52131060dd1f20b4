// Matrices that a warp has as wgmma and mma leave accumulators, to shared memory by columns.
#pragma once
#include "types.cuh"

// A warp's matrix of 8 x 8 pairs of bytes, of which lane 4 g + c has row g, columns 2c (low half) and 2c + 1, column by column:
// lane i < 8 has the address of the 16 bytes that column i goes to.
__device__ __forceinline__ void store_transposed(uint8_t* column, uint32_t matrix) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(shared_address(column)), "r"(matrix)
                 : "memory");
}

// Two of them: lane 8 + i has the address of column i of the second.
__device__ __forceinline__ void store_transposed(uint8_t* column, uint32_t first, uint32_t second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(column)), "r"(first),
                 "r"(second)
                 : "memory");
}
