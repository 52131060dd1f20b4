// What sm90_stream.cu is given, and what a CTA of it keeps in shared memory.
#pragma once
#include "activation.cuh"
#include "mbarrier.cuh"
#include "numeric.cuh"
#include "stream_constants.cuh"
#include "stream_schedule.cuh"
#include "stream_weights.cuh"

// At most kMaxRows rows of one expert: entries first_row.. of sorted_choices.
struct alignas(16) Tile {
    int32_t expert;
    uint32_t first_row;
    uint32_t num_rows;
    uint32_t unused;
};

struct Params {
    Weights weights;
    const uint8_t* x_q;
    const float* x_scale;
    const float* w13_scale;
    const float* w2_scale;
    const int32_t* sorted_choices;  // unless kOrdersChoices
    const int32_t* topk_ids;        // kOrdersChoices: [num_choices]
    const uint4* expert_choices;    // else, if kListsTiles: [kMostExperts]: how many each has
    const Tile* tiles;              // unless kListsTiles: [1 + tile_capacity]; the first entry is {number of tiles, ...}
    const float* topk_weights;
    float4* sums;  // kMaxParts * kNumChunks rows of kRowVectors for each choice; unless kFlagged ones in every bit
    // Ones in every bit at first, written by the kernel before, which also zeroes `out`:
    uint32_t* ticket_counter;
    uint32_t* sums_written;     // kFlagged: [jobs][kNumMathWarps][kFlaggedParts]
    uint4* activations;         // e4m3 [choices, I], in the order of sorted_choices
    float* activation_scales;   // [choices, kNumChunks], times the token's weight in `out`
    uint16_t* out;  // deterministic: [choices, H], written and not added to
    ActivationForm form;
    float routed_scaling_factor;
    uint32_t top_k;
    uint32_t tile_capacity;
    uint32_t num_experts;
    uint32_t num_choices;
    uint32_t inputs_from_previous_kernel;  // tokens, choices or tiles are written by the kernels just before
};

static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

// A Tile in half of its bytes.
struct alignas(8) PackedTile {
    uint32_t first_row;
    uint16_t expert, num_rows;
};

struct SharedStorage {
    alignas(1024) uint8_t weights[kNumStages][2][kHalfBytes];
    alignas(1024) uint8_t tokens[kNumTokenStages][kMaxRows * kTileK];
    alignas(1024) uint8_t activation[kNumBuffers][kNumChunks][kMaxRows * kGroupSize];
    alignas(16) uint8_t outgoing[kMaxRows * kGroupSize];
    float outgoing_scale[kMaxRows];
    PackedTile tiles[kTableTiles];  // kOrdersChoices: and at its end the choices
    alignas(16) float token_scale[kNumTokenStages][kMaxRows];
    alignas(16) float activation_scale[kNumBuffers][kNumChunks][kMaxRows];  // times the token's weight in `out`
    float row_weight[kNumBuffers][kMaxRows];
    float inverse_scale[kMaxRows];
    int32_t output_row[kNumBuffers][kMaxRows];
    float weight_scale[kNumTokenStages][2];
    float down_scale[kNumBuffers][kNumK * kNumChunks];  // of the columns of a piece
    alignas(8) float amax[4][kNumMathWarps];
    alignas(8) float row_amax[kNumMathWarps][kMaxRows];
    Piece queue[kQueueSize];
    float queue_weight[kQueueSize][kMaxRows];  // topk_weights of the tile's rows, for pieces of the up phase
    int32_t gathered_token[2][kMaxRows];
    uint32_t num_tiles;
    uint64_t full[kNumStages];  // weights
    uint64_t empty[kNumStages];
    uint64_t tokens_full[kNumTokenStages];  // in the up phase tokens and scales
    uint64_t tokens_empty[kNumTokenStages];
    uint64_t queue_full[kQueueSize];
    uint64_t queue_empty[kQueueSize];
    uint64_t activation_full[kNumBuffers];
    uint64_t activation_empty[kNumBuffers];
};

static_assert(sizeof(SharedStorage) <= SMEM_BYTES, "the launcher reserves too little shared memory");

__device__ __forceinline__ Tile tile_at(const Params& p, const SharedStorage& shared, uint32_t index) {
    if (!kListsTiles && index >= kTableTiles) return p.tiles[1 + index];
    const PackedTile tile = shared.tiles[index];
    return {tile.expert, tile.first_row, tile.num_rows, 0};
}

// kOrdersChoices: the choices in the order of the experts.
__device__ __forceinline__ uint16_t* ordered_choices(const Params& p, SharedStorage& shared) {
    return reinterpret_cast<uint16_t*>(shared.tiles + kTableTiles) - p.num_choices;
}

// Entry `row` of the choices in the order of the experts.
__device__ __forceinline__ int32_t sorted_choice(const Params& p, SharedStorage& shared, uint32_t row) {
    return kOrdersChoices ? ordered_choices(p, shared)[row] : p.sorted_choices[row];
}

// The first tiles, by the math threads.
__device__ __forceinline__ void copy_table(const Params& p, SharedStorage& shared) {
    constexpr uint32_t kTilesPerThread = kTableTiles / kNumMathThreads;
    Tile tiles[kTilesPerThread];
#pragma unroll
    for (uint32_t i = 0; i < kTilesPerThread; ++i)
        tiles[i] = p.tiles[1 + min(threadIdx.x + i * kNumMathThreads, p.tile_capacity - 1)];
#pragma unroll
    for (uint32_t i = 0; i < kTilesPerThread; ++i)
        shared.tiles[threadIdx.x + i * kNumMathThreads] = {tiles[i].first_row, static_cast<uint16_t>(tiles[i].expert),
                                                           static_cast<uint16_t>(tiles[i].num_rows)};
}

using Position = RingPosition<kNumStages>;
using TokenPosition = RingPosition<kNumTokenStages>;
using QueuePosition = RingPosition<kQueueSize>;
