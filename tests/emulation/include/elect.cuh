// One lane for a warp: the first.
#pragma once
#include "types.cuh"

inline bool elect_one(EMULATED_WHERE) {
    __syncwarp(~0u, where);
    return emulation::current->thread % 32 == 0;
}
