// The up phase of large batches: h = Q(SwiGLU(W13 . x)) for every choice, quantised, in the order of the experts.
//
// An item is a tile of up to 2 * kBlockM tokens of one expert and one chunk of 128 channels: 128 gate and 128 up rows of
// w13. A cluster of two CTAs has one item at a time; each multiplies half of the tokens with all 256 rows, of which each
// loads half into both. Clusters share the work to the step of K (prefill_schedule.cuh), tokens are gathered and weights
// multicast by a producer warpgroup (prefill_load.cuh), and multiplied by two others (prefill_math.cuh).
//
// h goes to memory, and to the down phase, by plain bulk copies: chunk by chunk, 128 bytes a row, the pieces of a row
// swizzled by its number. Beside it this kernel does what the down phase needs and nothing else would: it zeroes
// the first columns of `out`, and folds each row's weight into its scales. Its first CTA lists the jobs of the down phase.
//
// On an H200, with the launch before it, dsv3_tp8: 366 us at M=4096 (739 TFLOP/s), 594 at M=8192 (911 TFLOP/s):
// experiments/2026-11-28_prefill_producers, with what holds it: at once tensor cores, shared memory, and L2. Some 2 to 4 % less
// since epilogues are shorter and the first items are asked for ahead: 2026-11-28_short_epilogues, 2026-11-29_prefill_start.
//
// Set by the compiler's command line: HIDDEN_SIZE, NUM_CHUNKS (intermediate size / 128), BLOCK_M (64, 80, 96, 136), NUM_STAGES,
// DETERMINISTIC (items are never split), PLAIN_SWIGLU (no limit, alpha 1, beta 0), and what the launcher passes: SMEM_BYTES of
// shared memory and PARAMS_BYTES of parameters.
#include "activation.cuh"
#include "prefill_jobs.cuh"
#include "prefill_math.cuh"
#include "registers.cuh"
#include "store_matrix.cuh"

constexpr uint32_t kHiddenSize = HIDDEN_SIZE;
constexpr uint32_t kNumChunks = NUM_CHUNKS;
constexpr bool kDeterministic = DETERMINISTIC;
constexpr bool kPlainSwiglu = PLAIN_SWIGLU;
constexpr uint32_t kNumK = kHiddenSize / kTileK;

// Whether load threads make their Loader a second time, after the prefetch. Where they keep the first one, ptxas 13.0 spills
// two registers with the tallest tiles, several chunks, and rows a power of two apart.
constexpr bool kLoaderAnew = kBlockM > 128 && kNumChunks > 1 && (kHiddenSize & (kHiddenSize - 1)) == 0;

struct Params {
    TensorMap w13;  // [E * 2I, H], boxes of 128 rows x 128 bytes, of 16 rows first the even ones
    const uint8_t* x_q;
    const float* x_scale;
    const float* w13_scale;
    const int32_t* sorted_choices;
    const Tile* tiles;
    const float* topk_weights;
    float4* part_sums;       // see Parts
    uint32_t* part_written;
    uint8_t* h;              // e4m3 [I/128][num_h_rows][128], pieces swizzled
    float* h_scale;          // [num_h_rows][I/128], times topk_weight * routed_scaling_factor
    uint32_t* destination;   // [num_h_rows]: the row of `out` that the row adds to; deterministic: its choice
    int4* jobs;              // of the down phase, see prefill_jobs.cuh
    uint32_t* jobs_listed;   // 0 at the start: 1 when they are
    uint8_t* out;            // bf16 [num_out_rows, H], whose first columns are to be zeroed
    uint32_t num_out_rows;
    uint32_t zeroed_row_bytes;
    ActivationForm form;
    float routed_scaling_factor;
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t num_h_rows;
    uint32_t num_choices;
    uint8_t padding[36];  // alignment
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct ActivationStorage {
    union {
        alignas(16) uint8_t staged[kBlockM][kGroupSize];  // as they are to lie in h
        alignas(16) float amax[kNumMathWarps][kScaleSlots];  // before
    };
    alignas(16) float row_factor[kBlockM];
};

struct SharedStorage {
    LoadStorage<kNumK> load;
    union {
        ActivationStorage activation;
        JobStorage jobs;  // before the first item
        TailStorage tail;  // before the jobs
    };
    Share share;
};
static_assert(sizeof(SharedStorage) <= SMEM_BYTES, "the launcher reserves too little shared memory");

struct Operands {
    static constexpr uint32_t kNumK = ::kNumK;
    const Params& p;

    __device__ __forceinline__ Tile tile(uint32_t item) const { return p.tiles[1 + item / kNumChunks]; }
    __device__ __forceinline__ uint32_t column(uint32_t item) const { return item % kNumChunks; }
    __device__ __forceinline__ uint32_t source_row(const Tile& tile, uint32_t row) const {
        return p.sorted_choices[tile.first_row + row] / p.top_k;
    }
    // Where the row of h goes.
    __device__ __forceinline__ void begin_row(const Tile& tile, uint32_t chunk, uint32_t row, uint32_t token) const {
        if (chunk != 0) return;
        const uint32_t destination = kDeterministic ? p.sorted_choices[tile.first_row + row] : token;
        p.destination[first_h_row(tile.expert, tile.first_row) + row] = destination;
    }
    __device__ __forceinline__ const uint4* pieces() const { return reinterpret_cast<const uint4*>(p.x_q); }
    __device__ __forceinline__ static uint32_t row_piece(uint32_t row, uint32_t piece) {
        return row * (kHiddenSize / 16) + piece;
    }
    __device__ __forceinline__ static uint32_t k_stride() { return kTileK / 16; }
    __device__ __forceinline__ const float* row_scale(uint32_t row) const { return p.x_scale + row * kNumK; }
    __device__ __forceinline__ const float* weight_scale(uint32_t expert, uint32_t chunk, uint32_t half) const {
        return p.w13_scale + static_cast<uint64_t>((expert * 2 + half) * kNumChunks + chunk) * kNumK;
    }
    __device__ __forceinline__ void load_weights(uint8_t* target, uint64_t& full, uint32_t expert, uint32_t chunk, uint32_t k,
                                                 uint32_t half, uint64_t policy) const {
        const uint32_t row = ((expert * 2 + half) * kNumChunks + chunk) * kGroupSize;
        tma_multicast_4d(target, p.w13, full, k * kTileK, 0, 0, row / 16, 0b11, policy);
    }
    __device__ __forceinline__ void prefetch_weights(uint32_t expert, uint32_t chunk, uint32_t k, uint32_t half) const {
        const uint32_t row = ((expert * 2 + half) * kNumChunks + chunk) * kGroupSize;
        prefetch::box_4d(p.w13, k * kTileK, 0, 0, row / 16, evict_normal_policy());
    }
};

// SwiGLU of the sums, quantised per token over the chunk's 128 channels, to global memory.
struct Activation {
    const Params& p;
    ActivationStorage& shared;

    static constexpr uint32_t kNone = ~0u;

    // What the down phase needs of a row whose activations have been scaled by 1 / `scale`.
    __device__ __forceinline__ void hand_over(uint32_t h_row, uint32_t chunk, float scale, float weight) const {
        p.h_scale[static_cast<uint64_t>(h_row) * kNumChunks + chunk] = scale * (weight * p.routed_scaling_factor);
    }

    // The warp that sends the rows on, and waits before they are overwritten: the last, for others have scales to hand over.
    __device__ __forceinline__ static bool sends(uint32_t warp) { return registers::uniform(warp) == kNumMathWarps - 1; }

    __device__ __forceinline__ void send(uint32_t first_h_row, uint32_t chunk, uint32_t num_rows) const {
        uint8_t* const target = p.h + (static_cast<uint64_t>(chunk) * p.num_h_rows + first_h_row) * kGroupSize;
        if (num_rows > 0 && elect_one()) bulk_store(target, shared.staged, num_rows * kGroupSize);
        __syncwarp();
    }

    // Of 16 rows, or 8, of which a lane has two channels of four, or two: activations in place of the gates, and the larger
    // magnitude of each row.
    template <uint32_t kRows>
    __device__ __forceinline__ void activate(float (&largest)[4], float* gate, const float* up) const {
#pragma unroll
        for (uint32_t row = 0; row < 4; ++row) {
            largest[row] = 0.f;
            if (row >= kRows / 4) continue;
            const uint32_t i = row / 2 * 4 + row % 2;
            gate[i] = p.form.swiglu<kPlainSwiglu>(gate[i], up[i]);
            gate[i + 2] = p.form.swiglu<kPlainSwiglu>(gate[i + 2], up[i + 2]);
            largest[row] = fmaxf(fabsf(gate[i]), fabsf(gate[i + 2]));
        }
    }

    // Of 16 rows, the largest magnitudes that the warp has. Lanes swap the rows that they don't go on with: each ends with one.
    __device__ __forceinline__ static void reduce(const float (&largest)[4], float* amax) {
        const uint32_t lane = threadIdx.x % 32;
        const bool first_half = !(lane & 4), first_of_pair = !(lane & 8);
        float kept[2];
#pragma unroll
        for (uint32_t b = 0; b < 2; ++b) {
            const float other = __shfl_xor_sync(~0u, first_half ? largest[2 + b] : largest[b], 4);
            kept[b] = fmaxf(first_half ? largest[b] : largest[2 + b], other);
        }
        const float other = __shfl_xor_sync(~0u, first_of_pair ? kept[1] : kept[0], 8);
        float of_row = fmaxf(first_of_pair ? kept[0] : kept[1], other);
        of_row = fmaxf(of_row, __shfl_xor_sync(~0u, of_row, 16));
        const uint32_t row = (first_half ? 0u : 8u) + 2 * (lane % 4) + (first_of_pair ? 0u : 1u);
        if (lane < 16) amax[row] = of_row;
    }

    // 16 rows at a time. Of those lane 4 g + c of a warp has rows 2c, 2c + 1, 8 + 2c and 9 + 2c, and channels 2g and 2g + 1 of
    // 16 (see the launcher). Shuffles for one block go with the arithmetic of the next.
    template <uint32_t kCount>
    __device__ __forceinline__ void finish(const PieceOfTile& piece, uint32_t rows, float (&gate)[kCount],
                                           const float (&up)[kCount]) {
        const uint32_t thread = registers::thread_index(), warp = thread / 32, lane = thread % 32;
        // Thread `row` has that row's choice and weight, which are asked for well before they are needed.
        const uint32_t end = piece.rows_of_cta(), first_h_row = piece.first_h_row + piece.first_of_cta(), chunk = piece.column;
        const uint32_t choice = thread < end ? p.sorted_choices[piece.first_row + piece.first_of_cta() + thread] : kNone;
        if (sends(warp)) bulk_store_wait_read();
        named_barrier(kMathBarrier, kNumMathThreads);
        float largest[4] = {};
        float* amax = shared.amax[warp];
#pragma unroll
        for (uint32_t i = 0; i < kCount; i += 8) {
            if (2 * i >= rows) break;
            float largest_before[4];
#pragma unroll
            for (uint32_t row = 0; row < 4; ++row) largest_before[row] = largest[row];
            if (i + 4 < kCount)
                activate<16>(largest, gate + i, up + i);
            else
                activate<8>(largest, gate + i, up + i);
            if (i == 0) continue;
            reduce(largest_before, amax);
            amax += 16;
        }
        reduce(largest, amax);
        const float weight = choice == kNone ? 0.f : p.topk_weights[choice];
        named_barrier(kMathBarrier, kNumMathThreads);
        float scale = 0.f;
        if (thread < rows) {
            float amax = 0.f;
#pragma unroll
            for (uint32_t w = 0; w < kNumMathWarps; ++w) amax = fmaxf(amax, shared.amax[w][thread]);
            scale = p.form.scale(amax);
            shared.row_factor[thread] = reciprocal(scale);
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        // The warp's 16 channels are a piece of each row. Lane `row` has the address of that row of 16.
        uint8_t* const row_of_lane = shared.staged[lane % 16] + (warp ^ lane % 8) * 16;
#pragma unroll
        for (uint32_t i = 0; i < kCount; i += 8) {
            if (2 * i >= rows) break;
            uint32_t pairs[2];
#pragma unroll
            for (uint32_t j = 0; j < 2 && i + 4 * j < kCount; ++j) {
                const float2 inverse = *reinterpret_cast<const float2*>(shared.row_factor + 2 * i + 8 * j + 2 * (lane % 4));
                const float* const values = gate + i + 4 * j;
                const uint32_t even = pack_e4m3x2(values[0] * inverse.x, values[2] * inverse.x);
                const uint32_t odd = pack_e4m3x2(values[1] * inverse.y, values[3] * inverse.y);
                pairs[j] = even | odd << 16;
            }
            if (i + 4 < kCount)
                store_transposed(row_of_lane + 2 * i * kGroupSize, pairs[0], pairs[1]);
            else
                store_transposed(row_of_lane + 2 * i * kGroupSize, pairs[0]);
        }
        fence_async_proxy();
        named_barrier(kMathBarrier, kNumMathThreads);
        if (sends(warp)) send(first_h_row, chunk, end);
        if (choice != kNone) hand_over(first_h_row + thread, chunk, scale, weight);
    }
};

// The math threads: zeroes the first row_bytes of this CTA's part of the rows of `out`, while the first stages are on their way.
// Not inlined, as list_jobs().
__device__ __noinline__ void zero_out(uint8_t* out, uint32_t num_rows, uint32_t row_bytes) {
    const uint32_t part = ceil_div(num_rows, gridDim.x), first = part * blockIdx.x, end = min(first + part, num_rows);
#pragma unroll 1
    for (uint32_t row = first + threadIdx.x / 32; row < end; row += kNumMathWarps) {
        uint8_t* const target = out + static_cast<uint64_t>(row) * (kHiddenSize * 2);
#pragma unroll 1
        for (uint32_t offset = threadIdx.x % 32 * 16; offset < row_bytes; offset += 32 * 16)
            *reinterpret_cast<uint4*>(target + offset) = make_uint4(0, 0, 0, 0);
    }
    __syncwarp();
}

// All threads of the grid: the tiles and the choices come into L2, which all CTAs read one after the other before they can load
// anything.
__device__ __forceinline__ void prefetch_routing(const Params& p) {
    const uint32_t most_tiles = min(p.num_choices, p.num_experts + p.num_choices / (kClusterSize * kBlockM));
    const uint32_t num_tile_lines = ceil_div<uint32_t>((1 + most_tiles) * sizeof(Tile), prefetch::kLineBytes);
    const uint32_t num_lines = num_tile_lines + ceil_div<uint32_t>(p.num_choices * sizeof(int32_t), prefetch::kLineBytes);
#pragma unroll 1
    for (uint32_t i = blockIdx.x * kNumThreads + threadIdx.x; i < num_lines; i += gridDim.x * kNumThreads) {
        const bool of_tiles = i < num_tile_lines;
        const void* const array = of_tiles ? static_cast<const void*>(p.tiles) : p.sorted_choices;
        prefetch::line(static_cast<const uint8_t*>(array) + (of_tiles ? i : i - num_tile_lines) * prefetch::kLineBytes);
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) sm90_prefill_up(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    if (threadIdx.x == 0) {
        if (shared_address(shared_bytes) % 1024 != 0) __trap();  // the swizzle counts from 1024-byte boundaries
        prefetch_tensor_map(p.w13);
        init_ring(shared.load);
        mbarrier::fence_init();
    }
    prefetch_routing(p);
    cluster::sync();

    grid_dependency::wait();
    grid_dependency::launch_dependents();
    const Operands operands{p};
    const uint32_t num_tiles = p.tiles[0].expert;
    // A share waits only for later ones: they are the earlier CTAs, which are never held up by this one.
    const uint32_t num_shares = gridDim.x / kClusterSize;
    const uint32_t number = num_shares - 1 - blockIdx.x / kClusterSize, num_items = num_tiles * kNumChunks;
    const bool loads = threadIdx.x >= kNumMathThreads;
    Loader<Operands> loader(operands, shared.load);
    // Its first item, where it has a whole one.
    typename Loader<Operands>::Prefetch first_item{loader, number, loads && number < num_items};
    find_share<Cost<kNumK>, !kDeterministic>(
        shared.share, shared.tail, number, num_shares, num_items, [&](uint32_t item) { return operands.tile(item).num_rows; },
        first_item);
    if (loads) {
        registers::decrease<kProducerRegisters>();
        const Pieces pieces(shared.share, kNumK);
        if constexpr (kLoaderAnew)
            Loader<Operands>(operands, shared.load).run(pieces);
        else
            loader.run(pieces);
    } else {
        registers::increase<kMathRegisters>();
        zero_out(p.out, p.num_out_rows, p.zeroed_row_bytes);
        if (blockIdx.x == 0) {
            list_jobs(shared.jobs, p.tiles, p.num_experts, p.jobs);
            if (threadIdx.x == 0) exchange::signal(p.jobs_listed);
            __syncwarp();
        }
        Math<kNumK, Activation>(shared.load, shared.share, Parts{p.part_sums, p.part_written},
                                Activation{p, shared.activation})
            .run();
        if (Activation::sends(threadIdx.x / 32)) bulk_store_wait_read();
    }
    __syncwarp();
    cluster::sync();  // a CTA's shared memory must outlive the other's last arrivals
}
