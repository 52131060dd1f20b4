// words = words * factor + addend: two of these in a chain show which one ran first.
#include "cluster.cuh"

constexpr uint32_t kSkipsWait = 1;  // 0: no mistake
constexpr uint32_t kFault = FAULT;

struct Params {
    float* words;  // one for each thread
    float factor, addend;
};

extern "C" __global__ void affine(const __grid_constant__ Params p) {
    grid_dependency::launch_dependents();
    if (kFault != kSkipsWait) grid_dependency::wait();
    float& word = p.words[blockIdx.x * blockDim.x + threadIdx.x];
    word = word * p.factor + p.addend;
}
