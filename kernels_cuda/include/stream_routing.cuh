// The tiles of a small batch, worked out by each CTA of sm90_stream.cu for itself: it need not wait for the kernel before.
//
// A counting sort that keeps the order of the choices, so that all CTAs come to the same: each warp counts a run of choices
// in a row of counts of its own, lanes with the same expert find one another by __match_any_sync(), and a sum over experts
// and rows numbers slots and tiles. Weights can then be asked for; the choices are put into their slots meanwhile.
#pragma once
#include "copy.cuh"
#include "stream_storage.cuh"

// What a thread does of it. All threads call both functions.
struct Routing {
    static constexpr uint32_t kNumWarps = kNumThreads / 32, kCountingWarps = kNumWarps - 1;  // the loader's has other work
    static constexpr uint32_t kMostExperts = 1024, kMostChoices = 4;
    const Params& p;
    SharedStorage& shared;
    const uint32_t thread = threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t row = warp - (warp > kNumMathWarps);                  // of counts
    const uint32_t each = ceil_div(p.num_choices, 32 * kCountingWarps);  // choices of a thread, at most kMostChoices
    const uint32_t num_rows = small_quotient(p.num_choices + 32 * each - 1, 32 * each);
    const uint32_t row_vectors = ceil_div(p.num_experts, 4u);
    uint32_t expert[kMostChoices];  // of this thread's choices; of one that is not here num_experts or more
    uint32_t rank[kMostChoices];    // among its expert's in this row

    __device__ __forceinline__ Routing(const Params& p, SharedStorage& shared) : p(p), shared(shared) {
#pragma unroll
        for (uint32_t i = 0; i < kMostChoices; ++i) {
            const bool is_mine = warp != kNumMathWarps && i < each && choice(i) < p.num_choices;
            expert[i] = is_mine ? p.topk_ids[choice(i)] : ~0u;
        }
    }

    __device__ __forceinline__ uint32_t choice(uint32_t i) const { return (row * each + i) * 32 + lane; }

    // Counts of experts 4 * vector and the three behind it, in 16 bits each. They lie in the last stage of the ring.
    __device__ __forceinline__ uint2& counts(uint32_t row, uint32_t vector) const {
        static_assert(kCountingWarps * kMostExperts * sizeof(uint16_t) <= sizeof(shared.weights[0]));
        return reinterpret_cast<uint2*>(shared.weights[kNumStages - 1])[row * row_vectors + vector];
    }
    __device__ __forceinline__ uint16_t& count_of(uint32_t expert) const {
        return reinterpret_cast<uint16_t*>(&counts(row, 0))[expert];
    }

    // shared.tiles and shared.num_tiles. An expert's tiles, as reference.routing.tile_rows cuts them, lie behind each other.
    __device__ __forceinline__ void list_tiles() {
#pragma unroll 1
        for (uint32_t i = thread; i < num_rows * row_vectors; i += kNumThreads) counts(0, i) = make_uint2(0, 0);
        __syncthreads();
        if (warp != kNumMathWarps && row < num_rows) count_choices();
        __syncthreads();

        static_assert(kMostExperts <= 4 * kNumThreads, "a thread has four experts");
        uint2 sum = make_uint2(0, 0);
        if (thread < row_vectors) {
#pragma unroll 1
            for (uint32_t i = 0; i < num_rows; ++i) {
                const uint2 value = counts(i, thread);
                sum.x += value.x, sum.y += value.y;
            }
        }
        const uint32_t num_choices[4] = {sum.x & 0xffff, sum.x >> 16, sum.y & 0xffff, sum.y >> 16};
        constexpr uint32_t kTiles = 16;  // of a sum the bits from here count tiles, those below choices
        uint32_t packed = 0;
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) packed += num_choices[i] | ceil_div(num_choices[i], kMaxRows) << kTiles;
        uint32_t before = exclusive_sum(packed);
        if (thread == kNumThreads - 1) shared.num_tiles = (before + packed) >> kTiles;
        if (thread < row_vectors) {
            uint32_t first[4], tile = before >> kTiles;
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                first[i] = before & ((1u << kTiles) - 1);
                const uint32_t end = first[i] + num_choices[i], height = tile_height(num_choices[i]);
#pragma unroll 1
                for (uint32_t start = first[i]; start < end; start += height)
                    shared.tiles[tile++] = {start, static_cast<uint16_t>(4 * thread + i),
                                            static_cast<uint16_t>(min(height, end - start))};
                before += num_choices[i];
            }
            uint2 next = make_uint2(first[0] | first[1] << 16, first[2] | first[3] << 16);
#pragma unroll 1
            for (uint32_t i = 0; i < num_rows; ++i) {
                const uint2 value = counts(i, thread);
                counts(i, thread) = next;
                next.x += value.x, next.y += value.y;
            }
        }
        __syncthreads();
    }

    // The choices in their slots, after list_tiles(); a barrier is to follow.
    __device__ __forceinline__ void place() const {
#pragma unroll
        for (uint32_t i = 0; i < kMostChoices; ++i)
            if (expert[i] < p.num_experts) sorted_choices(p, shared)[count_of(expert[i]) + rank[i]] = choice(i);
        fence_async_proxy();  // weights come where the counts were
    }

  private:
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

    // Of the tiles of an expert with so many choices, but for the last.
    __device__ __forceinline__ static uint32_t tile_height(uint32_t num_choices) {
        if (num_choices <= kMaxRows) return kMaxRows;
        return ceil_div(ceil_div(num_choices, ceil_div(num_choices, kMaxRows)), 8u) * 8;
    }

    // Over the threads before this one.
    __device__ __forceinline__ uint32_t exclusive_sum(uint32_t value) const {
        uint32_t within = value;
#pragma unroll
        for (uint32_t offset = 1; offset < 32; offset *= 2) {
            const uint32_t earlier = __shfl_up_sync(~0u, within, offset);
            if (lane >= offset) within += earlier;
        }
        uint32_t* const warp_sum = reinterpret_cast<uint32_t*>(shared.amax);
        static_assert(sizeof(shared.amax) >= kNumWarps * sizeof(uint32_t));
        if (lane == 31) warp_sum[warp] = within;
        __syncthreads();
        uint32_t before = within - value;
#pragma unroll
        for (uint32_t i = 0; i < kNumWarps - 1; ++i) before += i < warp ? warp_sum[i] : 0u;
        return before;
    }
};
