// Warp matrix products in f16 of values that are e4m3: unlike those of wgmma in e4m3, which keep 14 bits of a sum, they are
// as exact as fp32. Weights and tokens go from shared memory through registers, where they become f16.
//
// Accumulators are those of wgmma.cuh: d[2h + b] is row lane/4 + 8h, column 2(lane%4) + b.
#pragma once
#include "types.cuh"

namespace mma {

__device__ __forceinline__ constexpr uint32_t word_of(const uint4& vector, uint32_t i) {
    return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Four e4m3 as two pairs of f16.
__device__ __forceinline__ uint2 f16_of_e4m3(uint32_t packed) {
    uint2 pairs;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n"
        "}"
        : "=r"(pairs.x), "=r"(pairs.y)
        : "r"(packed));
    return pairs;
}

// d += A[16 x 16] * B[8 x 16]^T. Of the row `lane`/4 of A, of the one 8 below, and of B: the lane's four values of K.
__device__ __forceinline__ void add(float (&d)[4], uint2 row, uint2 row_below, uint2 b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(row.x), "r"(row_below.x), "r"(row.y), "r"(row_below.y), "r"(b.x), "r"(b.y));
}

}  // namespace mma
