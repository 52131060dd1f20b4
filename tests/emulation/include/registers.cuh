// Moving registers between warpgroups, which has no effect that could be seen here.
#pragma once
#include "types.cuh"

namespace registers {

inline uint32_t thread_index() { return emulation::current->thread; }

template <uint32_t kCount>
inline void decrease() {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
}

template <uint32_t kCount>
inline void increase() {
    static_assert(kCount % 8 == 0 && kCount >= 24 && kCount <= 256);
}

inline uint32_t uniform(uint32_t value, EMULATED_WHERE) {
    const uint32_t first = __shfl_sync(~0u, value, 0, where);
    if (first != value) throw emulation::Fault{emulation::name_of(where) + ": lanes differ"};
    return value;
}

}  // namespace registers
