// The tiles of a batch, listed by each CTA of sm90_stream.cu for itself, from the numbers of choices of all experts.
//
// Of a small batch it counts and orders the choices (OrderedChoices), and asks for weights before another kernel has
// quantised the tokens or filled anything. That is a counting sort that keeps their order, so that all CTAs come to the
// same: each warp counts a run of choices in a row of counts of its own, lanes with the same expert find one another by
// __match_any_sync(), and a sum over experts and rows numbers slots and tiles. Of a larger batch sm90_order.cu has counted
// and ordered them (CountedChoices): it would take longer to list tiles than each CTA does.
#pragma once
#include "cluster.cuh"
#include "copy.cuh"
#include "scan.cuh"
#include "stream_storage.cuh"
#include "tiling.cuh"

constexpr uint32_t kExpertsPerThread = 4;
constexpr uint32_t kMostExperts = 1024;
static_assert(kMostExperts <= kExpertsPerThread * kNumThreads, "a thread has four experts");

// shared.tiles and shared.num_tiles, by all threads, of which each has the numbers of choices of experts 4 * thread and the
// three behind it; and of these the slots where their choices begin.
__device__ __forceinline__ void list_tiles(SharedStorage& shared, const uint32_t (&num_choices)[kExpertsPerThread],
                                           uint32_t (&first_slot)[kExpertsPerThread]) {
    constexpr uint32_t kNumWarps = kNumThreads / 32;
    using Tiles = TilesOfClasses<16>;
    constexpr uint32_t kSlots = 16 * kHeightClasses;  // of a sum the bits from here count choices
    uint64_t packed[kExpertsPerThread], own = 0, total;
    uint32_t height[kExpertsPerThread], height_class[kExpertsPerThread];
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        const Tiling tiling(num_choices[i], kMaxRows, small_quotient);
        height[i] = tiling.height, height_class[i] = tiling.height_class;
        packed[i] = Tiles::of(tiling) | uint64_t{num_choices[i]} << kSlots;
        own += packed[i];
    }
    static_assert(sizeof(shared.amax) >= kNumWarps * sizeof(uint64_t));
    uint64_t before = exclusive_sum<kNumWarps>(own, reinterpret_cast<uint64_t*>(shared.amax), total);
    if (threadIdx.x == 0) shared.num_tiles = Tiles::all(total);
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        first_slot[i] = static_cast<uint32_t>(before >> kSlots);
        uint32_t tile = Tiles::place(before, total, height_class[i]);
        const uint32_t end = first_slot[i] + num_choices[i];
#pragma unroll 1
        for (uint32_t row = first_slot[i]; row < end; row += height[i])
            shared.tiles[tile++] = {row, static_cast<uint16_t>(kExpertsPerThread * threadIdx.x + i),
                                    static_cast<uint16_t>(min(height[i], end - row))};
        before += packed[i];
    }
}

// What a thread does with the choices of a small batch. All threads call both functions.
struct OrderedChoices {
    static constexpr uint32_t kCountingWarps = kNumThreads / 32 - 1;  // the loader's has other work
    static constexpr uint32_t kMostChoices = 4;                       // of a thread
    const Params& p;
    SharedStorage& shared;
    const uint32_t thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row = warp - (warp > kNumMathWarps);                  // of counts
    const uint32_t each = ceil_div(p.num_choices, 32 * kCountingWarps);  // choices of a thread, at most kMostChoices
    const uint32_t num_rows = small_quotient(p.num_choices + 32 * each - 1, 32 * each);
    const uint32_t row_vectors = ceil_div(p.num_experts, kExpertsPerThread);
    uint32_t expert[kMostChoices];  // of this thread's choices; of one that is not here num_experts or more
    uint32_t rank[kMostChoices];    // among its expert's in this row

    __device__ __forceinline__ OrderedChoices(const Params& p, SharedStorage& shared) : p(p), shared(shared) {
#pragma unroll
        for (uint32_t i = 0; i < kMostChoices; ++i) {
            const bool is_mine = warp != kNumMathWarps && i < each && choice(i) < p.num_choices;
            expert[i] = is_mine ? p.topk_ids[choice(i)] : ~0u;
        }
    }

    __device__ __forceinline__ void list() {
#pragma unroll 1
        for (uint32_t i = thread; i < num_rows * row_vectors; i += kNumThreads) counts(0, i) = make_uint2(0, 0);
        __syncthreads();
        if (warp != kNumMathWarps && row < num_rows) count_choices();
        __syncthreads();
        uint2 sum = make_uint2(0, 0);
        if (thread < row_vectors) {
#pragma unroll 1
            for (uint32_t i = 0; i < num_rows; ++i) {
                const uint2 value = counts(i, thread);
                sum.x += value.x, sum.y += value.y;
            }
        }
        const uint32_t num_choices[kExpertsPerThread] = {sum.x & 0xffff, sum.x >> 16, sum.y & 0xffff, sum.y >> 16};
        uint32_t first_slot[kExpertsPerThread];
        list_tiles(shared, num_choices, first_slot);
        if (thread < row_vectors) {
            uint2 next = make_uint2(first_slot[0] | first_slot[1] << 16, first_slot[2] | first_slot[3] << 16);
#pragma unroll 1
            for (uint32_t i = 0; i < num_rows; ++i) {
                const uint2 value = counts(i, thread);
                counts(i, thread) = next;
                next.x += value.x, next.y += value.y;
            }
        }
        __syncthreads();
    }

    // The choices into their slots, after list(); a barrier is to follow.
    __device__ __forceinline__ void place() const {
#pragma unroll
        for (uint32_t i = 0; i < kMostChoices; ++i)
            if (expert[i] < p.num_experts) ordered_choices(p, shared)[count_of(expert[i]) + rank[i]] = choice(i);
        fence_async_proxy();  // weights come where the counts were
    }

  private:
    __device__ __forceinline__ uint32_t choice(uint32_t i) const { return (row * each + i) * 32 + lane; }

    // Counts of experts 4 * vector and the three behind it, in 16 bits each. They lie in the last stage of the ring.
    __device__ __forceinline__ uint2& counts(uint32_t row, uint32_t vector) const {
        static_assert(kCountingWarps * kMostExperts * sizeof(uint16_t) <= sizeof(shared.weights[0]));
        return reinterpret_cast<uint2*>(shared.weights[kNumStages - 1])[row * row_vectors + vector];
    }
    __device__ __forceinline__ uint16_t& count_of(uint32_t expert) const {
        return reinterpret_cast<uint16_t*>(&counts(row, 0))[expert];
    }

    __device__ __forceinline__ void count_choices() {
#pragma unroll
        for (uint32_t i = 0; i < kMostChoices; ++i) {
            if (i >= each) break;
            const bool is_here = expert[i] < p.num_experts;
            const uint32_t peers = __match_any_sync(~0u, expert[i]);
            rank[i] = __popc(peers & ((1u << lane) - 1)) + (is_here ? count_of(expert[i]) : 0u);
            __syncwarp();
            if (is_here && peers >> lane == 1) count_of(expert[i]) = rank[i] + 1;  // the last of them
            __syncwarp();
        }
    }
};

// The same of a larger batch, whose choices another kernel puts in order and counts.
struct CountedChoices {
    const Params& p;
    SharedStorage& shared;

    __device__ __forceinline__ CountedChoices(const Params& p, SharedStorage& shared) : p(p), shared(shared) {}

    __device__ __forceinline__ void list() const {
        grid_dependency::wait();
        // Loaded by all threads: after a first access by some the compiler takes registers for what all others need.
        constexpr uint32_t kVectors = kMostExperts / kExpertsPerThread;
        uint4 counts = p.expert_choices[min(threadIdx.x, kVectors - 1)];
        if (threadIdx.x >= kVectors) counts = make_uint4(0, 0, 0, 0);
        const uint32_t num_choices[kExpertsPerThread] = {counts.x, counts.y, counts.z, counts.w};
        uint32_t first_slot[kExpertsPerThread];
        list_tiles(shared, num_choices, first_slot);
        __syncthreads();
    }

    __device__ __forceinline__ void place() const {}
};
