// A ring as the kernels have them, small enough to plant mistakes in: a warpgroup adds up products of 64 x 128 tiles of
// `a`, which one thread loads by bulk copies, and 8 x 128 tiles of `b`, which a warp gathers by cp.async.
#include "copy.cuh"
#include "mbarrier.cuh"
#include "wgmma.cuh"

constexpr uint32_t kReleasesEarly = 1, kSkipsWait = 2, kExpectsTooFew = 3, kExpectsTooMany = 4, kSkipsFence = 5;
constexpr uint32_t kLoadsOneMore = 6, kReleasesTwice = 7;  // 0: no mistake
constexpr uint32_t kFault = FAULT;

constexpr uint32_t kNumStages = 2;
constexpr uint32_t kNumMathThreads = 128;
constexpr uint32_t kTileBytes = 64 * 128;

struct Params {
    const uint8_t* a;  // e4m3 [num_tiles][64][128], swizzled
    const uint8_t* b;  // e4m3 [8][num_tiles * 128]
    float* sum;        // [64][8]
    uint64_t num_tiles;
};

struct SharedStorage {
    alignas(1024) uint8_t a[kNumStages][kTileBytes];
    alignas(1024) uint8_t b[kNumStages][8 * 128];
    uint64_t full[kNumStages];
    uint64_t empty[kNumStages];
};

inline void load_a(const Params& p, SharedStorage& shared) {
    RingPosition<kNumStages> ring;
    const uint32_t num_bytes = kTileBytes + (kFault == kExpectsTooMany ? 16 : kFault == kExpectsTooFew ? -16 : 0);
    for (uint32_t tile = 0; tile < p.num_tiles + (kFault == kLoadsOneMore); ++tile, ring.advance()) {
        mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
        mbarrier::arrive_expect_bytes(shared.full[ring.stage], num_bytes);
        bulk_load(shared.a[ring.stage], p.a + tile * kTileBytes, kTileBytes, shared.full[ring.stage]);
    }
}

inline void gather_b(const Params& p, SharedStorage& shared, uint32_t lane) {
    RingPosition<kNumStages> ring;
    for (uint32_t tile = 0; tile < p.num_tiles; ++tile, ring.advance()) {
        mbarrier::wait(shared.empty[ring.stage], ring.parity ^ 1);
        for (uint32_t row = lane / 8; row < 8; row += 4)
            cp_async_16(shared.b[ring.stage] + row * 128 + (lane % 8 ^ row) * 16,
                        p.b + (row * p.num_tiles + tile) * 128 + lane % 8 * 16, true);
        cp_async_arrive(shared.full[ring.stage]);
    }
    cp_async_wait_all();
}

inline void multiply(const Params& p, SharedStorage& shared, uint32_t thread) {
    RingPosition<kNumStages> ring;
    float sum[4] = {};
    for (uint32_t tile = 0; tile < p.num_tiles; ++tile, ring.advance()) {
        if (kFault != kSkipsWait || tile == 0) mbarrier::wait(shared.full[ring.stage], ring.parity);
        if (kFault != kSkipsFence) fence_async_proxy();
        float product[4];
        const uint64_t a = wgmma::descriptor(shared.a[ring.stage]), b = wgmma::descriptor(shared.b[ring.stage]);
        wgmma::multiply_k128<8>(product, a, b);
        if (kFault == kReleasesEarly) mbarrier::arrive(shared.empty[ring.stage]);
        wgmma::wait<0>();
        if (kFault != kReleasesEarly) mbarrier::arrive(shared.empty[ring.stage]);
        if (kFault == kReleasesTwice && thread < 32) mbarrier::arrive(shared.empty[ring.stage]);
        for (uint32_t i = 0; i < 4; ++i) sum[i] += product[i];
    }
    const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    for (uint32_t i = 0; i < 4; ++i) p.sum[(row + i / 2 * 8) * 8 + column + i % 2] = sum[i];
}

extern "C" __global__ void ring(const __grid_constant__ Params p) {
    __shared__ SharedStorage shared;
    const uint32_t thread = threadIdx.x;
    if (thread == 0) {
        for (uint32_t stage = 0; stage < kNumStages; ++stage) {
            mbarrier::init(shared.full[stage], 1 + 32);
            mbarrier::init(shared.empty[stage], kNumMathThreads);
        }
        mbarrier::fence_init();
    }
    __syncthreads();
    if (thread < kNumMathThreads)
        multiply(p, shared, thread);
    else if (thread < kNumMathThreads + 32)
        gather_b(p, shared, thread - kNumMathThreads);
    else if (thread == kNumMathThreads + 32)
        load_a(p, shared);
}
