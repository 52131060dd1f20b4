// Fixed-width integers under NVRTC (which has no <cstdint>), and the opaque tensor map a kernel takes by value.
#pragma once

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

// A CUtensorMap. Named differently because <cuda.h> does not compile under NVRTC and CCCL predeclares the other name.
struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

// The 32-bit address of a shared-memory object, as PTX takes it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <typename T>
__device__ __forceinline__ constexpr T ceil_div(T value, T divisor) {
    return (value + divisor - 1) / divisor;
}
