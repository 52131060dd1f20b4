// The up phase of large batches: h = Q(SwiGLU(W13 . x)) for every choice, quantised, in the order of the experts.
//
// An item is a tile of up to 2 * kBlockM tokens of one expert and one chunk of 128 channels: 128 gate and 128 up rows of
// w13. A cluster of two CTAs has one item at a time; each multiplies half of the tokens with all 256 rows, of which each
// loads half into both. Clusters share the work to the step of K (prefill_schedule.cuh), tokens are gathered and weights
// multicast by a producer warpgroup (prefill_load.cuh), and multiplied by two others (prefill_math.cuh).
//
// h goes to memory as tiles that the down phase fetches by plain bulk copies: chunk by chunk, 128 bytes a row, the pieces
// of a row swizzled by its number. Beside it this kernel does what the down phase needs and nothing else would: it zeroes
// `out`, and folds each row's weight into its scales. Its first CTA lists the jobs of the down phase.
//
// On an H200, with the launch before it, dsv3_tp8: 412 us at M=4096 (656 TFLOP/s), 702 at M=8192 (771 TFLOP/s):
// experiments/2026-11-27_uniform_registers, with what holds it.
//
// Set by the compiler's command line: HIDDEN_SIZE, NUM_CHUNKS (intermediate size / 128), BLOCK_M (64, 96, 128), NUM_STAGES,
// DETERMINISTIC (items are never split), and what the launcher passes: SMEM_BYTES of shared memory and PARAMS_BYTES of
// parameters.
#include "activation.cuh"
#include "prefill_jobs.cuh"
#include "prefill_math.cuh"
#include "registers.cuh"

constexpr uint32_t kHiddenSize = HIDDEN_SIZE;
constexpr uint32_t kNumChunks = NUM_CHUNKS;
constexpr bool kDeterministic = DETERMINISTIC;
constexpr uint32_t kNumK = kHiddenSize / kTileK;
constexpr uint32_t kStagedRowBytes = kGroupSize + 16;  // rows apart by other than a multiple of all banks

struct Params {
    TensorMap w13;  // [E * 2I, H], boxes of 128 rows x 128 bytes
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
    uint8_t* out;            // to be zeroed
    uint64_t num_out_bytes;
    ActivationForm form;
    float routed_scaling_factor;
    uint32_t top_k;
    uint32_t num_experts;
    uint32_t num_h_rows;
    uint8_t padding[48];  // alignment
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct ActivationStorage {
    union {
        alignas(16) uint8_t staged[kBlockM][kStagedRowBytes];
        alignas(16) float amax[kNumMathWarps][kBlockM];  // before
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
    __device__ __forceinline__ const uint8_t* row_piece(uint32_t row, uint32_t piece, uint32_t k) const {
        return p.x_q + static_cast<uint64_t>(row) * kHiddenSize + k * kTileK + piece * 16;
    }
    __device__ __forceinline__ static uint32_t k_stride() { return kTileK; }
    __device__ __forceinline__ const float* row_scale(uint32_t row) const { return p.x_scale + row * kNumK; }
    __device__ __forceinline__ const float* weight_scale(uint32_t expert, uint32_t chunk, uint32_t half) const {
        return p.w13_scale + static_cast<uint64_t>((expert * 2 + half) * kNumChunks + chunk) * kNumK;
    }
    __device__ __forceinline__ void load_weights(uint8_t* target, uint64_t& full, uint32_t expert, uint32_t chunk, uint32_t k,
                                                 uint32_t half) const {
        const uint32_t row = ((expert * 2 + half) * kNumChunks + chunk) * kGroupSize;
        tma_multicast_2d(target, p.w13, full, k * kTileK, row, 0b11);
    }
};

// SwiGLU of the sums, quantised per token over the chunk's 128 channels, to global memory.
struct Activation {
    const Params& p;
    ActivationStorage& shared;

    static constexpr uint32_t kNone = ~0u;
    static constexpr uint32_t kPiecesOfRow = kGroupSize / 16;

    // Thread `row` has that row of this CTA's part of the tile: its choice, kNone if there is no such row.
    __device__ __forceinline__ uint32_t ahead(const PieceOfTile& piece) const {
        const uint32_t thread = registers::thread_index();
        const uint32_t rows = rows_per_cta(piece.num_rows), row = cluster::cta_rank() * rows + thread;
        return thread < rows && row < piece.num_rows ? p.sorted_choices[piece.first_row + row] : kNone;
    }

    __device__ __forceinline__ static uint32_t own_h_row(const PieceOfTile& piece) {
        return piece.first_h_row + cluster::cta_rank() * rows_per_cta(piece.num_rows) + registers::thread_index();
    }

    __device__ __forceinline__ void store_piece(const PieceOfTile& piece, uint32_t first_h_row, uint32_t row,
                                                uint32_t part) const {
        const uint32_t index = first_h_row + row;
        uint8_t* const target = p.h + (static_cast<uint64_t>(piece.column) * p.num_h_rows + index) * kGroupSize;
        *reinterpret_cast<uint4*>(target + (part ^ index % 8) * 16) =
            *reinterpret_cast<const uint4*>(shared.staged[row] + part * 16);
    }

    template <uint32_t kRows>
    __device__ __forceinline__ void finish(const PieceOfTile& piece, uint32_t choice, float (&gate)[kRows / 2],
                                           float (&up)[kRows / 2]) {
        const float weight = choice == kNone ? 0.f : p.topk_weights[choice] * p.routed_scaling_factor;
        const uint32_t thread = registers::thread_index(), warp = thread / 32, lane = thread % 32;
#pragma unroll
        for (uint32_t j = 0; j < kRows / 8; ++j) {
#pragma unroll
            for (uint32_t i = 4 * j; i < 4 * j + 4; ++i) gate[i] = p.form.swiglu(gate[i], up[i]);
            float left = fmaxf(fabsf(gate[4 * j]), fabsf(gate[4 * j + 2]));
            float right = fmaxf(fabsf(gate[4 * j + 1]), fabsf(gate[4 * j + 3]));
#pragma unroll
            for (uint32_t offset = 4; offset < 32; offset *= 2) {
                left = fmaxf(left, __shfl_xor_sync(~0u, left, offset));
                right = fmaxf(right, __shfl_xor_sync(~0u, right, offset));
            }
            if (j == 0) named_barrier(kMathBarrier, kNumMathThreads);  // the last item's `staged` has been stored
            if (lane < 4) *reinterpret_cast<float2*>(&shared.amax[warp][8 * j + 2 * lane]) = make_float2(left, right);
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        if (thread < kRows) {
            float amax = 0.f;
#pragma unroll
            for (uint32_t w = 0; w < kNumMathWarps; ++w) amax = fmaxf(amax, shared.amax[w][thread]);
            const float scale = p.form.scale(amax);
            shared.row_factor[thread] = 1.f / scale;
            if (choice != kNone) {
                const uint32_t row = own_h_row(piece);
                p.h_scale[static_cast<uint64_t>(row) * kNumChunks + piece.column] = scale * weight;
                if (piece.column == 0) p.destination[row] = kDeterministic ? choice : choice / p.top_k;
            }
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        const uint32_t channel = warp * 16 + lane / 4;  // and channel + 8
#pragma unroll
        for (uint32_t j = 0; j < kRows / 8; ++j) {
#pragma unroll
            for (uint32_t b = 0; b < 2; ++b) {
                const uint32_t row = 8 * j + 2 * (lane % 4) + b;
                const float inverse = shared.row_factor[row];
                const uint16_t packed = pack_e4m3x2(gate[4 * j + b] * inverse, gate[4 * j + 2 + b] * inverse);
                shared.staged[row][channel] = static_cast<uint8_t>(packed);
                shared.staged[row][channel + 8] = static_cast<uint8_t>(packed >> 8);
            }
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        const uint32_t rows = rows_per_cta(piece.num_rows), first = cluster::cta_rank() * rows;
        const uint32_t end = min(rows, max(piece.num_rows, first) - first);
        for (uint32_t i = thread; i < end * kPiecesOfRow; i += kNumMathThreads)
            store_piece(piece, piece.first_h_row + first, i / kPiecesOfRow, i % kPiecesOfRow);
    }

    // Thread (warp w, lane l) has rows 16 w + l / 4 and the one 8 below, and of each 8 channels 2 (l % 4) and the next.
    __device__ __forceinline__ void finish_tall(const PieceOfTile& piece, float (&gate)[kTallRows / 2],
                                                const float (&up)[kTallRows / 2]) {
        const uint32_t thread = registers::thread_index(), warp = thread / 32, lane = thread % 32;
        const uint32_t rows = rows_per_cta(piece.num_rows), first = cluster::cta_rank() * rows;
        const uint32_t end = min(rows, max(piece.num_rows, first) - first);
        uint32_t choice[2];
        float amax[2] = {}, weight[2];
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
            const uint32_t row = 16 * warp + lane / 4 + 8 * h;
            choice[h] = row < end ? p.sorted_choices[piece.first_row + first + row] : kNone;
            weight[h] = row < end ? p.topk_weights[choice[h]] * p.routed_scaling_factor : 0.f;
        }
        named_barrier(kMathBarrier, kNumMathThreads);  // the last item's `staged` has been stored
#pragma unroll
        for (uint32_t i = 0; i < kTallRows / 2; ++i) {
            gate[i] = p.form.swiglu(gate[i], up[i]);
            amax[i / 2 % 2] = fmaxf(amax[i / 2 % 2], fabsf(gate[i]));
        }
#pragma unroll
        for (uint32_t h = 0; h < 2; ++h) {
            const uint32_t row = 16 * warp + lane / 4 + 8 * h;
            amax[h] = fmaxf(amax[h], __shfl_xor_sync(~0u, amax[h], 1));
            amax[h] = fmaxf(amax[h], __shfl_xor_sync(~0u, amax[h], 2));
            const float scale = p.form.scale(amax[h]), inverse = 1.f / scale;
#pragma unroll
            for (uint32_t j = 0; j < kGroupSize / 8; ++j)
                *reinterpret_cast<uint16_t*>(&shared.staged[row][8 * j + 2 * (lane % 4)]) =
                    pack_e4m3x2(gate[4 * j + 2 * h] * inverse, gate[4 * j + 2 * h + 1] * inverse);
            if (lane % 4 == 0 && choice[h] != kNone) {
                const uint32_t h_row = piece.first_h_row + first + row;
                p.h_scale[static_cast<uint64_t>(h_row) * kNumChunks + piece.column] = scale * weight[h];
                if (piece.column == 0) p.destination[h_row] = kDeterministic ? choice[h] : choice[h] / p.top_k;
            }
        }
        __syncwarp();
#pragma unroll
        for (uint32_t i = lane; i < 16 * kPiecesOfRow; i += 32) {  // of this warp's rows
            const uint32_t row = 16 * warp + i / kPiecesOfRow;
            if (row < end) store_piece(piece, piece.first_h_row + first, row, i % kPiecesOfRow);
        }
    }
};

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) sm90_prefill_up(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    if (threadIdx.x == 0) {
        if (shared_address(shared_bytes) % 1024 != 0) __trap();  // the swizzle counts from 1024-byte boundaries
        prefetch_tensor_map(p.w13);
        init_ring(shared.load);
        mbarrier::fence_init();
    }
    shared.load.zeroing.init(p.out, p.num_out_bytes);
    cluster::sync();

    grid_dependency::wait();
    grid_dependency::launch_dependents();
    const Operands operands{p};
    const uint32_t num_tiles = p.tiles[0].expert;
    // A share waits only for later ones: they are the earlier CTAs, which are never held up by this one.
    const uint32_t num_shares = gridDim.x / kClusterSize;
    find_share<Cost<kNumK, kTall>, !kDeterministic, kNumThreads>(
        shared.share, shared.tail, num_shares - 1 - blockIdx.x / kClusterSize, num_shares, num_tiles * kNumChunks,
        [&](uint32_t item) { return operands.tile(item).num_rows; });
    if (threadIdx.x >= kNumMathThreads) {
        registers::decrease<kProducerRegisters>();
        Loader<Operands>(operands, shared.load).run(Pieces(shared.share, kNumK));
    } else {
        registers::increase<kMathRegisters>();
        if (blockIdx.x == 0) list_jobs(shared.jobs, p.tiles, p.num_experts, p.jobs);
        Math<kNumK, Activation>(shared.load, shared.share, Parts{p.part_sums, p.part_written},
                                Activation{p, shared.activation})
            .run();
    }
    __syncwarp();
    cluster::sync();  // a CTA's shared memory must outlive the other's last arrivals
}
