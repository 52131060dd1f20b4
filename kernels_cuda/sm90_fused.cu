// The whole layer in one kernel: out += factor * topk_weight * W2 . Q(SwiGLU(W13 . x)), from quantised tokens and
// aligned routing. `out` is zero at the start.
//
// One work item is a block of kBlockM tokens of one expert and one 128-wide chunk of the intermediate size. Its 128 gate
// and 128 up rows of w13 pass through shared memory once, then its 128 columns of w2; the chunk's activations never
// leave the SM. Weights are the M operand of wgmma and tokens the N operand, so a block of 8 tokens wastes nothing.
//
// A persistent cluster takes items in turn. Its CTAs share one item: each sums a part of K for the up projection, the
// partial sums meet in distributed shared memory, then each takes a part of the columns of `out`. Weight loads run
// ahead through a ring of kNumStages tiles of 32 KB, across the phases and across items, for they depend on nothing
// that is computed. Gate and up rows may lie interleaved: the copy engine sorts them.
//
// Warps 0-7 (two warpgroups) multiply; warp 8 loads weights; warps 9-11 gather tokens and scales.
//
// Set by the compiler's command line: BLOCK_M (8..128, step 8), CLUSTER_SIZE (1, 2, 4, 8), NUM_STAGES, and what the
// launcher passes: SMEM_BYTES of shared memory and PARAMS_BYTES of parameters.
#include "activation.cuh"
#include "cluster.cuh"
#include "copy.cuh"
#include "mbarrier.cuh"
#include "numeric.cuh"
#include "promote.cuh"
#include "registers.cuh"
#include "wgmma.cuh"

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
    TensorMap w2;   // [E * H, I], boxes of 128 rows in the order of `down_columns` below
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

// One thread: the weight tiles of every item, gate and up halves of each K tile, then the groups of w2.
__device__ __forceinline__ void load_weights(const Params& p, SharedStorage& shared, const Schedule& schedule) {
    Position ring;
    for (uint32_t item = schedule.first_item; item < schedule.num_items; item += schedule.item_step) {
        const int32_t expert = p.expert_ids[item / schedule.num_chunks];
        if (expert < 0) continue;
        const uint32_t chunk = item % schedule.num_chunks;
        const int32_t gate_row = expert * 2 * p.intermediate_size + chunk * kGroupSize;
        const int32_t up_row = gate_row + p.intermediate_size;
        for (uint32_t k = schedule.first_k; k < schedule.last_k; ++k, ring.advance()) {
            uint64_t& full = shared.full[ring.stage];
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            mbarrier::arrive_expect_bytes(full, 2 * kHalfBytes);
            if (p.interleaved) {
                const int32_t rows_of_8 = chunk * kGroupSize / 8;
                tma_load_5d(shared.weights[ring.stage][0], p.w13, full, k * kTileK, 0, 0, rows_of_8, expert);
                tma_load_5d(shared.weights[ring.stage][1], p.w13, full, k * kTileK, 0, 1, rows_of_8, expert);
            } else {
                tma_load_2d(shared.weights[ring.stage][0], p.w13, full, k * kTileK, gate_row);
                tma_load_2d(shared.weights[ring.stage][1], p.w13, full, k * kTileK, up_row);
            }
        }
        const int32_t column = chunk * kGroupSize;
        for (uint32_t group = schedule.first_group; group < schedule.num_groups; group += kClusterSize, ring.advance()) {
            // A warp's share of the box is 32 rows of w2: the fourth dimension of its map.
            const int32_t rows_of_32 = (expert * p.hidden_size + group * kGroupColumns) / 32;
            const bool whole = (group + 1) * kGroupColumns <= p.hidden_size;
            uint64_t& full = shared.full[ring.stage];
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            mbarrier::arrive_expect_bytes(full, whole ? 2 * kHalfBytes : kHalfBytes);
            tma_load_5d(shared.weights[ring.stage][0], p.w2, full, column, 0, 0, rows_of_32, 0);
            if (whole) tma_load_5d(shared.weights[ring.stage][1], p.w2, full, column, 0, 0, rows_of_32 + 4, 0);
        }
    }
}

// 96 threads: for every stage of the up projection the tokens' K tile, swizzled as wgmma reads it, and the scales; for
// every stage of the down projection the scales.
__device__ __forceinline__ void gather_tokens(const Params& p, SharedStorage& shared, const Schedule& schedule,
                                              uint32_t thread) {
    constexpr uint32_t kPiecesPerRow = kTileK / 16;
    constexpr uint32_t kRowsPerPass = kNumGatherThreads / kPiecesPerRow;
    const uint32_t piece = thread % kPiecesPerRow;
    const uint32_t num_k = p.hidden_size / kTileK;
    Position ring;
    uint32_t buffer = 0;  // a thread is at most one item ahead of another, so two tables of tokens suffice
    for (uint32_t item = schedule.first_item; item < schedule.num_items; item += schedule.item_step) {
        const uint32_t block = item / schedule.num_chunks;
        const int32_t expert = p.expert_ids[block];
        if (expert < 0) continue;
        const uint32_t chunk = item % schedule.num_chunks;
        int32_t* const tokens = shared.gathered_token[buffer ^= 1];
        for (uint32_t row = thread; row < kBlockM; row += kNumGatherThreads) {
            const uint32_t choice = p.sorted_token_ids[block * kBlockM + row];
            tokens[row] = choice < p.num_choices ? static_cast<int32_t>(choice / p.top_k) : -1;
        }
        named_barrier(kGatherBarrier, kNumGatherThreads);

        const uint32_t scale_row = p.interleaved ? 2 * chunk + thread : chunk + thread * schedule.num_chunks;
        const float* w13_scale =
            p.w13_scale + static_cast<uint64_t>(expert * 2 * schedule.num_chunks + scale_row) * num_k;
#pragma unroll 1
        for (uint32_t k = schedule.first_k; k < schedule.last_k; ++k, ring.advance()) {
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            // Padding reads token 0 with no bytes, which writes zeros.
#pragma unroll
            for (uint32_t pass = 0; pass < ceil_div(kBlockM, kRowsPerPass); ++pass) {
                const uint32_t row = thread / kPiecesPerRow + pass * kRowsPerPass;
                if (row >= kBlockM) break;
                const int32_t token = tokens[row];
                cp_async_16(shared.tokens[ring.stage] + row * kTileK + (piece ^ row % 8) * 16,
                            p.x_q + static_cast<uint64_t>(max(token, 0)) * p.hidden_size + k * kTileK + piece * 16, token >= 0);
            }
#pragma unroll
            for (uint32_t row = thread; row < kBlockM; row += kNumGatherThreads) {
                const int32_t token = tokens[row];
                cp_async_4(&shared.token_scale[ring.stage][row], p.x_scale + static_cast<uint64_t>(max(token, 0)) * num_k + k,
                           token >= 0);
            }
            if (thread < 2) cp_async_4(&shared.weight_scale[ring.stage][thread], w13_scale + k, true);
            cp_async_arrive(shared.full[ring.stage]);
        }
        for (uint32_t group = schedule.first_group; group < schedule.num_groups; group += kClusterSize, ring.advance()) {
            mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
            const uint32_t scale_row = group * 2 + thread;
            if (thread < 2 && scale_row < num_k)
                cp_async_4(&shared.weight_scale[ring.stage][thread],
                           p.w2_scale + static_cast<uint64_t>(expert * num_k + scale_row) * schedule.num_chunks + chunk, true);
            cp_async_arrive(shared.full[ring.stage]);
        }
    }
    cp_async_wait_all();
}

// registers::uniform() but with the tallest blocks, whose sums leave no room for what the compiler then makes of the loops.
__device__ __forceinline__ uint32_t uniform_if_room(uint32_t value) {
    if constexpr (kBlockM > 96)
        return value;
    else
        return registers::uniform(value);
}

// Two warpgroups: each 64 gate rows and the same 64 up rows of the chunk, then 128 of each group's 256 columns.
struct Math {
    const Params& p;
    SharedStorage& shared;
    const Schedule schedule;
    const uint32_t rank;
    const uint32_t thread = threadIdx.x;
    const uint32_t warpgroup = uniform_if_room(threadIdx.x / 128);
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t lane = threadIdx.x % 32;
    Position ring;
    uint32_t exchange_parity = 0;

    __device__ __forceinline__ Math(const Params& p, SharedStorage& shared, const Schedule& schedule, uint32_t rank)
        : p(p), shared(shared), schedule(schedule), rank(rank) {}

    __device__ __forceinline__ void wait_stage() {
        mbarrier::wait(shared.full[ring.stage], ring.parity);
        fence_async_proxy();  // the tokens came by cp.async
    }

    // Each lane arrives for itself. One lane for the warp, after __syncwarp(), would be right too and 0.5 % faster at
    // M=1024, but racecheck does not follow the order through __syncwarp().
    __device__ __forceinline__ void release_stage() {
        mbarrier::arrive_warp(shared.empty[ring.stage]);
        ring.advance();
    }

    // This CTA's part of K: gate and up sums of 64 rows each.
    __device__ __forceinline__ void project_up(float (&gate)[kBlockM / 2], float (&up)[kBlockM / 2]) {
#pragma unroll
        for (uint32_t i = 0; i < kBlockM / 2; ++i) gate[i] = up[i] = 0.f;
        const uint32_t first_k = uniform_if_room(schedule.first_k), last_k = uniform_if_room(schedule.last_k);
        for (uint32_t k = first_k; k < last_k; ++k) {
            wait_stage();
            const uint64_t tokens = wgmma::descriptor(shared.tokens[ring.stage]);
            const uint64_t gate_rows = wgmma::descriptor(shared.weights[ring.stage][0] + warpgroup * kWarpgroupBytes);
            const uint64_t up_rows = wgmma::descriptor(shared.weights[ring.stage][1] + warpgroup * kWarpgroupBytes);
            const float* token_scale = shared.token_scale[ring.stage];
            const float gate_scale = shared.weight_scale[ring.stage][0], up_scale = shared.weight_scale[ring.stage][1];
            if constexpr (kBlockM <= 64) {  // registers for two partial sums
                float gate_partial[kBlockM / 2], up_partial[kBlockM / 2];
                wgmma::multiply_k128<kBlockM>(gate_partial, gate_rows, tokens);
                wgmma::multiply_k128<kBlockM>(up_partial, up_rows, tokens);
                wgmma::wait<1>();
                wgmma::pin(gate_partial);
                promote<kBlockM>(gate, gate_partial, token_scale, gate_scale, lane);
                wgmma::wait<0>();
                wgmma::pin(up_partial);
                promote<kBlockM>(up, up_partial, token_scale, up_scale, lane);
            } else {
                float partial[kBlockM / 2];
                wgmma::multiply_k128<kBlockM>(partial, gate_rows, tokens);
                wgmma::wait<0>();
                wgmma::pin(partial);
                promote<kBlockM>(gate, partial, token_scale, gate_scale, lane);
                wgmma::multiply_k128<kBlockM>(partial, up_rows, tokens);
                wgmma::wait<0>();
                wgmma::pin(partial);
                promote<kBlockM>(up, partial, token_scale, up_scale, lane);
            }
            release_stage();
        }
    }

    // Every CTA sends its partial sums to every other and adds up all in rank order, so that all hold the same sums.
    __device__ __forceinline__ void sum_over_cluster(float (&gate)[kBlockM / 2], float (&up)[kBlockM / 2]) {
        constexpr uint32_t kVectors = kBlockM / 8;  // float4 of gate, and as many of up
        mbarrier::wait<true>(shared.exchange_empty, exchange_parity ^ 1);
        if (thread == 0) mbarrier::arrive_expect_bytes(shared.exchange_full, kNumPeers * sizeof(shared.exchange[0]));
#pragma unroll
        for (uint32_t step = 1; step < kClusterSize; ++step) {
            const uint32_t peer = (rank + step) % kClusterSize;
            const uint32_t slot = rank < peer ? rank : rank - 1;
            const uint32_t buffer = cluster::map_address(shared_address(&shared.exchange[slot][0][thread]), peer);
            const uint32_t full = cluster::map_address(shared_address(&shared.exchange_full), peer);
#pragma unroll
            for (uint32_t v = 0; v < kVectors; ++v) {
                const uint32_t stride = kNumMathThreads * sizeof(float4);
                cluster::store_async(buffer + v * stride, full,
                                     make_float4(gate[4 * v], gate[4 * v + 1], gate[4 * v + 2], gate[4 * v + 3]));
                cluster::store_async(buffer + (kVectors + v) * stride, full,
                                     make_float4(up[4 * v], up[4 * v + 1], up[4 * v + 2], up[4 * v + 3]));
            }
        }
        mbarrier::wait<true>(shared.exchange_full, exchange_parity);
#pragma unroll
        for (uint32_t v = 0; v < kVectors; ++v) {
            float4 gate_sum = make_float4(0.f, 0.f, 0.f, 0.f), up_sum = gate_sum;
#pragma unroll
            for (uint32_t source = 0; source < kClusterSize; ++source) {
                float4 g = make_float4(gate[4 * v], gate[4 * v + 1], gate[4 * v + 2], gate[4 * v + 3]);
                float4 u = make_float4(up[4 * v], up[4 * v + 1], up[4 * v + 2], up[4 * v + 3]);
                if (source != rank) {
                    const uint32_t slot = source < rank ? source : source - 1;
                    g = shared.exchange[slot][v][thread];
                    u = shared.exchange[slot][kVectors + v][thread];
                }
                gate_sum = make_float4(gate_sum.x + g.x, gate_sum.y + g.y, gate_sum.z + g.z, gate_sum.w + g.w);
                up_sum = make_float4(up_sum.x + u.x, up_sum.y + u.y, up_sum.z + u.z, up_sum.w + u.w);
            }
            gate[4 * v] = gate_sum.x, gate[4 * v + 1] = gate_sum.y, gate[4 * v + 2] = gate_sum.z, gate[4 * v + 3] = gate_sum.w;
            up[4 * v] = up_sum.x, up[4 * v + 1] = up_sum.y, up[4 * v + 2] = up_sum.z, up[4 * v + 3] = up_sum.w;
        }
        __syncwarp();
        if (lane < kClusterSize && lane != rank) mbarrier::arrive_remote(shared.exchange_empty, lane);
        exchange_parity ^= 1;
    }

    // SwiGLU of the sums, quantised per token over the chunk's 128 channels, to shared memory as wgmma reads it.
    __device__ __forceinline__ void activate(float (&gate)[kBlockM / 2], const float (&up)[kBlockM / 2], uint32_t block) {
#pragma unroll
        for (uint32_t j = 0; j < kBlockM / 8; ++j) {
#pragma unroll
            for (uint32_t i = 4 * j; i < 4 * j + 4; ++i) gate[i] = p.form.swiglu(gate[i], up[i]);
            float left = fmaxf(fabsf(gate[4 * j]), fabsf(gate[4 * j + 2]));
            float right = fmaxf(fabsf(gate[4 * j + 1]), fabsf(gate[4 * j + 3]));
#pragma unroll
            for (uint32_t offset = 4; offset < 32; offset *= 2) {
                left = fmaxf(left, __shfl_xor_sync(~0u, left, offset));
                right = fmaxf(right, __shfl_xor_sync(~0u, right, offset));
            }
            if (lane < 4) *reinterpret_cast<float2*>(&shared.amax[warp][8 * j + 2 * lane]) = make_float2(left, right);
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        if (thread < kBlockM) {
            float amax = 0.f;
#pragma unroll
            for (uint32_t w = 0; w < kNumMathWarps; ++w) amax = fmaxf(amax, shared.amax[w][thread]);
            const float scale = p.form.scale(amax);
            shared.inverse_scale[thread] = 1.f / scale;
            const uint32_t choice = p.sorted_token_ids[block * kBlockM + thread];
            OutputRow row{0.f, -1};
            if (choice < p.num_choices)
                row = {scale * p.topk_weights[choice] * p.routed_scaling_factor, static_cast<int32_t>(choice / p.top_k)};
            shared.output_row[thread] = row;
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        const uint32_t channel = warpgroup * 64 + (warp % 4) * 16 + lane / 4;  // and channel + 8, in the same 16-byte piece
#pragma unroll
        for (uint32_t j = 0; j < kBlockM / 8; ++j) {
#pragma unroll
            for (uint32_t b = 0; b < 2; ++b) {
                const uint32_t row = 8 * j + 2 * (lane % 4) + b;
                const float inverse = shared.inverse_scale[row];
                const uint16_t packed = pack_e4m3x2(gate[4 * j + b] * inverse, gate[4 * j + 2 + b] * inverse);
                uint8_t* piece = shared.activation + row * kGroupSize + ((channel / 16) ^ (row % 8)) * 16 + channel % 16;
                piece[0] = static_cast<uint8_t>(packed);
                piece[8] = static_cast<uint8_t>(packed >> 8);
            }
        }
        fence_async_proxy();
        named_barrier(kMathBarrier, kNumMathThreads);
    }

    // This CTA's columns of `out`. The map of w2 orders a box's rows so that this thread's four accumulator rows of a
    // token are four adjacent columns: row 64 t + 16 w + 8 h + g of the tile is column 32 w + 4 g + 2 t + h.
    __device__ __forceinline__ void project_down() {
        const uint64_t activation = wgmma::descriptor(shared.activation);
        const uint32_t first_group = uniform_if_room(schedule.first_group);
        const uint32_t num_groups = uniform_if_room(schedule.num_groups);
        for (uint32_t group = first_group; group < num_groups; group += kClusterSize) {
            wait_stage();
            const uint32_t first_column = group * kGroupColumns + warpgroup * kTileRows;
            if (first_column < p.hidden_size) {
                float sums[2][kBlockM / 2];
                const uint64_t rows = wgmma::descriptor(shared.weights[ring.stage][warpgroup]);
                wgmma::multiply_k128<kBlockM>(sums[0], rows, activation);
                wgmma::multiply_k128<kBlockM>(sums[1], rows + (kWarpgroupBytes >> 4), activation);
                const float weight_scale = shared.weight_scale[ring.stage][warpgroup];
                wgmma::wait<0>();
                wgmma::pin(sums[0]);
                wgmma::pin(sums[1]);
                release_stage();
                uint16_t* columns = p.out + first_column + (warp % 4) * 32 + (lane / 4) * 4;
#pragma unroll
                for (uint32_t j = 0; j < kBlockM / 8; ++j) {
#pragma unroll
                    for (uint32_t b = 0; b < 2; ++b) {
                        const OutputRow row = shared.output_row[8 * j + 2 * (lane % 4) + b];
                        const float scale = row.coefficient * weight_scale;
                        const uint32_t low = pack_bf16x2(sums[0][4 * j + b] * scale, sums[0][4 * j + 2 + b] * scale);
                        const uint32_t high = pack_bf16x2(sums[1][4 * j + b] * scale, sums[1][4 * j + 2 + b] * scale);
                        if (row.token >= 0) add_bf16x4(columns + static_cast<uint64_t>(row.token) * p.hidden_size, low, high);
                    }
                }
            } else {
                release_stage();
            }
            if constexpr (kBlockM <= 96) __syncwarp();  // where lanes may have parted, see registers::uniform()
        }
    }

    __device__ __forceinline__ void run() {
        const uint32_t first_item = uniform_if_room(schedule.first_item);
        const uint32_t num_items = uniform_if_room(schedule.num_items);
        for (uint32_t item = first_item; item < num_items; item += schedule.item_step) {
            const uint32_t block = item / schedule.num_chunks;
            if (static_cast<int32_t>(uniform_if_room(p.expert_ids[block])) < 0) continue;
            float gate[kBlockM / 2], up[kBlockM / 2];
            project_up(gate, up);
            if constexpr (kClusterSize > 1) sum_over_cluster(gate, up);
            activate(gate, up, block);
            project_down();
        }
    }
};

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) sm90_fused(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    const uint32_t rank = kClusterSize > 1 ? cluster::cta_rank() : 0;

    if (threadIdx.x == 0) {
        if (shared_address(shared_bytes) % 1024 != 0) __trap();  // the swizzle counts from 1024-byte boundaries
        prefetch_tensor_map(p.w13);
        prefetch_tensor_map(p.w2);
        for (uint32_t stage = 0; stage < kNumStages; ++stage) {
            mbarrier::init(shared.full[stage], 1 + kNumGatherThreads);
            mbarrier::init(shared.empty[stage], kNumMathWarps * mbarrier::kArrivalsPerWarp);
        }
        mbarrier::init(shared.exchange_full, 1);
        mbarrier::init(shared.exchange_empty, kNumPeers > 0 ? kNumPeers * kNumMathWarps : 1);
        mbarrier::fence_init();
    }
    if constexpr (kClusterSize > 1)
        cluster::sync();
    else
        __syncthreads();

    if (p.inputs_from_previous_kernel) grid_dependency::wait();
    // Each role makes its own Schedule: values shared across the change of register counts would be spilled.
    if (threadIdx.x >= kNumMathThreads) {
        registers::decrease<kProducerRegisters>();
        if (threadIdx.x == kNumMathThreads)
            load_weights(p, shared, Schedule(p, rank));
        else if (threadIdx.x >= kNumMathThreads + 32)
            gather_tokens(p, shared, Schedule(p, rank), threadIdx.x - kNumMathThreads - 32);
    } else {
        registers::increase<kMathRegisters>();
        grid_dependency::wait();  // `out` is zeroed by the previous kernel
        Math(p, shared, Schedule(p, rank), rank).run();
    }
    if constexpr (kClusterSize > 1) {
        __syncwarp();
        cluster::sync();  // a CTA's shared memory must outlive its peers' last arrivals
    }
}
