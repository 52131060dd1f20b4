// Sums over the threads of a warp and of a CTA. Loops are left as they are: what runs once costs more by its code than by
// its steps.
#pragma once
#include "types.cuh"

// Sum of `value` over this lane and those before it.
template <typename T>
__device__ __forceinline__ T inclusive_sum_of_warp(T value) {
#pragma unroll 1
    for (uint32_t offset = 1; offset < 32; offset *= 2) {
        const T before = __shfl_up_sync(~0u, value, offset);
        if (threadIdx.x % 32 >= offset) value += before;
    }
    return value;
}

// Sum of `value` over the threads before this one, by all threads of kNumWarps warps; `total` is that over all.
template <uint32_t kNumWarps, typename T>
__device__ __forceinline__ T exclusive_sum(T value, T* warp_total, T& total) {
    static_assert(kNumWarps <= 32, "a lane has a warp");
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const T within = inclusive_sum_of_warp(value);
    if (lane == 31) warp_total[warp] = within;
    __syncthreads();
    const T warps = inclusive_sum_of_warp(lane < kNumWarps ? warp_total[lane] : T{});
    total = __shfl_sync(~0u, warps, 31);
    const T before = __shfl_sync(~0u, warps, (warp + 31) % 32);
    return within - value + (warp > 0 ? before : T{});
}
