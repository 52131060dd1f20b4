// mbarrier and named barriers, emulated: arrivals and bytes are counted, and a count that cannot come out is a fault.
#pragma once
#include "types.cuh"

namespace emulation {

constexpr uint64_t kBarrierTag = 0x4d42;  // above the barrier's address and its number

inline Mbarrier& mbarrier_at(Cta& cta, uint32_t address, const Where& where) {
    address %= 1u << kRankShift;
    uint64_t word;
    memcpy(&word, shared_byte(cta, address), 8);
    const uint64_t index = word & 0xffff;
    if (address % 8 != 0 || word >> 16 != (kBarrierTag << 32 | address) || index >= cta.mbarriers.size())
        throw Fault{name_of(where) + ": no mbarrier was initialised here, or it was overwritten"};
    return cta.mbarriers[index];
}

inline Mbarrier& mbarrier_at(uint64_t& barrier, const Where& where) {
    return mbarrier_at(*current->cta, shared_offset(&barrier), where);
}

inline void settle(Mbarrier& barrier) {
    if (barrier.missing_arrivals > 0 || barrier.missing_bytes != 0) return;
    barrier.missing_arrivals = barrier.num_arrivals;
    ++barrier.num_phases;
    launch->wake(barrier.sleepers);
}

inline void check_bytes(const Mbarrier& barrier, const Where& where) {
    constexpr int64_t kMostBytes = (1 << 20) - 1;
    if (barrier.missing_arrivals == 0 && barrier.missing_bytes < 0)
        throw Fault{name_of(where) + ": more bytes land than the barrier was told to expect"};
    if (std::abs(barrier.missing_bytes) > kMostBytes)
        throw Fault{name_of(where) + ": more bytes than an mbarrier can count"};
}

inline void arrive(Mbarrier& barrier, uint32_t num_bytes, const Where& where) {
    if (barrier.missing_arrivals == 0)
        throw Fault{name_of(where) + ": more arrivals than the " + std::to_string(barrier.num_arrivals) + " expected"};
    barrier.missing_bytes += num_bytes;
    --barrier.missing_arrivals;
    check_bytes(barrier, where);
    settle(barrier);
}

// `num_bytes` of a copy have landed.
inline void land(Mbarrier& barrier, uint32_t num_bytes, const Where& where) {
    barrier.missing_bytes -= num_bytes;
    check_bytes(barrier, where);
    settle(barrier);
}

// An arrival that gets to CTA `cta_rank` later.
inline void arrive_remote(uint64_t& barrier, uint32_t cta_rank, const Where& where) {
    Fiber* const fiber = current;
    Cta* const cta = fiber->cta->cluster->ctas.at(cta_rank);
    const uint32_t address = shared_offset(&barrier);
    ++fiber->num_arrivals;
    launch->later("a remote arrival", cta, [=] {
        arrive(mbarrier_at(*cta, address, where), 0, where);
        if (--fiber->num_arrivals == 0) launch->wake(fiber->awaiting_arrivals);
    });
}

}  // namespace emulation

namespace mbarrier {

inline void init(uint64_t& barrier, uint32_t num_arrivals, EMULATED_WHERE) {
    emulation::Cta& cta = *emulation::current->cta;
    const uint32_t address = emulation::shared_offset(&barrier);
    const uint64_t tag = emulation::kBarrierTag << 32 | address;
    if (address % 8 != 0 || barrier >> 16 == tag)
        throw emulation::Fault{emulation::name_of(where) + ": misaligned, or initialised before"};
    if (num_arrivals == 0) throw emulation::Fault{emulation::name_of(where) + ": an mbarrier of no arrivals"};
    barrier = tag << 16 | cta.mbarriers.size();
    cta.mbarriers.push_back({num_arrivals, num_arrivals});
}

inline void fence_init() {}

inline void arrive(uint64_t& barrier, EMULATED_WHERE) {
    emulation::arrive(emulation::mbarrier_at(barrier, where), 0, where);
    emulation::launch->interrupt();
}

constexpr uint32_t kArrivalsPerWarp = 32;

inline void arrive_warp(uint64_t& barrier, EMULATED_WHERE) { arrive(barrier, where); }

inline void arrive_expect_bytes(uint64_t& barrier, uint32_t num_bytes, EMULATED_WHERE) {
    emulation::arrive(emulation::mbarrier_at(barrier, where), num_bytes, where);
    emulation::launch->interrupt();
}

inline void arrive_remote(uint64_t& barrier, uint32_t cta_rank, EMULATED_WHERE) {
    emulation::arrive_remote(barrier, cta_rank, where);
}

inline void arrive_remote_relaxed(uint64_t& barrier, uint32_t cta_rank, EMULATED_WHERE) {
    emulation::arrive_remote(barrier, cta_rank, where);
}

template <bool kCluster = false>
inline void wait(uint64_t& barrier, uint32_t parity, EMULATED_WHERE) {
    emulation::Mbarrier& state = emulation::mbarrier_at(barrier, where);
    if (parity > 1) throw emulation::Fault{emulation::name_of(where) + ": a parity is 0 or 1"};
    emulation::current->mbarrier = &state;
    emulation::current->parity = parity;
    while (state.num_phases % 2 == parity) emulation::launch->sleep(state.sleepers, "an mbarrier", where);
    emulation::current->mbarrier = nullptr;
    emulation::launch->interrupt();
}

}  // namespace mbarrier

inline void named_barrier(uint32_t id, uint32_t num_threads, EMULATED_WHERE) {
    if (id == 0 || id > 15 || num_threads % 32 != 0)
        throw emulation::Fault{emulation::name_of(where) + ": ids are 1..15 and threads come in warps"};
    emulation::ThreadBarrier& barrier = emulation::current->cta->barriers[id];
    if (barrier.num_arrived == 0) barrier.num_threads = num_threads;
    if (barrier.num_threads != num_threads)
        throw emulation::Fault{emulation::name_of(where) + ": two counts of threads for one barrier"};
    emulation::launch->arrive_and_wait(barrier, num_threads, "a named barrier", where);
}

template <uint32_t kNumStages>
struct RingPosition {
    uint32_t stage = 0;
    uint32_t parity = 0;

    void advance() {
        if (++stage == kNumStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};
