// The producers of sm90_stream.cu: tickets and weights, tokens and scales. What is the same in a warp is known to be, see
// registers::uniform(): else each copy and arrival runs in a loop over the lanes.
#pragma once
#include "cluster.cuh"
#include "copy.cuh"
#include "elect.cuh"
#include "exchange.cuh"
#include "gather.cuh"
#include "registers.cuh"
#include "stream_storage.cuh"

// What one read of memory by all lanes of a warp finds of the tiles: their number and, before that is known, the expert of
// nearly any tile that may turn out to be a CTA's first.
struct TilesAtStart {
    uint32_t number, other;
    int32_t low_expert, other_expert;

    __device__ __forceinline__ explicit TilesAtStart(const Params& p) {
        const uint32_t lane = threadIdx.x % 32, last = p.tile_capacity - 1;
        other = lane + 29;  // 32.. and the first tile where items are whole, in 4 parts, in fine ones
        if (lane < 3) other = blockIdx.x / (lane == 0 ? 1 : lane == 1 ? 4 : Schedule::kFinePartsUp) / kNumChunks;
        number = p.tiles[0].expert;
        low_expert = p.tiles[1 + min(lane, last)].expert;
        other_expert = p.tiles[1 + min(other, last)].expert;
    }
    __device__ __forceinline__ uint32_t expert(const Params& p, uint32_t tile) const {
        const uint32_t holders = __ballot_sync(~0u, other == tile);
        const int32_t expert = __shfl_sync(~0u, low_expert, tile);
        if (tile < 32) return expert;
        return holders == 0 ? p.tiles[1 + tile].expert : __shfl_sync(~0u, other_expert, __ffs(holders) - 1);
    }
};

// One warp: takes tickets, tells the others what they stand for, and loads the weights.
struct WeightLoader {
    const Params& p;
    SharedStorage& shared;
    const uint64_t policy = evict_first_policy();
    Position ring, arriving;
    uint32_t num_loads = 0;
    QueuePosition queue;

    __device__ __forceinline__ WeightLoader(const Params& p, SharedStorage& shared) : p(p), shared(shared) {}

    // The loads for which nothing has to be waited for, before other warps use the barriers; here of tiles that another
    // kernel has listed.
    __device__ __forceinline__ void start_with_given_tiles() {
        const TilesAtStart tiles(p);
        if (elect_one()) {
            init();
            shared.num_tiles = tiles.number;
        }
        __syncwarp();
        start(tiles.number, [&](uint32_t tile) { return tiles.expert(p, tile); });
    }

    // The same of so many tiles, of which expert_of() tells the experts.
    template <typename ExpertOf>
    __device__ __forceinline__ void start(uint32_t num_tiles, ExpertOf expert_of) {
        if (num_tiles == 0) return;
        const Schedule schedule(num_tiles);
        if (schedule.first_ticket() >= schedule.num_up) return;
        const Piece piece = schedule.piece(schedule.first_ticket());
        const uint32_t expert = expert_of(piece.item / kNumChunks);
#pragma unroll 1
        for (uint32_t k = piece.first_unit; k < early_end(piece); ++k, ++num_loads)
            issue(p.weights.up(expert, piece.item % kNumChunks, k), kStageBytes);
        begin(piece);  // its tokens, found by one read of the batch after another, take as long as the weights
    }

    __device__ __forceinline__ static uint32_t early_end(const Piece& piece) {
        return min(piece.last_unit, piece.first_unit + kNumInFlight);
    }

    // Barriers, and descriptions of the weights on their way: by one thread.
    __device__ __forceinline__ void init() {
        p.weights.prefetch_maps();
        for (uint32_t stage = 0; stage < kNumStages; ++stage) {
            mbarrier::init(shared.full[stage], 1);
            mbarrier::init(shared.empty[stage], kNumMathWarps * mbarrier::kArrivalsPerWarp);
        }
        for (uint32_t stage = 0; stage < kNumTokenStages; ++stage) {
            mbarrier::init(shared.tokens_full[stage], kNumGatherThreads);
            mbarrier::init(shared.tokens_empty[stage], kNumMathWarps * mbarrier::kArrivalsPerWarp);
        }
        for (uint32_t stage = 0; stage < kQueueSize; ++stage) {
            mbarrier::init(shared.queue_full[stage], 1);
            mbarrier::init(shared.queue_empty[stage], (kNumMathWarps + kNumGatherWarps) * mbarrier::kArrivalsPerWarp);
        }
        for (uint32_t buffer = 0; buffer < kNumBuffers; ++buffer) {
            mbarrier::init(shared.activation_full[buffer], kNumGatherWarps * mbarrier::kArrivalsPerWarp);
            mbarrier::init(shared.activation_empty[buffer], kNumMathWarps * mbarrier::kArrivalsPerWarp);
        }
        mbarrier::fence_init();
        fence_async_proxy();
    }

    // At most kNumInFlight loads are under way at a time.
    __device__ __forceinline__ void load(const Weights::Source& source, uint32_t num_bytes) {
        if (kNumInFlight < kNumStages && num_loads++ >= kNumInFlight) {
            mbarrier::wait(shared.full[arriving.stage], arriving.parity);
            arriving.advance();
        }
        mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
        issue(source, num_bytes);
    }

    __device__ __forceinline__ void issue(const Weights::Source& source, uint32_t num_bytes) {
        if (elect_one()) {
            uint64_t& full = shared.full[ring.stage];
            mbarrier::arrive_expect_bytes(full, num_bytes);
            source.load(shared.weights[ring.stage], num_bytes, full, policy);
        }
        __syncwarp();
        ring.advance();
    }

    // Tells the other warps of a piece.
    __device__ __forceinline__ void begin(const Piece& piece) {
        mbarrier::wait(shared.queue_empty[queue.stage], queue.parity ^ 1);
        if (elect_one()) {
            shared.queue[queue.stage] = piece;
            mbarrier::arrive(shared.queue_full[queue.stage]);
        }
        __syncwarp();
        queue.advance();
    }

    // After start(), with whose first piece it goes on if that is of the up phase. Of the jobs in parts this CTA owes the
    // activations of every kNumCtas-th, before its first piece of a down phase or earlier.
    __device__ __forceinline__ void run() {
        using registers::uniform;
        const Schedule schedule(uniform(shared.num_tiles));
        num_loads = uniform(num_loads);  // here and not in start(), where it would delay the first load
        ring = {uniform(ring.stage), uniform(ring.parity)};
        queue = {uniform(queue.stage), uniform(queue.parity)};
        bool first = true, counter_is_set = false;
        uint32_t ticket = schedule.first_ticket(), owed_job = schedule.few ? ~0u : schedule.up.num_whole + blockIdx.x;
        Piece piece = schedule.piece(ticket);
#pragma unroll 1
        for (;;) {
            for (; owed_job < schedule.num_summed_up(ticket, piece); owed_job += kNumCtas)
                begin({owed_job, 0, 0, 0, kActivate});
            const bool begun = first && piece.phase == kUp;
            if (begun)
                piece.first_unit = early_end(piece);
            else
                begin(piece);
            if (piece.phase == kEnd) break;
            const bool takes = !schedule.few && (!kFuses || piece.phase != kFusedUp);
            uint32_t taken = 0;
            if (takes && !counter_is_set) {  // by the previous kernel, to -1
                grid_dependency::wait();
                counter_is_set = true;
            }
            if (takes && threadIdx.x % 32 == 0) taken = atomicAdd(p.ticket_counter, 1u);
            first = false;
            load_units(piece);  // while the ticket is on its way
            if (takes)
                ticket = kNumCtas + 1 + uniform(__shfl_sync(~0u, taken, 0));
            else if (schedule.few)
                ticket = schedule.next_ticket(ticket);
            piece = kFuses && piece.phase == kFusedUp ? Schedule::following(piece) : schedule.piece(ticket);
        }
    }

    __device__ __forceinline__ void load_units(const Piece& piece) {
        const bool up = piece.phase <= kFusedUp;
        const uint32_t expert = registers::uniform(tile_at(p, shared, up ? piece.item / kNumChunks : piece.item).expert);
#pragma unroll 1
        for (uint32_t unit = piece.first_unit; unit < piece.last_unit; ++unit) {
            const bool whole = up || (unit + 1) * kGroupColumns <= kHiddenSize;  // the last group may be half
            Weights::Source source =
                up ? p.weights.up(expert, piece.item % kNumChunks, unit) : p.weights.down(expert, unit);
#pragma unroll 1
            for (uint32_t stage = 0; stage < (up ? 1 : kNumChunks); ++stage) {
                load(source, whole ? kStageBytes : kHalfBytes);
                source.advance(whole ? kStageBytes : kHalfBytes);
            }
        }
    }
};

// 96 threads: for every stage of the up phase the tokens' K tile, swizzled as wgmma reads it, and the scales, in a ring of
// their own; for every piece of the down phase its rows and scales. Rows past the tile's last are left as they are: their
// products are not used.
struct Gatherer {
    const Params& p;
    SharedStorage& shared;
    const uint32_t thread;
    TokenPosition ring;
    RingPosition<kNumBuffers> activation;
    uint32_t table = 0;  // a thread is at most one piece ahead of another, so two tables of tokens suffice

    __device__ __forceinline__ Gatherer(const Params& p, SharedStorage& shared, uint32_t thread)
        : p(p), shared(shared), thread(thread) {}

    __device__ __forceinline__ void run() {
        if (kOrdersChoices && p.inputs_from_previous_kernel) grid_dependency::wait();  // for tokens
        const bool few = Schedule(registers::uniform(shared.num_tiles)).few;
#pragma unroll 1
        for (QueuePosition queue;; queue.advance()) {
            mbarrier::wait(shared.queue_full[queue.stage], queue.parity);
            const Piece piece = shared.queue[queue.stage];
            const uint32_t phase = registers::uniform(piece.phase);
            if (phase == kEnd) break;
            if (phase <= kFusedUp) gather_up(piece, shared.queue_weight[queue.stage]);
            if (phase == kDown || (kFuses && phase == kFusedDown)) {
                gather_down(piece, kFuses && phase == kFusedDown ? kOwn : few ? kFromSums : kFromMemory);
                activation.advance();
            }
            mbarrier::arrive_warp(shared.queue_empty[queue.stage]);
        }
        cp_async_wait_all();
    }

    __device__ __forceinline__ void gather_up(const Piece& piece, float* row_weight) {
        const Tile tile = tile_at(p, shared, piece.item / kNumChunks);
        int32_t* const tokens = shared.gathered_token[table ^= 1];
        if (thread < tile.num_rows) {
            const int32_t choice = sorted_choice(p, shared, tile.first_row + thread);
            tokens[thread] = choice / p.top_k;
            cp_async_4(row_weight + thread, p.topk_weights + choice, true);  // there with the first stage's tokens
        }
        named_barrier(kGatherBarrier, kNumGatherThreads);

        const uint32_t gate_scale_row = tile.expert * 2 * kNumChunks + piece.item % kNumChunks;
        const float* w13_scale = p.w13_scale + static_cast<uint64_t>(gate_scale_row + thread * kNumChunks) * kNumK;
        const uint32_t first_unit = registers::uniform(piece.first_unit), last_unit = registers::uniform(piece.last_unit);
#pragma unroll 1
        for (uint32_t k = first_unit; k < last_unit; ++k, ring.advance()) {
            mbarrier::wait(shared.tokens_empty[ring.stage], ring.parity ^ 1);
            const auto copy = [&](uint8_t* target, uint32_t row, uint32_t offset) {
                cp_async_16(target, p.x_q + static_cast<uint64_t>(tokens[row]) * kHiddenSize + k * kTileK + offset, true);
            };
            gather_rows<kMaxRows, kNumGatherThreads>(shared.tokens[ring.stage], tile.num_rows, thread, copy);
            if (thread < tile.num_rows)
                cp_async_4(&shared.token_scale[ring.stage][thread],
                           p.x_scale + static_cast<uint64_t>(tokens[thread]) * kNumK + k, true);
            if (thread < 2) cp_async_4(&shared.weight_scale[ring.stage][thread], w13_scale + k, true);
            __syncwarp();
            cp_async_arrive(shared.tokens_full[ring.stage]);
        }
    }

    // Where a piece of the down phase has its activations from: this CTA computed them as it summed up, all CTAs write them to
    // memory, or this CTA computes them from sums there.
    static constexpr uint32_t kOwn = 0, kFromMemory = 1, kFromSums = 2;

    // What a piece takes beside its weights: their scales, the tile's rows in `out`, and the activations from memory or what it
    // takes to make them from sums, the tokens' weights. All of it is under way at a time.
    __device__ __forceinline__ void gather_down(const Piece& piece, uint32_t activations) {
        if (activations != kOwn) grid_dependency::wait();  // before that activations may look written that are not
        const uint32_t buffer = activation.stage;
        Tile tile = tile_at(p, shared, piece.item);
        // A warp whose turn it is not goes the same way with nothing to do: after a branch around it nothing would be uniform,
        // see registers::uniform().
        const bool takes_turns = kMaxRows * kNumChunks <= kMostGroupsOfWarp ||
                                 tile.num_rows * kNumChunks <= kMostGroupsOfWarp;
        const bool has_turn = !takes_turns || thread / 32 == buffer;
        const uint32_t own = takes_turns ? thread % 32 : thread, num_threads = takes_turns ? 32 : kNumGatherThreads;
        if (!has_turn) tile.num_rows = 0;
        mbarrier::wait(shared.activation_empty[buffer], activation.parity ^ 1);
        const float* const scales = p.w2_scale + static_cast<uint64_t>(tile.expert) * kNumK * kNumChunks;
        const uint32_t end = has_turn ? min(2 * piece.last_unit, kNumK) * kNumChunks : 0;
#pragma unroll 1
        for (uint32_t i = 2 * piece.first_unit * kNumChunks + own; i < end; i += num_threads)
            cp_async_4(&shared.down_scale[buffer][i], scales + i, true);
        static_assert(kMaxRows <= kNumGatherThreads && kMostGroupsOfWarp <= 32, "a thread has at most one row");
        const bool has_row = own < tile.num_rows;
        const int32_t choice = has_row ? sorted_choice(p, shared, tile.first_row + own) : 0;
        if (activations == kFromMemory) {
            gather_activations(tile, buffer, own, num_threads);
        } else if (has_row && activations == kFromSums) {
            shared.row_weight[buffer][own] = p.topk_weights[choice] * p.routed_scaling_factor;
        }
        if (has_row) shared.output_row[buffer][own] = kDeterministic ? choice : choice / p.top_k;
        __syncwarp();
        cp_async_wait_all();
        mbarrier::arrive_warp(shared.activation_full[buffer]);
    }

    __device__ __forceinline__ void gather_activations(const Tile& tile, uint32_t buffer, uint32_t own, uint32_t num_threads) {
        constexpr uint32_t kAtOnce = 4;
        constexpr uint32_t kPieces = kGroupSize / 16;
        const uint32_t num_scales = tile.num_rows * kNumChunks, num_pieces = num_scales * kPieces;
        const float* const scales = p.activation_scales + static_cast<uint64_t>(tile.first_row) * kNumChunks;
        const uint4* const rows = p.activations + static_cast<uint64_t>(tile.first_row) * kNumChunks * kPieces;
        float scale = own < num_scales ? exchange::load_once(scales + own) : 0.f;
#pragma unroll 1
        for (uint32_t first = own; first < num_pieces; first += kAtOnce * num_threads) {
            uint4 value[kAtOnce];
            exchange::load(
                value, [&](uint32_t i) { return first + i * num_threads < num_pieces; },
                [&](uint32_t i) { return rows + first + i * num_threads; });
#pragma unroll
            for (uint32_t i = 0; i < kAtOnce; ++i) {
                const uint32_t index = first + i * num_threads;
                const uint32_t row = index / (kNumChunks * kPieces), chunk = index / kPieces % kNumChunks;
                uint8_t* const target = shared.activation[buffer][chunk] + row * kGroupSize;
                if (index < num_pieces) *reinterpret_cast<uint4*>(target + (index % kPieces ^ row % 8) * 16) = value[i];
            }
        }
        __syncwarp();
        fence_async_proxy();
#pragma unroll 1
        for (uint32_t i = own; i < num_scales; i += num_threads) {
            if (i >= num_threads) scale = exchange::load_once(scales + i);
            shared.activation_scale[buffer][i % kNumChunks][i / kNumChunks] = exchange::await_written(scale, scales + i);
        }
    }
};
