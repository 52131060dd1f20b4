// The down phase of large batches: out += W2 . h, where h is what sm90_prefill_up.cu made and its scales hold the rows'
// weights.
//
// Additions to `out` take most of the time, and they are fastest in L2. So the work goes by slabs of up to 512 columns: all
// rows of all experts add to one slab before the next. A job is a slab and up to 448 rows of one expert: the slab's weights
// stay in shared memory while blocks of 64 rows pass through. Warpgroups take blocks in turn; CTAs take jobs by tickets,
// larger ones first. Slabs of 256 columns do best: half of the weights of 512, so that those of more jobs are on their way.
//
// `out` is zeroed slab by slab, not long before it is added to: zeros that wait for the additions in L2 need not go to
// memory and come back. The first slabs were zeroed by the up phase; when a CTA comes to a slab, one of its warps zeroes
// its part of a later one. A CTA begins a slab when all have zeroed their parts, which they do whatever they wait for.
//
// Weight rows are so ordered in shared memory that a thread's sums are 8 adjacent columns, and two lanes swap halves of two
// rows so that 8 lanes add to 128 adjacent bytes.
//
// On an H200, dsv3_tp8: 280 us at M=4096, 481 at M=8192, where it adds 1.06 GB, held by the traffic between the halves of L2:
// experiments/2026-11-23_prefill, 2026-11-27_prefill_tiles for the slabs, 2026-11-28_prefill_steps for the zeros.
//
// Set by the compiler's command line: HIDDEN_SIZE, NUM_CHUNKS (intermediate size / 128: 1 or 2), NUM_WARPGROUPS that
// multiply (2, 3), BLOCK_N (64, 128) columns of a product, SLAB_COLUMNS (128..512), ZEROED_COLUMNS that the up phase has
// zeroed, DETERMINISTIC (a row for each choice is stored instead of added to `out`), and what the launcher passes: SMEM_BYTES
// of shared memory and PARAMS_BYTES of parameters.
#include "cluster.cuh"
#include "copy.cuh"
#include "exchange.cuh"
#include "mbarrier.cuh"
#include "numeric.cuh"
#include "registers.cuh"
#include "wgmma.cuh"

constexpr uint32_t kHiddenSize = HIDDEN_SIZE;
constexpr uint32_t kNumChunks = NUM_CHUNKS;
constexpr uint32_t kNumWarpgroups = NUM_WARPGROUPS;
constexpr uint32_t kBlockN = BLOCK_N;
constexpr bool kDeterministic = DETERMINISTIC;

constexpr uint32_t kTileK = 128;                      // bytes of K in a tile: one swizzle row
constexpr uint32_t kQuarter = 128;                    // columns that one slot of weights gives
constexpr uint32_t kNumQuarters = kHiddenSize / kQuarter;
constexpr uint32_t kQuarters = SLAB_COLUMNS / kQuarter;   // of a slab
constexpr uint32_t kNumSlabs = kNumQuarters / kQuarters;
constexpr uint32_t kSlabsZeroedBefore = DETERMINISTIC ? kNumSlabs : ZEROED_COLUMNS / SLAB_COLUMNS;
constexpr uint32_t kStepsPerQuarter = kQuarter / kBlockN;
constexpr uint32_t kBlockRows = 64;                   // the M of a wgmma
constexpr uint32_t kQuarterBytes = kQuarter * kTileK; // of one chunk
constexpr uint32_t kBlockBytes = kBlockRows * kTileK; // of one chunk
constexpr uint32_t kNumSlots = 8 / kNumChunks;
constexpr uint32_t kNumBlocks = (kNumChunks == 1 ? 9 : 6) / kNumWarpgroups * kNumWarpgroups;  // a place has one taker
constexpr uint32_t kNumMathThreads = kNumWarpgroups * 128;
constexpr uint32_t kNumThreads = kNumMathThreads + 128;

// 64 K registers.
constexpr uint32_t kProducerRegisters = kNumWarpgroups == 2 ? 56 : 32;
constexpr uint32_t kMathRegisters = kNumWarpgroups == 2 ? 224 : 160;

static_assert(kNumChunks == 1 || kNumChunks == 2, "the weights of a slab stay in shared memory");
static_assert(kQuarters <= 4 && kNumQuarters % kQuarters == 0, "slabs are of up to 4 quarters, and all alike");
static_assert(kNumBlocks % kNumWarpgroups == 0, "who skips a phase of a barrier may take a later one for it");
static_assert(kNumBlocks >= 2 * kNumWarpgroups, "the first blocks of a job are loaded before the rest of its weights");

struct Params {
    TensorMap w2;  // [E * H, I], boxes of 128 rows: of each 32, column 8 c + 2 j + b is row 8 j + 2 c + b
    const uint8_t* h;
    const float* h_scale;
    const float* w2_scale;
    const uint32_t* destination;
    const int4* jobs;  // see prefill_jobs.cuh
    uint32_t* ticket_counter;  // 0 at the start
    uint32_t* zeroed;  // [slabs]: CTAs that have zeroed their part, 0 at the start
    uint16_t* out;
    uint32_t num_h_rows;
    uint32_t num_tokens;
    uint8_t padding[56];  // alignment
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the launcher's struct differs");

struct Block {
    static constexpr uint32_t kEnd = ~0u;

    uint32_t first_row;
    uint32_t num_rows;  // 0: there is only `last` to be done
    uint32_t first_quarter;
    uint32_t expert;
    uint32_t first_slot;  // counted from the start of the kernel
    uint32_t last;        // the warpgroup's last block with these weights
};

struct SharedStorage {
    alignas(1024) uint8_t weights[kNumSlots][kNumChunks][kQuarterBytes];
    alignas(1024) uint8_t rows[kNumBlocks][kNumChunks][kBlockBytes];
    Block block[kNumBlocks];
    uint64_t weights_full[kNumSlots];
    uint64_t weights_empty[kNumSlots];
    uint64_t block_full[kNumBlocks];
    uint64_t block_empty[kNumBlocks];
    uint32_t begun_slab;  // the last that the loader has come to; kNumSlabs at its end
};
static_assert(sizeof(SharedStorage) <= SMEM_BYTES, "the launcher reserves too little shared memory");

// One thread: takes tickets, loads the weights of each job and its blocks.
struct Loader {
    const Params& p;
    SharedStorage& shared;
    const uint32_t num_jobs, num_tickets;
    RingPosition<kNumBlocks> ring;
    uint32_t next_slot = 0;
    uint32_t first_warpgroup = 0;  // that gets the next job's first block

    struct Job {
        uint32_t slab;
        int4 rows;  // expert, first row, number of rows
    };

    __device__ __forceinline__ Loader(const Params& p, SharedStorage& shared)
        : p(p), shared(shared), num_jobs(p.jobs[0].x), num_tickets(num_jobs * kNumSlabs) {}

    __device__ __forceinline__ uint32_t take() const { return gridDim.x + atomicAdd(p.ticket_counter, 1u); }

    __device__ __forceinline__ Job job(uint32_t ticket) const {
        if (ticket >= num_tickets) return {};
        return {ticket / num_jobs, p.jobs[1 + ticket % num_jobs]};
    }

    __device__ __forceinline__ void load_quarter(const Job& job, uint32_t quarter) {
        const uint32_t slot = next_slot % kNumSlots;
        mbarrier::wait(shared.weights_empty[slot], (next_slot / kNumSlots + 1) % 2);
        ++next_slot;
        uint64_t& full = shared.weights_full[slot];
        mbarrier::arrive_expect_bytes(full, kNumChunks * kQuarterBytes);
        const uint32_t row = job.rows.x * kHiddenSize + (job.slab * kQuarters + quarter) * kQuarter;
#pragma unroll
        for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk)
            tma_load_5d(shared.weights[slot][chunk], p.w2, full, chunk * kTileK, 0, 0, 0, row / 32, evict_first_policy());
    }

    // Block `index` of those that the warpgroups take in turn; num_blocks is a multiple of their number.
    __device__ __forceinline__ void load_block(const Job& job, uint32_t index, uint32_t num_blocks, uint32_t first_slot) {
        const uint32_t turn = index % kNumWarpgroups;
        const uint32_t position = index - turn + (turn + kNumWarpgroups - first_warpgroup) % kNumWarpgroups;
        const uint32_t before = min(position * kBlockRows, static_cast<uint32_t>(job.rows.z));
        const uint32_t num_rows = min(kBlockRows, job.rows.z - before), first_row = job.rows.y + before;
        mbarrier::wait(shared.block_empty[ring.stage], ring.parity ^ 1);
        shared.block[ring.stage] = {first_row,
                                    num_rows,
                                    job.slab * kQuarters,
                                    static_cast<uint32_t>(job.rows.x),
                                    first_slot,
                                    index + kNumWarpgroups >= num_blocks};
        uint64_t& full = shared.block_full[ring.stage];
        if (num_rows == 0) {
            mbarrier::arrive(full);
        } else {
            mbarrier::arrive_expect_bytes(full, kNumChunks * kBlockBytes);
#pragma unroll
            for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk)
                bulk_load(shared.rows[ring.stage][chunk],
                          p.h + (static_cast<uint64_t>(chunk) * p.num_h_rows + first_row) * kTileK, kBlockBytes, full);
        }
        ring.advance();
    }

    __device__ __forceinline__ void begin(uint32_t slab) {
        exchange::raise(shared.begun_slab, slab);
        if (slab >= kSlabsZeroedBefore) exchange::await_count(p.zeroed + slab, gridDim.x);
    }

    __device__ __forceinline__ void run() {
        uint32_t ticket = blockIdx.x, next_ticket = take();
        Job current = job(ticket);
        while (ticket < num_tickets) {
            if (current.slab != shared.begun_slab) begin(current.slab);
            const uint32_t ticket_after = take();
            const Job next = job(next_ticket);
            const uint32_t blocks_in_job = ceil_div(static_cast<uint32_t>(current.rows.z), kBlockRows);
            const uint32_t num_blocks = ceil_div(blocks_in_job, kNumWarpgroups) * kNumWarpgroups;
            const uint32_t first_slot = next_slot;
            load_quarter(current, 0);
            for (uint32_t index = 0; index < kNumWarpgroups; ++index)
                load_block(current, index, num_blocks, first_slot);
            for (uint32_t quarter = 1; quarter < kQuarters; ++quarter) load_quarter(current, quarter);
            for (uint32_t index = kNumWarpgroups; index < num_blocks; ++index)
                load_block(current, index, num_blocks, first_slot);
            first_warpgroup = (first_warpgroup + blocks_in_job) % kNumWarpgroups;
            ticket = next_ticket, next_ticket = ticket_after, current = next;
        }
        exchange::raise(shared.begun_slab, kNumSlabs);
        for (uint32_t warpgroup = 0; warpgroup < kNumWarpgroups; ++warpgroup, ring.advance()) {
            mbarrier::wait(shared.block_empty[ring.stage], ring.parity ^ 1);
            shared.block[ring.stage].num_rows = Block::kEnd;
            mbarrier::arrive(shared.block_full[ring.stage]);
        }
    }
};

// One warp.
struct Zeroing {
    const Params& p;
    SharedStorage& shared;

    __device__ __forceinline__ void run() const {
        constexpr uint32_t kVectors = kQuarters * kQuarter / 8;  // of 8 columns, in a row of a slab
        const uint32_t part = ceil_div(p.num_tokens, gridDim.x), first = min(part * blockIdx.x, p.num_tokens);
        const uint32_t num_rows = min(part, p.num_tokens - first);
#pragma unroll 1
        for (uint32_t slab = kSlabsZeroedBefore; slab < kNumSlabs; ++slab) {
            exchange::await_raised(shared.begun_slab, slab - kSlabsZeroedBefore);
            uint16_t* row = p.out + static_cast<uint64_t>(first) * kHiddenSize + slab * kQuarters * kQuarter;
#pragma unroll 2
            for (uint32_t i = 0; i < num_rows; ++i, row += kHiddenSize)
                for (uint32_t vector = threadIdx.x % 32; vector < kVectors; vector += 32)
                    *reinterpret_cast<uint4*>(row + vector * 8) = make_uint4(0, 0, 0, 0);
            __syncwarp();
            if (threadIdx.x % 32 == 0) exchange::count(p.zeroed + slab);
        }
    }
};

struct Math {
    const Params& p;
    SharedStorage& shared;
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t row_in_block = threadIdx.x / 32 % 4 * 16 + lane / 4;  // and 8 below

    __device__ __forceinline__ Math(const Params& p, SharedStorage& shared) : p(p), shared(shared) {}

    __device__ __forceinline__ void wait_weights(uint32_t slot) {
        mbarrier::wait(shared.weights_full[slot % kNumSlots], slot / kNumSlots % 2);
    }

    // One step: 64 rows by kBlockN columns, each chunk by itself.
    __device__ __forceinline__ void multiply(float (&sums)[kNumChunks][kBlockN / 2], uint32_t block, uint32_t slot,
                                             uint32_t step) {
        wgmma::fence();
#pragma unroll
        for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
            const uint64_t rows = wgmma::descriptor(shared.rows[block][chunk]);
            const uint64_t weights = wgmma::descriptor(shared.weights[slot % kNumSlots][chunk] + step * kBlockN * kTileK);
            wgmma::Product<kBlockN>::zero(sums[chunk], rows, weights);
#pragma unroll
            for (uint32_t k = 1; k < 4; ++k)
                wgmma::Product<kBlockN>::add(sums[chunk], rows + k * wgmma::kStepK, weights + k * wgmma::kStepK);
        }
        wgmma::commit();
    }

    __device__ __forceinline__ void add(bool valid, uint16_t* address, uint4 values) {
        if constexpr (kDeterministic)
            store_bf16x8_if(valid, address, values);
        else
            add_bf16x8_if(valid, address, values);
    }

    // Lanes 4 apart have the same columns of two rows, as two halves of 64: each keeps one half and gets the same half of
    // the other row. `even` is the even row's half and `odd` the odd row's.
    __device__ __forceinline__ void swap_rows(const uint32_t (&halves)[2][4], uint4& even, uint4& odd) const {
        const bool is_odd = lane & 4;
        uint32_t kept[4], got[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            kept[i] = is_odd ? halves[1][i] : halves[0][i];
            got[i] = __shfl_xor_sync(~0u, is_odd ? halves[0][i] : halves[1][i], 4);
        }
        const uint4 own = make_uint4(kept[0], kept[1], kept[2], kept[3]);
        const uint4 other = make_uint4(got[0], got[1], got[2], got[3]);
        even = is_odd ? other : own;
        odd = is_odd ? own : other;
    }

    __device__ __forceinline__ void project(const Block& block, uint32_t index, uint32_t num_rows, uint32_t first_slot,
                                            bool last) {
        float sums[kNumChunks][kBlockN / 2];
        wait_weights(first_slot);
        multiply(sums, index, first_slot, 0);

        // What follows arrives while the first product is under way.
        const uint32_t last_row = num_rows - 1;
        const uint32_t upper = block.first_row + min(row_in_block, last_row);
        const uint32_t lower = block.first_row + min(row_in_block + 8, last_row);
        uint32_t upper_target = p.destination[upper], lower_target = p.destination[lower];
        float upper_scale[kNumChunks], lower_scale[kNumChunks];
#pragma unroll
        for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
            upper_scale[chunk] = p.h_scale[static_cast<uint64_t>(upper) * kNumChunks + chunk];
            lower_scale[chunk] = p.h_scale[static_cast<uint64_t>(lower) * kNumChunks + chunk];
        }
        // A lane has one of the slab's weight scales; they are handed round.
        const uint32_t scale = min(lane, kQuarters * kNumChunks - 1);
        const float weight_scales =
            p.w2_scale[static_cast<uint64_t>(block.expert * kNumQuarters + block.first_quarter) * kNumChunks + scale];
        const bool is_odd = lane & 4;
        const uint32_t even_row = row_in_block & ~1u;
        const uint32_t upper_other = __shfl_xor_sync(~0u, upper_target, 4), lower_other = __shfl_xor_sync(~0u, lower_target, 4);
        uint16_t* const columns = p.out + block.first_quarter * kQuarter + lane % 4 * 8 + (is_odd ? 32 : 0);
        const auto address = [&](uint32_t target) { return columns + static_cast<uint64_t>(target) * kHiddenSize; };
        uint16_t* const upper_even = address(is_odd ? upper_other : upper_target);
        uint16_t* const upper_odd = address(is_odd ? upper_target : upper_other);
        uint16_t* const lower_even = address(is_odd ? lower_other : lower_target);
        uint16_t* const lower_odd = address(is_odd ? lower_target : lower_other);

        float upper_factor[kNumChunks], lower_factor[kNumChunks];
#pragma unroll
        for (uint32_t i = 0; i < kQuarters * kStepsPerQuarter; ++i) {
            const uint32_t quarter = i / kStepsPerQuarter, step = i % kStepsPerQuarter, slot = first_slot + quarter;
            if (step == 0) {
#pragma unroll
                for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
                    const float weight_scale = __shfl_sync(~0u, weight_scales, quarter * kNumChunks + chunk);
                    upper_factor[chunk] = upper_scale[chunk] * weight_scale;
                    lower_factor[chunk] = lower_scale[chunk] * weight_scale;
                }
            }
            uint32_t upper_pairs[kBlockN / 8], lower_pairs[kBlockN / 8];
            wgmma::wait<0>();
#pragma unroll
            for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) wgmma::pin(sums[chunk]);
#pragma unroll
            for (uint32_t j = 0; j < kBlockN / 8; ++j) {
                float value[4] = {};
#pragma unroll
                for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
#pragma unroll
                    for (uint32_t v = 0; v < 4; ++v)
                        value[v] += sums[chunk][4 * j + v] * (v < 2 ? upper_factor[chunk] : lower_factor[chunk]);
                }
                upper_pairs[j] = pack_bf16x2(value[0], value[1]);
                lower_pairs[j] = pack_bf16x2(value[2], value[3]);
                asm volatile("" : "+r"(upper_pairs[j]), "+r"(lower_pairs[j])::"memory");  // before the next product
            }
            if (step + 1 < kStepsPerQuarter) {
                multiply(sums, index, slot, step + 1);
            } else {
                if (last) mbarrier::arrive_warp(shared.weights_empty[slot % kNumSlots]);
                if (quarter + 1 < kQuarters) {
                    wait_weights(slot + 1);
                    multiply(sums, index, slot + 1, 0);
                }
            }
#pragma unroll
            for (uint32_t half = 0; half < kBlockN / 64; ++half) {
                const uint32_t offset = i * kBlockN + half * 64;
                uint32_t pieces[2][4];
                uint4 even, odd;
#pragma unroll
                for (uint32_t j = 0; j < 8; ++j) pieces[j / 4][j % 4] = upper_pairs[8 * half + j];
                swap_rows(pieces, even, odd);
                add(even_row < num_rows, upper_even + offset, even);
                add(even_row + 1 < num_rows, upper_odd + offset, odd);
#pragma unroll
                for (uint32_t j = 0; j < 8; ++j) pieces[j / 4][j % 4] = lower_pairs[8 * half + j];
                swap_rows(pieces, even, odd);
                add(even_row + 8 < num_rows, lower_even + offset, even);
                add(even_row + 9 < num_rows, lower_odd + offset, odd);
            }
        }
    }

    __device__ __forceinline__ void run() {
        for (uint32_t entry = registers::uniform(threadIdx.x / 128);; entry += kNumWarpgroups) {
            const uint32_t index = entry % kNumBlocks;
            mbarrier::wait(shared.block_full[index], entry / kNumBlocks % 2);
            // Products must not be under way where the compiler sees a warp diverge.
            const Block& block = shared.block[index];
            const uint32_t num_rows = registers::uniform(block.num_rows), first_slot = registers::uniform(block.first_slot);
            const bool last = registers::uniform(block.last);
            if (num_rows == Block::kEnd) return;
            if (num_rows > 0) {
                project(block, index, num_rows, first_slot, last);
            } else if (last) {
#pragma unroll 1
                for (uint32_t slot = first_slot; slot < first_slot + kQuarters; ++slot) {
                    wait_weights(slot);
                    mbarrier::arrive_warp(shared.weights_empty[slot % kNumSlots]);
                }
            }
            mbarrier::arrive_warp(shared.block_empty[index]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) sm90_prefill_down(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
    if (threadIdx.x == 0) {
        if (shared_address(shared_bytes) % 1024 != 0) __trap();  // the swizzle counts from 1024-byte boundaries
        prefetch_tensor_map(p.w2);
        shared.begun_slab = 0;
        for (uint32_t slot = 0; slot < kNumSlots; ++slot) {
            mbarrier::init(shared.weights_full[slot], 1);
            mbarrier::init(shared.weights_empty[slot], kNumWarpgroups * 4 * mbarrier::kArrivalsPerWarp);
        }
        for (uint32_t block = 0; block < kNumBlocks; ++block) {
            mbarrier::init(shared.block_full[block], 1);
            mbarrier::init(shared.block_empty[block], 4 * mbarrier::kArrivalsPerWarp);
        }
        mbarrier::fence_init();
    }
    __syncthreads();
    grid_dependency::wait();
    grid_dependency::launch_dependents();
    if (threadIdx.x >= kNumMathThreads) {
        registers::decrease<kProducerRegisters>();
        if (threadIdx.x == kNumMathThreads) Loader(p, shared).run();
        if (threadIdx.x / 32 == kNumMathThreads / 32 + 1) Zeroing{p, shared}.run();
    } else {
        registers::increase<kMathRegisters>();
        Math(p, shared).run();
    }
}
