// How sm90_stream.cu cuts the layer into pieces of work.
#pragma once
#include "stream_constants.cuh"

// Units first_unit..last_unit of an item: K tiles of a job, or groups of columns of a tile.
struct Piece {
    uint32_t item, first_unit, last_unit;
    uint32_t part;  // which of the item's pieces
    uint32_t phase;
};
constexpr uint32_t kUp = 0, kActivate = 1, kDown = 2, kEnd = 3;

// dividend / divisor, for dividends below 2^20.
__device__ __forceinline__ uint32_t small_quotient(uint32_t dividend, uint32_t divisor) {
    return __float2uint_rz(__fdividef(dividend + 0.5f, divisor));
}

// How the items of a phase, of kUnits units each, are cut into pieces of at most kMostParts parts. Few items: all alike,
// so that each CTA has at most one piece. Many: the first ones not at all, the next ones into 4, the last ones finely.
// Where units add up to one sum and that has to come out the same in any batch, all finely.
template <uint32_t kUnits, uint32_t kMostParts, bool kUnitsAddUp>
struct Cut {
    static constexpr uint32_t kFineParts = kUnits < 4 ? 1 : kUnits / 2 < kMostParts ? kUnits / 2 : kMostParts;
    static constexpr uint32_t kFewestFine = 20;
    uint32_t num_items, num_whole, num_quartered, num_fine_parts;

    __device__ __forceinline__ Cut(uint32_t num_items, bool few) : num_items(num_items) {
        num_whole = num_quartered = 0;
        num_fine_parts = kFineParts;
        if (kDeterministic && kUnitsAddUp) return;
        if (few) {
            num_fine_parts = min(min(small_quotient(kNumCtas, num_items), kUnits), kMostParts);
        } else {
            num_whole = num_items * 2 / 3 / kNumCtas * kNumCtas;
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

// What there is to do.
struct Schedule {
    static constexpr uint32_t kFinePartsUp = Cut<kNumK, kMaxParts, true>::kFineParts;
    uint32_t num_jobs;
    bool few;
    Cut<kNumK, kMaxParts, true> up;
    Cut<kNumGroups, 16, false> down;
    uint32_t num_up, num_tickets;

    __device__ __forceinline__ explicit Schedule(uint32_t num_tiles)
        : num_jobs(num_tiles * kNumChunks), few(!kDeterministic && num_jobs * 4 <= kNumCtas), up(num_jobs, few),
          down(num_tiles, few), num_up(up.num_pieces()), num_tickets(num_up + down.num_pieces()) {}

    // Tickets of the up phase, then tickets of the down phase.
    __device__ __forceinline__ Piece piece(uint32_t ticket) const {
        return ticket < num_up ? up.piece(ticket, kUp) : down.piece(ticket - num_up, kDown);
    }
    __device__ __forceinline__ uint32_t first_ticket() const {
        return few && blockIdx.x >= num_up ? num_up + blockIdx.x : blockIdx.x;
    }
    // Few items: one ticket of each phase for each CTA.
    __device__ __forceinline__ uint32_t next_ticket(uint32_t ticket) const {
        return ticket < num_up ? num_up + blockIdx.x : num_tickets;
    }
};
