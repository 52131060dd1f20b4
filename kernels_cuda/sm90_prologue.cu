// Everything a fused kernel needs before it can start, in one launch: the first CTAs group the choices by expert, the
// others quantise the tokens, zero the output and fill a scratch area with ones. Each part is left out when it has
// nothing to do. Compiled without the first, it takes so few registers and no shared memory that the CTAs of the next
// kernel start beside its own.
//
// Grouping is a counting sort in shared memory, by one CTA for few choices and by clusters for many. In decode, where the
// next kernel waits for it, a choice keeps its rank from the count, and one sum numbers slots and tiles. The CTAs of a
// cluster count a slice of the choices each and read one another's counts. More clusters share nothing: each counts all
// choices and scatters those of some experts, because scattered stores, not counting, are what takes long. Nothing
// outlives the launch.
//
// Quantising divides every value by its group's scale, to the last bit: many quotients are ties between two e4m3 codes.
// The product with the reciprocal, corrected once by its remainder, is the rounded quotient, in three instructions
// (after Markstein, 1990; his theorem asks for a little more than holds here, and so tests/test_sm90_prologue.py goes
// through all pairs of mantissas).
//
// Set by the compiler's command line: GROUPS, whether it groups choices, and PARAMS_BYTES, the size of what the launcher
// passes.
#include "activation.cuh"
#include "cluster.cuh"
#include "numeric.cuh"

constexpr bool kGroups = GROUPS;
constexpr uint32_t kNumThreads = 512;
constexpr uint32_t kNumWarps = kNumThreads / 32;
constexpr uint32_t kLargeCluster = 8;
constexpr uint32_t kExpertsPerThread = 2;
constexpr uint32_t kMaxExperts = kExpertsPerThread * kNumThreads;
constexpr uint32_t kRowStep = 8;          // tiles differ in height by multiples of this
constexpr uint32_t kMaxHeights = 64;      // two for each lane
constexpr uint32_t kChoicesInFlight = 8;  // loads ahead of the first use, per thread
constexpr uint32_t kGroupsInFlight = kGroups ? 2 : 1;
constexpr uint32_t kFewPerThread = 2;     // choices of a small batch

struct Params {
    // group by expert; no routing CTAs: leave out
    const int32_t* topk_ids;  // [num_choices]; an id outside 0..num_experts-1 is not on this rank
    int32_t* sorted_choices;  // [num_choices] in tiles, [capacity] in blocks
    // as tiles of up to max_rows; null: as blocks
    int4* tiles;  // [1 + capacity]: reference.routing.TiledRouting.tiles
    // as blocks of max_rows
    int32_t* expert_ids;              // [capacity / max_rows]
    int32_t* num_tokens_post_padded;  // [1]
    // quantise
    const uint4* x;  // bf16 [num_groups, 128]
    uint2* x_q;      // e4m3 [num_groups, 128]
    float* x_scale;  // [num_groups]
    // fill with zeros, fill with ones
    uint4* out;
    uint4* poison;
    uint64_t num_out_vectors;
    uint64_t num_poison_vectors;
    uint32_t num_groups;
    uint32_t num_choices;
    uint32_t num_experts;
    uint32_t max_rows;
    uint32_t capacity;
    uint32_t cluster_size;
    uint32_t num_routing_ctas;  // whole clusters
    uint32_t power_of_two_scales;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct SharedStorage {
    alignas(8) uint32_t count[kMaxExperts];  // of this CTA's slice; read by the others of the cluster
    uint32_t next_slot[kMaxExperts];         // in sorted_choices, of this CTA's slice
    uint32_t first_slot[kMaxExperts];
    uint32_t cut[kMaxExperts];               // Cut::packed()
    uint32_t first_tile[kMaxExperts];        // of the expert, counted among those of experts with tiles as high
    uint32_t tiles_of_height[kMaxHeights + 1];  // the index is height / kRowStep
    uint32_t warp_total[kNumWarps];
};

// Sum of `value` over this lane and those before it.
__device__ __forceinline__ uint32_t inclusive_sum_of_warp(uint32_t value) {
#pragma unroll
    for (uint32_t offset = 1; offset < 32; offset *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, value, offset);
        if (threadIdx.x % 32 >= offset) value += before;
    }
    return value;
}

// Sum of `value` over the threads before this one; `total` is that over all.
__device__ __forceinline__ uint32_t exclusive_sum(uint32_t value, uint32_t (&warp_total)[kNumWarps], uint32_t& total) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t within = inclusive_sum_of_warp(value);
    if (lane == 31) warp_total[warp] = within;
    __syncthreads();
    const uint32_t warps = inclusive_sum_of_warp(lane < kNumWarps ? warp_total[lane] : 0u);
    total = __shfl_sync(~0u, warps, 31);
    const uint32_t before = __shfl_sync(~0u, warps, (warp + 31) % 32);
    return within - value + (warp > 0 ? before : 0u);
}

// Calls visit(choice, expert) for the choices of this CTA's slice, kChoicesInFlight at a time and kStep apart: `choice`
// is the first of them. `expert` is ~0 past the last choice.
template <uint32_t kClusterSize, typename Visit>
__device__ __forceinline__ void for_each_batch(const Params& p, Visit visit) {
    constexpr uint32_t kStep = kClusterSize * kNumThreads;
    const uint32_t first = blockIdx.x % kClusterSize * kNumThreads + threadIdx.x;
    for (uint32_t choice = first; choice < p.num_choices; choice += kChoicesInFlight * kStep) {
        uint32_t expert[kChoicesInFlight];
#pragma unroll
        for (uint32_t i = 0; i < kChoicesInFlight; ++i)
            expert[i] = choice + i * kStep < p.num_choices ? p.topk_ids[choice + i * kStep] : ~0u;
        visit(choice, expert);
    }
}

template <uint32_t kClusterSize>
__device__ __forceinline__ void count_choices(const Params& p, SharedStorage& shared) {
    for_each_batch<kClusterSize>(p, [&](uint32_t, const uint32_t (&expert)[kChoicesInFlight]) {
#pragma unroll
        for (uint32_t i = 0; i < kChoicesInFlight; ++i)
            if (expert[i] < p.num_experts) atomicAdd(&shared.count[expert[i]], 1u);
    });
}

// Puts the choices with an expert in begin..end-1 into their slots.
template <uint32_t kClusterSize>
__device__ __forceinline__ void scatter_choices(const Params& p, SharedStorage& shared, uint32_t begin, uint32_t end) {
    for_each_batch<kClusterSize>(p, [&](uint32_t choice, const uint32_t (&expert)[kChoicesInFlight]) {
        uint32_t slot[kChoicesInFlight];
#pragma unroll
        for (uint32_t i = 0; i < kChoicesInFlight; ++i)
            if (expert[i] - begin < end - begin) slot[i] = atomicAdd(&shared.next_slot[expert[i]], 1u);
#pragma unroll
        for (uint32_t i = 0; i < kChoicesInFlight; ++i)
            if (expert[i] - begin < end - begin) p.sorted_choices[slot[i]] = choice + i * kClusterSize * kNumThreads;
    });
}

// How many experts have their first slot before `slot`.
__device__ __forceinline__ uint32_t experts_before(const SharedStorage& shared, uint32_t slot) {
    uint32_t before = 0, end = kMaxExperts;
    while (before < end) {
        const uint32_t middle = (before + end) / 2;
        if (shared.first_slot[middle] < slot)
            before = middle + 1;
        else
            end = middle;
    }
    return before;
}

// An expert's rows, cut into tiles of `height` rows, the last of what is left.
struct Cut {
    uint32_t height, num_tiles;

    __device__ __forceinline__ Cut(uint32_t num_rows, uint32_t max_rows) : height(0), num_tiles(0) {
        if (num_rows == 0) return;
        const uint32_t even = ceil_div(num_rows, ceil_div(num_rows, max_rows));
        height = ceil_div(even, kRowStep) * kRowStep;
        num_tiles = ceil_div(num_rows, height);
    }
    __device__ __forceinline__ uint32_t packed() const { return num_tiles << 6 | height / kRowStep; }
    static __device__ __forceinline__ uint32_t tiles_as_high(uint32_t packed, uint32_t height) {
        return packed % kMaxHeights == height ? packed >> 6 : 0u;
    }
};

// For every expert the position of its tiles among those of experts with tiles as high: a warp takes one height, a lane a
// run of experts. Heights are in units of kRowStep; the loops are over an odd number of experts, which keeps lanes on
// different banks.
__device__ __forceinline__ void rank_tiles(const Params& p, SharedStorage& shared) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t run = ceil_div(p.num_experts, 32u) | 1u;
    const uint32_t begin = lane * run, end = min(begin + run, p.num_experts);
    for (uint32_t height = warp + 1; height <= p.max_rows / kRowStep; height += kNumWarps) {
        uint32_t num_tiles = 0;
        for (uint32_t expert = begin; expert < end; ++expert) num_tiles += Cut::tiles_as_high(shared.cut[expert], height);
        const uint32_t sum = inclusive_sum_of_warp(num_tiles);
        if (lane == 31) shared.tiles_of_height[height] = sum;
        if (num_tiles == 0) continue;
        uint32_t tile = sum - num_tiles;
        for (uint32_t expert = begin; expert < end; ++expert) {
            if (const uint32_t own = Cut::tiles_as_high(shared.cut[expert], height)) {
                shared.first_tile[expert] = tile;
                tile += own;
            }
        }
    }
}

// Zeros behind the last tile: kernels read entries before they know how many there are.
__device__ __forceinline__ void write_no_tiles(const Params& p, uint32_t num_tiles) {
    const uint32_t thread = blockIdx.x * kNumThreads + threadIdx.x;
    for (uint32_t index = num_tiles + thread; index < p.capacity; index += p.num_routing_ctas * kNumThreads)
        p.tiles[1 + index] = make_int4(0, 0, 0, 0);
}

// The list of tiles, higher ones first; each routing CTA writes every num_routing_ctas-th tile of an expert.
__device__ __forceinline__ void write_tiles(const Params& p, SharedStorage& shared, uint32_t num_rows,
                                            const uint32_t (&count)[kExpertsPerThread],
                                            const uint32_t (&first_slot)[kExpertsPerThread]) {
    const uint32_t first_expert = kExpertsPerThread * threadIdx.x;
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i)
        shared.cut[first_expert + i] = Cut(count[i], p.max_rows).packed();
    __syncthreads();
    rank_tiles(p, shared);
    __syncthreads();

    const auto tiles_of = [&](uint32_t height) { return height <= p.max_rows / kRowStep ? shared.tiles_of_height[height] : 0u; };
    const uint32_t higher_height = kMaxHeights - 1 - 2 * (threadIdx.x % 32);  // lane 0 has the greatest
    const uint32_t higher_tiles = tiles_of(higher_height);
    const uint32_t num_tiles = higher_tiles + (higher_height > 1 ? tiles_of(higher_height - 1) : 0u);
    const uint32_t sum = inclusive_sum_of_warp(num_tiles);
    if (blockIdx.x == 0 && threadIdx.x == 31) p.tiles[0] = make_int4(sum, num_rows, 0, 0);
    write_no_tiles(p, __shfl_sync(~0u, sum, 31));
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        const uint32_t expert = first_expert + i;
        const Cut cut(count[i], p.max_rows);
        const uint32_t index_of_height = (kMaxHeights - 1 - cut.height / kRowStep) % kMaxHeights;
        uint32_t before = __shfl_sync(~0u, sum - num_tiles, index_of_height / 2);
        const uint32_t higher = __shfl_sync(~0u, higher_tiles, index_of_height / 2);
        if (index_of_height % 2 == 1) before += higher;
        int4* const tiles = p.tiles + 1 + before + (cut.num_tiles > 0 ? shared.first_tile[expert] : 0u);
        for (uint32_t index = blockIdx.x; index < cut.num_tiles; index += p.num_routing_ctas) {
            const uint32_t start = index * cut.height;
            tiles[index] = make_int4(expert, first_slot[i] + start, min(cut.height, count[i] - start), cut.num_tiles);
        }
    }
}

// The experts of all blocks, and what stands where there is no choice.
__device__ __forceinline__ void write_blocks(const Params& p, uint32_t total,
                                             const uint32_t (&count)[kExpertsPerThread],
                                             const uint32_t (&first_slot)[kExpertsPerThread]) {
    const uint32_t block_m = p.max_rows, num_ctas = p.num_routing_ctas;
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        const uint32_t num_blocks = ceil_div(count[i], block_m), first_block = first_slot[i] / block_m;
        for (uint32_t block = blockIdx.x; block < num_blocks; block += num_ctas)
            p.expert_ids[first_block + block] = kExpertsPerThread * threadIdx.x + i;
        for (uint32_t row = count[i] + blockIdx.x; row < num_blocks * block_m; row += num_ctas)
            p.sorted_choices[first_slot[i] + row] = p.num_choices;
    }
    const uint32_t thread = blockIdx.x * kNumThreads + threadIdx.x;
    for (uint32_t slot = total + thread; slot < p.capacity; slot += num_ctas * kNumThreads)
        p.sorted_choices[slot] = p.num_choices;
    for (uint32_t block = total / block_m + thread; block < p.capacity / block_m; block += num_ctas * kNumThreads)
        p.expert_ids[block] = -1;
    if (thread == 0) *p.num_tokens_post_padded = total;
}

template <uint32_t kClusterSize>
__device__ __forceinline__ void route(const Params& p, SharedStorage& shared) {
    const uint32_t first_expert = kExpertsPerThread * threadIdx.x, rank = blockIdx.x % kClusterSize;
    *reinterpret_cast<uint2*>(&shared.count[first_expert]) = make_uint2(0, 0);
    __syncthreads();
    count_choices<kClusterSize>(p, shared);
    uint32_t count[kExpertsPerThread] = {}, earlier[kExpertsPerThread] = {};  // of all slices, of those before this
    if constexpr (kClusterSize == 1) {
        __syncthreads();
        count[0] = shared.count[first_expert];
        count[1] = shared.count[first_expert + 1];
    } else {
        cluster::sync();
        if (first_expert < p.num_experts) {
            uint2 slice[kClusterSize];
#pragma unroll
            for (uint32_t cta = 0; cta < kClusterSize; ++cta)
                slice[cta] = cluster::load(cluster::map_address(shared_address(&shared.count[first_expert]), cta));
#pragma unroll
            for (uint32_t cta = 0; cta < kClusterSize; ++cta) {
                if (cta == rank) earlier[0] = count[0], earlier[1] = count[1];
                count[0] += slice[cta].x, count[1] += slice[cta].y;
            }
        }
    }

    const bool in_tiles = p.tiles != nullptr;
    uint32_t room[kExpertsPerThread], first_slot[kExpertsPerThread], total;
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i)
        room[i] = in_tiles ? count[i] : ceil_div(count[i], p.max_rows) * p.max_rows;
    first_slot[0] = exclusive_sum(room[0] + room[1], shared.warp_total, total);
    first_slot[1] = first_slot[0] + room[0];
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        shared.first_slot[first_expert + i] = first_slot[i];
        shared.next_slot[first_expert + i] = first_slot[i] + earlier[i];
    }
    __syncthreads();

    uint32_t begin = 0, end = p.num_experts;  // the experts that this cluster scatters
    if (p.num_routing_ctas > kClusterSize) {
        const uint32_t cluster = blockIdx.x / kClusterSize, num_clusters = p.num_routing_ctas / kClusterSize;
        begin = experts_before(shared, total * cluster / num_clusters);
        if (cluster + 1 < num_clusters) end = experts_before(shared, total * (cluster + 1) / num_clusters);
    }
    scatter_choices<kClusterSize>(p, shared, begin, end);
    if (in_tiles)
        write_tiles(p, shared, total, count, first_slot);
    else
        write_blocks(p, total, count, first_slot);
    if constexpr (kClusterSize > 1) cluster::sync();  // the others may still be reading this CTA's counts
}

// One CTA, for few choices in tiles of one height or two: a choice keeps its rank among its expert's from the count, and tiles
// are numbered by the same sum as slots, those of more than kRowStep rows before the others.
template <uint32_t kTileRows>
__device__ __forceinline__ void route_few(const Params& p, SharedStorage& shared) {
    const uint32_t first_expert = kExpertsPerThread * threadIdx.x;
    uint32_t expert[kFewPerThread], rank[kFewPerThread];
#pragma unroll
    for (uint32_t i = 0; i < kFewPerThread; ++i) {
        const uint32_t choice = i * kNumThreads + threadIdx.x;
        expert[i] = choice < p.num_choices ? p.topk_ids[choice] : ~0u;
    }
    *reinterpret_cast<uint2*>(&shared.count[first_expert]) = make_uint2(0, 0);
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kFewPerThread; ++i)
        rank[i] = expert[i] < p.num_experts ? atomicAdd(&shared.count[expert[i]], 1u) : 0u;
    __syncthreads();

    static_assert(kTileRows == kRowStep || kTileRows == 2 * kRowStep);
    // Of slots, of high tiles, of low tiles: each sum in its bits of one word.
    constexpr uint32_t kHigh = 11, kLow = 21, kSlotMask = (1 << kHigh) - 1, kHighMask = (1 << (kLow - kHigh)) - 1;
    static_assert(kFewPerThread * kNumThreads <= kSlotMask && kFewPerThread * kNumThreads / kRowStep <= kHighMask);
    uint32_t count[kExpertsPerThread], packed[kExpertsPerThread], total;
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        count[i] = shared.count[first_expert + i];
        const bool is_high = kTileRows > kRowStep && count[i] > kRowStep;
        packed[i] = count[i] | ceil_div(count[i], kTileRows) << (is_high ? kHigh : kLow);
    }
    uint32_t before = exclusive_sum(packed[0] + packed[1], shared.warp_total, total);
    const auto high_of = [](uint32_t sums) { return kTileRows > kRowStep ? sums >> kHigh & kHighMask : 0u; };
    const uint32_t num_high = high_of(total);
    if (threadIdx.x == 0) p.tiles[0] = make_int4(num_high + (total >> kLow), total & kSlotMask, 0, 0);
    write_no_tiles(p, num_high + (total >> kLow));
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        const uint32_t first_slot = before & kSlotMask, own_high = high_of(packed[i]);
        const uint32_t num_tiles = own_high + (packed[i] >> kLow);
        int4* const tiles = p.tiles + 1 + (own_high > 0 ? high_of(before) : num_high + (before >> kLow));
        shared.first_slot[first_expert + i] = first_slot;
#pragma unroll 1
        for (uint32_t index = 0; index < num_tiles; ++index) {
            const uint32_t start = index * kTileRows;
            tiles[index] = make_int4(first_expert + i, first_slot + start, min(kTileRows, count[i] - start), num_tiles);
        }
        before += packed[i];
    }
    __syncthreads();
#pragma unroll
    for (uint32_t i = 0; i < kFewPerThread; ++i) {
        const uint32_t choice = i * kNumThreads + threadIdx.x;
        if (expert[i] < p.num_experts) p.sorted_choices[shared.first_slot[expert[i]] + rank[i]] = choice;
    }
}

// value / scale, rounded; -0 stays -0.
__device__ __forceinline__ float quotient(float value, float scale, float reciprocal) {
    const float product = value * reciprocal;
    return fmaf(fmaf(product, scale, -value), -reciprocal, product);
}

// A group of 128 values by kLanes lanes, each with vectors `lane` and `lane + kLanes` of 8 values.
constexpr uint32_t kLanes = 8, kVectorsPerGroup = 16;

__device__ __forceinline__ void quantise_group(const Params& p, uint32_t group, const uint4 (&values)[2]) {
    const uint32_t lane = threadIdx.x % kLanes;
    constexpr uint32_t kMagnitudes = 0x7fff7fff;  // bf16 without the sign compares as an integer
    uint32_t most = 0;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        most = __vmaxu2(most, __vmaxu2(values[i].x & kMagnitudes, values[i].y & kMagnitudes));
        most = __vmaxu2(most, __vmaxu2(values[i].z & kMagnitudes, values[i].w & kMagnitudes));
    }
#pragma unroll
    for (uint32_t offset = kLanes / 2; offset > 0; offset /= 2)
        most = __vmaxu2(most, __shfl_xor_sync(0xffu << (threadIdx.x & 24), most, offset));
    const float largest = __uint_as_float(max(most << 16, most & 0xffff0000u));
    const float amax = largest < kSmallestAmax ? kSmallestAmax : largest;  // a NaN stays one
    float scale = __fdiv_rn(amax, kE4M3Max);
    if (p.power_of_two_scales) scale = ActivationForm::round_up_to_power_of_two(scale);

    const float reciprocal = __frcp_rn(scale);
    const auto encode = [&](uint32_t two) -> uint32_t {
        return pack_e4m3x2(quotient(bf16_low(two), scale, reciprocal), quotient(bf16_high(two), scale, reciprocal));
    };
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t low = encode(values[i].x) | encode(values[i].y) << 16;
        const uint32_t high = encode(values[i].z) | encode(values[i].w) << 16;
        p.x_q[uint64_t{group} * kVectorsPerGroup + i * kLanes + lane] = make_uint2(low, high);
    }
    if (lane == 0) p.x_scale[group] = scale;
}

__device__ __forceinline__ void quantise(const Params& p, uint32_t cta, uint32_t num_ctas) {
    const uint32_t step = num_ctas * (kNumThreads / kLanes);
    const uint32_t first = cta * (kNumThreads / kLanes) + threadIdx.x / kLanes;
    for (uint32_t base = first; base < p.num_groups; base += kGroupsInFlight * step) {
        uint4 values[kGroupsInFlight][2];
#pragma unroll
        for (uint32_t i = 0; i < kGroupsInFlight; ++i) {
            const uint4* const vectors = p.x + uint64_t{base + i * step} * kVectorsPerGroup + threadIdx.x % kLanes;
            if (base + i * step >= p.num_groups) continue;
            values[i][0] = __ldcs(vectors);  // read once: first to leave L2
            values[i][1] = __ldcs(vectors + kLanes);
        }
#pragma unroll
        for (uint32_t i = 0; i < kGroupsInFlight; ++i)
            if (base + i * step < p.num_groups) quantise_group(p, base + i * step, values[i]);
    }
}

__device__ __forceinline__ void fill(uint4* area, uint64_t num_vectors, uint32_t word, uint32_t cta,
                                     uint32_t num_ctas) {
    const uint64_t step = num_ctas * kNumThreads;
#pragma unroll 4
    for (uint64_t vector = cta * kNumThreads + threadIdx.x; vector < num_vectors; vector += step)
        area[vector] = make_uint4(word, word, word, word);
}

// By all routing CTAs.
__device__ __forceinline__ void group_choices(const Params& p, SharedStorage& shared) {
    const bool is_few = p.tiles != nullptr && p.num_choices <= kFewPerThread * kNumThreads;
    if (is_few && p.max_rows == kRowStep)
        route_few<kRowStep>(p, shared);
    else if (is_few && p.max_rows == 2 * kRowStep)
        route_few<2 * kRowStep>(p, shared);
    else if (p.cluster_size == 1)
        route<1>(p, shared);
    else
        route<kLargeCluster>(p, shared);
}

extern "C" __global__ void __launch_bounds__(kNumThreads, kGroups ? 2 : 4) sm90_prologue(const __grid_constant__ Params p) {
    grid_dependency::launch_dependents();
    if constexpr (kGroups) {
        __shared__ SharedStorage shared;
        if (blockIdx.x < p.num_routing_ctas) return group_choices(p, shared);
    }
    const uint32_t cta = blockIdx.x - p.num_routing_ctas, num_ctas = gridDim.x - p.num_routing_ctas;
    fill(p.out, p.num_out_vectors, 0u, cta, num_ctas);
    fill(p.poison, p.num_poison_vectors, ~0u, cta, num_ctas);
    quantise(p, kGroups ? cta : num_ctas - 1 - cta, num_ctas);  // of few CTAs the last have least to fill
}
