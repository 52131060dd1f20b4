// What CUDA C++ has and C++ has not: qualifiers, vector types, built-in variables, barriers, shuffles, atomics, and the
// intrinsics that the kernels use.
#pragma once
#include <math.h>

#include <array>
#include <bit>
#include <type_traits>
#include <utility>

#include "fibers.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(8) int2 { int32_t x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

struct Index {
    uint32_t x, y = 0, z = 0;
};

// ---- shared memory: 32-bit addresses are offsets in this CTA or, with the rank + 1 above them, in one of the cluster.

constexpr uint32_t kRankShift = 24;

inline uint32_t shared_offset(const void* pointer) {
    const auto* const byte = static_cast<const uint8_t*>(pointer);
    const uint8_t* const shared = current->cta->shared;
    if (byte < shared || byte >= shared + kSharedBytes) throw Fault{"an address outside this CTA's shared memory"};
    return static_cast<uint32_t>(byte - shared);
}

inline Cta& cta_of(uint32_t address) {
    if (address >> kRankShift == 0) return *current->cta;
    return *current->cta->cluster->ctas.at((address >> kRankShift) - 1);
}

inline uint8_t* shared_byte(Cta& cta, uint32_t address) { return cta.shared + address % (1u << kRankShift); }

inline uint8_t* dynamic_shared() { return current->cta->shared + kSharedBase; }

// The static variable declared at `line`.
template <typename T>
T& static_shared(uint32_t line) {
    const auto [place, is_new] = launch->static_shared.try_emplace(line, 0);
    if (is_new) {
        constexpr uint32_t kAlignment = alignof(T);
        place->second = (launch->num_shared_bytes + kAlignment - 1) / kAlignment * kAlignment;
        launch->num_shared_bytes = place->second + sizeof(T);
        if (launch->num_shared_bytes > kSharedBytes) throw Fault{"more shared memory than a CTA can have"};
    }
    return *reinterpret_cast<T*>(current->cta->shared + place->second);
}

// ---- warps

template <typename T, typename Source>
T exchange_in_warp(uint32_t mask, T value, Source source, const Where& where) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    auto& exchanges = current->cta->warps[current->thread / 32];
    auto place = std::find_if(exchanges.begin(), exchanges.end(), [&](const auto& one) { return one.mask == mask; });
    if (place == exchanges.end()) place = exchanges.insert(place, WarpExchange{.mask = mask});
    const uint32_t lane = current->thread % 32;
    if (!(mask >> lane & 1)) throw Fault{name_of(where) + ": this lane is not in the mask it names"};
    uint64_t(&slot)[32] = place->slot[current->num_exchanges[mask]++ % 2];
    slot[lane] = 0;
    std::memcpy(&slot[lane], &value, sizeof(T));
    launch->arrive_and_wait(place->barrier, std::popcount(mask), "the other lanes of its warp", where);
    return source(lane, slot);
}

template <typename T, typename Lane>
T shuffle(uint32_t mask, T value, Lane from, const Where& where) {
    return exchange_in_warp(
        mask, value,
        [&](uint32_t lane, const uint64_t (&slot)[32]) {
            const uint32_t source = from(lane) % 32;
            if (!(mask >> source & 1)) throw Fault{name_of(where) + ": reads a lane that is not in the mask"};
            T received;
            std::memcpy(&received, &slot[source], sizeof(T));
            return received;
        },
        where);
}

// ---- memory that others write

// Something that becomes visible later, in any order with other such stores.
template <typename T>
void store_later(T* address, const T& value) {
    Cta* const cta = current->cta;
    ++cta->num_stores;
    launch->later("a store", nullptr, [=] {
        *address = value;
        if (--cta->num_stores == 0) launch->wake(cta->awaiting_stores);
    });
}

// Until all stores of this CTA are visible: what a release at device scope makes of those before it.
inline void drain_stores(const Where& where) {
    while (current->cta->num_stores > 0) launch->sleep(current->cta->awaiting_stores, "its stores", where);
}

}  // namespace emulation

#define threadIdx (emulation::Index{emulation::current->thread})
#define blockIdx (emulation::Index{emulation::current->cta->index})
#define blockDim (emulation::Index{emulation::launch->grid.num_threads, 1, 1})
#define gridDim (emulation::Index{emulation::launch->grid.num_ctas, 1, 1})

using EmulatedWhere = emulation::Where;
#define EMULATED_WHERE EmulatedWhere where = EmulatedWhere::current()

inline uint64_t __cvta_generic_to_shared(const void* pointer) { return emulation::shared_offset(pointer); }

[[noreturn]] inline void __trap(EMULATED_WHERE) { throw emulation::Fault{emulation::name_of(where) + ": __trap()"}; }

inline void __syncthreads(EMULATED_WHERE) {
    emulation::Cta& cta = *emulation::current->cta;
    emulation::launch->arrive_and_wait(cta.barriers[0], cta.num_alive, "__syncthreads()", where);
}

inline void __syncwarp(uint32_t mask = ~0u, EMULATED_WHERE) {
    emulation::exchange_in_warp(mask, 0u, [](uint32_t, const uint64_t (&)[32]) { return 0u; }, where);
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, uint32_t lane, EMULATED_WHERE) {
    return emulation::shuffle(mask, value, [=](uint32_t) { return lane; }, where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, uint32_t bits, EMULATED_WHERE) {
    return emulation::shuffle(mask, value, [=](uint32_t lane) { return lane ^ bits; }, where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, uint32_t step, EMULATED_WHERE) {
    return emulation::shuffle(mask, value, [=](uint32_t lane) { return lane >= step ? lane - step : lane; }, where);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, uint32_t step, EMULATED_WHERE) {
    return emulation::shuffle(mask, value, [=](uint32_t lane) { return lane + step < 32 ? lane + step : lane; }, where);
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote, EMULATED_WHERE) {
    return emulation::exchange_in_warp(
        mask, uint32_t{vote},
        [=](uint32_t, const uint64_t (&slot)[32]) {
            uint32_t votes = 0;
            for (uint32_t lane = 0; lane < 32; ++lane)
                if (mask >> lane & 1) votes |= slot[lane] << lane;
            return votes;
        },
        where);
}
inline uint32_t __match_any_sync(uint32_t mask, uint32_t value, EMULATED_WHERE) {
    return emulation::exchange_in_warp(
        mask, value,
        [=](uint32_t own, const uint64_t (&slot)[32]) {
            uint32_t peers = 0;
            for (uint32_t lane = 0; lane < 32; ++lane)
                if (mask >> lane & 1 && slot[lane] == slot[own]) peers |= 1u << lane;
            return peers;
        },
        where);
}
inline bool __any_sync(uint32_t mask, bool vote, EMULATED_WHERE) { return __ballot_sync(mask, vote, where) != 0; }
inline bool __all_sync(uint32_t mask, bool vote, EMULATED_WHERE) { return __ballot_sync(mask, vote, where) == mask; }

inline void __threadfence(EMULATED_WHERE) { emulation::drain_stores(where); }

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = old + value;
    return old;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = std::max(old, value);
    return old;
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return std::exchange(*address, value);
}

template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    return std::min<std::common_type_t<A, B>>(a, b);
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    return std::max<std::common_type_t<A, B>>(a, b);
}

inline int __ffs(uint32_t value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __popc(uint32_t value) { return std::popcount(value); }
inline int __clz(uint32_t value) { return std::countl_zero(value); }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) {
    return max(a & 0xffffu, b & 0xffffu) | max(a & 0xffff0000u, b & 0xffff0000u);
}
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline float __int_as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline int32_t __float_as_int(float value) { return std::bit_cast<int32_t>(value); }
inline uint32_t __float2uint_rz(float value) { return static_cast<uint32_t>(value); }
inline float __fdividef(float dividend, float divisor) { return dividend / divisor; }
inline float __fdiv_rn(float dividend, float divisor) { return dividend / divisor; }
inline float __frcp_rn(float value) { return 1.f / value; }
template <typename T>
T __ldg(const T* address) {
    return *address;
}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
T __ldcs(const T* address) {
    return *address;
}
