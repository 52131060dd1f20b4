// The producers of sm90_prefill_down.cu: tickets, weights and blocks of rows; and zeros in `out`.
#pragma once
#include "cluster.cuh"
#include "copy.cuh"
#include "exchange.cuh"
#include "prefill_down_storage.cuh"

// One thread, when jobs are listed: takes tickets, loads the weights of each job and its blocks.
struct Loader {
    const Params& p;
    SharedStorage& shared;
    const uint32_t num_jobs, num_ahead, num_slabs_ahead, num_tickets;
    RingPosition<kNumBlocks> ring;
    uint32_t next_slot = 0;
    uint32_t first_warpgroup = 0;  // that gets the next job's first block
    uint32_t ready_slab = 0;       // whose `out` waits for additions
    Giving giving_ahead = Giving::kAdd;

    struct Job {
        uint32_t begun_slab, slab;  // the same unless it is ahead
        int4 rows;                  // expert, first row, number of rows: 0 where there is nothing to do
    };

    __device__ __forceinline__ Loader(const Params& p, SharedStorage& shared) : Loader(p, shared, p.jobs[0]) {}
    __device__ __forceinline__ Loader(const Params& p, SharedStorage& shared, int4 counts)
        : p(p), shared(shared), num_jobs(counts.x), num_ahead(kStoresLast ? counts.y : 0),
          num_slabs_ahead(slabs_ahead(counts.w)), num_tickets(num_ahead * num_slabs_ahead + num_jobs * kNumSlabs) {}

    __device__ __forceinline__ uint32_t take() const { return gridDim.x + atomicAdd(p.ticket_counter, 1u); }

    // First those of the last expert in the first slabs, then slab by slab all jobs, of which its are ahead.
    __device__ __forceinline__ Job job(uint32_t ticket) const {
        if (ticket >= num_tickets) return {};
        if (ticket < num_ahead * num_slabs_ahead) return {0, ticket / num_ahead, p.jobs[1 + ticket % num_ahead]};
        ticket -= num_ahead * num_slabs_ahead;
        const uint32_t slab = ticket / num_jobs, index = ticket % num_jobs;
        if (index >= num_ahead) return {slab, slab, p.jobs[1 + index]};
        const uint32_t slab_ahead = slab + num_slabs_ahead;
        if (slab_ahead >= kNumSlabs) return {};
        return {slab, slab_ahead, p.jobs[1 + index]};
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
    __device__ __forceinline__ void load_block(const Job& job, Giving giving, uint32_t index, uint32_t num_blocks,
                                               uint32_t first_slot) {
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
                                    index + kNumWarpgroups >= num_blocks,
                                    giving};
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

    // Waits until `out` is ready for what the job gives it: tells how.
    __device__ __forceinline__ Giving begin(const Job& job) {
        if (job.begun_slab != shared.begun_slab) exchange::raise(shared.begun_slab, job.begun_slab);
        if (job.slab < kSlabsZeroedBefore) return Giving::kAdd;
        if (kStoresLast && job.slab != job.begun_slab) {
            if (giving_ahead == Giving::kAdd) {
                exchange::await_count(p.looked, gridDim.x);
                giving_ahead = p.looked[1] ? Giving::kStoreWhereOnce : Giving::kStore;
            }
            if (giving_ahead == Giving::kStoreWhereOnce) exchange::await_count(p.zeroed + job.slab, gridDim.x);
            return giving_ahead;
        }
        if (job.slab != ready_slab) {
            exchange::await_count(p.zeroed + job.slab, gridDim.x);
            if (kStoresLast) exchange::await_count(p.stored + job.slab, p.jobs[0].z * kWarpsOfBlock);
            ready_slab = job.slab;
        }
        return Giving::kAdd;
    }

    __device__ __forceinline__ void load_weights(const Job& job) {
#pragma unroll 1
        for (uint32_t quarter = 0; quarter < kQuarters; ++quarter) load_quarter(job, quarter);
    }

    // has_weights: they have been loaded, as the last ones so far.
    __device__ __forceinline__ void load(const Job& job, bool has_weights) {
        const Giving giving = begin(job);
        const uint32_t blocks_in_job = ceil_div(static_cast<uint32_t>(job.rows.z), kBlockRows);
        const uint32_t num_blocks = ceil_div(blocks_in_job, kNumWarpgroups) * kNumWarpgroups;
        const uint32_t first_slot = next_slot - (has_weights ? kQuarters : 0);
        if (!has_weights) load_quarter(job, 0);
        for (uint32_t index = 0; index < kNumWarpgroups; ++index)
            load_block(job, giving, index, num_blocks, first_slot);
        for (uint32_t quarter = 1; quarter < kQuarters && !has_weights; ++quarter) load_quarter(job, quarter);
        for (uint32_t index = kNumWarpgroups; index < num_blocks; ++index)
            load_block(job, giving, index, num_blocks, first_slot);
        first_warpgroup = (first_warpgroup + blocks_in_job) % kNumWarpgroups;
    }

    __device__ __forceinline__ void run() {
        uint32_t ticket = blockIdx.x, next_ticket = take();
        Job current = job(ticket);
        // While the last CTAs of the kernel before end: of what is needed, only weights depend on nothing of it.
        bool has_weights = ticket < num_tickets && current.rows.z > 0;
        if (has_weights) load_weights(current);
        grid_dependency::wait();
        while (ticket < num_tickets) {
            const uint32_t ticket_after = take();
            const Job next = job(next_ticket);
            if (!kStoresLast || current.rows.z > 0) load(current, has_weights);
            has_weights = false;
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

// One warp, when jobs are listed: zeros where a row is added first.
struct Zeroing {
    const Params& p;
    SharedStorage& shared;

    __device__ __forceinline__ void run() const {
        constexpr uint32_t kVectors = kQuarters * kQuarter / 8;  // of 8 columns, in a row of a slab
        const uint32_t part = ceil_div(p.num_tokens, gridDim.x), first = min(part * blockIdx.x, p.num_tokens);
        const uint32_t num_rows = min(part, p.num_tokens - first), num_slabs_ahead = slabs_ahead(p.jobs[0].w);
        if (kStoresLast) look(first, first + num_rows);
#pragma unroll 1
        for (uint32_t slab = kSlabsZeroedBefore; slab < kNumSlabs; ++slab) {
            exchange::await_raised(shared.begun_slab, slab - min(slab, num_slabs_ahead + kStoresLast));
            uint16_t* row = p.out + static_cast<uint64_t>(first) * kHiddenSize + slab * kQuarters * kQuarter;
            uint32_t stored = 0;  // of 32 rows
#pragma unroll 2
            for (uint32_t i = 0; i < num_rows; ++i, row += kHiddenSize) {
                if (kStoresLast && i % 32 == 0) stored = rows_stored(first + i, first + num_rows);
                if (stored >> i % 32 & 1) continue;
                for (uint32_t vector = threadIdx.x % 32; vector < kVectors; vector += 32)
                    *reinterpret_cast<uint4*>(row + vector * 8) = make_uint4(0, 0, 0, 0);
            }
            __syncwarp();
            if (threadIdx.x % 32 == 0) exchange::count(p.zeroed + slab);
        }
    }

    // Tells all CTAs if a token has the last expert more than once.
    __device__ __forceinline__ void look(uint32_t first, uint32_t end) const {
#pragma unroll 1
        for (uint32_t token = first + threadIdx.x % 32; token < end; token += 32)
            if (times_of_last(p, token) > 1) p.looked[1] = 1;
        __syncwarp();
        if (threadIdx.x % 32 == 0) exchange::count(p.looked);
    }

    // Of 32 tokens from `first` on, those that have the last expert once.
    __device__ __forceinline__ uint32_t rows_stored(uint32_t first, uint32_t end) const {
        const uint32_t token = first + threadIdx.x % 32;
        return __ballot_sync(~0u, token < end && times_of_last(p, token) == 1);
    }
};
