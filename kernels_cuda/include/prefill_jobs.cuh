// The jobs of the down phase: the rows of each expert in chunks of up to kJobBlocks blocks, those of the last expert, which may
// be a shared one, before the others, and of these larger ones first. They are cut from the experts, not from the tiles of the
// up phase, so that weights are read as few times as can be.
#pragma once
#include "mbarrier.cuh"
#include "prefill_schedule.cuh"

constexpr uint32_t kBlockRows = 64;   // the M of a wgmma
constexpr uint32_t kJobBlocks = 7;
constexpr uint32_t kMostExperts = 1024;
constexpr uint32_t kNumListThreads = 256;
constexpr uint32_t kListBarrier = 3;

// jobs[0] is (number of jobs, of the last expert's, of its blocks, 0), each further one (expert, first row of h, rows, 0).

constexpr uint32_t kSizes = kJobBlocks + 2;  // of jobs: their blocks, or of the last expert's

struct JobStorage {
    uint32_t num_rows[kMostExperts];
    uint32_t jobs_of_size[kSizes];  // then the index of the next one
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

// Threads 0..255 of one CTA. The order of jobs of one size is not fixed. Not inlined: it is called once, and within the kernel
// its branches would keep the compiler from seeing what is uniform in the loops that follow.
__device__ __noinline__ void list_jobs(JobStorage& shared, const Tile* tiles, uint32_t num_experts, int4* jobs) {
    constexpr uint32_t kPerThread = kMostExperts / kNumListThreads;
    const uint32_t thread = threadIdx.x, lane = thread % 32, first_expert = kPerThread * thread;
#pragma unroll
    for (uint32_t i = 0; i < kPerThread; ++i) shared.num_rows[first_expert + i] = 0;
    if (thread < kSizes) shared.jobs_of_size[thread] = 0;
    named_barrier(kListBarrier, kNumListThreads);
    const uint32_t num_tiles = tiles[0].expert;
#pragma unroll 4
    for (uint32_t tile = thread; tile < num_tiles; tile += kNumListThreads)
        atomicAdd(&shared.num_rows[tiles[1 + tile].expert], tiles[1 + tile].num_rows);
    named_barrier(kListBarrier, kNumListThreads);

    const auto size_of = [&](const Cut& cut, uint32_t i, uint32_t index) {
        return first_expert + i == num_experts - 1 ? kSizes - 1 : cut.blocks(index);
    };
    uint32_t sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPerThread; ++i) {
        const Cut cut(shared.num_rows[first_expert + i]);
        sum += cut.num_rows;
        for (uint32_t index = 0; index < cut.num_jobs; ++index) atomicAdd(&shared.jobs_of_size[size_of(cut, i, index)], 1u);
    }
    uint32_t within = sum;
#pragma unroll
    for (uint32_t offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, within, offset);
        if (lane >= offset) within += other;
    }
    if (lane == 31) shared.warp_total[thread / 32] = within;
    named_barrier(kListBarrier, kNumListThreads);
    uint32_t first_row = within - sum;
    for (uint32_t warp = 0; warp < thread / 32; ++warp) first_row += shared.warp_total[warp];
    if (thread == 0) {
        const uint32_t of_last = shared.jobs_of_size[kSizes - 1];
        uint32_t before = 0;
#pragma unroll
        for (uint32_t size = kSizes - 1; size > 0; --size) {
            const uint32_t num_jobs = shared.jobs_of_size[size];
            shared.jobs_of_size[size] = before;
            before += num_jobs;
        }
        jobs[0] = make_int4(before, of_last, Cut(shared.num_rows[num_experts - 1]).num_blocks, 0);
    }
    named_barrier(kListBarrier, kNumListThreads);
#pragma unroll
    for (uint32_t i = 0; i < kPerThread; ++i) {
        const Cut cut(shared.num_rows[first_expert + i]);
        for (uint32_t index = 0; index < cut.num_jobs; ++index) {
            const uint32_t position = atomicAdd(&shared.jobs_of_size[size_of(cut, i, index)], 1u);
            const uint32_t first = first_h_row(first_expert + i, first_row) + cut.first_block(index) * kBlockRows;
            jobs[1 + position] = make_int4(first_expert + i, first, cut.rows(index), 0);
        }
        first_row += cut.num_rows;
    }
    named_barrier(kListBarrier, kNumListThreads);
}
