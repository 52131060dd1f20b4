// Which tile a CTA begins with, found by itself while the kernel before still groups the choices, quantises tokens and fills
// memory: so the first weights are on their way some microseconds earlier.
#pragma once
#include "stream_storage.cuh"
#include "tile_cut.cuh"

struct FirstTileStorage {
    static constexpr uint32_t kMostExperts = 1024;
    static constexpr uint32_t kNumHeights = kMaxRows / kRowStep;
    static constexpr uint32_t kWords = ceil_div(kNumHeights, 2u);  // of tiles by height, the highest first, in 16 bits each

    uint32_t counts[kMostExperts / 2];  // of choices of an expert, in 16 bits each
    uint32_t warp_total[kNumMathWarps][kWords];
};

// All threads; ends with a barrier. Finds num_tiles, and first_expert if the CTA begins with a piece of the up phase. Not
// inlined, so that the compiler takes no warp for parted after it.
__device__ __noinline__ void find_first_tile(const Params& p, SharedStorage& shared) {
    using Storage = FirstTileStorage;
    static_assert(sizeof(Storage) <= sizeof(shared.tokens), "it lies where tokens will");
    constexpr uint32_t kExpertsPerThread = Storage::kMostExperts / kNumMathThreads, kInFlight = 4;
    Storage& own = *reinterpret_cast<Storage*>(shared.tokens);
    const uint32_t thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    for (uint32_t i = thread; i < Storage::kMostExperts / 2; i += kNumThreads) own.counts[i] = 0;
    __syncthreads();
    for (uint32_t first = thread; first < p.num_choices; first += kInFlight * kNumThreads) {
        uint32_t expert[kInFlight];
#pragma unroll
        for (uint32_t i = 0; i < kInFlight; ++i) {
            const uint32_t choice = first + i * kNumThreads;
            expert[i] = choice < p.num_choices ? p.topk_ids[choice] : ~0u;
        }
#pragma unroll
        for (uint32_t i = 0; i < kInFlight; ++i)
            if (expert[i] < p.num_experts) atomicAdd(&own.counts[expert[i] / 2], 1u << expert[i] % 2 * 16);
    }
    __syncthreads();

    uint32_t tiles[kExpertsPerThread] = {}, height[kExpertsPerThread] = {};  // counted from the highest
    uint32_t before[Storage::kWords] = {};
    if (thread < kNumMathThreads) {
#pragma unroll
        for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
            const uint32_t count = own.counts[(thread * kExpertsPerThread + i) / 2] >> i % 2 * 16 & 0xffff;
            const TileCut cut(count, kMaxRows);
            tiles[i] = cut.num_tiles, height[i] = (kMaxRows - cut.height) / kRowStep;
#pragma unroll
            for (uint32_t w = 0; w < Storage::kWords; ++w)
                before[w] += height[i] / 2 == w ? tiles[i] << height[i] % 2 * 16 : 0;
        }
#pragma unroll
        for (uint32_t w = 0; w < Storage::kWords; ++w) {
            uint32_t sum = before[w];
#pragma unroll
            for (uint32_t offset = 1; offset < 32; offset *= 2) {
                const uint32_t other = __shfl_up_sync(~0u, sum, offset);
                if (lane >= offset) sum += other;
            }
            if (lane == 31) own.warp_total[warp][w] = sum;
            before[w] = sum - before[w];
        }
    }
    __syncthreads();
    uint32_t total[Storage::kWords] = {}, num_tiles = 0;
#pragma unroll
    for (uint32_t w = 0; w < Storage::kWords; ++w) {
#pragma unroll
        for (uint32_t other = 0; other < kNumMathWarps; ++other) {
            if (other < warp) before[w] += own.warp_total[other][w];
            total[w] += own.warp_total[other][w];
        }
        num_tiles += (total[w] & 0xffff) + (total[w] >> 16);
    }
    const Schedule schedule(max(num_tiles, 1u));
    const uint32_t ticket = schedule.first_ticket();
    const uint32_t wanted = ticket < schedule.num_up ? schedule.piece(ticket).item / kNumChunks : ~0u;
    uint32_t first_of_height = 0;
#pragma unroll
    for (uint32_t w = 0; w < Storage::kWords; ++w) {
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            uint32_t first = first_of_height + (before[w] >> half * 16 & 0xffff);
#pragma unroll
            for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
                const uint32_t own_tiles = height[i] == 2 * w + half ? tiles[i] : 0;
                if (wanted - first < own_tiles) shared.first_expert = thread * kExpertsPerThread + i;
                first += own_tiles;
            }
            first_of_height += total[w] >> half * 16 & 0xffff;
        }
    }
    if (thread == 0) shared.num_tiles = num_tiles;
    __syncthreads();
}
