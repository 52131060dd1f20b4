// CTAs that hand each other a value, once through global memory and once through the shared memory of a cluster.
#include "cluster.cuh"
#include "exchange.cuh"

constexpr uint32_t kNeverStores = 1, kLeavesEarly = 2;  // 0: no mistake
constexpr uint32_t kFault = FAULT;

struct Params {
    float* words;      // [CTAs], ones in every bit at the start
    float* neighbour;  // [CTAs][2]: what the next CTA of the grid stored, what the next one of the cluster holds
};

extern "C" __global__ void handover(const __grid_constant__ Params p) {
    __shared__ uint2 held;
    const uint32_t cta = blockIdx.x, rank = cluster::cta_rank();
    if (threadIdx.x == 0) {
        held = make_uint2(100 + cta, 0);
        if (kFault != kNeverStores || cta != 0) exchange::store(p.words + cta, static_cast<float>(cta));
        p.neighbour[2 * cta] = exchange::await_written(exchange::load_once(p.words + (cta + 1) % gridDim.x), p.words + (cta + 1) % gridDim.x);
    }
    cluster::sync();
    if (threadIdx.x == 0)
        p.neighbour[2 * cta + 1] = cluster::load(cluster::map_address(shared_address(&held), rank ^ 1)).x;
    if (kFault != kLeavesEarly) cluster::sync();
}
