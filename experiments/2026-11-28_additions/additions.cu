// Additions to `out` in bf16 as the down phase makes them, by how many adjacent bytes of a row an instruction of a warp
// adds to, alone or beside a stream of weights.
#include "copy.cuh"
#include "elect.cuh"
#include "mbarrier.cuh"
#include "numeric.cuh"

constexpr uint32_t kHidden = 7168, kTileRows = 48, kGroups = kHidden / 256;
constexpr uint32_t kLanes = ROW_BYTES / 16;  // of a row
constexpr uint32_t kStages = 6, kStageBytes = 32768;

extern "C" __global__ void __launch_bounds__(288, 1)
additions(uint16_t* out, const int* tokens, uint32_t num_tiles, const uint8_t* weights, uint32_t num_stages) {
    extern __shared__ __align__(1024) uint8_t ring[];
    __shared__ uint64_t full[kStages];
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (uint32_t i = 0; i < kStages; ++i) mbarrier::init(full[i], 1);
        mbarrier::fence_init();
    }
    __syncthreads();
    if (warp == 8) {
        const uint64_t policy = evict_first_policy();
        const auto issue = [&](uint32_t stage, uint32_t slot) {
            if (elect_one()) {
                mbarrier::arrive_expect_bytes(full[slot], kStageBytes);
                bulk_load(ring + slot * kStageBytes, weights + static_cast<uint64_t>(stage) * kStageBytes, kStageBytes, full[slot], policy);
            }
            __syncwarp();
        };
        uint32_t slot = 0, parity = 0, ahead = blockIdx.x;
        for (uint32_t i = 0; i < kStages && ahead < num_stages; ++i, ahead += gridDim.x) issue(ahead, i);
        for (uint32_t stage = blockIdx.x; stage < num_stages; stage += gridDim.x) {
            mbarrier::wait(full[slot], parity);
            if (ahead < num_stages) issue(ahead, slot);
            ahead += gridDim.x;
            if (++slot == kStages) slot = 0, parity ^= 1;
        }
        return;
    }
    constexpr uint32_t kRowsAtOnce = 32 / kLanes, kWarpsAcross = 16 * 2 / kLanes, kWarpsDown = 8 / kWarpsAcross;
    const uint32_t column = warp % kWarpsAcross * (kLanes * 8) + lane % kLanes * 8;
    const uint32_t first = warp / kWarpsAcross * (kTileRows / kWarpsDown) + lane / kLanes;
    for (uint32_t unit = blockIdx.x; unit < num_tiles * kGroups; unit += gridDim.x) {
        // By tiles, or by slabs of 256 columns.
        const uint32_t tile = SLABS ? unit % num_tiles : unit / kGroups, group = SLABS ? unit / num_tiles : unit % kGroups;
        const int* const of_tile = tokens + tile * kTileRows;
        uint16_t* const columns = out + group * 256 + column;
#pragma unroll
        for (uint32_t row = 0; row < kTileRows / kWarpsDown; row += kRowsAtOnce)
            add_bf16x8(columns + static_cast<uint64_t>(of_tile[first + row]) * kHidden, make_uint4(1, 1, 1, 1));
    }
}
