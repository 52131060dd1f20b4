// The layer as one stream of weights: every SM reads weights from its first microsecond to its last.
//
//     out += factor * topk_weight * W2 . Q(SwiGLU(W13 . x)),  `out` zero at the start
//
// A tile is up to kMaxRows tokens of one expert, a job a tile and one chunk of 128 channels. Jobs are cut along K into
// pieces of the up phase, tiles along the columns of `out` into pieces of the down phase: large pieces first, small ones
// last. CTAs take pieces by tickets, so that fast SMs take more of them: first the up phase, then for each job that was cut
// the activation of what its pieces add up to, then the down phase. Weights arrive through a ring of 32 KB stages that crosses
// pieces and phases: what the down phase reads depends on nothing, so it is on its way while sums and activations meet.
//
// They meet in global memory (L2), which the previous kernel filled with ones: each piece has rows of its own there for
// its sums, each job for its activations, and who needs them reads until no word is still all ones. (None ever is:
// arithmetic makes only one NaN, 0x7fffffff, and conversion to e4m3 only 0x7f.) There is no flag, no fence and nothing to
// reset, and the pieces of a job are always added in the same order. With many rows filling takes longer than waiting, so
// that flags follow the sums (MAX_PARTS of 4).
//
// Where tiles are many (MAX_PARTS of 4 again) there is no moment at which all SMs change phase and loads stop: about three of
// five tiles, more of very many, are fused, that is, one ticket takes both phases of such a tile and its activations stay on
// the SM. These tickets lie between the up phase and the down phase of the other tiles, whose sums and activations meet
// meanwhile and whose small pieces even out the end.
//
// A CTA lists the tiles for itself (LISTS_TILES, stream_routing.cuh), unless it is given them. Of a small batch it also puts
// the choices in order (ORDERS_CHOICES): then it reads weights while the kernel before quantises the tokens. Of a larger one
// another kernel does, at the same time as tokens are quantised.
//
// Where there are only a few jobs no tickets are needed: a CTA has at most one piece of each phase, and computes the
// activations of its own tile itself, which saves the second meeting.
//
// DETERMINISTIC cuts all jobs alike, whatever the batch, and stores a row for each choice instead of adding it to `out`;
// sm90_combine.cu adds those up in a fixed order.
//
// IN_PLACE reads the weights as they are served, as boxes of tensor maps, where otherwise it reads a copy re-laid as tiles
// (stream_weights.cuh): that takes no memory, and 6 % longer in the mean (experiments/2026-11-28_shipped).
//
// Over sm90_fused.cu: SMs share bytes, not items, so that none idles where items do not divide over SMs. On an H200, kernel
// alone, of the floor of reading the weights: dsv3_tp8 M=1 17.9 us (1.40), M=16 126 (1.03), M=64 272 (1.01), M=256 317 (1.02);
// dsv3_tp16 M=16 66 (1.06), M=64 140 (1.03), M=256 167 (1.06); qwen3next_tp4 M=128 86 (1.05), M=1024 106 (1.16):
// experiments/2026-11-28_shipped; 2026-11-28_additions, 2026-11-28_heights and 2026-11-28_tall_tiles say what holds it.
//
// Code of more than some 70 KB costs 2 to 4 us a call, whether it runs or not (experiments/2026-11-28_code_size): what a kernel
// does not need is left out of it.
//
// With up to 16 rows gate and up are multiplied in f16 (mma.cuh), for the sake of the error: 0.0053 -> 0.0042 typical, and
// 0.0090 -> 0.0051 at most over many batches. It costs up to 1 % for M from 8 to 256 and nothing that the benches show at
// M=1 and 2: experiments/2026-11-27_uniform_registers.
//
// Warps 0-7 (two warpgroups) multiply; warp 8 takes tickets and loads weights; warps 9-11 gather tokens and scales.
//
// Set by the compiler's command line: MAX_ROWS (8, 16, 24, 32, 48, 64, 80, 96), HIDDEN_SIZE, NUM_CHUNKS (intermediate size / 128),
// MAX_PARTS (most pieces of a job), NUM_STAGES, NUM_IN_FLIGHT (stages whose loads may be under way), NUM_BUFFERS (pieces of
// the down phase whose activations may be), TABLE_TILES (tiles of which a CTA keeps its own copy), NUM_CTAS (all resident at
// a time), DETERMINISTIC, LISTS_TILES, ORDERS_CHOICES, IN_PLACE, and what the launcher passes: SMEM_BYTES of shared memory
// and PARAMS_BYTES of parameters.
#include "cluster.cuh"
#include "registers.cuh"
#include "stream_load.cuh"
#include "stream_math.cuh"
#include "stream_routing.cuh"

// Lists the tiles and asks for the first weights.
template <typename Choices>
__device__ __forceinline__ void list_and_start(const Params& p, SharedStorage& shared, WeightLoader& loader, bool is_loader) {
    Choices choices(p, shared);  // whose ids are on their way while barriers are initialised
    if (is_loader && elect_one()) loader.init();
    choices.list();
    if (is_loader) loader.start(shared.num_tiles, [&](uint32_t tile) { return shared.tiles[tile].expert; });
    choices.place();
}

extern "C" __global__ void __launch_bounds__(kThreadsToFit, 1) sm90_stream(const __grid_constant__ Params p) {
    extern __shared__ __align__(1024) uint8_t shared_bytes[];
    SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);

    WeightLoader loader(p, shared);
    const uint32_t thread = threadIdx.x;
    const bool is_loader = thread / 32 == kNumMathWarps;
    if constexpr (kOrdersChoices) {
        list_and_start<OrderedChoices>(p, shared, loader, is_loader);
    } else if constexpr (kListsTiles) {
        list_and_start<CountedChoices>(p, shared, loader, is_loader);
    } else {
        if (p.inputs_from_previous_kernel) grid_dependency::wait();
        if (is_loader) loader.start_with_given_tiles();
        if (thread < kNumMathThreads) copy_table(p, shared);  // the loader's warp would wait behind its weights
    }
    __syncthreads();
    if (shared.num_tiles == 0) return;

    if (thread >= kNumMathThreads) {
        registers::decrease<kProducerRegisters>();
        if (registers::uniform(thread / 32) == kNumMathWarps)
            loader.run();
        else
            Gatherer(p, shared, thread - kNumMathThreads - 32).run();
    } else {
        registers::increase<kMathRegisters>();
        Math(p, shared).run();
    }
}
