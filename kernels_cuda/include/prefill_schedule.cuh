// How a persistent grid of clusters shares a list of items of K steps each: clusters get equal shares of the cost, to the
// step, so that none idles at the end. A share that ends inside an item leaves the rest of its K to the next shares.
//
// Items are dealt out as cards are, one to each cluster in turn, into as many columns as there are clusters; the shares
// are cut from the columns in sequence. Columns cost nearly the same, so that share and column nearly agree, and items
// that stand beside each other in the list, which read the same weights or tokens, run at about the same time.
//
// Every CTA works out its share by itself, from the list alone.
#pragma once
#include "mbarrier.cuh"
#include "types.cuh"

constexpr uint32_t kMaxClusters = 128;
constexpr uint32_t kNoItem = ~0u;

// A row of reference.routing.TiledRouting.tiles.
struct alignas(16) Tile {
    uint32_t expert, first_row, num_rows, earlier_rows;
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

struct Share {
    Position begin, end;
    uint32_t number, num_shares;
    uint32_t num_items;
    uint64_t total_cost;
    uint32_t cut_item_cost;  // of the items before the one that the share ends in, if it ends inside of one
    uint32_t cut_step_cost;  // of a step of that item

    // The item after `item` in the sequence of columns.
    __device__ __forceinline__ uint32_t after(uint32_t item) const {
        const uint32_t below = item + num_shares;
        if (below < num_items) return below;
        const uint32_t column = item % num_shares + 1;
        return column < min(num_shares, num_items) ? column : kNoItem;
    }

    // Where share `share` begins, as a cost.
    __device__ __forceinline__ uint32_t cost_before(uint32_t share) const {
        return static_cast<uint32_t>(total_cost * share / num_shares);
    }

    // The first step of the item that this share ends in which is not done by shares before `share`.
    __device__ __forceinline__ uint32_t steps_before(uint32_t share, uint32_t num_k) const {
        return min((cost_before(share) - cut_item_cost) / cut_step_cost, num_k);
    }
};

struct ShareStorage {
    uint32_t column_cost[kMaxClusters + 1];  // then that of all columns before
    Share share;
};

// A part of K of one item.
struct Piece {
    uint32_t item, first_k, last_k;
};

struct Pieces {
    const Share& share;
    const uint32_t num_k;
    Position next;

    __device__ __forceinline__ Pieces(const Share& share, uint32_t num_k) : share(share), num_k(num_k), next(share.begin) {}

    // The next piece of the share; item kNoItem at its end.
    __device__ __forceinline__ Piece take() {
        if (next.item == share.end.item && next.k >= share.end.k) return {kNoItem, 0, 0};
        const bool last = next.item == share.end.item;
        const Piece piece{next.item, next.k, last ? share.end.k : num_k};
        next = last ? share.end : Position{share.after(next.item), 0};
        return piece;
    }
};

// What an item costs, in the time that 8 rows take for a step: kNumK steps as long as the products of its rows take, but
// no shorter than loading their weights, then an epilogue.
template <uint32_t kNumK>
struct Cost {
    static constexpr uint32_t kLoad = 5;
    static constexpr uint32_t kEpilogue = 84;

    static __device__ __forceinline__ uint32_t step(uint32_t num_rows) { return max(rows_per_cta(num_rows) / 8, kLoad); }
    static __device__ __forceinline__ uint32_t item(uint32_t num_rows) { return step(num_rows) * kNumK + kEpilogue; }
};

// Where the cost `cost` is reached: inside an item only if kSplitK, otherwise at the nearer end of it.
template <uint32_t kNumK, bool kSplitK, typename NumRows>
__device__ __forceinline__ Position position_of(const ShareStorage& storage, Share& share, uint32_t column, uint32_t cost,
                                                const NumRows& num_rows) {
    uint32_t before = storage.column_cost[column];
    for (uint32_t item = column;; item += share.num_shares) {
        const uint32_t rows = num_rows(item), item_cost = Cost<kNumK>::item(rows);
        if (cost - before >= item_cost) {
            before += item_cost;
            continue;
        }
        share.cut_item_cost = before;
        share.cut_step_cost = Cost<kNumK>::step(rows);
        uint32_t k = min((cost - before) / share.cut_step_cost, kNumK);
        if constexpr (!kSplitK) k = (cost - before) * 2 < item_cost ? 0 : kNumK;
        return k < kNumK ? Position{item, k} : Position{share.after(item), 0};
    }
}

// All kNumThreads threads: the share of this cluster into storage.share. num_rows(item) is the rows of the item's tile.
template <uint32_t kNumK, bool kSplitK, uint32_t kNumThreads, typename NumRows>
__device__ __forceinline__ void find_share(ShareStorage& storage, uint32_t number, uint32_t num_shares, uint32_t num_items,
                                           const NumRows& num_rows) {
    static_assert(kNumThreads % kMaxClusters == 0 && kNumThreads >= 2 * kMaxClusters, "whole columns, two ends at once");
    const uint32_t thread = threadIdx.x, column = thread % kMaxClusters;
    if (thread <= kMaxClusters) storage.column_cost[thread] = 0;
    __syncthreads();
    if (column < num_shares) {
        uint32_t cost = 0;
        const uint32_t step = kNumThreads / kMaxClusters * num_shares;
#pragma unroll 4
        for (uint32_t item = column + thread / kMaxClusters * num_shares; item < num_items; item += step)
            cost += Cost<kNumK>::item(num_rows(item));
        atomicAdd(&storage.column_cost[column], cost);
    }
    __syncthreads();
    if (thread < 32) {  // each lane has kPerLane columns
        constexpr uint32_t kPerLane = kMaxClusters / 32;
        uint32_t sum = 0, before[kPerLane];
#pragma unroll
        for (uint32_t i = 0; i < kPerLane; ++i) {
            before[i] = sum;
            sum += storage.column_cost[thread * kPerLane + i];
        }
        uint32_t within = sum;
#pragma unroll
        for (uint32_t offset = 1; offset < 32; offset *= 2) {
            const uint32_t other = __shfl_up_sync(~0u, within, offset);
            if (thread >= offset) within += other;
        }
#pragma unroll
        for (uint32_t i = 0; i < kPerLane; ++i) storage.column_cost[thread * kPerLane + i] = within - sum + before[i];
        if (thread == 31) storage.column_cost[kMaxClusters] = within;
    }
    __syncthreads();
    Share share{};
    share.number = number, share.num_shares = num_shares, share.num_items = num_items;
    share.total_cost = storage.column_cost[kMaxClusters];
    const bool ends = thread >= kMaxClusters;
    const uint32_t cost = share.cost_before(number + ends);
    if (thread == 0 || thread == kMaxClusters) {  // a share that begins or ends where all items do
        Position& bound = ends ? storage.share.end : storage.share.begin;
        if (cost == share.total_cost) bound = {kNoItem, 0};
        if (ends) {
            storage.share.number = number, storage.share.num_shares = num_shares, storage.share.num_items = num_items;
            storage.share.total_cost = share.total_cost;
        }
    }
    if (thread < 2 * kMaxClusters && storage.column_cost[column] <= cost && cost < storage.column_cost[column + 1]) {
        const Position bound = position_of<kNumK, kSplitK>(storage, share, column, cost, num_rows);
        if (ends) {
            storage.share.end = bound;
            storage.share.cut_item_cost = share.cut_item_cost;
            storage.share.cut_step_cost = share.cut_step_cost;
        } else {
            storage.share.begin = bound;
        }
    }
    __syncthreads();
}
