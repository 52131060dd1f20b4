// Asynchronous copies from global to shared memory: bulk tensor copies (TMA) and 4- and 16-byte cp.async.
#pragma once
#include "types.cuh"

// One box of a 2-dimensional tensor map; completes `num bytes of the box` on the barrier.
__device__ __forceinline__ void tma_load_2d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t column,
                                            int32_t row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(destination)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row)
        : "memory");
}

// One box of a 5-dimensional tensor map.
__device__ __forceinline__ void tma_load_5d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t c0,
                                            int32_t c1, int32_t c2, int32_t c3, int32_t c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

__device__ __forceinline__ uint64_t evict_normal_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// For data that is read once: it leaves L2 before anything else does.
__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// tma_load_2d and tma_load_5d with an L2 cache policy.
__device__ __forceinline__ void tma_load_2d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t column,
                                            int32_t row, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void tma_load_5d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t c0,
                                            int32_t c1, int32_t c2, int32_t c3, int32_t c4, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4), "l"(policy)
        : "memory");
}

// num_bytes of contiguous memory, a multiple of 16, with an L2 cache policy.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t num_bytes, uint64_t& barrier,
                                          uint64_t policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            shared_address(destination)),
        "l"(source), "r"(num_bytes), "r"(shared_address(&barrier)), "l"(policy)
        : "memory");
}

// num_bytes of contiguous memory, a multiple of 16.
__device__ __forceinline__ void bulk_load(void* destination, const void* source, uint32_t num_bytes, uint64_t& barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(destination)),
                 "l"(source), "r"(num_bytes), "r"(shared_address(&barrier))
                 : "memory");
}

// One box of a 2- or 4-dimensional tensor map into every CTA of the cluster that `cta_mask` names, at the same shared
// address, with an L2 cache policy; it completes its bytes on the barrier of each.
__device__ __forceinline__ void tma_multicast_2d(void* destination, const TensorMap& map, uint64_t& barrier,
                                                 int32_t column, int32_t row, uint16_t cta_mask, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4}], [%2], %5, %6;" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(column), "r"(row), "h"(cta_mask), "l"(policy)
        : "memory");
}

__device__ __forceinline__ void tma_multicast_4d(void* destination, const TensorMap& map, uint64_t& barrier, int32_t c0,
                                                 int32_t c1, int32_t c2, int32_t c3, uint16_t cta_mask, uint64_t policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], %7, %8;" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(cta_mask), "l"(policy)
        : "memory");
}

// num_bytes of shared memory, a multiple of 16, to global memory. The source must be visible to the copy engine
// (fence_async_proxy()) and stay until bulk_store_wait_read() of the same thread.
__device__ __forceinline__ void bulk_store(void* destination, const void* source, uint32_t num_bytes) {
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n"
        "cp.async.bulk.commit_group;" ::"l"(destination),
        "r"(shared_address(source)), "r"(num_bytes)
        : "memory");
}

// Until this thread's bulk stores have read their sources.
__device__ __forceinline__ void bulk_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// 16 bytes past L1; writes zeros instead when `valid` is false (source must still be an address of the same array).
__device__ __forceinline__ void cp_async_16(uint32_t shared_destination, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_destination), "l"(source) : "memory");
}

__device__ __forceinline__ void cp_async_16(void* destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// 4 bytes through L1, for values that lie beside each other and are fetched one step after another.
__device__ __forceinline__ void cp_async_4(void* destination, const void* source, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(destination)), "l"(source),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

// This thread's arrival on the barrier, made when all its earlier cp.async have landed. Counts as one of the
// barrier's expected arrivals. The consumer that feeds the data to wgmma must issue fence_async_proxy() itself.
__device__ __forceinline__ void cp_async_arrive(uint64_t& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Orders this thread's ordinary shared-memory accesses before later ones of wgmma and the copy engine.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
