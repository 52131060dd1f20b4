// What the command line of sm90_stream.cu sets, and the sizes that follow from it.
#pragma once
#include "types.cuh"

constexpr uint32_t kMaxRows = MAX_ROWS;
constexpr uint32_t kNumChunks = NUM_CHUNKS;
constexpr uint32_t kMaxParts = MAX_PARTS;
constexpr uint32_t kHiddenSize = HIDDEN_SIZE;
constexpr uint32_t kNumStages = NUM_STAGES;
constexpr uint32_t kNumInFlight = NUM_IN_FLIGHT;
constexpr uint32_t kNumCtas = NUM_CTAS;
constexpr bool kDeterministic = DETERMINISTIC;
constexpr bool kListsTiles = LISTS_TILES;
constexpr bool kOrdersChoices = ORDERS_CHOICES;
constexpr bool kInPlace = IN_PLACE;

constexpr uint32_t kTileK = 128;                                       // bytes of K in a stage: one swizzle row
constexpr uint32_t kTileRows = 128;                                    // weight rows in each half of a stage
constexpr uint32_t kHalfBytes = kTileRows * kTileK;
constexpr uint32_t kStageBytes = 2 * kHalfBytes;
constexpr uint32_t kWarpgroupBytes = 64 * kTileK;                      // 64 rows: the M of one wgmma
constexpr uint32_t kGroupColumns = 2 * kTileRows;                      // columns of `out` in a unit of the down phase
constexpr uint32_t kNumK = kHiddenSize / kTileK;                       // units of a job
constexpr uint32_t kNumGroups = ceil_div(kHiddenSize, kGroupColumns);  // units of a tile in the down phase
constexpr uint32_t kQueueSize = 8;                                     // pieces between the taker of tickets and the others
constexpr uint32_t kRowVectors = 64;                                   // float4 in a row of partial sums
constexpr uint32_t kNumMathThreads = 256;
constexpr uint32_t kNumMathWarps = kNumMathThreads / 32;
constexpr uint32_t kNumGatherThreads = 96;
constexpr uint32_t kNumGatherWarps = kNumGatherThreads / 32;
constexpr uint32_t kNumThreads = 384;
constexpr uint32_t kTableTiles = TABLE_TILES;                          // tiles kept in shared memory
constexpr uint32_t kFlaggedParts = 4;
constexpr bool kFlagged = kMaxParts == kFlaggedParts;  // sums are followed by a flag; else they are their own signal
constexpr bool kFuses = kFlagged && !kDeterministic;   // some tiles pass both phases in one CTA, where there are many
constexpr uint32_t kMathBarrier = 1;
constexpr uint32_t kGatherBarrier = 2;

// Up to 32 rows 128 registers a thread do, which leaves room on the SM for the kernel before, so that this one need not
// wait for it to leave. Of these, or of all 64 K, the 128 producer threads leave most to the 256 math threads.
constexpr bool kLeavesRoom = kMaxRows <= 32;
constexpr uint32_t kThreadsToFit = kLeavesRoom ? 512 : kNumThreads;
constexpr uint32_t kProducerRegisters = kLeavesRoom ? 64 : 72;
constexpr uint32_t kMathRegisters = kLeavesRoom ? 160 : 216;

// Activations of pieces of the down phase. Of tiles with few of them a piece is as short as one trip to L2, so that a gather
// warp has pieces of its own; those with more take all of the warps.
constexpr uint32_t kNumBuffers = NUM_BUFFERS;
constexpr uint32_t kMostGroupsOfWarp = 32;  // of 128 activations: two trips

// More tokens of tall tiles would take the room of a stage of weights.
constexpr uint32_t kMostTokenStages = kMaxRows <= 32 ? kNumStages : kMaxRows <= 64 ? 4 : 3;
constexpr uint32_t kNumTokenStages = kNumStages < kMostTokenStages ? kNumStages : kMostTokenStages;

static_assert(kTableTiles % kNumMathThreads == 0, "each thread copies as many");
static_assert(kMaxParts >= 4, "jobs are cut into 4 or more parts");
static_assert(kListsTiles || !kOrdersChoices, "who orders the choices lists the tiles");
static_assert(!kOrdersChoices || kNumInFlight < kNumStages, "meanwhile the last stage holds counts");
static_assert(kNumBuffers <= kNumGatherWarps, "a warp has one buffer");
static_assert(kMaxRows % (kMaxRows <= 32 ? 8 : 16) == 0 && kMaxRows <= 96, "a warpgroup has whole blocks of 8 rows");
