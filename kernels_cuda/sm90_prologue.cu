// Everything a fused kernel needs before it can start, in one launch: the first CTAs group the choices by expert, the
// others quantise the tokens, zero the output and fill a scratch area with ones. Each part is left out when it has
// nothing to do. Compiled without the first, it takes so few registers and no shared memory that the CTAs of the next
// kernel start beside its own.
//
// Grouping is a counting sort in shared memory, by one CTA for few choices and by clusters for many. The CTAs of a cluster
// count a slice of the choices each and read one another's counts. More clusters share nothing: each counts all choices
// and scatters those of some experts, because scattered stores, not counting, are what takes long. Nothing outlives the
// launch.
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
#include "scan.cuh"
#include "tiling.cuh"

constexpr bool kGroups = GROUPS;
constexpr uint32_t kNumThreads = 512;
constexpr uint32_t kNumWarps = kNumThreads / 32;
constexpr uint32_t kLargeCluster = 8;
constexpr uint32_t kExpertsPerThread = 2;
constexpr uint32_t kMaxExperts = kExpertsPerThread * kNumThreads;
constexpr uint32_t kChoicesInFlight = 8;  // loads ahead of the first use, per thread
constexpr uint32_t kGroupsInFlight = kGroups ? 2 : 1;

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
    uint32_t warp_total[kNumWarps];
    uint64_t warp_tiles[kNumWarps];
};

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

// Zeros behind the last tile: kernels read entries before they know how many there are.
__device__ __forceinline__ void write_no_tiles(const Params& p, uint32_t num_tiles) {
    const uint32_t thread = blockIdx.x * kNumThreads + threadIdx.x;
    for (uint32_t index = num_tiles + thread; index < p.capacity; index += p.num_routing_ctas * kNumThreads)
        p.tiles[1 + index] = make_int4(0, 0, 0, 0);
}

// The list of tiles; each routing CTA writes every num_routing_ctas-th tile of an expert.
__device__ __forceinline__ void write_tiles(const Params& p, SharedStorage& shared, uint32_t num_rows,
                                            const uint32_t (&count)[kExpertsPerThread],
                                            const uint32_t (&first_slot)[kExpertsPerThread]) {
    using Tiles = TilesOfClasses<21>;
    const auto tiling_of = [&](uint32_t i) {
        return Tiling(count[i], p.max_rows, [](uint32_t dividend, uint32_t divisor) { return dividend / divisor; });
    };
    const Tiling tiling[kExpertsPerThread] = {tiling_of(0), tiling_of(1)};
    uint64_t total;
    uint64_t before = exclusive_sum<kNumWarps>(Tiles::of(tiling[0]) + Tiles::of(tiling[1]), shared.warp_tiles, total);
    const uint32_t num_tiles = Tiles::all(total);
    if (blockIdx.x == 0 && threadIdx.x == 0) p.tiles[0] = make_int4(num_tiles, num_rows, 0, 0);
    write_no_tiles(p, num_tiles);
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i) {
        const uint32_t expert = kExpertsPerThread * threadIdx.x + i, height = tiling[i].height;
        int4* const tiles = p.tiles + 1 + Tiles::place(before, total, tiling[i].height_class);
        for (uint32_t index = blockIdx.x; index < tiling[i].num_tiles; index += p.num_routing_ctas) {
            const uint32_t start = index * height;
            tiles[index] = make_int4(expert, first_slot[i] + start, min(height, count[i] - start), tiling[i].num_tiles);
        }
        before += Tiles::of(tiling[i]);
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
        __syncwarp();
        cluster::arrive();
    }

    const bool in_tiles = p.tiles != nullptr;
    uint32_t room[kExpertsPerThread], first_slot[kExpertsPerThread], total;
#pragma unroll
    for (uint32_t i = 0; i < kExpertsPerThread; ++i)
        room[i] = in_tiles ? count[i] : ceil_div(count[i], p.max_rows) * p.max_rows;
    first_slot[0] = exclusive_sum<kNumWarps>(room[0] + room[1], shared.warp_total, total);
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
    if constexpr (kClusterSize > 1) cluster::wait();  // until the others have read this CTA's counts
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
    if (p.cluster_size == 1)
        route<1>(p, shared);
    else
        route<kLargeCluster>(p, shared);
}

// By all other CTAs.
__device__ __forceinline__ void prepare(const Params& p) {
    const uint32_t cta = blockIdx.x - p.num_routing_ctas, num_ctas = gridDim.x - p.num_routing_ctas;
    fill(p.out, p.num_out_vectors, 0u, cta, num_ctas);
    fill(p.poison, p.num_poison_vectors, ~0u, cta, num_ctas);
    quantise(p, kGroups ? cta : num_ctas - 1 - cta, num_ctas);  // of few CTAs the last have least to fill
}

extern "C" __global__ void __launch_bounds__(kNumThreads, kGroups ? 2 : 4) sm90_prologue(const __grid_constant__ Params p) {
    grid_dependency::launch_dependents();
    if constexpr (kGroups) {
        __shared__ SharedStorage shared;
        if (blockIdx.x < p.num_routing_ctas)
            group_choices(p, shared);
        else
            prepare(p);
    } else {
        prepare(p);
    }
    grid_dependency::wait();  // what this may run beside is done when it is
}
