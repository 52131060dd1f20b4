// Conversions to e4m3 and bf16, arithmetic by single instructions, and additions of bf16 into global memory.
#pragma once
#include "types.cuh"

constexpr uint32_t kGroupSize = 128;  // values that share one scale
constexpr float kE4M3Max = 448.f;
constexpr float kSmallestAmax = 1e-10f;  // keeps the scale of an all-zero group finite

// Two values to e4m3, round to nearest even, saturating: `low` in bits 0..7.
__device__ __forceinline__ uint16_t pack_e4m3x2(float low, float high) {
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

// Two values to bf16, round to nearest even: `low` in bits 0..15.
__device__ __forceinline__ uint32_t pack_bf16x2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float bf16_low(uint32_t packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float bf16_high(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

// The smaller and the larger of two values; of a NaN and anything a NaN.
__device__ __forceinline__ float min_nan(float a, float b) {
    float value;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}
__device__ __forceinline__ float max_nan(float a, float b) {
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}

// The largest `value` of a warp's lanes, none of which is negative; of NaNs none counts.
__device__ __forceinline__ float largest_of_warp(float value) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(fmaxf(value, 0.f))));
}

// 2^x and 1 / x within two units of the last place, subnormal ones as zeros: one instruction each.
__device__ __forceinline__ float fast_exp2(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
    float value;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// value / divisor, rounded, of a divisor whose rounded reciprocal is given and numbers far from subnormal: three instructions
// (after Markstein, 1990); -0 stays -0.
__device__ __forceinline__ float quotient(float value, float divisor, float reciprocal) {
    const float product = value * reciprocal;
    return fmaf(fmaf(product, divisor, -value), -reciprocal, product);
}

// 1 / x to within one unit of the last place, where neither is subnormal.
__device__ __forceinline__ float reciprocal(float x) {
    const float estimate = fast_reciprocal(x);
    return fmaf(fmaf(-x, estimate, 1.f), estimate, estimate);
}

// Adds 4 adjacent bf16 to global memory (8-byte aligned); the order of several such additions is not fixed.
__device__ __forceinline__ void add_bf16x4(uint16_t* address, uint32_t low, uint32_t high) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v2.bf16x2 [%0], {%1, %2};" ::"l"(address), "r"(low), "r"(high)
                 : "memory");
}

// Adds 8 adjacent bf16 to global memory (16-byte aligned); the order of several such additions is not fixed.
__device__ __forceinline__ void add_bf16x8(uint16_t* address, uint4 values) {
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(values.x),
                 "r"(values.y), "r"(values.z), "r"(values.w)
                 : "memory");
}

// add_bf16x8() if `valid`, by a predicate: for code with a product under way, where a branch would end the overlap.
__device__ __forceinline__ void add_bf16x8_if(bool valid, uint16_t* address, uint4 values) {
    asm volatile(
        "{\n"
        ".reg .pred valid;\n"
        "setp.ne.b32 valid, %5, 0;\n"
        "@valid red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};\n"
        "}" ::"l"(address),
        "r"(values.x), "r"(values.y), "r"(values.z), "r"(values.w), "r"(static_cast<uint32_t>(valid))
        : "memory");
}

// The same with a plain store.
__device__ __forceinline__ void store_bf16x8_if(bool valid, uint16_t* address, uint4 values) {
    asm volatile(
        "{\n"
        ".reg .pred valid;\n"
        "setp.ne.b32 valid, %5, 0;\n"
        "@valid st.global.v4.b32 [%0], {%1, %2, %3, %4};\n"
        "}" ::"l"(address),
        "r"(values.x), "r"(values.y), "r"(values.z), "r"(values.w), "r"(static_cast<uint32_t>(valid))
        : "memory");
}
