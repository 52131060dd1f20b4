// Shared-memory barriers (mbarrier) and named CTA barriers. Every wait is bounded: a protocol error traps, it never hangs.
#pragma once
#include "types.cuh"

namespace mbarrier {

// One thread, before any other use; follow with fence_init() and a CTA or cluster barrier.
__device__ __forceinline__ void init(uint64_t& barrier, uint32_t num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(num_arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other CTAs of the cluster.
__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(uint64_t& barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// A warp arrives once, lane 0 for all that its lanes have done: arrivals at one barrier are made one after the other, and
// those of 256 threads take as long as the products of a stage. compute-sanitizer's racecheck does not follow that order;
// with EACH_LANE_ARRIVES every lane arrives for itself.
#ifndef EACH_LANE_ARRIVES
#define EACH_LANE_ARRIVES 0
#endif
constexpr uint32_t kArrivalsPerWarp = EACH_LANE_ARRIVES ? 32 : 1;

// All lanes of a warp: kArrivalsPerWarp arrivals.
__device__ __forceinline__ void arrive_warp(uint64_t& barrier) {
    if constexpr (kArrivalsPerWarp == 1) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) arrive(barrier);
    } else {
        arrive(barrier);
    }
}

// Arrive, and make the phase wait for num_bytes more of asynchronous copies.
__device__ __forceinline__ void arrive_expect_bytes(uint64_t& barrier, uint32_t num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(num_bytes)
                 : "memory");
}

// Arrive on the barrier at the same shared address in another CTA of the cluster.
__device__ __forceinline__ void arrive_remote(uint64_t& barrier, uint32_t cta_rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(cta_rank)
        : "memory");
}

// As arrive_remote(), ordering nothing: for a thread that has finished reading what the other CTA will overwrite, and has
// written nothing that it should see. The release of arrive_remote() flushes to the whole GPU, at every stage of a ring.
__device__ __forceinline__ void arrive_remote_relaxed(uint64_t& barrier, uint32_t cta_rank) {
    asm volatile(
        "{\n"
        ".reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote];\n"
        "}" ::"r"(shared_address(&barrier)),
        "r"(cta_rank)
        : "memory");
}

// Whether the phase of this parity has completed. With kCluster, what other CTAs of the cluster wrote before they
// arrived is visible then.
template <bool kCluster>
__device__ __forceinline__ bool try_wait(uint32_t address, uint32_t parity) {
    uint32_t done;
    if constexpr (kCluster)
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n"
            "}"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
    else
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
            "selp.u32 %0, 1, 0, done;\n"
            "}"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
    return done;
}

constexpr uint32_t kMaxPolls = 4'000'000;  // each poll may sleep about a microsecond

// Wait until the phase of this parity has completed; see try_wait().
template <bool kCluster = false>
__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t parity) {
#pragma unroll 1  // left to itself the compiler makes a kilobyte of code of every wait
    for (uint32_t poll = 0; poll < kMaxPolls; ++poll)
        if (try_wait<kCluster>(shared_address(&barrier), parity)) return;
    __trap();
}

}  // namespace mbarrier

// Barrier 0 is __syncthreads(); ids 1..15 serve subsets of the CTA.
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Where a producer and a consumer stand in a ring of stages: the stage, and the parity its barrier has next.
template <uint32_t kNumStages>
struct RingPosition {
    uint32_t stage = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++stage == kNumStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};
