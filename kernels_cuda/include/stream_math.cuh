// The consumers of sm90_stream.cu: products, activations, additions to the output.
#pragma once
#include "cluster.cuh"
#include "copy.cuh"
#include "exchange.cuh"
#include "mma.cuh"
#include "promote.cuh"
#include "registers.cuh"
#include "stream_storage.cuh"
#include "wgmma.cuh"

// The heights that products have: a multiple of 16 rows, or kMaxRows. More of them would save nothing while weights are
// waited for, and each takes its place in the instruction caches.
constexpr uint32_t kLeastHeight = kMaxRows < 16 ? kMaxRows : 16;
__device__ __forceinline__ constexpr uint32_t next_height(uint32_t rows) {
    return rows + 16 < kMaxRows ? rows + 16 : kMaxRows;
}

// Sums of wgmma have 14 bits: gate and up are off by 1.3e-4 with sums over 128 of K, by 4.5e-5 with sums over 32. That flips
// codes of the activations, the largest part of the error of `out`. With few rows to a tile there is time for products in
// f16 while weights are waited for; with more, for short sums; tall tiles take long enough, and the registers, as it is.
constexpr uint32_t kMaxExactRows = 16;

template <uint32_t kRows>
constexpr uint32_t kPromoteK = kRows <= 24 ? 32 : kRows <= 32 ? 64 : kTileK;

// Products of 64 weight rows by kRows tokens over one K tile, in kRounds rounds of kCount sums of kPromoteK each.
template <uint32_t kRows>
struct Products {
    static constexpr uint32_t kPieces = kTileK / kPromoteK<kRows>;
    static constexpr uint32_t kFitting = kRows <= 16 ? 4 : kRows <= 24 ? 2 : 1;  // registers
    static constexpr uint32_t kCount = kFitting < kPieces ? kFitting : kPieces;
    static constexpr uint32_t kRounds = kPieces / kCount;
    static constexpr uint32_t kSteps = kPromoteK<kRows> / 32;
    float sums[kCount][kRows / 2];

    // As one committed group.
    __device__ __forceinline__ void start(uint64_t weights, uint64_t tokens, uint32_t round) {
        wgmma::fence();
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) {
            const uint64_t first = (round * kCount + i) * kSteps * wgmma::kStepK;
            wgmma::Product<kRows>::zero(sums[i], weights + first, tokens + first);
#pragma unroll
            for (uint32_t step = 1; step < kSteps; ++step)
                wgmma::Product<kRows>::add(sums[i], weights + first + step * wgmma::kStepK,
                                           tokens + first + step * wgmma::kStepK);
        }
        wgmma::commit();
    }

    __device__ __forceinline__ void pin() {
#pragma unroll
        for (uint32_t i = 0; i < kCount; ++i) wgmma::pin(sums[i]);
    }

    // Of a round that was waited for.
    __device__ __forceinline__ void promote_into(float (&total)[kRows / 2], const float* token_scale, float weight_scale,
                                                 uint32_t lane) {
        pin();
#pragma unroll
        for (uint32_t i = 1; i < kCount; ++i)
#pragma unroll
            for (uint32_t j = 0; j < kRows / 2; ++j) sums[0][j] += sums[i][j];
        promote<kRows>(total, sums[0], token_scale, weight_scale, lane);
    }
};

// Two warpgroups: each 64 gate rows and the same 64 up rows of the chunk, then 128 of each group's 256 columns.
struct Math {
    const Params& p;
    SharedStorage& shared;
    const uint32_t thread = threadIdx.x;
    const uint32_t warpgroup = registers::uniform(threadIdx.x / 128);
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t lane = threadIdx.x % 32;
    Position ring;
    TokenPosition token_ring;
    RingPosition<2> activation;

    __device__ __forceinline__ Math(const Params& p, SharedStorage& shared) : p(p), shared(shared) {}

    __device__ __forceinline__ void wait_weights() { mbarrier::wait(shared.full[ring.stage], ring.parity); }

    __device__ __forceinline__ void release_stage() {
        mbarrier::arrive_warp(shared.empty[ring.stage]);
        ring.advance();
    }

    // gate and up += products over the K tile that has arrived.
    template <uint32_t kRows>
    __device__ __forceinline__ void add_products(float (&gate)[kRows / 2], float (&up)[kRows / 2]) {
        fence_async_proxy();  // the tokens came by cp.async
        const uint64_t tokens = wgmma::descriptor(shared.tokens[token_ring.stage]);
        const uint64_t gate_rows = wgmma::descriptor(shared.weights[ring.stage][0] + warpgroup * kWarpgroupBytes);
        const uint64_t up_rows = wgmma::descriptor(shared.weights[ring.stage][1] + warpgroup * kWarpgroupBytes);
        const float* token_scale = shared.token_scale[token_ring.stage];
        const float gate_scale = shared.weight_scale[token_ring.stage][0];
        const float up_scale = shared.weight_scale[token_ring.stage][1];
        Products<kRows> gate_products, up_products;
        gate_products.start(gate_rows, tokens, 0);
        up_products.start(up_rows, tokens, 0);
#pragma unroll
        for (uint32_t round = 1; round < Products<kRows>::kRounds; ++round) {
            wgmma::wait<1>();
            gate_products.promote_into(gate, token_scale, gate_scale, lane);
            gate_products.start(gate_rows, tokens, round);
            wgmma::wait<1>();
            up_products.promote_into(up, token_scale, up_scale, lane);
            up_products.start(up_rows, tokens, round);
        }
        wgmma::wait<1>();
        gate_products.promote_into(gate, token_scale, gate_scale, lane);
        wgmma::wait<0>();
        up_products.pin();
        release_stage();
        up_products.promote_into(up, token_scale, up_scale, lane);
    }

    // The same in f16. A lane has 16 bytes of K of a row at a time, those of pieces 2q and 2q + 1 for q its place in the quad;
    // each 4 of them are its part of 16 values of K. In which order K is added up does not matter.
    template <uint32_t kRows>
    __device__ __forceinline__ void add_exact_products(float (&gate)[kRows / 2], float (&up)[kRows / 2]) {
        constexpr uint32_t kBlocks = kRows / 8;
        const uint32_t row = lane / 4;
        const uint8_t* const weights = shared.weights[ring.stage][0] + (warp * 16 + row) * kTileK;
        const uint8_t* const tokens = shared.tokens[token_ring.stage] + row * kTileK;
        float partial[2][2][kRows / 2] = {};  // of each half of K: a sum waits for the one before
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t piece = ((2 * (lane % 4) + half) ^ row) * 16;
            uint4 token[kBlocks], above[2], below[2];
#pragma unroll
            for (uint32_t j = 0; j < kBlocks; ++j)
                token[j] = *reinterpret_cast<const uint4*>(tokens + j * 8 * kTileK + piece);
#pragma unroll
            for (uint32_t matrix = 0; matrix < 2; ++matrix) {
                above[matrix] = *reinterpret_cast<const uint4*>(weights + matrix * kHalfBytes + piece);
                below[matrix] = *reinterpret_cast<const uint4*>(weights + matrix * kHalfBytes + 8 * kTileK + piece);
            }
#pragma unroll
            for (uint32_t word = 0; word < 4; ++word) {
                uint2 b[kBlocks];
#pragma unroll
                for (uint32_t j = 0; j < kBlocks; ++j) b[j] = mma::f16_of_e4m3(mma::word_of(token[j], word));
#pragma unroll
                for (uint32_t matrix = 0; matrix < 2; ++matrix) {
                    const uint2 a = mma::f16_of_e4m3(mma::word_of(above[matrix], word));
                    const uint2 a_below = mma::f16_of_e4m3(mma::word_of(below[matrix], word));
#pragma unroll
                    for (uint32_t j = 0; j < kBlocks; ++j)
                        mma::add(*reinterpret_cast<float(*)[4]>(partial[half][matrix] + 4 * j), a, a_below, b[j]);
                }
            }
        }
        const float* const token_scale = shared.token_scale[token_ring.stage];
        const float* const weight_scale = shared.weight_scale[token_ring.stage];
        release_stage();
#pragma unroll
        for (uint32_t matrix = 0; matrix < 2; ++matrix)
#pragma unroll
            for (uint32_t i = 0; i < kRows / 2; ++i) partial[0][matrix][i] += partial[1][matrix][i];
        promote<kRows>(gate, partial[0][0], token_scale, weight_scale[0], lane);
        promote<kRows>(up, partial[0][1], token_scale, weight_scale[1], lane);
    }

    // Some K tiles of one job: gate and up sums of 64 rows each, into the rows of the piece in the exchange. If these are
    // all of them, on to the job's activations, for all CTAs or, of a fused tile, for this one. Row r has row_weight[r].
    template <uint32_t kRows>
    __device__ __forceinline__ void project_up(const Tile& tile, const Piece& piece, bool whole, const float* row_weight) {
        float gate[kRows / 2], up[kRows / 2];
#pragma unroll
        for (uint32_t i = 0; i < kRows / 2; ++i) gate[i] = up[i] = 0.f;
        const uint32_t first_unit = registers::uniform(piece.first_unit), last_unit = registers::uniform(piece.last_unit);
#pragma unroll 1
        for (uint32_t k = first_unit; k < last_unit; ++k) {
            wait_weights();
            mbarrier::wait(shared.tokens_full[token_ring.stage], token_ring.parity);
            if constexpr (kRows <= kMaxExactRows)
                add_exact_products<kRows>(gate, up);
            else
                add_products<kRows>(gate, up);
            mbarrier::arrive_warp(shared.tokens_empty[token_ring.stage]);
            token_ring.advance();
        }
        grid_dependency::wait();  // the previous kernel zeroes `out` and fills what is exchanged with ones
        if (whole) {
            const uint32_t chunk = piece.item % kNumChunks;
            const float weight = thread < tile.num_rows ? row_weight[thread] * p.routed_scaling_factor : 0.f;
            if (kFuses && piece.phase == kFusedUp)
                return activate_own<kRows>(tile, gate, up, shared.activation[activation.stage][chunk],
                                           shared.activation_scale[activation.stage][chunk], weight);
            activate_own<kRows>(tile, gate, up, shared.outgoing, shared.outgoing_scale, 1.f);
            return publish(tile, chunk, weight);
        }
        float4* const part = sums(tile, piece.item % kNumChunks, piece.part) + warp * 8 + lane / 4;
#pragma unroll
        for (uint32_t j = 0; j < kRows / 8; ++j) {
#pragma unroll
            for (uint32_t b = 0; b < 2; ++b) {
                const uint32_t row = 8 * j + 2 * (lane % 4) + b;
                if (row < tile.num_rows)
                    exchange::store(part + row * kMaxParts * kRowVectors,
                                    make_float4(gate[4 * j + b], gate[4 * j + 2 + b], up[4 * j + b], up[4 * j + 2 + b]));
            }
        }
        if constexpr (kFlagged) {
            __syncwarp();
            if (lane == 0) exchange::signal(flags(piece.item, warp) + piece.part);
        }
    }

    // The weight in `out` of row `thread` of the tile.
    __device__ __forceinline__ float weight_of_own_row(const Tile& tile) const {
        if (thread >= tile.num_rows) return 0.f;
        return p.topk_weights[p.sorted_choices[tile.first_row + thread]] * p.routed_scaling_factor;
    }

    // The activations of a job whose sums this CTA has, quantised per row: `target` as wgmma reads them, and their scales,
    // those of row `thread` times `weight`. Both are free after the first barrier here.
    template <uint32_t kRows>
    __device__ __forceinline__ void activate_own(const Tile& tile, float (&gate)[kRows / 2], const float (&up)[kRows / 2],
                                                 uint8_t* target, float* target_scale, float weight) {
#pragma unroll
        for (uint32_t j = 0; j < kRows / 8; ++j) {
            float amax[2] = {};
#pragma unroll
            for (uint32_t i = 0; i < 4; ++i) {
                gate[4 * j + i] = p.form.swiglu(gate[4 * j + i], up[4 * j + i]);
                amax[i % 2] = fmaxf(amax[i % 2], fabsf(gate[4 * j + i]));
            }
#pragma unroll
            for (uint32_t offset = 4; offset < 32; offset *= 2) {
                amax[0] = fmaxf(amax[0], __shfl_xor_sync(~0u, amax[0], offset));
                amax[1] = fmaxf(amax[1], __shfl_xor_sync(~0u, amax[1], offset));
            }
            if (lane < 4)
                *reinterpret_cast<float2*>(&shared.row_amax[warp][8 * j + 2 * lane]) = make_float2(amax[0], amax[1]);
        }
        named_barrier(kMathBarrier, kNumMathThreads);
        if (thread < tile.num_rows) {
            float amax = 0.f;
#pragma unroll
            for (uint32_t w = 0; w < kNumMathWarps; ++w) amax = fmaxf(amax, shared.row_amax[w][thread]);
            const float scale = p.form.scale(amax);
            shared.inverse_scale[thread] = 1.f / scale;
            target_scale[thread] = scale * weight;
        }
        named_barrier(kMathBarrier, kNumMathThreads);
#pragma unroll
        for (uint32_t j = 0; j < kRows / 8; ++j) {
#pragma unroll
            for (uint32_t b = 0; b < 2; ++b) {
                const uint32_t row = 8 * j + 2 * (lane % 4) + b;
                if (row >= tile.num_rows) continue;
                const float inverse = shared.inverse_scale[row];
                const uint16_t packed = pack_e4m3x2(gate[4 * j + b] * inverse, gate[4 * j + 2 + b] * inverse);
                uint8_t* const piece = target + row * kGroupSize + (warp ^ row % 8) * 16 + lane / 4;
                piece[0] = static_cast<uint8_t>(packed);
                piece[8] = static_cast<uint8_t>(packed >> 8);
            }
        }
        fence_async_proxy();
        named_barrier(kMathBarrier, kNumMathThreads);
    }

    // Set when the sums that `writer` had of a job are written, one for each part.
    __device__ __forceinline__ uint32_t* flags(uint32_t job, uint32_t writer) const {
        return p.sums_written + (job * kNumMathWarps + writer) * kFlaggedParts;
    }

    // Where the sums of a piece of the up phase go: its first row, the next one kMaxParts * kRowVectors further.
    __device__ __forceinline__ float4* sums(const Tile& tile, uint32_t chunk, uint32_t part) const {
        const uint64_t first_row = tile.first_row * kNumChunks + chunk * tile.num_rows;
        return p.sums + (first_row * kMaxParts + part) * kRowVectors;
    }

    // The activations of a job from its num_parts parts, quantised per row: `target` as wgmma reads them, and their scales.
    // kPasses rows per group of 64 threads at a time, and up to 16 vectors in flight.
    template <uint32_t kPasses>
    __device__ __forceinline__ void activate(const Tile& tile, uint32_t job, uint32_t num_parts, uint8_t* target,
                                             float* target_scale, const float* row_weight) {
        constexpr uint32_t kParts = kMaxParts == 4 || kPasses == 4 ? 4 : kPasses == 2 ? 6 : 8;
        constexpr uint32_t kRowsAtOnce = kNumMathThreads / kRowVectors;
        const uint32_t vector = thread % kRowVectors, first_row = thread / kRowVectors;
        const uint32_t channel = vector / 32 * 64 + vector / 8 % 4 * 16 + vector % 8;  // and channel + 8
        const float4* const parts = sums(tile, job % kNumChunks, 0) + vector;
        if constexpr (kFlagged) exchange::await(reinterpret_cast<const uint4*>(flags(job, vector / 8)), num_parts);
#pragma unroll 1
        for (uint32_t base = 0; base < tile.num_rows; base += kPasses * kRowsAtOnce) {
            float4 sum[kPasses];
#pragma unroll
            for (uint32_t pass = 0; pass < kPasses; ++pass) sum[pass] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
            for (uint32_t first_part = 0; first_part < num_parts; first_part += kParts) {
                float4 value[kPasses * kParts];
                const float4* const first = parts + ((base + first_row) * kMaxParts + first_part) * kRowVectors;
                const auto wanted = [&](uint32_t i) {
                    const uint32_t row = base + i / kParts * kRowsAtOnce + first_row, part = first_part + i % kParts;
                    return row < tile.num_rows && part < num_parts;
                };
                const auto address = [&](uint32_t i) {
                    return first + (i / kParts * kRowsAtOnce * kMaxParts + i % kParts) * kRowVectors;
                };
                if constexpr (kFlagged)
                    exchange::load_flagged(value, wanted, address);
                else
                    exchange::load(value, wanted, address);
#pragma unroll
                for (uint32_t pass = 0; pass < kPasses; ++pass)
#pragma unroll
                    for (uint32_t i = 0; i < kParts; ++i) add(sum[pass], value[pass * kParts + i]);
            }
            float low[kPasses], high[kPasses];
#pragma unroll
            for (uint32_t pass = 0; pass < kPasses; ++pass) {
                low[pass] = p.form.swiglu(sum[pass].x, sum[pass].z);
                high[pass] = p.form.swiglu(sum[pass].y, sum[pass].w);
                float amax = fmaxf(fabsf(low[pass]), fabsf(high[pass]));
#pragma unroll
                for (uint32_t offset = 16; offset > 0; offset /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, offset));
                if (lane == 0) shared.amax[pass][warp] = amax;
            }
            named_barrier(kMathBarrier, kNumMathThreads);
#pragma unroll
            for (uint32_t pass = 0; pass < kPasses; ++pass) {
                const uint32_t row = base + pass * kRowsAtOnce + first_row;
                if (row >= tile.num_rows) break;
                const float amax = fmaxf(shared.amax[pass][warp], shared.amax[pass][warp ^ 1]);
                const float scale = p.form.scale(amax);
                const float inverse = 1.f / scale;
                const uint16_t packed = pack_e4m3x2(low[pass] * inverse, high[pass] * inverse);
                uint8_t* const piece = target + row * kGroupSize + (channel / 16 ^ row % 8) * 16 + channel % 16;
                piece[0] = static_cast<uint8_t>(packed);
                piece[8] = static_cast<uint8_t>(packed >> 8);
                if (vector == 0) target_scale[row] = row_weight == nullptr ? scale : scale * row_weight[row];
            }
            fence_async_proxy();
            named_barrier(kMathBarrier, kNumMathThreads);
        }
    }

    __device__ __forceinline__ void activate_fitting(const Tile& tile, uint32_t job, uint32_t num_parts, uint8_t* target,
                                                     float* target_scale, const float* row_weight) {
        if (tile.num_rows <= 4)
            activate<1>(tile, job, num_parts, target, target_scale, row_weight);
        else if (tile.num_rows <= 8)
            activate<2>(tile, job, num_parts, target, target_scale, row_weight);
        else
            activate<4>(tile, job, num_parts, target, target_scale, row_weight);
    }

    // Hands the activations of a job, in `outgoing`, to all CTAs: thread `row` has that row's weight in `out`. `outgoing` is
    // free again after the first barrier of what fills it next.
    __device__ __forceinline__ void publish(const Tile& tile, uint32_t chunk, float weight) {
        if (thread < tile.num_rows)
            exchange::store(p.activation_scales + (tile.first_row + thread) * kNumChunks + chunk,
                            shared.outgoing_scale[thread] * weight);
        constexpr uint32_t kPieces = kGroupSize / 16;
        uint4* const rows = p.activations + (static_cast<uint64_t>(tile.first_row) * kNumChunks + chunk) * kPieces;
#pragma unroll 1
        for (uint32_t i = thread; i < tile.num_rows * kPieces; i += kNumMathThreads) {
            const uint32_t row = i / kPieces, piece = i % kPieces;
            const uint8_t* const source = shared.outgoing + row * kGroupSize + (piece ^ row % 8) * 16;
            exchange::store(rows + row * kNumChunks * kPieces + piece, *reinterpret_cast<const uint4*>(source));
        }
    }

    __device__ __forceinline__ static void add(float4& sum, const float4& value) {
        sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
    }

    // Some groups of columns of a tile. The rows of a tile of w2 are so ordered that this thread's four accumulator rows
    // of a token are four adjacent columns: row 64 t + 16 w + 8 h + g is column 32 w + 4 g + 2 t + h.
    template <uint32_t kRows>
    __device__ __forceinline__ void project_down(const Tile& tile, const Piece& piece) {
        const uint32_t buffer = activation.stage;
        const uint32_t first_unit = registers::uniform(piece.first_unit), last_unit = registers::uniform(piece.last_unit);
#pragma unroll 1
        for (uint32_t group = first_unit; group < last_unit; ++group) {
            const uint32_t first_column = group * kGroupColumns + warpgroup * kTileRows;
            if (first_column >= kHiddenSize) {  // the last group may be half
#pragma unroll 1
                for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
                    wait_weights();
                    release_stage();
                }
                continue;
            }
            float sums[2][kRows / 2];
#pragma unroll
            for (uint32_t i = 0; i < kRows / 2; ++i) sums[0][i] = sums[1][i] = 0.f;
#pragma unroll 1
            for (uint32_t chunk = 0; chunk < kNumChunks; ++chunk) {
                wait_weights();
                float partial[2][kRows / 2];
                const uint64_t activation = wgmma::descriptor(shared.activation[buffer][chunk]);
                const uint64_t rows = wgmma::descriptor(shared.weights[ring.stage][warpgroup]);
                wgmma::multiply_k128<kRows>(partial[0], rows, activation);
                wgmma::multiply_k128<kRows>(partial[1], rows + (kWarpgroupBytes >> 4), activation);
                const float weight_scale = shared.down_scale[buffer][(2 * group + warpgroup) * kNumChunks + chunk];
                wgmma::wait<0>();
                wgmma::pin(partial[0]);
                wgmma::pin(partial[1]);
                release_stage();
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half)
                    promote<kRows>(sums[half], partial[half], shared.activation_scale[buffer][chunk], weight_scale, lane);
            }
            // Lanes 4 apart hold columns 4 apart of the same two tokens: they swap, and each adds 8 columns of one.
            const bool odd = lane & 4;
            uint16_t* const columns = p.out + first_column + (warp % 4) * 32 + lane / 8 * 8;
#pragma unroll
            for (uint32_t j = 0; j < kRows / 8; ++j) {
                uint32_t low[2], high[2];
#pragma unroll
                for (uint32_t b = 0; b < 2; ++b) {
                    low[b] = pack_bf16x2(sums[0][4 * j + b], sums[0][4 * j + 2 + b]);
                    high[b] = pack_bf16x2(sums[1][4 * j + b], sums[1][4 * j + 2 + b]);
                }
                const uint32_t other_low = __shfl_xor_sync(~0u, odd ? low[0] : low[1], 4);
                const uint32_t other_high = __shfl_xor_sync(~0u, odd ? high[0] : high[1], 4);
                const uint32_t row = 8 * j + 2 * (lane % 4) + odd;
                if (row >= tile.num_rows) continue;
                uint16_t* const address = columns + static_cast<uint64_t>(shared.output_row[buffer][row]) * kHiddenSize;
                const uint4 values = odd ? make_uint4(other_low, other_high, low[1], high[1])
                                         : make_uint4(low[0], high[0], other_low, other_high);
                if constexpr (kDeterministic)
                    *reinterpret_cast<uint4*>(address) = values;
                else
                    add_bf16x8(address, values);
            }
            __syncwarp();  // where lanes may have parted, see registers::uniform()
        }
    }

    // project_up() and project_down() with the least height that holds the tile's rows, kRows or more.
    template <uint32_t kRows = kLeastHeight>
    __device__ __forceinline__ void project_up_fitting(const Tile& tile, const Piece& piece, bool whole,
                                                       const float* row_weight) {
        if constexpr (kRows < kMaxRows)
            if (tile.num_rows > kRows) return project_up_fitting<next_height(kRows)>(tile, piece, whole, row_weight);
        project_up<kRows>(tile, piece, !kDeterministic && whole, row_weight);
    }

    template <uint32_t kRows = kLeastHeight>
    __device__ __forceinline__ void project_down_fitting(const Tile& tile, const Piece& piece) {
        if constexpr (kRows < kMaxRows)
            if (tile.num_rows > kRows) return project_down_fitting<next_height(kRows)>(tile, piece);
        project_down<kRows>(tile, piece);
    }

    __device__ __forceinline__ void run() {
        const Schedule schedule(shared.num_tiles);
#pragma unroll 1
        for (QueuePosition queue;; queue.advance()) {
            mbarrier::wait(shared.queue_full[queue.stage], queue.parity);
            const Piece piece = shared.queue[queue.stage];
            if (piece.phase == kEnd) break;
            if (piece.phase <= kFusedUp)
                project_up_fitting(tile_at(p, shared, piece.item / kNumChunks), piece,
                                   piece.phase == kFusedUp || piece.item < schedule.up.num_whole,
                                   shared.queue_weight[queue.stage]);
            else
                finish(piece, schedule);
            mbarrier::arrive_warp(shared.queue_empty[queue.stage]);
        }
    }

    // The activations of a job for all CTAs, or a piece of the down phase, which with few jobs begins with those of its tile.
    __device__ __forceinline__ void finish(const Piece& piece, const Schedule& schedule) {
        grid_dependency::wait();  // with few jobs a CTA may begin here
        const bool for_all = piece.phase == kActivate;
        const uint32_t first_job = for_all ? piece.item : piece.item * kNumChunks;
        const uint32_t num_jobs = for_all ? 1 : schedule.few ? kNumChunks : 0;
        const Tile tile = tile_at(p, shared, first_job / kNumChunks);
        const uint32_t buffer = activation.stage;
        const float weight = for_all ? weight_of_own_row(tile) : 0.f;  // asked for before the wait for sums
        if (!for_all) mbarrier::wait(shared.activation_full[buffer], activation.parity);
#pragma unroll 1
        for (uint32_t job = first_job; job < first_job + num_jobs; ++job) {
            const uint32_t chunk = job % kNumChunks;
            activate_fitting(tile, job, schedule.up.num_parts(job),
                             for_all ? shared.outgoing : shared.activation[buffer][chunk],
                             for_all ? shared.outgoing_scale : shared.activation_scale[buffer][chunk],
                             for_all ? nullptr : shared.row_weight[buffer]);
        }
        if (for_all) return publish(tile, first_job % kNumChunks, weight);
        project_down_fitting(tile, piece);
        mbarrier::arrive_warp(shared.activation_empty[buffer]);
        activation.advance();
    }
};
