// Puts the choices of a batch in the order of their experts and counts them, for a kernel that works out the tiles from the
// counts by itself.
//
// A counting sort in shared memory by one cluster: each CTA counts a slice of the choices, of which each keeps its rank from
// the count, and reads the others' counts. The order of an expert's choices is not fixed.
//
// Over sm90_prologue.cu, which lists tiles as well: that, and to look at the choices twice, took 3 us of 7
// (experiments/2026-11-28_order).
//
// Set by the compiler's command line: CLUSTER_SIZE, CHOICES_PER_THREAD, and PARAMS_BYTES, the size of what the launcher
// passes.
#include "cluster.cuh"
#include "scan.cuh"

constexpr uint32_t kClusterSize = CLUSTER_SIZE;
constexpr uint32_t kNumThreads = 512;
constexpr uint32_t kChoicesPerThread = CHOICES_PER_THREAD;
constexpr uint32_t kExpertsPerThread = 2;
constexpr uint32_t kMaxExperts = kExpertsPerThread * kNumThreads;

struct Params {
    const int32_t* topk_ids;  // [num_choices]; an id outside 0..num_experts-1 is not on this rank
    int32_t* sorted_choices;  // [num_choices]
    uint2* expert_choices;    // [kMaxExperts / 2]: how many choices two experts have; zeros past the last
    uint32_t num_choices;
    uint32_t num_experts;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct SharedStorage {
    alignas(8) uint32_t count[kMaxExperts];  // of this CTA's slice; read by the others of the cluster
    alignas(8) uint32_t first_slot[kMaxExperts];  // in sorted_choices, of this CTA's slice
    uint32_t warp_total[kNumThreads / 32];
};

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) sm90_order(const __grid_constant__ Params p) {
    __shared__ SharedStorage shared;
    grid_dependency::launch_dependents();
    const uint32_t cta = blockIdx.x, pair = threadIdx.x;
    const auto choice = [&](uint32_t i) { return (i * kClusterSize + cta) * kNumThreads + threadIdx.x; };
    uint32_t expert[kChoicesPerThread], rank[kChoicesPerThread];
#pragma unroll
    for (uint32_t i = 0; i < kChoicesPerThread; ++i)
        expert[i] = choice(i) < p.num_choices ? p.topk_ids[choice(i)] : ~0u;

    uint2& own = reinterpret_cast<uint2*>(shared.count)[pair];
    own = make_uint2(0, 0);
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kChoicesPerThread; ++i)
        if (expert[i] < p.num_experts) rank[i] = atomicAdd(&shared.count[expert[i]], 1u);
    cluster::sync();

    uint2 slice[kClusterSize], all = make_uint2(0, 0), earlier = make_uint2(0, 0);  // of all slices, of those before this
#pragma unroll
    for (uint32_t other = 0; other < kClusterSize; ++other)
        slice[other] = cluster::load(cluster::map_address(shared_address(&own), other));
#pragma unroll
    for (uint32_t other = 0; other < kClusterSize; ++other) {
        if (other == cta) earlier = all;
        all.x += slice[other].x, all.y += slice[other].y;
    }
    cluster::arrive();
    if (cta == 0) p.expert_choices[pair] = all;

    uint32_t total;
    const uint32_t first = exclusive_sum<kNumThreads / 32>(all.x + all.y, shared.warp_total, total);
    reinterpret_cast<uint2*>(shared.first_slot)[pair] = make_uint2(first + earlier.x, first + all.x + earlier.y);
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kChoicesPerThread; ++i)
        if (expert[i] < p.num_experts) p.sorted_choices[shared.first_slot[expert[i]] + rank[i]] = choice(i);
    cluster::wait();  // until the others have read this CTA's counts
}
