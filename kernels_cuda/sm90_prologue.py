"""Host side of sm90_prologue.cu: grouping the choices by expert, quantising the tokens, zeroing the output and marking
scratch memory as unwritten, in one launch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from typing import Literal

import torch

from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, Launch, current_stream, load
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting, TiledRouting, aligned_capacity, tile_capacity
from workbench.errors import InputError

KERNEL = "sm90_prologue"
NUM_THREADS = 512
MAX_EXPERTS = 1024
MAX_TILE_ROWS = 504
GROUPS_PER_CTA = NUM_THREADS // 8
VECTOR_BYTES = 16
LARGE_CLUSTER = 8
CTAS_OF_SM_WITHOUT_GROUPS = 4
Form = Literal["tiles", "blocks"]
"""Of grouped choices: TiledRouting's or AlignedRouting's."""
LARGE_CLUSTER_CHOICES: dict[Form, int] = {"tiles": 2048, "blocks": 256}
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


def compiled(groups: bool) -> Cubin:
    """The kernel, compiled: with all its parts, or without the one that groups choices."""
    return compile_kernel(KERNEL, {"GROUPS": int(groups), "PARAMS_BYTES": ctypes.sizeof(_Params)})


def compiled_forms() -> tuple[Cubin, Cubin]:
    """Both, the whole one first."""
    return compiled(True), compiled(False)


@functools.cache
def _kernel(cluster_size: int, device: torch.device, groups: bool) -> Kernel:
    return load(compiled(groups), NUM_THREADS, cluster_size, dynamic_smem_bytes=0, device=device)


def warm(device: torch.device) -> None:
    """Compile and load, which must not happen while a CUDA graph is captured."""
    for cluster_size in (1, LARGE_CLUSTER):
        _kernel(cluster_size, device, groups=True)
    _kernel(1, device, groups=False)


def block_parts(num_choices: int, num_experts: int, block_m: int) -> dict[str, int]:
    """Bytes of AlignedRouting's tensors for the worst alignment of `num_choices` choices, as
    reference.routing.align_block_size sizes them."""
    capacity = aligned_capacity(num_choices, block_m, num_experts)
    return {"sorted_token_ids": 4 * capacity, "expert_ids": 4 * (capacity // block_m), "num_tokens_post_padded": 4}


def tile_parts(num_choices: int, num_experts: int, max_rows: int) -> dict[str, int]:
    """Bytes of TiledRouting's tensors for any tiles of `num_choices` choices, as reference.routing.tile_rows sizes
    them.

    Raises InputError unless `max_rows` is a multiple of 8 in 8..504.
    """
    if max_rows % 8 or not 8 <= max_rows <= MAX_TILE_ROWS:
        raise InputError(f"max_rows: expected a multiple of 8 in 8..{MAX_TILE_ROWS}, got {max_rows}")
    return {"tiles": 16 * (1 + tile_capacity(num_choices, max_rows, num_experts)), "sorted_choices": 4 * num_choices}


def quantised_parts(num_tokens: int, hidden_size: int) -> dict[str, int]:
    """Bytes of [M, H] quantised: e4m3 [M, H] and scales [M, H/128]."""
    return {"x_q": num_tokens * hidden_size, "x_scale": num_tokens * (hidden_size // GROUP_SIZE) * 4}


def empty_alignment(num_choices: int, num_experts: int, block_m: int, device: torch.device) -> AlignedRouting:
    """Room for any alignment of `num_choices` choices."""
    sorted_token_ids, expert_ids, total = _integers(block_parts(num_choices, num_experts, block_m), device)
    return AlignedRouting(sorted_token_ids, expert_ids, total, block_m)


def empty_tiles(num_choices: int, num_experts: int, max_rows: int, device: torch.device) -> TiledRouting:
    """Room for any tiles of `num_choices` choices. InputError as of tile_parts."""
    tiles, sorted_choices = _integers(tile_parts(num_choices, num_experts, max_rows), device)
    return TiledRouting(sorted_choices, tiles.view(-1, 4), max_rows)


def _integers(parts: Mapping[str, int], device: torch.device) -> tuple[torch.Tensor, ...]:
    sizes = [num_bytes // 4 for num_bytes in parts.values()]
    return torch.empty(sum(sizes), dtype=torch.int32, device=device).split_with_sizes(sizes)


def empty_quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for `x` bf16 [M, H] quantised: e4m3 [M, H] and scales [M, H/128]."""
    scales = torch.empty(x.shape[0], x.shape[1] // GROUP_SIZE, dtype=torch.float32, device=x.device)
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), scales


def bind(
    device: torch.device,
    *,
    num_out_bytes: int = 0,
    num_values: int = 0,
    num_choices: int = 0,
    num_experts: int = 0,
    form: Form = "tiles",
    max_rows: int = 0,
    num_poison_bytes: int = 0,
    power_of_two_scales: bool = False,
    leaves_room: bool = False,
    overlap_previous: bool = False,
) -> Launch:
    """Any of, in one launch whose addresses the caller fills in:

    num_out_bytes       zero `out`, memory of a multiple of 16 bytes
    num_values          quantise as many of `x` bf16 [M, H], 128 dividing H, into (`x_q`, `x_scale`) as
                        reference.quant.quantise_activations does, bit for bit; with `power_of_two_scales` as it does
                        with power_of_two
    num_choices         group as many of `topk_ids` int32 [M, top_k] by expert into tiles of at most `max_rows` rows
                        (`sorted_choices`, `tiles`), or into blocks of `max_rows` (`sorted_choices`, `expert_ids`,
                        `num_tokens_post_padded`); an id outside 0..num_experts-1 is left out; the order of an expert's
                        choices is not fixed
    num_poison_bytes    set every bit of `poison`, memory of a multiple of 16 bytes
    leaves_room         with one CTA on an SM that leaves room for one of the next kernel, which may then start at once:
                        without num_choices
    overlap_previous    may start before the launch ahead of it has ended, and ends after that one
    """
    params = _Params(
        num_out_vectors=num_out_bytes // VECTOR_BYTES,
        num_poison_vectors=num_poison_bytes // VECTOR_BYTES,
        num_groups=num_values // GROUP_SIZE,
        power_of_two_scales=power_of_two_scales,
    )
    cluster_size, num_routing_ctas = 1, 0
    if num_choices:
        cluster_size, num_routing_ctas = _routing_ctas(num_choices, form)
        params.cluster_size, params.num_routing_ctas = cluster_size, num_routing_ctas
        params.num_choices, params.num_experts, params.max_rows = num_choices, num_experts, max_rows
        capacity = aligned_capacity if form == "blocks" else tile_capacity
        params.capacity = capacity(num_choices, max_rows, num_experts)
    num_vectors = max(params.num_out_vectors, params.num_poison_vectors)
    num_working_ctas = max(-(-params.num_groups // GROUPS_PER_CTA), -(-num_vectors // NUM_THREADS))

    kernel = _kernel(cluster_size, device, groups=not leaves_room)
    num_resident = max(kernel.max_clusters * cluster_size - num_routing_ctas, cluster_size)
    if leaves_room:
        num_resident //= CTAS_OF_SM_WITHOUT_GROUPS
    num_rounds = -(-num_working_ctas // num_resident)
    if num_rounds:
        num_working_ctas = -(-num_working_ctas // num_rounds)  # the same number of rounds for each
    num_clusters = -(-(num_routing_ctas + num_working_ctas) // cluster_size)
    return kernel.bind(params, num_clusters * cluster_size, overlap_previous=overlap_previous)


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
    """What `bind` says, on tensors and torch's current stream: zero `out`, quantise `x` into `quantised`, group
    `topk_ids` into `aligned`, poison `poison`. All contiguous, M > 0."""
    device = next(tensor.device for tensor in (out, x, topk_ids, poison) if tensor is not None)
    form: Form = "tiles" if isinstance(aligned, TiledRouting) else "blocks"
    max_rows = aligned.max_rows if isinstance(aligned, TiledRouting) else aligned.block_size if aligned else 0
    bound = bind(
        device,
        num_out_bytes=0 if out is None else out.nbytes,
        num_values=0 if x is None else x.numel(),
        num_choices=0 if topk_ids is None else topk_ids.numel(),
        num_experts=num_experts,
        form=form,
        max_rows=max_rows,
        num_poison_bytes=0 if poison is None else poison.nbytes,
        power_of_two_scales=power_of_two_scales,
    )
    addressed = {"out": out, "x": x, "topk_ids": topk_ids, "poison": poison}
    if quantised is not None:
        addressed["x_q"], addressed["x_scale"] = quantised
    if isinstance(aligned, TiledRouting):
        addressed |= {"sorted_choices": aligned.sorted_choices, "tiles": aligned.tiles}
    elif aligned is not None:
        addressed |= {"sorted_choices": aligned.sorted_token_ids, "expert_ids": aligned.expert_ids}
        addressed["num_tokens_post_padded"] = aligned.num_tokens_post_padded
    for field, tensor in addressed.items():
        if tensor is not None:
            setattr(bound.params, field, tensor.data_ptr())
    bound.enqueue(current_stream(device.index))


def _routing_ctas(num_choices: int, form: Form) -> tuple[int, int]:
    """The size of a cluster, and how many CTAs of whole clusters route."""
    if num_choices < LARGE_CLUSTER_CHOICES[form]:
        return 1, 1
    return LARGE_CLUSTER, LARGE_CLUSTER * (ROUTING_CLUSTERS if num_choices >= ALL_CLUSTERS_CHOICES else 1)
