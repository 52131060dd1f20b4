// One lane for a warp.
#pragma once
#include "types.cuh"

// All lanes of a warp: true in one of them, always the same. Behind `lane == 0` the compiler makes a loop over lanes of what
// can only be issued for one at a time, such as a bulk copy; behind this it knows that there is one.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, elected;\n"
        "}"
        : "=r"(elected));
    return elected;
}
