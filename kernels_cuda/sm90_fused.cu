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
#include "cluster.cuh"
#include "fused_load.cuh"
#include "promote.cuh"
#include "registers.cuh"
#include "wgmma.cuh"

// registers::uniform(), but not with the tallest blocks: their sums leave no registers for what the compiler makes of loops
// then, and would be spilled.
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
            shared.inverse_scale[thread] = reciprocal(scale);
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
        if (registers::uniform(threadIdx.x / 32) == kNumMathWarps)
            load_weights(p, shared, Schedule(p, rank));
        else
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
