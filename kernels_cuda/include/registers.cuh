// Moving registers between the warpgroups of a CTA. Takes effect only in a kernel whose __launch_bounds__ names the
// threads and one CTA per SM; each warpgroup's role must be one branch of a single if/else.
#pragma once
#include "types.cuh"

namespace registers {

// All threads of a warpgroup: at most kCount registers each from here on, a multiple of 8.
template <uint32_t kCount>
__device__ __forceinline__ void decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// All threads of a warpgroup: wait until as many are free, then have kCount registers each.
template <uint32_t kCount>
__device__ __forceinline__ void increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

// threadIdx.x, read again where it is used: over a stretch of code that needs every register it would be spilled.
__device__ __forceinline__ uint32_t thread_index() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}

// `value`, which is the same in all lanes of the warp, so that the compiler knows it. Stages of a ring, bounds of loops and
// descriptors then live in uniform registers; otherwise each product waits for its descriptors to be moved there, and each
// copy runs in a loop over the lanes. It holds only where the compiler sees the warp as one: code in which lanes part, as
// an epilogue with rows that are not there, must end in __syncwarp(), or nothing after it is uniform any more.
__device__ __forceinline__ uint32_t uniform(uint32_t value) { return __reduce_or_sync(~0u, value); }

}  // namespace registers
