"""Host side of sm90_prologue.cu: grouping the choices by expert, quantising the tokens, zeroing the output and marking
scratch memory as unwritten, in one launch."""

from __future__ import annotations

import ctypes
import functools

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, load, pointer
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting, TiledRouting, aligned_capacity, tile_capacity
from workbench.errors import InputError

KERNEL = "sm90_prologue"
NUM_THREADS = 512
MAX_EXPERTS = 1024
MAX_TILE_ROWS = 256
GROUPS_PER_CTA = NUM_THREADS // 8
VECTOR_BYTES = 16
LARGE_CLUSTER = 8
LARGE_CLUSTER_CHOICES = {"tiles": 2048, "blocks": 256}
"""From how many choices on a cluster routes faster than one CTA: blocks are padded, which is more to write."""
ALL_CLUSTERS_CHOICES = 16384
"""From how many choices on ROUTING_CLUSTERS route faster than one."""
ROUTING_CLUSTERS = 8


class _Params(ctypes.Structure):
    _fields_ = (
        ("topk_ids", ctypes.c_uint64),
        ("sorted_choices", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
        ("expert_ids", ctypes.c_uint64),
        ("num_tokens_post_padded", ctypes.c_uint64),
        ("x", ctypes.c_uint64),
        ("x_q", ctypes.c_uint64),
        ("x_scale", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("poison", ctypes.c_uint64),
        ("num_out_vectors", ctypes.c_uint64),
        ("num_poison_vectors", ctypes.c_uint64),
        ("num_groups", ctypes.c_uint32),
        ("num_choices", ctypes.c_uint32),
        ("num_experts", ctypes.c_uint32),
        ("max_rows", ctypes.c_uint32),
        ("capacity", ctypes.c_uint32),
        ("cluster_size", ctypes.c_uint32),
        ("num_routing_ctas", ctypes.c_uint32),
        ("power_of_two_scales", ctypes.c_uint32),
    )


def compiled() -> Cubin:
    """The kernel, compiled."""
    return compile_kernel(KERNEL, {"PARAMS_BYTES": ctypes.sizeof(_Params)})


@functools.cache
def _kernel(cluster_size: int, device: torch.device) -> Kernel:
    return load(compiled(), NUM_THREADS, cluster_size, dynamic_smem_bytes=0, device=device)


def warm(device: torch.device) -> None:
    """Compile and load, which must not happen while a CUDA graph is captured."""
    for cluster_size in (1, LARGE_CLUSTER):
        _kernel(cluster_size, device)


def empty_alignment(num_choices: int, num_experts: int, block_m: int, device: torch.device) -> AlignedRouting:
    """Room for the worst alignment of `num_choices` choices, as reference.routing.align_block_size sizes it."""
    capacity = aligned_capacity(num_choices, block_m, num_experts)
    integers = torch.empty(capacity + capacity // block_m + 1, dtype=torch.int32, device=device)
    sorted_token_ids, expert_ids, total = integers.split_with_sizes((capacity, capacity // block_m, 1))
    return AlignedRouting(sorted_token_ids, expert_ids, total, block_m)


def empty_tiles(num_choices: int, num_experts: int, max_rows: int, device: torch.device) -> TiledRouting:
    """Room for any tiles of `num_choices` choices, as reference.routing.tile_rows sizes it.

    Raises InputError unless `max_rows` is a multiple of 8 in 8..256.
    """
    if max_rows % 8 or not 8 <= max_rows <= MAX_TILE_ROWS:
        raise InputError(f"max_rows: expected a multiple of 8 in 8..{MAX_TILE_ROWS}, got {max_rows}")
    num_rows = 1 + tile_capacity(num_choices, max_rows, num_experts)
    integers = torch.empty(4 * num_rows + num_choices, dtype=torch.int32, device=device)
    tiles, sorted_choices = integers.split_with_sizes((4 * num_rows, num_choices))
    return TiledRouting(sorted_choices, tiles.view(num_rows, 4), max_rows)


def empty_quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for `x` bf16 [M, H] quantised: e4m3 [M, H] and scales [M, H/128]."""
    scales = torch.empty(x.shape[0], x.shape[1] // GROUP_SIZE, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


def launch(
    *,
    out: torch.Tensor | None = None,
    x: torch.Tensor | None = None,
    quantised: tuple[torch.Tensor, torch.Tensor] | None = None,
    topk_ids: torch.Tensor | None = None,
    num_experts: int = 0,
    aligned: AlignedRouting | TiledRouting | None = None,
    poison: torch.Tensor | None = None,
    power_of_two_scales: bool = False,
) -> None:
    """Any of, in one launch on the current stream:

    out                 zero it; contiguous, a multiple of 16 bytes
    x, quantised        quantise `x` bf16 [M, H], 128 dividing H, into (x_q, x_scale) as
                        reference.quant.quantise_activations does, bit for bit; with `power_of_two_scales` as it does
                        with power_of_two
    topk_ids, aligned   group `topk_ids` int32 [M, top_k] by expert into either form; an id outside 0..num_experts-1 is
                        left out; the order of an expert's choices is not fixed
    poison              set every bit of it; contiguous, a multiple of 16 bytes

    M > 0.
    """
    device = next(tensor.device for tensor in (out, x, topk_ids, poison) if tensor is not None)
    params = _Params()
    cluster_size, num_routing_ctas, num_working_ctas = 1, 0, 0
    if topk_ids is not None and aligned is not None:
        form = "tiles" if isinstance(aligned, TiledRouting) else "blocks"
        cluster_size, num_routing_ctas = _routing_ctas(topk_ids.numel(), form)
        params.cluster_size, params.num_routing_ctas = cluster_size, num_routing_ctas
        params.topk_ids = pointer(topk_ids)
        params.num_choices, params.num_experts = topk_ids.numel(), num_experts
        if isinstance(aligned, TiledRouting):
            params.sorted_choices, params.tiles = pointer(aligned.sorted_choices), pointer(aligned.tiles)
            params.max_rows = aligned.max_rows
        else:
            params.sorted_choices, params.expert_ids = pointer(aligned.sorted_token_ids), pointer(aligned.expert_ids)
            params.num_tokens_post_padded = pointer(aligned.num_tokens_post_padded)
            params.max_rows, params.capacity = aligned.block_size, aligned.sorted_token_ids.numel()
    if x is not None and quantised is not None:
        params.x, params.x_q, params.x_scale = pointer(x), pointer(quantised[0]), pointer(quantised[1])
        params.num_groups = x.numel() // GROUP_SIZE
        params.power_of_two_scales = power_of_two_scales
        num_working_ctas = -(-params.num_groups // GROUPS_PER_CTA)
    if out is not None:
        params.out, params.num_out_vectors = pointer(out), out.nbytes // VECTOR_BYTES
    if poison is not None:
        params.poison, params.num_poison_vectors = pointer(poison), poison.nbytes // VECTOR_BYTES
    num_vectors = max(params.num_out_vectors, params.num_poison_vectors)
    num_working_ctas = max(num_working_ctas, -(-num_vectors // NUM_THREADS))

    kernel = _kernel(cluster_size, device)
    num_resident = max(kernel.max_clusters * cluster_size - num_routing_ctas, cluster_size)
    num_rounds = -(-num_working_ctas // num_resident)
    if num_rounds:
        num_working_ctas = -(-num_working_ctas // num_rounds)  # the same number of rounds for each
    num_clusters = -(-(num_routing_ctas + num_working_ctas) // cluster_size)
    kernel.launch(params, num_clusters * cluster_size, overlap_previous=False)


def _routing_ctas(num_choices: int, form: str) -> tuple[int, int]:
    """The size of a cluster, and how many CTAs of whole clusters route."""
    if num_choices < LARGE_CLUSTER_CHOICES[form]:
        return 1, 1
    return LARGE_CLUSTER, LARGE_CLUSTER * (ROUTING_CLUSTERS if num_choices >= ALL_CLUSTERS_CHOICES else 1)
