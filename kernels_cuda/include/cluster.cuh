// Thread-block clusters: rank, barrier, and accesses to another CTA's shared memory.
#pragma once
#include "types.cuh"

namespace cluster {

__device__ __forceinline__ uint32_t cta_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all CTAs of the cluster: wait() returns when all have come to arrive().
__device__ __forceinline__ void arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ void sync() {
    arrive();
    wait();
}

// The address, in the cluster's shared window, of this CTA's `local` address in CTA `cta_rank`.
__device__ __forceinline__ uint32_t map_address(uint32_t local, uint32_t cta_rank) {
    uint32_t remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(cta_rank));
    return remote;
}

// 8 bytes from another CTA's shared memory.
__device__ __forceinline__ uint2 load(uint32_t remote) {
    uint2 value;
    asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(remote) : "memory");
    return value;
}

// 16 bytes into another CTA; completes 16 bytes on that CTA's barrier, so the receiver needs no fence.
__device__ __forceinline__ void store_async(uint32_t remote, uint32_t remote_barrier, float4 value) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(remote),
        "r"(remote_barrier), "f"(value.x), "f"(value.y), "f"(value.z), "f"(value.w)
        : "memory");
}

}  // namespace cluster

// Programmatic dependent launch: the previous kernel's writes are visible after wait(); the next kernel may start
// once every CTA has called launch_dependents() or ended.
namespace grid_dependency {

__device__ __forceinline__ void wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace grid_dependency
