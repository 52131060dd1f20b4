// Warpgroup matrix products, emulated: computed when wait() demands them, from what shared memory holds then. Until
// then the accumulators are NaN. A product is at fault when what it reads has changed since it was issued, or came by
// cp.async and this thread has not fenced since.
//
// Each thread computes its own accumulators; sums are in fp32, which is more than the tensor cores keep.
#pragma once
#include "types.cuh"

namespace emulation {

inline const float* e4m3_values() {
    static const std::vector<float> values = [] {
        std::vector<float> table(256);
        for (uint32_t code = 0; code < 256; ++code) {
            const int exponent = code >> 3 & 15, mantissa = code & 7;
            float value = exponent == 0 ? ldexpf(static_cast<float>(mantissa), -9)
                                        : ldexpf(static_cast<float>(8 + mantissa), exponent - 10);
            if ((code & 0x7f) == 0x7f) value = NAN;
            table[code] = code & 0x80 ? -value : value;
        }
        return table;
    }();
    return values.data();
}

// The tile of a descriptor as wgmma.cuh makes them.
struct Tile {
    uint32_t first;

    explicit Tile(uint64_t descriptor) : first(static_cast<uint32_t>(descriptor & 0x3fff) << 4) {
        if (descriptor >> 62 != 1 || (descriptor >> 32 & 0x3fff) != 64)
            throw Fault{"a wgmma descriptor that is not of 128-byte swizzled rows"};
    }
    // Where 16 bytes of a row begin: bytes 16 * half .. of its 32.
    uint32_t piece(uint32_t row, uint32_t half) const {
        const uint32_t address = first + row / 8 * 1024 + row % 8 * 128 + half * 16;
        return address ^ (address >> 7 & 7) << 4;
    }
};

constexpr uint32_t kProductK = 32;

inline void decode_row(const Tile& tile, uint32_t row, float (&value)[kProductK]) {
    const float* const table = e4m3_values();
    for (uint32_t half = 0; half < 2; ++half) {
        const uint8_t* const bytes = current->cta->shared + tile.piece(row, half);
        for (uint32_t i = 0; i < 16; ++i) value[16 * half + i] = table[bytes[i]];
    }
}

// Rows of A and of B, as far as this thread's accumulators need them: visit(tile, row).
template <uint32_t kN, typename Visit>
void for_each_operand_row(uint64_t a, uint64_t b, Visit visit) {
    const uint32_t warp = current->thread / 32 % 4, lane = current->thread % 32;
    for (uint32_t h = 0; h < 2; ++h) visit(Tile(a), 16 * warp + lane / 4 + 8 * h);
    for (uint32_t n = 0; n < kN / 4; ++n) visit(Tile(b), n / 2 * 8 + lane % 4 * 2 + n % 2);
}

template <uint32_t kN>
uint64_t digest_operands(uint64_t a, uint64_t b) {
    uint64_t digest = 0;
    for_each_operand_row<kN>(a, b, [&](const Tile& tile, uint32_t row) {
        for (uint32_t i = 0; i < 4; ++i) {
            uint64_t word;
            memcpy(&word, current->cta->shared + tile.piece(row, i / 2) + i % 2 * 8, 8);
            digest = (digest ^ word) * 0x9e3779b97f4a7c15;
            digest ^= digest >> 29;
        }
    });
    return digest;
}

template <uint32_t kN>
void check_fenced(uint64_t a, uint64_t b, const Where& where) {
    for_each_operand_row<kN>(a, b, [&](const Tile& tile, uint32_t row) {
        for (uint32_t half = 0; half < 2; ++half)
            if (current->cta->cp_async_clock[tile.piece(row, half) / kStampBytes] > current->fenced)
                throw Fault{name_of(where) + ": reads what cp.async wrote, without fence_async_proxy() since"};
    });
}

template <uint32_t kN>
void finish_product(const PendingProduct& product, float* sum) {
    if (digest_operands<kN>(product.a, product.b) != product.operands)
        throw Fault{name_of(product.where) + ": operands changed while the product was in flight"};
    float left[2][kProductK], right[kProductK];
    uint32_t n = 0;
    for_each_operand_row<kN>(product.a, product.b, [&](const Tile& tile, uint32_t row) {
        if (n < 2) return decode_row(tile, row, left[n++]);
        decode_row(tile, row, right);
        const uint32_t j = (n - 2) / 2, b = n % 2;
        for (uint32_t h = 0; h < 2; ++h) {
            float total = product.adds ? sum[4 * j + 2 * h + b] : 0.f;
            for (uint32_t k = 0; k < kProductK; ++k) total += left[h][k] * right[k];
            sum[4 * j + 2 * h + b] = total;
        }
        ++n;
    });
}

template <uint32_t kN>
void issue_product(float (&d)[kN / 2], uint64_t a, uint64_t b, bool adds, const Where& where) {
    check_fenced<kN>(a, b, where);
    if (current->accumulators.try_emplace(d, d, d + kN / 2).second) std::fill(d, d + kN / 2, NAN);
    current->groups.back().push_back({d, &finish_product<kN>, a, b, adds, digest_operands<kN>(a, b), where});
}

inline void finish_oldest_group() {
    auto& groups = current->groups;
    const std::vector<PendingProduct> products = std::move(groups.front());
    groups.pop_front();
    for (const PendingProduct& product : products)
        product.finish(product, current->accumulators.at(product.accumulators).data());
    for (const PendingProduct& product : products) {
        const auto still_used = [&](const auto& group) {
            return std::any_of(group.begin(), group.end(),
                               [&](const auto& other) { return other.accumulators == product.accumulators; });
        };
        const auto place = current->accumulators.find(product.accumulators);
        if (place == current->accumulators.end() || std::any_of(groups.begin(), groups.end(), still_used)) continue;
        std::copy(place->second.begin(), place->second.end(), product.accumulators);
        current->accumulators.erase(place);
    }
}

}  // namespace emulation

namespace wgmma {

inline uint64_t descriptor(const void* tile, EMULATED_WHERE) {
    if (shared_address(tile) % 1024 != 0)
        throw emulation::Fault{emulation::name_of(where) + ": a tile that is not at a multiple of 1024 bytes"};
    const uint64_t address = shared_address(tile) >> 4;
    return address | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

constexpr uint64_t kStepK = 32 >> 4;

inline void fence() {}
inline void commit() { emulation::current->groups.emplace_back(); }

// No lane goes on before all of its warp have what they waited for: the instruction is one for the warp.
template <int kPending>
inline void wait(EMULATED_WHERE) {
    emulation::launch->interrupt();
    while (emulation::current->groups.size() > kPending + 1) emulation::finish_oldest_group();
    __syncwarp(~0u, where);
}

template <int kCount>
inline void pin(float (&)[kCount]) {}

template <int kN>
struct Product {
    static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
    static void zero(float (&d)[kN / 2], uint64_t a, uint64_t b, EMULATED_WHERE) {
        emulation::issue_product<kN>(d, a, b, false, where);
    }
    static void anew(float (&d)[kN / 2], uint64_t a, uint64_t b, EMULATED_WHERE) {
        emulation::issue_product<kN>(d, a, b, false, where);
    }
    static void add(float (&d)[kN / 2], uint64_t a, uint64_t b, EMULATED_WHERE) {
        emulation::issue_product<kN>(d, a, b, true, where);
    }
};

template <int kN, bool kAnew = false>
inline void multiply_k128(float (&d)[kN / 2], uint64_t a, uint64_t b, EMULATED_WHERE) {
    fence();
    Product<kN>::zero(d, a, b, where);
    for (int step = 1; step < 4; ++step) Product<kN>::add(d, a + step * kStepK, b + step * kStepK, where);
    commit();
}

}  // namespace wgmma
