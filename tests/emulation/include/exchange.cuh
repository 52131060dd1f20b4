// Values handed from CTA to CTA through global memory, emulated: stores become visible later, in halves, in any order.
#pragma once
#include "types.cuh"

namespace exchange {

inline bool written(const float4& value) {
    return __float_as_uint(value.x) != ~0u && __float_as_uint(value.y) != ~0u && __float_as_uint(value.z) != ~0u &&
           __float_as_uint(value.w) != ~0u;
}
inline bool written(const uint4& value) {
    return value.x != ~0u && value.y != ~0u && value.z != ~0u && value.w != ~0u;
}
inline bool written(float value) { return __float_as_uint(value) != ~0u; }

template <typename T>
void check_written(const T& value, const EmulatedWhere& where) {
    if (!written(value)) throw emulation::Fault{emulation::name_of(where) + ": stores what means unwritten"};
}

template <typename T>
    requires(sizeof(T) == 16)
void store(T* address, T value, EMULATED_WHERE) {
    check_written(value, where);
    const auto halves = std::bit_cast<std::array<uint2, 2>>(value);
    for (uint32_t half = 0; half < 2; ++half)
        emulation::store_later(reinterpret_cast<uint2*>(address) + half, halves[half]);
}

inline void store(float* address, float value, EMULATED_WHERE) {
    check_written(value, where);
    emulation::store_later(address, value);
}

template <typename T>
T load_once(const T* address, EMULATED_WHERE) {
    if (written(*address)) return *address;
    emulation::launch->poll(where);
    if (written(*address)) emulation::launch->poll_succeeded();
    return *address;
}

template <typename Done>
void poll_until(Done done, EMULATED_WHERE) {
    while (!done()) {
        emulation::launch->poll(where);
        if (done()) emulation::launch->poll_succeeded();
    }
}

template <typename T>
T await_written(T value, const T* address, EMULATED_WHERE) {
    while (!written(value)) value = load_once(address, where);
    return value;
}

template <typename T, uint32_t kCount, typename Wanted, typename Address>
void load(T (&value)[kCount], Wanted wanted, Address address, EMULATED_WHERE) {
    for (uint32_t i = 0; i < kCount; ++i) {
        value[i] = T{};
        if (wanted(i)) value[i] = await_written(load_once(address(i), where), address(i), where);
    }
}

template <typename T, uint32_t kCount, typename Wanted, typename Address>
void load_flagged(T (&value)[kCount], Wanted wanted, Address address) {
    for (uint32_t i = 0; i < kCount; ++i) value[i] = wanted(i) ? *address(i) : T{};
}

// A flag for what this CTA wrote before.
inline void signal(uint32_t* flag, EMULATED_WHERE) {
    emulation::drain_stores(where);
    emulation::store_later(flag, 1u);
}

inline void await(const uint32_t* flag, EMULATED_WHERE) {
    poll_until([&] { return *flag == 1; }, where);
}

inline void count(uint32_t* counter, EMULATED_WHERE) {
    emulation::drain_stores(where);
    ++*counter;
}

inline void await_count(const uint32_t* counter, uint32_t total, EMULATED_WHERE) {
    poll_until([&] { return *counter == total; }, where);
}

inline void raise(uint32_t& word, uint32_t value) { word = value; }

inline void await_raised(uint32_t& word, uint32_t least, EMULATED_WHERE) {
    poll_until([&] { return word >= least; }, where);
}

inline void await(const uint4* flags, uint32_t num_flags, EMULATED_WHERE) {
    for (uint32_t flag = 0; flag < num_flags; ++flag) await(reinterpret_cast<const uint32_t*>(flags) + flag, where);
}

}  // namespace exchange
