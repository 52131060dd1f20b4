// Values handed from CTA to CTA through global memory, each its own signal: memory that holds ones in every bit has not
// been written yet. The writer's words must never be ones in every bit; sums in fp32 are not.
#pragma once
#include "types.cuh"

namespace exchange {

constexpr uint32_t kMaxPolls = 4'000'000;

__device__ __forceinline__ void store(float4* address, float4 value) {
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(value.x), "f"(value.y),
                 "f"(value.z), "f"(value.w)
                 : "memory");
}

__device__ __forceinline__ void store(float* address, float value) {
    asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}

__device__ __forceinline__ float4 load_once(const float4* address) {
    float4 value;
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ bool written(const float4& value) {
    constexpr uint32_t kOnes = ~0u;
    return __float_as_uint(value.x) != kOnes && __float_as_uint(value.y) != kOnes &&
           __float_as_uint(value.z) != kOnes && __float_as_uint(value.w) != kOnes;
}

__device__ __forceinline__ void store(uint4* address, uint4 value) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

// The values at address(0), address(1), ..., once written; zeros where it is null. Traps if that does not happen.
template <uint32_t kCount, typename Address>
__device__ __forceinline__ void load(float4 (&value)[kCount], Address address) {
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
        const float4* const source = address(i);
        value[i] = source == nullptr ? make_float4(0.f, 0.f, 0.f, 0.f) : load_once(source);
    }
#pragma unroll 1
    for (uint32_t poll = 0; poll < kMaxPolls; ++poll) {
        bool all = true;
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
            if (written(value[i])) continue;
            value[i] = load_once(address(i));
            all = false;
        }
        if (all) return;
    }
    __trap();
}

__device__ __forceinline__ uint4 load(const uint4* address) {
#pragma unroll 1
    for (uint32_t poll = 0; poll < kMaxPolls; ++poll) {
        uint4 value;
        asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                     : "l"(address)
                     : "memory");
        if (value.x != ~0u && value.y != ~0u && value.z != ~0u && value.w != ~0u) return value;
    }
    __trap();
    return {};
}

__device__ __forceinline__ float load(const float* address) {
#pragma unroll 1
    for (uint32_t poll = 0; poll < kMaxPolls; ++poll) {
        uint32_t value;
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
        if (value != ~0u) return __uint_as_float(value);
    }
    __trap();
    return 0.f;
}

// A flag for what this CTA wrote before, by one thread after a barrier of those that wrote.
__device__ __forceinline__ void signal(uint32_t* flag) {
    __threadfence();
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// One thread, before a barrier with those that read. Traps if the signal does not come.
__device__ __forceinline__ void await(const uint32_t* flag) {
#pragma unroll 1
    for (uint32_t poll = 0; poll < kMaxPolls; ++poll) {
        uint32_t value;
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
        if (value != 0) return;
    }
    __trap();
}

}  // namespace exchange
