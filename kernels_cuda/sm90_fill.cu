// Zeroes `out` and fills a scratch area with ones, for a kernel whose routing and tokens are ready. It takes so few
// registers and no shared memory, so that the CTAs of the next kernel start beside its own.
//
// Set by the compiler's command line: PARAMS_BYTES, the size of what the launcher passes.
#include "cluster.cuh"
#include "types.cuh"

constexpr uint32_t kNumThreads = 512;

struct Params {
    uint4* out;
    uint4* poison;
    uint64_t num_out_vectors;
    uint64_t num_poison_vectors;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

__device__ __forceinline__ void fill(uint4* area, uint64_t num_vectors, uint32_t word) {
    const uint64_t step = gridDim.x * kNumThreads;
    for (uint64_t vector = blockIdx.x * kNumThreads + threadIdx.x; vector < num_vectors; vector += step)
        area[vector] = make_uint4(word, word, word, word);
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 4) sm90_fill(const __grid_constant__ Params p) {
    grid_dependency::launch_dependents();
    fill(p.poison, p.num_poison_vectors, ~0u);
    fill(p.out, p.num_out_vectors, 0u);
    grid_dependency::wait();  // what this may run beside is done when it is
}
