// out[m] = the sum, in the order of m's choices, of the rows that kernels stored for them: the same bits every time, where
// additions into `out` by many CTAs come in any order.
//
// A thread takes 8 columns of a token. Reads each row once, writes each element once: bound by memory.
//
// Set by the compiler's command line: PARAMS_BYTES, the size of what the launcher passes.
#include "cluster.cuh"
#include "numeric.cuh"

constexpr uint32_t kNumThreads = 256;
constexpr uint32_t kColumns = 8;

struct Params {
    const uint4* contributions;  // bf16 [num_tokens * top_k, H], a choice's row weighted already
    const int32_t* topk_ids;     // [num_tokens, top_k]; an id outside 0..num_experts-1 contributes nothing
    uint4* out;                  // bf16 [num_tokens, H]
    uint64_t num_vectors;        // num_tokens * vectors_per_row
    uint32_t vectors_per_row;    // H / 8
    uint32_t top_k;
    uint32_t num_experts;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

extern "C" __global__ void __launch_bounds__(kNumThreads) sm90_combine(const __grid_constant__ Params p) {
    grid_dependency::wait();
    const uint64_t vector = static_cast<uint64_t>(blockIdx.x) * kNumThreads + threadIdx.x;
    if (vector >= p.num_vectors) return;
    const uint64_t token = vector / p.vectors_per_row, first_choice = token * p.top_k;
    const uint4* const column = p.contributions + first_choice * p.vectors_per_row + vector % p.vectors_per_row;
    float sum[kColumns] = {};
#pragma unroll 4
    for (uint32_t slot = 0; slot < p.top_k; ++slot) {
        if (static_cast<uint32_t>(p.topk_ids[first_choice + slot]) >= p.num_experts) continue;
        const uint4 row = column[static_cast<uint64_t>(slot) * p.vectors_per_row];
        sum[0] += bf16_low(row.x), sum[1] += bf16_high(row.x), sum[2] += bf16_low(row.y), sum[3] += bf16_high(row.y);
        sum[4] += bf16_low(row.z), sum[5] += bf16_high(row.z), sum[6] += bf16_low(row.w), sum[7] += bf16_high(row.w);
    }
    p.out[vector] = make_uint4(pack_bf16x2(sum[0], sum[1]), pack_bf16x2(sum[2], sum[3]), pack_bf16x2(sum[4], sum[5]),
                               pack_bf16x2(sum[6], sum[7]));
}
