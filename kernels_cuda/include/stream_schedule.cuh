// How sm90_stream.cu cuts the layer into pieces of work.
#pragma once
#include "stream_constants.cuh"

// Units first_unit..last_unit of an item: K tiles of a job, or groups of columns of a tile.
struct Piece {
    uint32_t item, first_unit, last_unit;
    uint32_t part;  // which of the item's pieces
    uint32_t phase;
};
// In the order in which a CTA comes to them, but for kActivate.
constexpr uint32_t kUp = 0, kFusedUp = 1, kFusedDown = 2, kDown = 3, kEnd = 4, kActivate = 5;

// dividend / divisor, for dividends below 2^20.
__device__ __forceinline__ uint32_t small_quotient(uint32_t dividend, uint32_t divisor) {
    return __float2uint_rz(__fdividef(dividend + 0.5f, divisor));
}

// How the items of a phase, of kUnits units each, are cut into pieces of at most kMostParts parts. Few items: all alike,
// so that each CTA has at most one piece. Many: the first ones not at all, the next ones into 4, the last ones finely; if
// the phase need not end everywhere at a time, as many as possible not at all.
// Where units add up to one sum and that has to come out the same in any batch, all finely.
template <uint32_t kUnits, uint32_t kMostParts, bool kUnitsAddUp>
struct Cut {
    static constexpr uint32_t kFineParts = kUnits < 4 ? 1 : kUnits / 2 < kMostParts ? kUnits / 2 : kMostParts;
    static constexpr uint32_t kFewestFine = 40;
    uint32_t num_items, num_whole, num_quartered, num_fine_parts;

    __device__ __forceinline__ Cut(uint32_t num_items, bool few, bool ends_together) : num_items(num_items) {
        num_whole = num_quartered = 0;
        num_fine_parts = kFineParts;
        if (kDeterministic && kUnitsAddUp) return;
        if (few) {
            num_fine_parts = min(min(small_quotient(kNumCtas, num_items), kUnits), kMostParts);
        } else {
            num_whole = (ends_together ? num_items * 2 / 3 : num_items) / kNumCtas * kNumCtas;
            const uint32_t rest = num_items - num_whole;
            num_quartered = rest > kFewestFine ? (rest - kFewestFine) / (kNumCtas / 4) * (kNumCtas / 4) : 0;
        }
    }
    __device__ __forceinline__ uint32_t num_pieces() const {
        return num_whole + num_quartered * 4 + (num_items - num_whole - num_quartered) * num_fine_parts;
    }
    __device__ __forceinline__ uint32_t num_parts(uint32_t item) const {
        return item < num_whole ? 1 : item < num_whole + num_quartered ? 4 : num_fine_parts;
    }
    __device__ __forceinline__ Piece piece(uint32_t index, uint32_t phase) const {
        if (index < num_whole) return {index, 0, kUnits, 0, phase};
        index -= num_whole;
        if (index < num_quartered * 4)
            return {num_whole + index / 4, kUnits * (index % 4) / 4, kUnits * (index % 4 + 1) / 4, index % 4, phase};
        index -= num_quartered * 4;
        const uint32_t item = num_fine_parts == kFineParts ? index / kFineParts : small_quotient(index, num_fine_parts);
        const uint32_t part = index - item * num_fine_parts;
        return {num_whole + num_quartered + item, small_quotient(kUnits * part, num_fine_parts),
                small_quotient(kUnits * (part + 1), num_fine_parts), part, phase};
    }
};

// What there is to do. Tickets of the up phase, one for each fused tile, then tickets of the down phase. Fused tiles are
// the last ones; the others are cut, and so many that their down phase evens out the rest. Of few tiles none is fused.
struct Schedule {
    static constexpr uint32_t kFinePartsUp = Cut<kNumK, kMaxParts, true>::kFineParts;
    static constexpr uint32_t kEnoughCut = 3 * kNumCtas;
    // With few jobs each CTA makes all activations of its tile, chunk after chunk.
    static constexpr bool kMayBeFew = !kDeterministic && kNumChunks <= 4;
    // A job for each CTA, or some.
    static constexpr uint32_t kTilesInRound = kNumCtas % kNumChunks == 0 ? kNumCtas / kNumChunks : kNumCtas;
    bool few;
    uint32_t num_cut, num_fused;  // tiles
    Cut<kNumK, kMaxParts, true> up;
    Cut<kNumGroups, 16, false> down;
    uint32_t num_up, first_down, num_tickets;

    __device__ __forceinline__ explicit Schedule(uint32_t num_tiles)
        : few(kMayBeFew && num_tiles * kNumChunks * 4 <= kNumCtas), num_cut(tiles_to_cut(num_tiles)),
          num_fused(num_tiles - num_cut), up(num_cut * kNumChunks, few, num_fused == 0), down(num_cut, few, true),
          num_up(up.num_pieces()), first_down(num_up + num_fused), num_tickets(first_down + down.num_pieces()) {}

    __device__ __forceinline__ static uint32_t tiles_to_cut(uint32_t num_tiles) {
        if (!kFuses) return num_tiles;
        constexpr uint32_t kDownUnits = kNumGroups * kNumChunks, kFusedUnits = kNumK * kNumChunks + kDownUnits;
        const uint32_t least = min(num_tiles * 2 / 5, kEnoughCut);
        // So that each CTA has whole jobs and there are no sums to exchange, if it evens out that then some CTAs have a fused
        // tile less.
        const uint32_t whole = ceil_div(least, kTilesInRound) * kTilesInRound;
        const uint32_t num_less = kNumCtas - 1 - (num_tiles - whole - 1) % kNumCtas;
        if (whole < num_tiles && num_less * kFusedUnits * 5 <= whole * kDownUnits * 3) return whole;
        // Or as many fused tiles for each CTA.
        return num_tiles - (num_tiles - least) / kNumCtas * kNumCtas;
    }

    // The first piece of a ticket; past the last ticket, the end.
    __device__ __forceinline__ Piece piece(uint32_t ticket) const {
        if (ticket < num_up) return up.piece(ticket, kUp);
        if (kFuses && ticket < first_down) return {(num_cut + ticket - num_up) * kNumChunks, 0, kNumK, 0, kFusedUp};
        if (ticket < num_tickets) return down.piece(ticket - first_down, kDown);
        return {0, 0, 0, 0, kEnd};
    }
    // What follows a kFusedUp within its ticket: the tile's next chunk, or its down phase.
    __device__ __forceinline__ static Piece following(const Piece& piece) {
        const uint32_t job = piece.item + 1;
        if (job % kNumChunks == 0) return {job / kNumChunks - 1, 0, kNumGroups, 0, kFusedDown};
        return {job, 0, kNumK, 0, kFusedUp};
    }

    // The jobs whose activations a CTA may be made to compute when it comes to `piece` of `ticket`: for those that were cut
    // first, when each CTA had another piece since; for all, when there is no other way on.
    __device__ __forceinline__ uint32_t num_summed_up(uint32_t ticket, const Piece& piece) const {
        if (piece.phase >= kFusedDown) return up.num_items;
        const uint32_t num_early = up.num_whole + up.num_quartered;
        return ticket >= up.num_whole + up.num_quartered * 4 + kNumCtas ? num_early : 0;
    }

    __device__ __forceinline__ uint32_t first_ticket() const {
        return few && blockIdx.x >= num_up ? first_down + blockIdx.x : blockIdx.x;
    }
    // Few items: one ticket of each phase for each CTA.
    __device__ __forceinline__ uint32_t next_ticket(uint32_t ticket) const {
        return ticket < num_up ? first_down + blockIdx.x : num_tickets;
    }
};
