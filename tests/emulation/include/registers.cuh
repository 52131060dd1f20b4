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

}  // namespace registers
