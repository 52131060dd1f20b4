// The down phase of large batches for a wide intermediate size: out += W2 . h, where h is what sm90_prefill_up.cu made and
// its scales hold the rows' weights.
//
// The same grouped product as the up phase, with the rows of h in place of tokens: an item is a tile of rows and 256
// columns of `out`. Items go by slabs of 512 columns: all tiles add to one slab, which stays in L2, before the next.
// sm90_prefill_down.cu keeps the weights of a slab in shared memory instead, where they fit.
//
// Set by the compiler's command line: HIDDEN_SIZE, NUM_CHUNKS (intermediate size / 128), BLOCK_M (64, 80, 96, 136), NUM_STAGES,
// DETERMINISTIC (items are never split, a row for each choice is stored instead of added to `out`), and what the launcher
// passes: SMEM_BYTES of shared memory and PARAMS_BYTES of parameters.
#include "numeric.cuh"
#include "prefill_math.cuh"
#include "registers.cuh"

constexpr uint32_t kHiddenSize = HIDDEN_SIZE;
constexpr uint32_t kNumK = NUM_CHUNKS;
constexpr bool kDeterministic = DETERMINISTIC;
constexpr uint32_t kColumns = 256;           // of an item
constexpr uint32_t kSlabItems = 2;           // of a tile in a slab
constexpr uint32_t kNumColumnBlocks = kHiddenSize / kGroupSize;
constexpr uint32_t kNumGroups = ceil_div(kHiddenSize, kColumns);

struct Params {
    TensorMap w2;  // [E * H, I], boxes of 128 rows; of each 16 the even ones first
    const uint8_t* h;
    const float* h_scale;
    const float* w2_scale;
    const uint32_t* destination;
    const Tile* tiles;
    float4* part_sums;
    uint32_t* part_written;
    uint16_t* out;
    uint32_t num_h_rows;
    uint8_t padding[60];  // alignment
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct SharedStorage {
    LoadStorage<kNumK> load;
    Share share;
    TailStorage tail;
};
static_assert(sizeof(SharedStorage) <= SMEM_BYTES, "the launcher reserves too little shared memory");

struct Operands {
    static constexpr uint32_t kNumK = ::kNumK;
    const Params& p;
    const uint32_t num_tiles;

    // Slab by slab, in each tile by tile; of the last slab a tile may have one item only.
    __device__ __forceinline__ uint32_t slab(uint32_t item) const { return item / (num_tiles * kSlabItems); }
    __device__ __forceinline__ uint32_t within_slab(uint32_t item) const { return item % (num_tiles * kSlabItems); }
    __device__ __forceinline__ static uint32_t items_per_tile(uint32_t slab) {
        return min(kSlabItems, kNumGroups - slab * kSlabItems);
    }
    __device__ __forceinline__ Tile tile(uint32_t item) const {
        return p.tiles[1 + within_slab(item) / items_per_tile(slab(item))];
    }
    __device__ __forceinline__ uint32_t column(uint32_t item) const {
        return slab(item) * kSlabItems + within_slab(item) % items_per_tile(slab(item));
    }
    __device__ __forceinline__ uint32_t source_row(const Tile& tile, uint32_t row) const {
        return first_h_row(tile.expert, tile.first_row) + row;
    }
    __device__ __forceinline__ void begin_row(const Tile&, uint32_t, uint32_t, uint32_t) const {}
    __device__ __forceinline__ const uint4* pieces() const { return reinterpret_cast<const uint4*>(p.h); }
    __device__ __forceinline__ static uint32_t row_piece(uint32_t row, uint32_t piece) {
        return row * (kGroupSize / 16) + (piece ^ row % 8);
    }
    __device__ __forceinline__ uint32_t k_stride() const { return p.num_h_rows * (kGroupSize / 16); }
    __device__ __forceinline__ const float* row_scale(uint32_t row) const {
        return p.h_scale + static_cast<uint64_t>(row) * kNumK;
    }
    __device__ __forceinline__ const float* weight_scale(uint32_t expert, uint32_t group, uint32_t half) const {
        const uint32_t block = min(group * 2 + half, kNumColumnBlocks - 1);
        return p.w2_scale + static_cast<uint64_t>(expert * kNumColumnBlocks + block) * kNumK;
    }
    __device__ __forceinline__ void load_weights(uint8_t* target, uint64_t& full, uint32_t expert, uint32_t group, uint32_t k,
                                                 uint32_t half, uint64_t policy) const {
        const uint32_t rows_of_16 = (expert * kHiddenSize + group * kColumns + half * kGroupSize) / 16;
        tma_multicast_4d(target, p.w2, full, k * kTileK, 0, 0, rows_of_16, 0b11, policy);
    }
};

// The sums to `out`, as bf16, 8 adjacent columns at a time. Of each 16 weight rows of a tile row 8 h + g is column 2 g + h.
struct Addition {
    const Params& p;

    // Where row `row` of this CTA's part of the tile goes; null if there is none.
    __device__ __forceinline__ uint16_t* target(const PieceOfTile& piece, uint32_t row) const {
        if (row >= piece.rows_of_cta()) return nullptr;
        return p.out + static_cast<uint64_t>(p.destination[piece.first_h_row + piece.first_of_cta() + row]) * kHiddenSize +
               piece.column * kColumns;
    }

    __device__ __forceinline__ static void add(uint16_t* target, uint32_t column, uint4 values) {
        if constexpr (kDeterministic)
            store_bf16x8_if(target != nullptr, target + column, values);
        else
            add_bf16x8_if(target != nullptr, target + column, values);
    }

    __device__ __forceinline__ static bool within(uint32_t group, uint32_t half) {
        return kHiddenSize % kColumns == 0 || group * 2 + half < kNumColumnBlocks;
    }

    // A lane has two adjacent columns of four rows. Four lanes swap, and each has 8 columns of one.
    template <uint32_t kCount>
    __device__ __forceinline__ void finish(const PieceOfTile& piece, uint32_t rows, const float (&first)[kCount],
                                           const float (&second)[kCount]) {
        const uint32_t thread = registers::thread_index(), lane = thread % 32;
        const bool odd = lane & 4, upper = lane & 8;
        const uint32_t column = thread / 32 * 16 + lane / 16 * 8;
#pragma unroll
        for (uint32_t i = 0; i < ceil_div(kCount, 8u); ++i) {
            if (16 * i >= rows) break;
            uint16_t* const row = target(piece, 16 * i + 8 * upper + 2 * (lane % 4) + odd);
#pragma unroll
            for (uint32_t half = 0; half < 2; ++half) {
                const float(&sum)[kCount] = half == 0 ? first : second;
                uint32_t pairs[4];
#pragma unroll
                for (uint32_t j = 0; j < 4; ++j) {
                    const uint32_t at = 8 * i + 4 * (j / 2) + j % 2;
                    pairs[j] = at < kCount ? pack_bf16x2(sum[at], sum[at + 2]) : 0u;
                }
                uint2 own[2];  // 4 columns of two rows
#pragma unroll
                for (uint32_t j = 0; j < 2; ++j) {
                    const uint32_t even_pair = pairs[2 * j], odd_pair = pairs[2 * j + 1];
                    const uint32_t other = __shfl_xor_sync(~0u, odd ? even_pair : odd_pair, 4);
                    own[j] = odd ? make_uint2(other, odd_pair) : make_uint2(even_pair, other);
                }
                const uint2 sent = upper ? own[0] : own[1], kept = upper ? own[1] : own[0];
                const uint2 other = make_uint2(__shfl_xor_sync(~0u, sent.x, 8), __shfl_xor_sync(~0u, sent.y, 8));
                if (within(piece.column, half))
                    add(row, half * kGroupSize + column, upper ? make_uint4(other.x, other.y, kept.x, kept.y)
                                                               : make_uint4(kept.x, kept.y, other.x, other.y));
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) sm90_prefill_down_wide(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    if (threadIdx.x == 0) {
        if (shared_address(shared_bytes) % 1024 != 0) __trap();  // the swizzle counts from 1024-byte boundaries
        prefetch_tensor_map(p.w2);
        init_ring(shared.load);
        mbarrier::fence_init();
    }
    cluster::sync();

    grid_dependency::wait();
    grid_dependency::launch_dependents();
    const Operands operands{p, p.tiles[0].expert};
    // A share waits only for later ones: they are the earlier CTAs, which are never held up by this one.
    const uint32_t num_shares = gridDim.x / kClusterSize;
    find_share<Cost<kNumK>, !kDeterministic>(
        shared.share, shared.tail, num_shares - 1 - blockIdx.x / kClusterSize, num_shares, operands.num_tiles * kNumGroups,
        [&](uint32_t item) { return operands.tile(item).num_rows; }, Nothing{});
    if (threadIdx.x >= kNumMathThreads) {
        registers::decrease<kProducerRegisters>();
        Loader<Operands>(operands, shared.load).run(Pieces(shared.share, kNumK));
    } else {
        registers::increase<kMathRegisters>();
        Math<kNumK, Addition>(shared.load, shared.share, Parts{p.part_sums, p.part_written}, Addition{p}).run();
    }
    __syncwarp();
    cluster::sync();  // a CTA's shared memory must outlive the other's last arrivals
}
