// Values handed from CTA to CTA through global memory. Either each is its own signal: memory that holds ones in every bit
// has not been written yet, and the writer's words are never that; sums in fp32 are not. That takes one trip through L2,
// and a fill of the memory before. Or a flag follows them, which takes two.
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

__device__ __forceinline__ uint4 load_once(const uint4* address) {
    uint4 value;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ float load_once(const float* address) {
    float value;
    asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_acquire(const uint4* address) {
    uint4 value;
    asm volatile("ld.acquire.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
}

__device__ __forceinline__ bool written(float value) { return __float_as_uint(value) != ~0u; }
__device__ __forceinline__ bool written(const float4& value) {
    return written(value.x) && written(value.y) && written(value.z) && written(value.w);
}
__device__ __forceinline__ bool written(const uint4& value) {
    return value.x != ~0u && value.y != ~0u && value.z != ~0u && value.w != ~0u;
}

__device__ __forceinline__ void store(uint4* address, uint4 value) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

// Polls until done(). Traps if that does not happen.
template <typename Done>
__device__ __forceinline__ void poll_until(Done done) {
#pragma unroll 1
    for (uint32_t poll = 0; poll < kMaxPolls; ++poll)
        if (done()) return;
    __trap();
}

// The values at address(0), address(1), ..., whose flag was seen; zeros where not wanted(i). All are under way at a time.
template <typename T, uint32_t kCount, typename Wanted, typename Address>
__device__ __forceinline__ void load_flagged(T (&value)[kCount], Wanted wanted, Address address) {
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
        value[i] = T{};
        if (wanted(i)) value[i] = load_once(address(i));
    }
}

// As load_flagged(), of values that are their own signal. Traps if one is not written.
template <typename T, uint32_t kCount, typename Wanted, typename Address>
__device__ __forceinline__ void load(T (&value)[kCount], Wanted wanted, Address address) {
    load_flagged(value, wanted, address);
    poll_until([&] {
        bool all = true;
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
            if (written(value[i])) continue;
            value[i] = load_once(address(i));
            all = false;
        }
        return all;
    });
}

// `value`, which load_once() gave, or what the address holds once written. Traps if that does not happen.
template <typename T>
__device__ __forceinline__ T await_written(T value, const T* address) {
    poll_until([&] {
        if (written(value)) return true;
        value = load_once(address);
        return false;
    });
    return value;
}

// A flag becomes 1, from zero or from ones: for what was written before, by one thread after a barrier of those that wrote.
__device__ __forceinline__ void signal(uint32_t* flag) {
    asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// One thread, before a barrier with those that read. Traps if the signal does not come. Not inlined, as list_jobs().
__device__ __noinline__ void await(const uint32_t* flag) {
    poll_until([&] { return load_acquire(flag) == 1; });
}

// One thread, for what its warp wrote before a __syncwarp().
__device__ __forceinline__ void count(uint32_t* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

// One thread: until `counter` has come to `total`. Traps if it does not.
__device__ __forceinline__ void await_count(const uint32_t* counter, uint32_t total) {
    poll_until([&] { return load_acquire(counter) == total; });
}

// A word of shared memory that one thread raises, and whole warps without anything to do until then wait for.
__device__ __forceinline__ void raise(uint32_t& word, uint32_t value) { atomicExch(&word, value); }

__device__ __forceinline__ void await_raised(uint32_t& word, uint32_t least) {
    poll_until([&] {
        if (atomicAdd(&word, 0u) >= least) return true;
        __nanosleep(200);
        return false;
    });
}

// For the first num_flags of up to 4 flags that lie beside each other, by each thread that reads. Not inlined either.
__device__ __noinline__ void await(const uint4* flags, uint32_t num_flags) {
    poll_until([&] {
        const uint4 value = load_acquire(flags);
        // & and not &&, of which the compiler would make a branch.
        return (value.x == 1) & (num_flags < 2 || value.y == 1) & (num_flags < 3 || value.z == 1) &
               (num_flags < 4 || value.w == 1);
    });
}

}  // namespace exchange
