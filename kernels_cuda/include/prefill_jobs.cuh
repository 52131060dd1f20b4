// The jobs of the down phase: the rows of each expert in chunks of up to kJobBlocks blocks, larger ones first. They are cut from
// the experts, not from the tiles of the up phase, so that weights are read as few times as can be. Before them come those of
// the last expert, which may be a shared one, in chunks of up to kLastJobBlocks: all wait for these.
#pragma once
#include "mbarrier.cuh"
#include "prefill_schedule.cuh"
#include "scan.cuh"

constexpr uint32_t kBlockRows = 64;   // the M of a wgmma
constexpr uint32_t kJobBlocks = 7;
constexpr uint32_t kLastJobBlocks = 3;
constexpr uint32_t kMostExperts = 1024;
constexpr uint32_t kNumListThreads = 256;
constexpr uint32_t kListBarrier = 3;

// jobs[0] is (number of jobs, of the last expert's, of its blocks, of all blocks), each further one (expert, first row of h,
// number of rows, 0).

struct JobStorage {
    uint32_t num_rows[kMostExperts];
    uint32_t jobs_of_size[kJobBlocks + 1];  // by blocks; then the index of the next one
    uint32_t num_blocks;
    uint32_t warp_total[kNumListThreads / 32];
};

// Job `index` of `num_jobs` of an expert with num_rows rows: equal ones, in blocks, and the last as short as it is.
struct Cut {
    uint32_t num_rows, num_blocks, num_jobs;

    __device__ __forceinline__ explicit Cut(uint32_t num_rows)
        : num_rows(num_rows), num_blocks(ceil_div(num_rows, kBlockRows)), num_jobs(ceil_div(num_blocks, kJobBlocks)) {}

    __device__ __forceinline__ uint32_t first_block(uint32_t index) const { return num_blocks * index / num_jobs; }
    __device__ __forceinline__ uint32_t blocks(uint32_t index) const { return first_block(index + 1) - first_block(index); }
    __device__ __forceinline__ uint32_t rows(uint32_t index) const {
        return min(first_block(index + 1) * kBlockRows, num_rows) - first_block(index) * kBlockRows;
    }
};

// Threads 0..255 of one CTA. The order of jobs of one size is not fixed. Loops are left as they are, as in scan.cuh: unrolled
// they were a quarter of the kernel. Not inlined: it is called once, and within the kernel
// its branches would keep the compiler from seeing what is uniform in the loops that follow.
__device__ __noinline__ void list_jobs(JobStorage& shared, const Tile* tiles, uint32_t num_experts, int4* jobs) {
    constexpr uint32_t kPerThread = kMostExperts / kNumListThreads;
    constexpr uint32_t kLastJobRows = kLastJobBlocks * kBlockRows;
    const uint32_t thread = threadIdx.x, lane = thread % 32, first_expert = kPerThread * thread, last_expert = num_experts - 1;
#pragma unroll
    for (uint32_t i = 0; i < kPerThread; ++i) shared.num_rows[first_expert + i] = 0;
    if (thread <= kJobBlocks) shared.jobs_of_size[thread] = 0;
    if (thread == 0) shared.num_blocks = 0;
    named_barrier(kListBarrier, kNumListThreads);
    const uint32_t num_tiles = tiles[0].expert;
#pragma unroll 4
    for (uint32_t tile = thread; tile < num_tiles; tile += kNumListThreads)
        atomicAdd(&shared.num_rows[tiles[1 + tile].expert], tiles[1 + tile].num_rows);
    named_barrier(kListBarrier, kNumListThreads);

    const auto cut_of = [&](uint32_t expert) { return Cut(expert == last_expert ? 0u : shared.num_rows[expert]); };
    const uint32_t last_rows = shared.num_rows[last_expert], num_last = ceil_div(last_rows, kLastJobRows);
    uint32_t sum = 0, num_blocks = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < kPerThread; ++i) {
        const Cut cut = cut_of(first_expert + i);
        sum += cut.num_rows, num_blocks += cut.num_blocks;
#pragma unroll 1
        for (uint32_t index = 0; index < cut.num_jobs; ++index) atomicAdd(&shared.jobs_of_size[cut.blocks(index)], 1u);
    }
    if (num_blocks > 0) atomicAdd(&shared.num_blocks, num_blocks);
    const uint32_t within = inclusive_sum_of_warp(sum);
    if (lane == 31) shared.warp_total[thread / 32] = within;
    named_barrier(kListBarrier, kNumListThreads);
    uint32_t first_row = within - sum, num_other_rows = 0;
#pragma unroll 1
    for (uint32_t warp = 0; warp < kNumListThreads / 32; ++warp) {
        if (warp == thread / 32) first_row += num_other_rows;
        num_other_rows += shared.warp_total[warp];
    }
    if (thread == 0) {
        uint32_t before = num_last;
#pragma unroll 1
        for (uint32_t blocks = kJobBlocks; blocks > 0; --blocks) {
            const uint32_t num_jobs = shared.jobs_of_size[blocks];
            shared.jobs_of_size[blocks] = before;
            before += num_jobs;
        }
        const uint32_t last_blocks = ceil_div(last_rows, kBlockRows);
        jobs[0] = make_int4(before, num_last, last_blocks, shared.num_blocks + last_blocks);
    }
#pragma unroll 1
    for (uint32_t index = thread; index < num_last; index += kNumListThreads) {
        const uint32_t row = index * kLastJobRows, first = first_h_row(last_expert, num_other_rows) + row;
        jobs[1 + index] = make_int4(last_expert, first, min(last_rows - row, kLastJobRows), 0);
    }
    named_barrier(kListBarrier, kNumListThreads);
#pragma unroll 1
    for (uint32_t i = 0; i < kPerThread; ++i) {
        const Cut cut = cut_of(first_expert + i);
#pragma unroll 1
        for (uint32_t index = 0; index < cut.num_jobs; ++index) {
            const uint32_t position = atomicAdd(&shared.jobs_of_size[cut.blocks(index)], 1u);
            const uint32_t first = first_h_row(first_expert + i, first_row) + cut.first_block(index) * kBlockRows;
            jobs[1 + position] = make_int4(first_expert + i, first, cut.rows(index), 0);
        }
        first_row += cut.num_rows;
    }
    named_barrier(kListBarrier, kNumListThreads);
}
