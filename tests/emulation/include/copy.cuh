// Asynchronous copies, emulated: each lands as a whole at a moment that the scheduler picks, and reads its source then.
#pragma once
#include "mbarrier.cuh"
#include "types.cuh"

namespace emulation {

// What emulator.py packs into a TensorMap in place of the driver.
struct TensorBox {
    static constexpr uint64_t kTag = 0x5445'4e53'4f52'4d41;
    uint64_t tag;
    const uint8_t* base;
    uint64_t rank;
    uint64_t size[5];    // the innermost counts bytes
    uint64_t stride[5];  // bytes; the innermost is 1
    uint8_t box[8];      // less 1
    uint64_t unused[2];
};
static_assert(sizeof(TensorBox) == sizeof(TensorMap));

// Bytes that the copy engine or another CTA writes: no longer cp.async's.
inline void write_shared(Cta& cta, uint32_t address, const void* source, uint32_t num_bytes, uint64_t clock = 0) {
    address %= 1u << kRankShift;
    if (address + num_bytes > kSharedBytes) throw Fault{"a copy beyond the end of shared memory"};
    memcpy(cta.shared + address, source, num_bytes);
    for (uint32_t i = address / kStampBytes; i * kStampBytes < address + num_bytes; ++i) cta.cp_async_clock[i] = clock;
}

// A box into shared memory, 128-byte swizzled by the bits of the shared address; zeros where it is out of range.
inline void land_box(Cta& cta, uint32_t destination, const TensorBox& map, const int32_t (&first)[5]) {
    uint64_t extent[5], num_bytes = 1;
    for (uint32_t d = 0; d < 5; ++d) num_bytes *= extent[d] = map.box[d] + 1u;
    std::vector<uint8_t> line(extent[0]);
    for (uint64_t done = 0; done < num_bytes; done += extent[0]) {
        uint64_t rest = done / extent[0];
        const uint8_t* source = map.base + first[0];
        bool inside = true;
        for (uint32_t d = 1; d < 5; ++d) {
            const int64_t index = first[d] + static_cast<int64_t>(rest % extent[d]);
            rest /= extent[d];
            inside = inside && index >= 0 && index < static_cast<int64_t>(map.size[d]);
            source += index * static_cast<int64_t>(map.stride[d]);
        }
        for (uint64_t i = 0; i < extent[0]; ++i) {
            const int64_t column = first[0] + static_cast<int64_t>(i);
            line[i] = inside && column >= 0 && column < static_cast<int64_t>(map.size[0]) ? source[i] : 0;
        }
        for (uint32_t i = 0; i < extent[0]; i += 16) {
            const uint32_t address = static_cast<uint32_t>(destination + done + i);
            write_shared(cta, address ^ (address >> 7 & 7) << 4, line.data() + i, 16);
        }
    }
}

// The same offsets in every CTA of `cta_mask`; 0: in this CTA.
inline void load_box(void* destination, const TensorMap& tensor_map, uint64_t& barrier, const int32_t (&first)[5],
                     uint16_t cta_mask, const Where& where) {
    TensorBox map;
    memcpy(&map, &tensor_map, sizeof(map));
    if (map.tag != TensorBox::kTag) throw Fault{name_of(where) + ": no tensor map"};
    const uint32_t address = shared_offset(destination), barrier_address = shared_offset(&barrier);
    if (address % 128 != 0) throw Fault{name_of(where) + ": the copy engine writes to multiples of 128 bytes"};
    uint32_t num_bytes = 1;
    for (uint32_t d = 0; d < 5; ++d) num_bytes *= map.box[d] + 1u;
    const std::vector<int32_t> index(first, first + 5);
    const auto land_in = [&](Cta* cta) {
        launch->later("a tensor copy", cta, [=] {
            const int32_t corner[5] = {index[0], index[1], index[2], index[3], index[4]};
            land_box(*cta, address, map, corner);
            land(mbarrier_at(*cta, barrier_address, where), num_bytes, where);
        });
    };
    if (cta_mask == 0) return land_in(current->cta);
    for (uint32_t rank = 0; rank < 16; ++rank)
        if (cta_mask >> rank & 1) land_in(current->cta->cluster->ctas.at(rank));
}

// The next of a thread's cp.async, which land in order.
inline void cp_async_later(std::function<void()> act) {
    Fiber* const fiber = current;
    fiber->cp_async.push_back(std::move(act));
    launch->later("cp.async", fiber->cta, [fiber] {
        const auto next = std::move(fiber->cp_async.front());
        fiber->cp_async.pop_front();
        next();
        if (fiber->cp_async.empty()) launch->wake(fiber->awaiting_cp_async);
    });
}

inline void cp_async(void* destination, const void* source, uint32_t num_bytes, bool valid, const Where& where) {
    const uint32_t address = shared_offset(destination);
    if (address % num_bytes != 0 || reinterpret_cast<uintptr_t>(source) % num_bytes != 0)
        throw Fault{name_of(where) + ": cp.async of " + std::to_string(num_bytes) + " bytes, misaligned"};
    Cta* const cta = current->cta;
    cp_async_later([=] {
        constexpr uint8_t kZeros[16] = {};
        write_shared(*cta, address, valid ? source : kZeros, num_bytes, ++launch->clock);
    });
}

}  // namespace emulation

inline void tma_load_2d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t column, int32_t row,
                        EMULATED_WHERE) {
    emulation::load_box(destination, map, barrier, {column, row, 0, 0, 0}, 0, where);
}

inline void tma_load_5d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t c0, int32_t c1, int32_t c2,
                        int32_t c3, int32_t c4, EMULATED_WHERE) {
    emulation::load_box(destination, map, barrier, {c0, c1, c2, c3, c4}, 0, where);
}

inline uint64_t evict_first_policy() { return 0; }
inline uint64_t evict_normal_policy() { return 0; }

inline void tma_load_2d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t column, int32_t row,
                        uint64_t, EMULATED_WHERE) {
    emulation::load_box(destination, map, barrier, {column, row, 0, 0, 0}, 0, where);
}

inline void tma_load_5d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t c0, int32_t c1, int32_t c2,
                        int32_t c3, int32_t c4, uint64_t, EMULATED_WHERE) {
    emulation::load_box(destination, map, barrier, {c0, c1, c2, c3, c4}, 0, where);
}

inline void bulk_load(void* destination, const void* source, uint32_t num_bytes, uint64_t& barrier, EMULATED_WHERE) {
    const uint32_t address = emulation::shared_offset(destination), full = emulation::shared_offset(&barrier);
    if (address % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0 || num_bytes % 16 != 0)
        throw emulation::Fault{emulation::name_of(where) + ": a bulk copy takes multiples of 16 bytes"};
    emulation::Cta* const cta = emulation::current->cta;
    emulation::launch->later("a bulk copy", cta, [=] {
        emulation::write_shared(*cta, address, source, num_bytes);
        emulation::land(emulation::mbarrier_at(*cta, full, where), num_bytes, where);
    });
}

inline void bulk_load(void* destination, const void* source, uint32_t num_bytes, uint64_t& barrier, uint64_t,
                      EMULATED_WHERE) {
    bulk_load(destination, source, num_bytes, barrier, where);
}

inline void tma_multicast_2d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t column, int32_t row,
                             uint16_t cta_mask, uint64_t, EMULATED_WHERE) {
    emulation::load_box(destination, map, barrier, {column, row, 0, 0, 0}, cta_mask, where);
}

inline void tma_multicast_4d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t c0, int32_t c1,
                             int32_t c2, int32_t c3, uint16_t cta_mask, uint64_t, EMULATED_WHERE) {
    emulation::load_box(destination, map, barrier, {c0, c1, c2, c3, 0}, cta_mask, where);
}

// Reads its source when it is done: what is overwritten before bulk_store_wait_read() is lost.
inline void bulk_store(void* destination, const void* source, uint32_t num_bytes, EMULATED_WHERE) {
    emulation::shared_offset(source);
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0 || reinterpret_cast<uintptr_t>(destination) % 16 != 0 ||
        num_bytes % 16 != 0)
        throw emulation::Fault{emulation::name_of(where) + ": a bulk copy takes multiples of 16 bytes"};
    emulation::Fiber* const fiber = emulation::current;
    ++fiber->num_bulk_stores;
    emulation::launch->later("a bulk store", fiber->cta, [=] {
        memcpy(destination, source, num_bytes);
        if (--fiber->num_bulk_stores == 0) emulation::launch->wake(fiber->awaiting_bulk_stores);
    });
}

inline void bulk_store_wait_read(EMULATED_WHERE) {
    emulation::Fiber& fiber = *emulation::current;
    while (fiber.num_bulk_stores > 0) emulation::launch->sleep(fiber.awaiting_bulk_stores, "its bulk stores", where);
}

inline void prefetch_tensor_map(const TensorMap&) {}

inline void cp_async_16(void* destination, const void* source, bool valid, EMULATED_WHERE) {
    emulation::cp_async(destination, source, 16, valid, where);
}

inline void cp_async_16(uint32_t destination, const void* source, EMULATED_WHERE) {
    emulation::cp_async(emulation::shared_byte(*emulation::current->cta, destination), source, 16, true, where);
}

inline void cp_async_4(void* destination, const void* source, bool valid, EMULATED_WHERE) {
    emulation::cp_async(destination, source, 4, valid, where);
}

inline void cp_async_arrive(uint64_t& barrier, EMULATED_WHERE) {
    emulation::Mbarrier* const state = &emulation::mbarrier_at(barrier, where);
    emulation::cp_async_later([=] { emulation::arrive(*state, 0, where); });
}

inline void cp_async_wait_all(EMULATED_WHERE) {
    emulation::Fiber* const fiber = emulation::current;
    while (!fiber->cp_async.empty()) emulation::launch->sleep(fiber->awaiting_cp_async, "its cp.async", where);
}

inline void fence_async_proxy() { emulation::current->fenced = emulation::launch->clock; }
