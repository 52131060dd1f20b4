// Clusters and programmatic dependent launch, emulated.
#pragma once
#include "copy.cuh"
#include "types.cuh"

namespace cluster {

inline uint32_t cta_rank() { return emulation::current->cta->rank; }

inline void arrive(EMULATED_WHERE) {
    emulation::Fiber& fiber = *emulation::current;
    while (fiber.num_arrivals > 0) emulation::launch->sleep(fiber.awaiting_arrivals, "its remote arrivals", where);
    emulation::Cluster& cluster = *fiber.cta->cluster;
    fiber.cluster_phase = emulation::launch->arrive(cluster.barrier, cluster.num_alive);
}

inline void wait(EMULATED_WHERE) {
    emulation::Fiber& fiber = *emulation::current;
    emulation::launch->await_phase(fiber.cta->cluster->barrier, fiber.cluster_phase, "its cluster", where);
}

inline void sync(EMULATED_WHERE) {
    arrive(where);
    wait(where);
}

inline uint32_t map_address(uint32_t local, uint32_t cta_rank) {
    if (cta_rank >= emulation::current->cta->cluster->ctas.size()) throw emulation::Fault{"no such CTA in the cluster"};
    return (cta_rank + 1) << emulation::kRankShift | local;
}

inline uint2 load(uint32_t remote, EMULATED_WHERE) {
    emulation::Cta& cta = emulation::cta_of(remote);
    if (cta.num_alive == 0)
        throw emulation::Fault{emulation::name_of(where) + ": reads the shared memory of a CTA that has ended"};
    uint2 value;
    memcpy(&value, emulation::shared_byte(cta, remote), sizeof(value));
    return value;
}

inline void store_async(uint32_t remote, uint32_t remote_barrier, float4 value, EMULATED_WHERE) {
    emulation::Cta* const cta = &emulation::cta_of(remote);
    if (cta != &emulation::cta_of(remote_barrier))
        throw emulation::Fault{emulation::name_of(where) + ": st.async to one CTA, its barrier in another"};
    emulation::launch->later("st.async", cta, [=] {
        emulation::write_shared(*cta, remote, &value, sizeof(value));
        emulation::land(emulation::mbarrier_at(*cta, remote_barrier, where), sizeof(value), where);
    });
}

}  // namespace cluster

namespace grid_dependency {

inline void wait(EMULATED_WHERE) { emulation::launch->wait_for_previous_grid(where); }
inline void launch_dependents() {}

}  // namespace grid_dependency
