// Warp matrix products in f16, emulated: what stands for a pair of f16 is the pair of e4m3 codes that it came from.
#pragma once
#include "types.cuh"
#include "wgmma.cuh"

namespace mma {

inline constexpr uint32_t word_of(const uint4& vector, uint32_t i) {
    return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

inline uint2 f16_of_e4m3(uint32_t packed) { return {packed & 0xffff, packed >> 16}; }

inline void add(float (&d)[4], uint2 row, uint2 row_below, uint2 b, EMULATED_WHERE) {
    const uint32_t lane = emulation::current->thread % 32;
    const uint32_t value[3][2] = {{row.x, row.y}, {row_below.x, row_below.y}, {b.x, b.y}};
    float of_lane[3][32][4];
    for (uint32_t operand = 0; operand < 3; ++operand)
        for (uint32_t pair = 0; pair < 2; ++pair)
            emulation::exchange_in_warp(
                ~0u, value[operand][pair],
                [&](uint32_t, const uint64_t (&slot)[32]) {
                    for (uint32_t other = 0; other < 32; ++other)
                        for (uint32_t i = 0; i < 2; ++i)
                            of_lane[operand][other][2 * pair + i] =
                                emulation::e4m3_values()[slot[other] >> 8 * i & 0xff];
                    return 0u;
                },
                where);
    for (uint32_t h = 0; h < 2; ++h)
        for (uint32_t column = 0; column < 2; ++column)
            for (uint32_t quarter = 0; quarter < 4; ++quarter)
                for (uint32_t i = 0; i < 4; ++i)
                    d[2 * h + column] += of_lane[h][lane / 4 * 4 + quarter][i] *
                                         of_lane[2][(2 * (lane % 4) + column) * 4 + quarter][i];
}

}  // namespace mma
