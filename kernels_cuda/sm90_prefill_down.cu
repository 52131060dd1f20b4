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
// A shared expert has a row for nearly every token (STORES_LAST). Its jobs come some slabs ahead of the others', and where a
// token has it once its row is stored instead of added, so that no zeros have to be. The other jobs of a slab wait until all
// of its are done, which they would for long if it were but two slabs: by then CTAs hold, or have loaded, most of them.
//
// Weight rows are so ordered in shared memory that a thread's sums are 8 adjacent columns, and two lanes swap halves of two
// rows so that 8 lanes add to 128 adjacent bytes.
//
// On an H200, dsv3_tp8: 280 us at M=4096, 481 at M=8192, where it adds 1.06 GB, held by the traffic between the halves of L2;
// some 15 and 20 less since rows are stored first: experiments/2026-11-23_prefill, 2026-11-27_prefill_tiles for the slabs,
// 2026-11-28_prefill_steps for the zeros, 2026-11-28_stored_first.
//
// Set by the compiler's command line: HIDDEN_SIZE, NUM_CHUNKS (intermediate size / 128: 1 or 2), NUM_WARPGROUPS that
// multiply (2, 3), BLOCK_N (64, 128) columns of a product, SLAB_COLUMNS (128..512), ZEROED_COLUMNS that the up phase has
// zeroed, DETERMINISTIC (a row for each choice is stored instead of added to `out`), STORES_LAST, and what the launcher passes:
// SMEM_BYTES of shared memory and PARAMS_BYTES of parameters.
#include "cluster.cuh"
#include "exchange.cuh"
#include "numeric.cuh"
#include "prefill_down_load.cuh"
#include "registers.cuh"
#include "wgmma.cuh"

struct Math {
    static constexpr uint32_t kStored = 1u << 31;  // with a row's target: it is stored and not added
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

    // A row of the block that is `valid`, and stored if `target` says so.
    __device__ __forceinline__ void give(Giving giving, bool valid, uint32_t target, uint16_t* address, uint4 values) {
        if (kDeterministic) {
            store_bf16x8_if(valid, address, values);
        } else if (!kStoresLast || giving == Giving::kAdd) {
            add_bf16x8_if(valid, address, values);
        } else {
            store_bf16x8_if(valid && target & kStored, address, values);
            add_bf16x8_if(valid && !(target & kStored), address, values);
        }
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

    __device__ __forceinline__ uint32_t stored_flag(Giving giving, uint32_t h_row) const {
        const bool adds = giving == Giving::kStoreWhereOnce && times_of_last(p, p.destination[h_row]) != 1;
        return adds ? 0 : kStored;
    }

    __device__ __forceinline__ void project(const Block& block, uint32_t index, uint32_t num_rows, uint32_t first_slot,
                                            bool last, Giving giving) {
        float sums[kNumChunks][kBlockN / 2];
        const uint32_t last_row = num_rows - 1;
        const uint32_t upper = block.first_row + min(row_in_block, last_row);
        const uint32_t lower = block.first_row + min(row_in_block + 8, last_row);
        const bool stores = kStoresLast && giving != Giving::kAdd;
        const uint32_t upper_flag = stores ? stored_flag(giving, upper) : 0, lower_flag = stores ? stored_flag(giving, lower) : 0;
        wait_weights(first_slot);
        multiply(sums, index, first_slot, 0);

        // What follows arrives while the first product is under way.
        const uint32_t upper_target = p.destination[upper] | upper_flag, lower_target = p.destination[lower] | lower_flag;
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
        const uint32_t target[4] = {is_odd ? upper_other : upper_target, is_odd ? upper_target : upper_other,
                                    is_odd ? lower_other : lower_target, is_odd ? lower_target : lower_other};
        uint16_t* address[4];
        bool valid[4];
#pragma unroll
        for (uint32_t i = 0; i < 4; ++i) {
            address[i] = columns + static_cast<uint64_t>(target[i] & ~kStored) * kHiddenSize;
            valid[i] = even_row + i % 2 + i / 2 * 8 < num_rows;
        }

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
                give(giving, valid[0], target[0], address[0] + offset, even);
                give(giving, valid[1], target[1], address[1] + offset, odd);
#pragma unroll
                for (uint32_t j = 0; j < 8; ++j) pieces[j / 4][j % 4] = lower_pairs[8 * half + j];
                swap_rows(pieces, even, odd);
                give(giving, valid[2], target[2], address[2] + offset, even);
                give(giving, valid[3], target[3], address[3] + offset, odd);
            }
        }
        if (stores) {
            __syncwarp();
            if (lane == 0) exchange::count(p.stored + block.first_quarter / kQuarters);
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
            const Giving giving = static_cast<Giving>(registers::uniform(static_cast<uint32_t>(block.giving)));
            if (num_rows == Block::kEnd) return;
            if (num_rows > 0) {
                project(block, index, num_rows, first_slot, last, giving);
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
    if (threadIdx.x >= kNumMathThreads) {
        registers::decrease<kProducerRegisters>();
        const uint32_t warp = threadIdx.x / 32 - kNumMathThreads / 32;
        if (warp < 2 && threadIdx.x % 32 == 0) exchange::await(p.jobs_listed);
        __syncwarp();
        if (threadIdx.x == kNumMathThreads) Loader(p, shared).run();
        if (warp == 1) Zeroing{p, shared}.run();
    } else {
        registers::increase<kMathRegisters>();
        grid_dependency::wait();
        grid_dependency::launch_dependents();
        Math(p, shared).run();
    }
}
