// What the command line of sm90_fused.cu sets, what the kernel is given and a CTA keeps in shared memory, and which items are
// a CTA's own.
#pragma once
#include "activation.cuh"
#include "mbarrier.cuh"
#include "numeric.cuh"
#include "types.cuh"

constexpr uint32_t kBlockM = BLOCK_M;
constexpr uint32_t kClusterSize = CLUSTER_SIZE;
constexpr uint32_t kNumStages = NUM_STAGES;

constexpr uint32_t kTileK = 128;                                       // bytes of K in a tile: one swizzle row
constexpr uint32_t kTileRows = 128;                                    // rows in each half of a tile
constexpr uint32_t kHalfBytes = kTileRows * kTileK;
constexpr uint32_t kWarpgroupBytes = 64 * kTileK;                      // 64 rows: the M of one wgmma
constexpr uint32_t kGroupColumns = 2 * kTileRows;                      // columns of `out` that one w2 tile gives
constexpr uint32_t kNumMathThreads = 256;
constexpr uint32_t kNumMathWarps = kNumMathThreads / 32;
constexpr uint32_t kNumGatherThreads = 96;
constexpr uint32_t kNumThreads = 384;
constexpr uint32_t kNumPeers = kClusterSize - 1;
constexpr uint32_t kMathBarrier = 1;
constexpr uint32_t kGatherBarrier = 2;

// 64 K registers: 128 producer threads and 256 math threads.
constexpr uint32_t kProducerRegisters = 72;
constexpr uint32_t kMathRegisters = 216;

static_assert(kBlockM % 8 == 0 && kBlockM >= 8 && kBlockM <= 128, "wgmma takes 8..128 tokens in steps of 8");
static_assert(kClusterSize == 1 || kClusterSize == 2 || kClusterSize == 4 || kClusterSize == 8, "portable cluster sizes");

struct Params {
    TensorMap w13;  // [E * 2I, H], boxes of 128 rows x 128 bytes; interleaved: [E, I/8, 2, 8, H], boxes of 16 x 1 x 8 rows
    TensorMap w2;   // [E * H, I], boxes of 128 rows in the order that project_down() says
    const uint8_t* x_q;
    const float* x_scale;
    const float* w13_scale;
    const float* w2_scale;
    const int32_t* sorted_token_ids;
    const int32_t* expert_ids;
    const int32_t* num_tokens_post_padded;
    const float* topk_weights;
    uint16_t* out;
    ActivationForm form;
    float routed_scaling_factor;
    uint32_t num_choices;  // M * top_k; larger ids are padding
    uint32_t top_k;
    uint32_t hidden_size;
    uint32_t intermediate_size;
    uint32_t inputs_from_previous_kernel;  // tokens and routing are written by the kernel just before in the stream
    uint32_t interleaved;  // gate and up rows of w13 alternate by 8, of w13_scale by 1; else all gate rows come first
};

static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct OutputRow {
    float coefficient;  // activation scale * topk_weight * routed_scaling_factor
    int32_t token;      // -1: padding
};

struct SharedStorage {
    alignas(1024) uint8_t weights[kNumStages][2][kHalfBytes];
    alignas(1024) uint8_t tokens[kNumStages][kBlockM * kTileK];
    alignas(1024) uint8_t activation[kBlockM * kGroupSize];
    alignas(16) float4 exchange[kNumPeers > 0 ? kNumPeers : 1][kBlockM / 4][kNumPeers > 0 ? kNumMathThreads : 1];
    alignas(16) float token_scale[kNumStages][kBlockM];
    alignas(16) OutputRow output_row[kBlockM];
    int32_t gathered_token[2][kBlockM];
    float inverse_scale[kBlockM];
    float amax[kNumMathWarps][kBlockM];
    float weight_scale[kNumStages][2];
    uint64_t full[kNumStages];
    uint64_t empty[kNumStages];
    uint64_t exchange_full;
    uint64_t exchange_empty;
};

static_assert(sizeof(SharedStorage) <= SMEM_BYTES, "the launcher reserves too little shared memory");

// The items of this cluster and the part of each that is this CTA's.
struct Schedule {
    uint32_t first_item, item_step, num_items, num_chunks;
    uint32_t first_k, last_k;            // tiles of K of the up projection
    uint32_t first_group, num_groups;    // groups of 256 columns of the down projection; this CTA takes every kClusterSize-th

    __device__ __forceinline__ Schedule(const Params& p, uint32_t rank) {
        num_chunks = p.intermediate_size / kGroupSize;
        num_items = static_cast<uint32_t>(*p.num_tokens_post_padded) / kBlockM * num_chunks;
        first_item = blockIdx.x / kClusterSize;
        item_step = gridDim.x / kClusterSize;
        const uint32_t num_k = p.hidden_size / kTileK;
        first_k = num_k * rank / kClusterSize;
        last_k = num_k * (rank + 1) / kClusterSize;
        first_group = rank;
        num_groups = ceil_div(p.hidden_size, kGroupColumns);
    }
};

using Position = RingPosition<kNumStages>;
