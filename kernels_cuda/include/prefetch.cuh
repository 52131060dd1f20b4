// Asking for memory ahead of its use: hints, by which nothing is read or written that a kernel could see. What an address
// holds need not have been written yet.
#pragma once
#include "types.cuh"

namespace prefetch {

constexpr uint32_t kLineBytes = 128;

// The line of `address` comes into L2.
__device__ __forceinline__ void line(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// One box of a 4-dimensional tensor map comes into L2, with a cache policy.
__device__ __forceinline__ void box_4d(const TensorMap& map, int32_t c0, int32_t c1, int32_t c2, int32_t c3, uint64_t policy) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.L2::cache_hint [%0, {%1, %2, %3, %4}], %5;" ::"l"(&map), "r"(c0),
                 "r"(c1), "r"(c2), "r"(c3), "l"(policy)
                 : "memory");
}

}  // namespace prefetch
