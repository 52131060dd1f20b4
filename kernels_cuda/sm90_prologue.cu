// Everything a fused kernel needs before it can start, in one launch: CTA 0 aligns the routing into blocks, the others
// quantise the tokens and zero the output. Each of the three is left out when its pointers are null.
//
// Alignment by one CTA is a counting sort in shared memory. It takes about as long as quantising the same batch does, so
// it hides behind it; a grid-wide sort would need a second launch.
//
// Set by the compiler's command line: PARAMS_BYTES, the size of what the launcher passes.
#include "cluster.cuh"
#include "numeric.cuh"

constexpr uint32_t kNumThreads = 1024;
constexpr uint32_t kMaxExperts = 1024;
constexpr uint32_t kBatch = 8;  // independent loads in flight per thread

struct Params {
    // align; null topk_ids: leave out
    const int32_t* topk_ids;          // [num_choices], -1: not on this rank
    int32_t* sorted_token_ids;        // [capacity]
    int32_t* expert_ids;              // [capacity / block_m]
    int32_t* num_tokens_post_padded;  // [1]
    // quantise; null x: leave out
    const uint16_t* x;  // bf16 [num_tokens, hidden_size]
    uint8_t* x_q;       // e4m3, same shape
    float* x_scale;     // [num_tokens, hidden_size / 128]
    // zero; null: leave out
    uint16_t* out;  // bf16 [num_tokens, hidden_size]
    uint64_t num_values;  // num_tokens * hidden_size
    uint32_t num_choices;
    uint32_t num_experts;
    uint32_t block_m;
    uint32_t capacity;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct SharedStorage {
    uint32_t count[kMaxExperts];
    uint32_t first_slot[kMaxExperts + 1];  // of each expert's first block; the last entry is the padded total
    uint32_t next_slot[kMaxExperts];
    uint32_t warp_total[kNumThreads / 32];
};

// Calls visit(choice, expert) for every choice whose expert is on this rank, many loads ahead of the first use.
template <typename Visit>
__device__ __forceinline__ void for_each_choice(const Params& p, Visit visit) {
    for (uint32_t base = threadIdx.x; base < p.num_choices; base += kBatch * kNumThreads) {
        uint32_t expert[kBatch];
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
            const uint32_t choice = base + i * kNumThreads;
            expert[i] = choice < p.num_choices ? p.topk_ids[choice] : ~0u;
        }
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i)
            if (expert[i] < p.num_experts) visit(base + i * kNumThreads, expert[i]);
    }
}

// Sum of `value` over the threads before this one.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t value, uint32_t (&warp_total)[kNumThreads / 32]) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = value;
#pragma unroll
    for (uint32_t offset = 1; offset < 32; offset *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, sum, offset);
        if (lane >= offset) sum += before;
    }
    if (lane == 31) warp_total[warp] = sum;
    __syncthreads();
    if (warp == 0) {
        uint32_t total = warp_total[lane];
#pragma unroll
        for (uint32_t offset = 1; offset < 32; offset *= 2) {
            const uint32_t before = __shfl_up_sync(~0u, total, offset);
            if (lane >= offset) total += before;
        }
        warp_total[lane] = total;
    }
    __syncthreads();
    return sum - value + (warp > 0 ? warp_total[warp - 1] : 0u);
}

__device__ __forceinline__ void align(const Params& p, SharedStorage& shared) {
    const uint32_t thread = threadIdx.x;
    shared.count[thread] = 0;
    __syncthreads();
    for_each_choice(p, [&](uint32_t, uint32_t expert) { atomicAdd(&shared.count[expert], 1u); });
    __syncthreads();

    const uint32_t count = shared.count[thread];
    const uint32_t padded = ceil_div(count, p.block_m) * p.block_m;
    const uint32_t first = exclusive_sum(padded, shared.warp_total);
    shared.first_slot[thread] = first;
    shared.next_slot[thread] = first;
    if (thread == kNumThreads - 1) {
        shared.first_slot[kMaxExperts] = first + padded;
        *p.num_tokens_post_padded = first + padded;
    }
    for (uint32_t slot = first + count; slot < first + padded; ++slot) p.sorted_token_ids[slot] = p.num_choices;
    __syncthreads();

    const uint32_t total = shared.first_slot[kMaxExperts];
    for (uint32_t slot = total + thread; slot < p.capacity; slot += kNumThreads) p.sorted_token_ids[slot] = p.num_choices;
    for (uint32_t block = thread; block < p.capacity / p.block_m; block += kNumThreads) {
        const uint32_t slot = block * p.block_m;
        uint32_t low = 0, high = kMaxExperts;  // the expert is the last whose first slot is at or before this one
        while (high - low > 1) {
            const uint32_t middle = (low + high) / 2;
            (shared.first_slot[middle] <= slot ? low : high) = middle;
        }
        p.expert_ids[block] = slot < total ? static_cast<int32_t>(low) : -1;
    }
    for_each_choice(p, [&](uint32_t choice, uint32_t expert) {
        p.sorted_token_ids[atomicAdd(&shared.next_slot[expert], 1u)] = choice;
    });
}

// 16 lanes take one group of 128 values: 8 values (16 bytes) each.
__device__ __forceinline__ void quantise_and_zero(const Params& p, uint32_t cta, uint32_t num_ctas) {
    constexpr uint32_t kLanes = 16, kValues = kGroupSize / kLanes;
    const uint32_t lane = threadIdx.x % kLanes;
    const uint64_t num_groups = p.num_values / kGroupSize;
    const uint64_t step = static_cast<uint64_t>(num_ctas) * blockDim.x / kLanes;
    for (uint64_t group = (static_cast<uint64_t>(cta) * blockDim.x + threadIdx.x) / kLanes; group < num_groups; group += step) {
        const uint64_t first = group * kGroupSize + lane * kValues;
        if (p.out != nullptr) *reinterpret_cast<uint4*>(p.out + first) = make_uint4(0, 0, 0, 0);
        if (p.x == nullptr) continue;
        const uint4 packed = *reinterpret_cast<const uint4*>(p.x + first);
        const float values[kValues] = {bf16_low(packed.x), bf16_high(packed.x), bf16_low(packed.y), bf16_high(packed.y),
                                       bf16_low(packed.z), bf16_high(packed.z), bf16_low(packed.w), bf16_high(packed.w)};
        float amax = kSmallestAmax;
#pragma unroll
        for (uint32_t i = 0; i < kValues; ++i) amax = fmaxf(amax, fabsf(values[i]));
#pragma unroll
        for (uint32_t offset = kLanes / 2; offset > 0; offset /= 2)
            amax = fmaxf(amax, __shfl_xor_sync(0xffffu << (threadIdx.x & 16), amax, offset));
        const float scale = amax / kE4M3Max;
        uint32_t quantised[2];
#pragma unroll
        for (uint32_t i = 0; i < 2; ++i) {
            const uint32_t low = pack_e4m3x2(values[4 * i] / scale, values[4 * i + 1] / scale);
            const uint32_t high = pack_e4m3x2(values[4 * i + 2] / scale, values[4 * i + 3] / scale);
            quantised[i] = low | high << 16;
        }
        *reinterpret_cast<uint2*>(p.x_q + first) = make_uint2(quantised[0], quantised[1]);
        if (lane == 0) p.x_scale[group] = scale;
    }
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) sm90_prologue(const __grid_constant__ Params p) {
    __shared__ SharedStorage shared;
    grid_dependency::launch_dependents();
    const uint32_t aligning = p.topk_ids != nullptr ? 1 : 0;
    if (blockIdx.x < aligning)
        align(p, shared);
    else
        quantise_and_zero(p, blockIdx.x - aligning, gridDim.x - aligning);
}
