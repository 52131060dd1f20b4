// Reads the weights of the first NUM_EXPERTS experts and nothing else: what memory gives for each way of asking.
//
// TENSOR_MAPS=1: boxes of 128 rows x 128 bytes out of the served layout. 0: contiguous copies of PIECE_BYTES.
#include "copy.cuh"
#include "mbarrier.cuh"

constexpr uint32_t kNumStages = NUM_STAGES;
constexpr uint32_t kStageBytes = 32768;

struct Params {
    TensorMap w13;  // [E * 2I, H]
    TensorMap w2;   // rows in the order of kernels_cuda/sm90_fused.py
    const uint8_t* w13_bytes;
    const uint8_t* w2_bytes;
    uint32_t num_k, num_chunks, num_experts, num_groups;
};

extern "C" __global__ void __launch_bounds__(64, 1) bandwidth(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t stages[];
    __shared__ uint64_t full[kNumStages], empty[kNumStages];
    if (threadIdx.x == 0) {
        for (uint32_t stage = 0; stage < kNumStages; ++stage) {
            mbarrier::init(full[stage], 1);
            mbarrier::init(empty[stage], 1);
        }
        mbarrier::fence_init();
    }
    __syncthreads();
    const uint32_t num_up = p.num_experts * p.num_chunks * p.num_k, num_down = p.num_experts * p.num_groups * p.num_chunks;
    const auto share = [](uint32_t units, uint32_t cta) { return static_cast<uint32_t>(uint64_t{units} * cta / gridDim.x); };
    const uint32_t first_up = share(num_up, blockIdx.x), last_up = share(num_up, blockIdx.x + 1);
    const uint32_t first_down = share(num_down, blockIdx.x), last_down = share(num_down, blockIdx.x + 1);
    RingPosition<kNumStages> ring;
    if (threadIdx.x == 0) {
        const uint64_t policy = evict_first_policy();
        const auto contiguous = [&](uint8_t* target, const uint8_t* source) {
            for (uint32_t byte = 0; byte < kStageBytes; byte += PIECE_BYTES)
                bulk_load(target + byte, source + byte, PIECE_BYTES, full[ring.stage], policy);
        };
        for (uint32_t unit = first_up; unit < last_up; ++unit, ring.advance()) {
            mbarrier::wait(empty[ring.stage], ring.parity ^ 1);
            mbarrier::arrive_expect_bytes(full[ring.stage], kStageBytes);
            uint8_t* const target = stages + ring.stage * kStageBytes;
            const uint32_t job = unit / p.num_k, k = unit % p.num_k;
            const int32_t row = (job / p.num_chunks * 2 * p.num_chunks + job % p.num_chunks) * 128;
            if (TENSOR_MAPS) {
                tma_load_2d(target, p.w13, full[ring.stage], k * 128, row, policy);
                tma_load_2d(target + kStageBytes / 2, p.w13, full[ring.stage], k * 128, row + p.num_chunks * 128, policy);
            } else {
                contiguous(target, p.w13_bytes + uint64_t{unit} * kStageBytes);
            }
        }
        for (uint32_t unit = first_down; unit < last_down; ++unit, ring.advance()) {
            mbarrier::wait(empty[ring.stage], ring.parity ^ 1);
            mbarrier::arrive_expect_bytes(full[ring.stage], kStageBytes);
            uint8_t* const target = stages + ring.stage * kStageBytes;
            if (TENSOR_MAPS) {
                const int32_t column = unit % p.num_chunks * 128, rows_of_32 = unit / p.num_chunks * 8;
                tma_load_5d(target, p.w2, full[ring.stage], column, 0, 0, rows_of_32, 0, policy);
                tma_load_5d(target + kStageBytes / 2, p.w2, full[ring.stage], column, 0, 0, rows_of_32 + 4, 0, policy);
            } else {
                contiguous(target, p.w2_bytes + uint64_t{unit} * kStageBytes);
            }
        }
    } else if (threadIdx.x == 32) {
        for (uint32_t i = 0; i < last_up - first_up + last_down - first_down; ++i, ring.advance()) {
            mbarrier::wait(full[ring.stage], ring.parity);
            mbarrier::arrive(empty[ring.stage]);
        }
    }
}
