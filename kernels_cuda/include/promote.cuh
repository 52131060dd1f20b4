// Block scaling: products of 128 of K have one scale per weight block and one per row, and add up in fp32.
#pragma once
#include "types.cuh"

// sum += partial * weight_scale * row_scale, where rows (tokens) are the N of a wgmma of kRows: the accumulators of lane
// `lane`. row_scale is 8-byte aligned.
template <uint32_t kRows>
__device__ __forceinline__ void promote(float (&sum)[kRows / 2], const float (&partial)[kRows / 2],
                                        const float* row_scale, float weight_scale, uint32_t lane) {
#pragma unroll
    for (uint32_t j = 0; j < kRows / 8; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(row_scale + 8 * j + 2 * (lane % 4));
        const float left = scale.x * weight_scale, right = scale.y * weight_scale;
        sum[4 * j + 0] += partial[4 * j + 0] * left;
        sum[4 * j + 1] += partial[4 * j + 1] * right;
        sum[4 * j + 2] += partial[4 * j + 2] * left;
        sum[4 * j + 3] += partial[4 * j + 3] * right;
    }
}
