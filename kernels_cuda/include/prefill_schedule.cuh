// How a persistent grid of clusters shares a list of items of K steps each, so that none idles at the end.
//
// Most items are dealt out whole, as cards are, one to each cluster in turn: items that stand beside each other in the list
// read the same weights, so they should run at the same time, step by step. The last ones, at least one for each cluster,
// are shared to the step of K, such that all clusters end together: a share that ends inside an item leaves the rest of
// its K to the next shares.
//
// Every CTA works out its share by itself, from the list alone.
#pragma once
#include "mbarrier.cuh"
#include "scan.cuh"
#include "types.cuh"

constexpr uint32_t kMaxClusters = 96;
constexpr uint32_t kNoItem = ~0u;

// A row of reference.routing.TiledRouting.tiles.
struct alignas(16) Tile {
    uint32_t expert, first_row, num_rows, tiles_of_expert;
};

// Where the rows of h of an expert begin that are first_row, ... in the order of the experts: at a multiple of 8, for they
// are swizzled by 8. Tiles of an expert begin a multiple of 8 after each other, so that this holds for each of them.
__device__ __forceinline__ uint32_t first_h_row(uint32_t expert, uint32_t first_row) {
    return (ceil_div(first_row, 8u) + expert) * 8;
}

// Rows of a tile that each of the two CTAs of a cluster takes: the N of a wgmma. The last ones may be fewer.
__device__ __forceinline__ uint32_t rows_per_cta(uint32_t num_rows) { return ceil_div(num_rows, 16u) * 8; }

struct Position {
    uint32_t item;  // kNoItem: past the last
    uint32_t k;     // step of K within it
};

constexpr uint32_t kMaxTail = 2 * kMaxClusters;
constexpr uint32_t kNumShareThreads = 192;  // that find a share

// A share: items number, number + num_shares, ... below first_tail, then begin..end.
struct Share {
    Position begin, end;
    uint32_t number, num_shares;
    uint32_t num_items, first_tail;
    uint32_t cut_item_cost;  // of the tail before the item that the share ends in, if it ends inside of one
    uint32_t cut_step_cost;  // of a step of that item
    uint32_t begin_cost[kMaxClusters + 1];  // of the tail before each share

    // The first step of the item that this share ends in which is not done by shares before `share`.
    __device__ __forceinline__ uint32_t steps_before(uint32_t share, uint32_t num_k) const {
        return min((begin_cost[share] - cut_item_cost) / cut_step_cost, num_k);
    }
};

// Needed only until the share is found.
struct TailStorage {
    uint32_t cost[kMaxTail + 1];  // of an item of the tail; then of all before it
};

// A part of K of one item.
struct Piece {
    uint32_t item, first_k, last_k;
};

struct Pieces {
    const Share& share;
    const uint32_t num_k;
    uint32_t whole;
    Position next;

    __device__ __forceinline__ Pieces(const Share& share, uint32_t num_k)
        : share(share), num_k(num_k), whole(share.number), next(share.begin) {}

    // The next piece of the share; item kNoItem at its end.
    __device__ __forceinline__ Piece take() {
        if (whole < share.first_tail) {
            const Piece piece{whole, 0, num_k};
            whole += share.num_shares;
            return piece;
        }
        if (next.item == share.end.item && next.k >= share.end.k) return {kNoItem, 0, 0};
        const bool last = next.item == share.end.item;
        const Piece piece{next.item, next.k, last ? share.end.k : num_k};
        next = last ? share.end : Position{next.item + 1 < share.num_items ? next.item + 1 : kNoItem, 0};
        return piece;
    }
};

// What an item costs, in units of about 19 cycles: num_k steps and an epilogue, as measured on an H200
// (experiments/2026-11-28_prefill_steps).
template <uint32_t num_k>
struct Cost {
    static constexpr uint32_t kNumK = num_k;

    static __device__ __forceinline__ uint32_t step(uint32_t num_rows) { return 40 + 3 * (rows_per_cta(num_rows) / 8); }
    static __device__ __forceinline__ uint32_t item(uint32_t num_rows) {
        return step(num_rows) * kNumK + 90 + 8 * (rows_per_cta(num_rows) / 8);
    }
};

// One warp: value[i] becomes the sum of all before it, value[32 * kPerLane] that of all.
template <uint32_t kPerLane>
__device__ __forceinline__ uint32_t sum_before(uint32_t* value) {
    const uint32_t lane = threadIdx.x % 32;
    uint32_t own[kPerLane], sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) {
        own[i] = sum;
        sum += value[lane * kPerLane + i];
    }
    const uint32_t within = inclusive_sum_of_warp(sum);
    __syncwarp();
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) value[lane * kPerLane + i] = within - sum + own[i];
    const uint32_t total = __shfl_sync(~0u, within, 31);
    if (lane == 0) value[32 * kPerLane] = total;
    __syncwarp();
    return total;
}

// One warp: from what the whole items of each share cost, how much of the tail comes before each share, such that all
// shares cost the same.
__device__ __forceinline__ void share_tail(Share& share, TailStorage& storage, uint32_t num_shares) {
    constexpr uint32_t kPerLane = kMaxClusters / 32;
    uint32_t* const cost = share.begin_cost;
    const uint32_t lane = threadIdx.x % 32, tail = sum_before<kMaxTail / 32>(storage.cost);
    uint32_t total = 0;
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) total += cost[lane * kPerLane + i];
#pragma unroll
    for (uint32_t offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
    const uint32_t even = (total + tail) / num_shares;
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) {
        uint32_t& own = cost[lane * kPerLane + i];
        own = lane * kPerLane + i < num_shares && own < even ? even - own : 0u;
    }
    __syncwarp();
    const double of_tail = static_cast<double>(tail) / max(sum_before<kPerLane>(cost), 1u);
#pragma unroll
    for (uint32_t i = 0; i < kPerLane; ++i) {
        uint32_t& before = cost[lane * kPerLane + i];
        before = lane * kPerLane + i < num_shares ? min(static_cast<uint32_t>(before * of_tail), tail) : tail;
    }
    if (lane == 0) cost[kMaxClusters] = tail;
}

// Where the cost `cost` is reached in an item of the tail: inside it only if kSplitK, otherwise at the nearer end of it.
template <typename Cost, bool kSplitK>
__device__ __forceinline__ Position position_of(const Share& share, uint32_t item, uint32_t cost_within, uint32_t rows) {
    uint32_t k = min(cost_within / Cost::step(rows), Cost::kNumK);
    if constexpr (!kSplitK) k = cost_within * 2 < Cost::item(rows) ? 0 : Cost::kNumK;
    if (k < Cost::kNumK) return {item, k};
    return {item + 1 < share.num_items ? item + 1 : kNoItem, 0};
}

// Has nothing to do while a share is found.
struct Nothing {
    __device__ __forceinline__ void first() {}
    __device__ __forceinline__ void second() {}
    __device__ __forceinline__ void third() {}
};

// All threads, of which the first 192 have work: the share of this cluster. num_rows(item) is the rows of the item's tile.
// The other threads meanwhile do three things, each of which may wait for what the one before has asked memory for.
template <typename Cost, bool kSplitK, typename NumRows, typename Meanwhile>
__device__ __forceinline__ void find_share(Share& share, TailStorage& storage, uint32_t number, uint32_t num_shares, uint32_t num_items,
                                           const NumRows& num_rows, Meanwhile meanwhile) {
    static_assert(kNumShareThreads % kMaxClusters == 0 && kNumShareThreads >= kMaxTail, "whole columns, the tail at once");
    const uint32_t thread = threadIdx.x, column = thread % kMaxClusters;
    const bool finds = thread < kNumShareThreads;
    const uint32_t first_tail = max(num_items / num_shares, 1u) * num_shares - num_shares;
    const uint32_t tail_item = first_tail + thread;
    uint32_t tail_rows = 0;
    if (thread <= kMaxClusters) share.begin_cost[thread] = 0;
    if (!finds) meanwhile.first();
    if (thread < kMaxTail) {
        if (tail_item < num_items) tail_rows = num_rows(tail_item);
        storage.cost[thread] = tail_item < num_items ? Cost::item(tail_rows) : 0u;
    }
    if (thread == 0)
        share.number = number, share.num_shares = num_shares, share.num_items = num_items, share.first_tail = first_tail;
    __syncthreads();
    if (!finds) meanwhile.second();
    if (finds && column < num_shares) {
        uint32_t cost = 0;
        const uint32_t step = kNumShareThreads / kMaxClusters * num_shares;
#pragma unroll 4
        for (uint32_t item = column + thread / kMaxClusters * num_shares; item < first_tail; item += step)
            cost += Cost::item(num_rows(item));
        atomicAdd(&share.begin_cost[column], cost);
    }
    __syncthreads();
    if (!finds) meanwhile.third();
    if (thread < 32) share_tail(share, storage, num_shares);
    __syncthreads();
    const uint32_t begin = share.begin_cost[number], end = share.begin_cost[number + 1];
    const uint32_t tail = share.begin_cost[kMaxClusters];
    if (thread == 0 && begin == tail) share.begin = {kNoItem, 0};
    if (thread == 0 && end == tail) share.end = {kNoItem, 0};
    if (thread < kMaxTail) {
        const uint32_t before = storage.cost[thread], after = storage.cost[thread + 1];
        if (before <= begin && begin < after)
            share.begin = position_of<Cost, kSplitK>(share, tail_item, begin - before, tail_rows);
        if (before <= end && end < after) {
            share.end = position_of<Cost, kSplitK>(share, tail_item, end - before, tail_rows);
            share.cut_item_cost = before;
            share.cut_step_cost = Cost::step(tail_rows);
        }
    }
    __syncthreads();
}
