// What sm90_prefill_down.cu is given, the sizes that follow from it, and what a CTA of it keeps in shared memory.
#pragma once
#include "mbarrier.cuh"
#include "types.cuh"

constexpr uint32_t kHiddenSize = HIDDEN_SIZE;
constexpr uint32_t kNumChunks = NUM_CHUNKS;
constexpr uint32_t kNumWarpgroups = NUM_WARPGROUPS;
constexpr uint32_t kBlockN = BLOCK_N;
constexpr bool kDeterministic = DETERMINISTIC;
constexpr bool kStoresLast = STORES_LAST;

constexpr uint32_t kTileK = 128;                      // bytes of K in a tile: one swizzle row
constexpr uint32_t kQuarter = 128;                    // columns that one slot of weights gives
constexpr uint32_t kNumQuarters = kHiddenSize / kQuarter;
constexpr uint32_t kQuarters = SLAB_COLUMNS / kQuarter;   // of a slab
constexpr uint32_t kNumSlabs = kNumQuarters / kQuarters;
constexpr uint32_t kSlabsZeroedBefore = DETERMINISTIC ? kNumSlabs : ZEROED_COLUMNS / SLAB_COLUMNS;
constexpr uint32_t kBlocksAhead = 18;  // of each CTA, between one of the last expert and those that wait for it
constexpr uint32_t kStepsPerQuarter = kQuarter / kBlockN;
constexpr uint32_t kBlockRows = 64;                   // the M of a wgmma
constexpr uint32_t kQuarterBytes = kQuarter * kTileK; // of one chunk
constexpr uint32_t kBlockBytes = kBlockRows * kTileK; // of one chunk
constexpr uint32_t kNumSlots = 8 / kNumChunks;
constexpr uint32_t kNumBlocks = (kNumChunks == 1 ? 9 : 6) / kNumWarpgroups * kNumWarpgroups;  // a place has one taker
constexpr uint32_t kWarpsOfBlock = 4;
constexpr uint32_t kNumMathThreads = kNumWarpgroups * 128;
constexpr uint32_t kNumThreads = kNumMathThreads + 128;

// 64 K registers.
constexpr uint32_t kProducerRegisters = 56;
constexpr uint32_t kMathRegisters = kNumWarpgroups == 2 ? 224 : 152;

static_assert(kNumChunks == 1 || kNumChunks == 2, "the weights of a slab stay in shared memory");
static_assert(kQuarters <= 4 && kNumQuarters % kQuarters == 0, "slabs are of up to 4 quarters, and all alike");
static_assert(kNumBlocks % kNumWarpgroups == 0, "who skips a phase of a barrier may take a later one for it");
static_assert(kNumBlocks >= 2 * kNumWarpgroups, "the first blocks of a job are loaded before the rest of its weights");
static_assert(!kDeterministic || !kStoresLast, "without additions there is nothing to store first");

struct Params {
    TensorMap w2;  // [E * H, I], boxes of 128 rows: of each 32, column 8 c + 2 j + b is row 8 j + 2 c + b
    const uint8_t* h;
    const float* h_scale;
    const float* w2_scale;
    const uint32_t* destination;
    const int4* jobs;  // see prefill_jobs.cuh
    const uint32_t* jobs_listed;  // 1 when they are, which is long before the kernel before ends
    uint32_t* ticket_counter;  // 0 at the start
    uint32_t* zeroed;  // [slabs]: CTAs that have zeroed their part, 0 at the start
    // kStoresLast:
    uint32_t* stored;  // [slabs]: warps that have stored their part of a block, 0 at the start
    uint32_t* looked;  // 0 at the start: CTAs that have looked at their tokens; whether one has the last expert more than once
    const int32_t* topk_ids;
    uint16_t* out;
    uint32_t num_h_rows;
    uint32_t num_tokens;
    uint32_t top_k;
    uint32_t num_experts;
    uint8_t padding[16];  // alignment
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

// How often a token has the last expert.
__device__ __forceinline__ uint32_t times_of_last(const Params& p, uint32_t token) {
    const int32_t* const ids = p.topk_ids + static_cast<uint64_t>(token) * p.top_k;
    uint32_t times = 0;
#pragma unroll 4
    for (uint32_t i = 0; i < p.top_k; ++i) times += ids[i] == static_cast<int32_t>(p.num_experts - 1);
    return times;
}

// By how many slabs jobs of the last expert are ahead of the others.
__device__ __forceinline__ uint32_t slabs_ahead(uint32_t num_blocks) {
    const uint32_t slabs = ceil_div(kBlocksAhead * gridDim.x, max(num_blocks, 1u));
    return kStoresLast ? min(slabs, kNumSlabs) : kSlabsZeroedBefore;
}

// What becomes of the rows of a block in `out`.
enum class Giving : uint32_t { kAdd, kStore, kStoreWhereOnce };  // where the token has the expert once

struct Block {
    static constexpr uint32_t kEnd = ~0u;

    uint32_t first_row;
    uint32_t num_rows;  // 0: there is only `last` to be done
    uint32_t first_quarter;
    uint32_t expert;
    uint32_t first_slot;  // counted from the start of the kernel
    uint32_t last;        // the warpgroup's last block with these weights
    Giving giving;
};

struct SharedStorage {
    alignas(1024) uint8_t weights[kNumSlots][kNumChunks][kQuarterBytes];
    alignas(1024) uint8_t rows[kNumBlocks][kNumChunks][kBlockBytes];
    Block block[kNumBlocks];
    uint64_t weights_full[kNumSlots];
    uint64_t weights_empty[kNumSlots];
    uint64_t block_full[kNumBlocks];
    uint64_t block_empty[kNumBlocks];
    uint32_t begun_slab;  // the last that the loader has come to, jobs ahead of it aside; kNumSlabs at its end
};
static_assert(sizeof(SharedStorage) <= SMEM_BYTES, "the launcher reserves too little shared memory");
