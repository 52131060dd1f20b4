// Conversions and additions of bf16, emulated bit for bit, and the arithmetic beside them.
#pragma once
#include "types.cuh"

constexpr uint32_t kGroupSize = 128;
constexpr float kE4M3Max = 448.f;
constexpr float kSmallestAmax = 1e-10f;

namespace emulation {

inline uint8_t encode_e4m3(float value) {
    constexpr uint8_t kNan = 0x7f, kLargest = 0x7e;
    if (isnan(value)) return kNan;
    const uint8_t sign = std::signbit(value) ? 0x80 : 0;
    const float magnitude = fabsf(value);
    if (magnitude >= kE4M3Max) return sign | kLargest;
    constexpr float kSmallestNormal = 0x1p-6f, kSubnormalStep = 0x1p-9f;
    if (magnitude < kSmallestNormal) return sign | static_cast<uint8_t>(nearbyintf(magnitude / kSubnormalStep));
    uint32_t bits = __float_as_uint(magnitude);
    bits += 0x7ffff + (bits >> 20 & 1);  // 3 bits of the mantissa stay, ties to even
    return sign | static_cast<uint8_t>((bits >> 20) - ((127 - 7) << 3));
}

inline uint16_t encode_bf16(float value) {
    if (isnan(value)) return 0x7fff;
    const uint32_t bits = __float_as_uint(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float decode_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

template <uint32_t kCount>
void add_bf16(uint16_t* address, const uint32_t (&pairs)[kCount], const Where& where) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(pairs) != 0)
        throw Fault{name_of(where) + ": an addition to a misaligned address"};
    for (uint32_t i = 0; i < 2 * kCount; ++i) {
        const auto value = static_cast<uint16_t>(pairs[i / 2] >> i % 2 * 16);
        address[i] = encode_bf16(decode_bf16(address[i]) + decode_bf16(value));
    }
}

}  // namespace emulation

inline uint16_t pack_e4m3x2(float low, float high) {
    return static_cast<uint16_t>(emulation::encode_e4m3(low) | emulation::encode_e4m3(high) << 8);
}

inline uint32_t pack_bf16x2(float low, float high) {
    return emulation::encode_bf16(low) | static_cast<uint32_t>(emulation::encode_bf16(high)) << 16;
}

inline float bf16_low(uint32_t packed) { return __uint_as_float(packed << 16); }
inline float bf16_high(uint32_t packed) { return __uint_as_float(packed & 0xffff0000u); }

inline float min_nan(float a, float b) { return isnan(a) || isnan(b) ? a + b : fminf(a, b); }
inline float max_nan(float a, float b) { return isnan(a) || isnan(b) ? a + b : fmaxf(a, b); }
inline float largest_of_warp(float value, EMULATED_WHERE) {
    for (uint32_t bits = 16; bits > 0; bits /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, bits, where));
    return fmaxf(value, 0.f);
}
inline float fast_exp2(float x) { return exp2f(x); }
inline float fast_reciprocal(float x) { return 1.f / x; }
inline float quotient(float value, float divisor, float reciprocal) {
    const float product = value * reciprocal;
    return fmaf(fmaf(product, divisor, -value), -reciprocal, product);
}
inline float reciprocal(float x) { return 1.f / x; }

inline void add_bf16x4(uint16_t* address, uint32_t low, uint32_t high, EMULATED_WHERE) {
    emulation::add_bf16(address, {low, high}, where);
}

inline void add_bf16x8(uint16_t* address, uint4 values, EMULATED_WHERE) {
    emulation::add_bf16(address, {values.x, values.y, values.z, values.w}, where);
}

inline void add_bf16x8_if(bool valid, uint16_t* address, uint4 values, EMULATED_WHERE) {
    if (valid) add_bf16x8(address, values, where);
}

inline void store_bf16x8_if(bool valid, uint16_t* address, uint4 values) {
    if (valid) *reinterpret_cast<uint4*>(address) = values;
}
