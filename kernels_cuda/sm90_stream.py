"""`cuda.sm90_stream`: decode and middle batches as one even stream of weights over all SMs (sm90_stream.cu), behind a
small launch that quantises, zeroes `out` and marks the exchange as unwritten and, unless the batch is small, beside one
that puts the choices in order.

`prepare` re-lays the weights as tiles of 32 KB (weight_tiles.py), which the memory delivers 9 % faster.
`cuda.sm90_stream_in_place` reads the same tiles as boxes of the weights as they are served, and keeps no copy.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from kernels_cuda import activation_form, sm90, sm90_combine, sm90_fill, sm90_order, sm90_prologue, tiled_inputs, tma
from kernels_cuda import compile as cuda_compile
from kernels_cuda.activation_form import ActivationForm
from kernels_cuda.calls import Call, ReadyCalls
from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, load
from kernels_cuda.sm90 import NUM_SMS, SMEM_BYTES
from kernels_cuda.tiled_inputs import Takes
from kernels_cuda.weight_tiles import tile_w2, tile_w13
from reference.quant import GROUP_SIZE
from reference.routing import tile_capacity
from workbench.errors import InputError
from workbench.problem import MoEInputs, MoEShape, MoEWeights, scale_blocks
from workbench.variant import Backend, CompileReport, Config, Support, Variant, register

KERNEL = "sm90_stream"
NUM_THREADS = 384
STAGE_BYTES = 2 * 128 * 128
MAX_STAGES = 6
FEWEST_BUFFERS = 2
MAX_ROWS = (8, 16, 24, 32, 48, 64, 80, 96)
MOST_ORDERED_CHOICES = 4 * (NUM_THREADS - 32)  # of a batch whose choices each CTA puts in order itself
FEWEST_TABLE_TILES, MOST_TABLE_TILES = 512, 1024  # of which a CTA keeps its own copy
TILE_BYTES, CHOICE_BYTES = 8, 2
QUEUE_SIZE = 8  # pieces of work that a CTA has taken
SUMS_ROW_BYTES = 1024
FLAGGED_PARTS = 4  # with so many parts of a job at most, a flag follows its sums: there are too many of them to mark
FLAG_BYTES = 8 * FLAGGED_PARTS * 4  # of a job: for each warp and part
FEWEST_EXPERTS_WITH_SKEW = 32
FUSED_FROM = 1.6  # tiles for each SM
MOST_ROWS_FOR_SKEW = 64  # taller tiles pay where an expert would be read twice without, but not for skew
DETERMINISTIC_PARTS = 8  # of a job, whatever the batch
TENSOR_MAP_ALIGNMENT = 16  # bytes, of where a tensor lies and of its rows


FORMS: tuple[Takes, ...] = ("tiles", "choices", "ids")
"""Of the kernel."""


_TensorMap = ctypes.c_uint8 * tma.TENSOR_MAP_BYTES
_FIELDS_BEHIND_WEIGHTS = (
    ("x_q", ctypes.c_uint64),
    ("x_scale", ctypes.c_uint64),
    ("w13_scale", ctypes.c_uint64),
    ("w2_scale", ctypes.c_uint64),
    ("sorted_choices", ctypes.c_uint64),
    ("topk_ids", ctypes.c_uint64),
    ("expert_choices", ctypes.c_uint64),
    ("tiles", ctypes.c_uint64),
    ("topk_weights", ctypes.c_uint64),
    ("sums", ctypes.c_uint64),
    ("ticket_counter", ctypes.c_uint64),
    ("sums_written", ctypes.c_uint64),
    ("activations", ctypes.c_uint64),
    ("activation_scales", ctypes.c_uint64),
    ("out", ctypes.c_uint64),
    ("form", ActivationForm),
    ("routed_scaling_factor", ctypes.c_float),
    ("top_k", ctypes.c_uint32),
    ("tile_capacity", ctypes.c_uint32),
    ("num_experts", ctypes.c_uint32),
    ("num_choices", ctypes.c_uint32),
    ("inputs_from_previous_kernel", ctypes.c_uint32),
)


class _Params(ctypes.Structure):
    _fields_ = (("w13", ctypes.c_uint64), ("w2", ctypes.c_uint64), *_FIELDS_BEHIND_WEIGHTS)


class _InPlaceParams(ctypes.Structure):
    _fields_ = (
        ("w13", _TensorMap),
        ("w2", _TensorMap),
        ("w2_half_group", _TensorMap),
        *_FIELDS_BEHIND_WEIGHTS,
        ("padding", ctypes.c_uint8 * 32),  # the kernel's struct is aligned to 64 bytes
    )


def smem_bytes(
    shape: MoEShape,
    max_rows: int,
    num_stages: int,
    num_buffers: int = FEWEST_BUFFERS,
    num_tiles: int = FEWEST_TABLE_TILES,
) -> int:
    """Size of the kernel's SharedStorage, from above."""
    num_chunks = scale_blocks(shape.intermediate_size)
    stages = num_stages * (STAGE_BYTES + 16)  # weights, two barriers
    stages += token_stages(max_rows, num_stages) * (max_rows * (128 + 4) + 8 + 16)  # tokens and scales, two barriers
    down_scales = num_buffers * 4 * num_chunks * shape.hidden_size // GROUP_SIZE
    activation = (num_buffers * num_chunks + 1) * max_rows * (128 + 4)
    rows = max_rows * 4 * (3 + 2 * num_buffers + 8 + QUEUE_SIZE)
    return -(-(stages + activation + TILE_BYTES * num_tiles + rows + down_scales + 640) // 1024) * 1024


def most_buffers(shape: MoEShape, max_rows: int, num_stages: int) -> int:
    """Of how many pieces of the down phase activations may be on their way to a CTA at a time: one for each gather warp
    where that takes no stage from the ring."""
    return FEWEST_BUFFERS + (smem_bytes(shape, max_rows, num_stages, FEWEST_BUFFERS + 1) <= SMEM_BYTES)


def table_tiles(shape: MoEShape, max_rows: int, num_stages: int) -> int:
    """Of how many tiles a CTA keeps its own copy: more where that takes neither a stage nor a buffer."""
    num_buffers = most_buffers(shape, max_rows, num_stages)
    fits = smem_bytes(shape, max_rows, num_stages, num_buffers, MOST_TABLE_TILES) <= SMEM_BYTES
    return MOST_TABLE_TILES if fits else FEWEST_TABLE_TILES


def token_stages(max_rows: int, num_stages: int) -> int:
    """How many stages of tokens go with so many of weights: fewer of tall tiles, to leave room for one of weights."""
    most = num_stages if max_rows <= 32 else 4 if max_rows <= 64 else 3
    return min(num_stages, most)


def most_stages(shape: MoEShape, max_rows: int) -> int:
    """The deepest ring that fits, at most MAX_STAGES; 0 if none does."""
    return next((n for n in range(MAX_STAGES, 1, -1) if smem_bytes(shape, max_rows, n) <= SMEM_BYTES), 0)


def _compile(
    config: Config, shape: MoEShape, num_ctas: int, deterministic: bool, takes: Takes, *, in_place: bool = False
) -> tuple[Cubin, int]:
    max_rows, num_stages = config.integer("max_rows"), config.integer("num_stages")
    num_buffers = most_buffers(shape, max_rows, num_stages)
    num_tiles = table_tiles(shape, max_rows, num_stages)
    num_bytes = smem_bytes(shape, max_rows, num_stages, num_buffers, num_tiles)
    defines = {
        "MAX_ROWS": max_rows,
        "HIDDEN_SIZE": shape.hidden_size,
        "NUM_CHUNKS": scale_blocks(shape.intermediate_size),
        "MAX_PARTS": config.integer("max_parts"),
        "NUM_STAGES": num_stages,
        "NUM_IN_FLIGHT": config.integer("num_in_flight"),
        "NUM_BUFFERS": num_buffers,
        "TABLE_TILES": num_tiles,
        "NUM_CTAS": num_ctas,
        "DETERMINISTIC": int(deterministic),
        "LISTS_TILES": int(takes != "tiles"),
        "ORDERS_CHOICES": int(takes == "ids"),
        "IN_PLACE": int(in_place),
        "SMEM_BYTES": num_bytes,
        "PARAMS_BYTES": ctypes.sizeof(_InPlaceParams if in_place else _Params),
    }
    return compile_kernel(KERNEL, defines), num_bytes


@dataclass
class Prepared:
    """A layer's weights, re-laid or described to the copy engine, and the kernels loaded so far."""

    weights: MoEWeights
    tiles: tuple[torch.Tensor, torch.Tensor] | None
    """w13 and w2 as weight_tiles.py makes them: as many bytes again. None: they are read in place."""
    params: _Params | _InPlaceParams
    num_ctas: int
    deterministic: bool
    kernels: dict[tuple[Config, Takes], Kernel] = field(default_factory=dict)
    calls: ReadyCalls = field(default_factory=ReadyCalls)

    def kernel(self, config: Config, takes: Takes) -> Kernel:
        """The kernel of `config` that takes this, compiled and loaded on first use, which must come before a graph is
        captured."""
        kernel = self.kernels.get((config, takes))
        if kernel is None:
            shape, in_place = self.weights.shape, self.tiles is None
            cubin, num_bytes = _compile(config, shape, self.num_ctas, self.deterministic, takes, in_place=in_place)
            kernel = load(cubin, NUM_THREADS, 1, num_bytes, self.weights.device, all_resident=True)
            self.kernels[config, takes] = kernel
        return kernel


@register
class SM90Stream(Variant):
    """See the head of sm90_stream.cu."""

    name: ClassVar[str] = "cuda.sm90_stream"
    backend: ClassVar[Backend] = "cuda"
    in_place: ClassVar[bool] = False
    """Whether the weights are read as they are served, not from a copy."""

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        return sm90.supports_device(device) and self.supports_shape(shape)

    def supports_shape(self, shape: MoEShape) -> Support:
        """supports(), the device left aside."""
        if reason := shape.unserved(*activation_form.SERVED):
            return Support.no(reason)
        if shape.hidden_size % GROUP_SIZE:
            return Support.no(f"hidden_size must be a multiple of {GROUP_SIZE}, got {shape.hidden_size}")
        if self.in_place and shape.intermediate_size % TENSOR_MAP_ALIGNMENT:
            return Support.no(
                f"intermediate_size must be a multiple of {TENSOR_MAP_ALIGNMENT}, got {shape.intermediate_size}"
            )
        if shape.num_experts > sm90_prologue.MAX_EXPERTS:
            return Support.no(f"at most {sm90_prologue.MAX_EXPERTS} experts, got {shape.num_experts}")
        if not max_rows_that_fit(shape):
            return Support.no(f"the activations of 8 rows of {shape.intermediate_size} channels do not fit an SM")
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        """The default by the expected rows of an expert, then the other heights, nearer ones first."""
        default = default_max_rows(shape, num_tokens)
        for max_rows in sorted(max_rows_that_fit(shape), key=lambda rows: (abs(math.log2(rows / default)), rows)):
            num_stages = most_stages(shape, max_rows)
            yield Config(
                max_rows=max_rows,
                max_parts=DETERMINISTIC_PARTS if self.deterministic else default_max_parts(shape, num_tokens),
                num_stages=num_stages,
                num_in_flight=2,
            )

    def prepare(self, weights: MoEWeights) -> Prepared:
        tiles = None if self.in_place else (tile_w13(weights.w13), tile_w2(weights.w2))
        params: _Params | _InPlaceParams
        if tiles is None:
            params = _in_place_params(weights)
        else:
            params = _Params(w13=tiles[0].data_ptr(), w2=tiles[1].data_ptr())
        params.w13_scale, params.w2_scale = weights.w13_scale.data_ptr(), weights.w2_scale.data_ptr()
        params.form = activation_form.activation_form(weights.shape)
        params.top_k, params.num_experts = weights.shape.top_k, weights.shape.num_experts
        for helper in (sm90_prologue, sm90_order, sm90_fill, sm90_combine):
            helper.warm(weights.device)
        num_ctas = torch.cuda.get_device_properties(weights.device).multi_processor_count
        return Prepared(weights, tiles, params, num_ctas, self.deterministic)

    def align(self, prepared: Prepared, inputs: MoEInputs, config: Config) -> MoEInputs:
        return tiled_inputs.align(inputs, prepared.weights.shape.num_experts, config.integer("max_rows"))

    def run(self, prepared: Prepared, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        num_tokens = inputs.num_tokens
        if num_tokens == 0:
            return
        given = tiled_inputs.given(inputs, config)
        key = num_tokens, given, config
        call = prepared.calls.take(key) or _make_call(prepared, key)
        address = out.data_ptr()
        if self.deterministic:
            *ahead, stream, combine = call.params
            combine.topk_ids, combine.out = inputs.topk_ids.data_ptr(), address
        else:
            *ahead, stream = call.params
            stream.out = address
        ahead[-1].out = address
        takes: Takes = "choices" if len(ahead) > 1 else "ids" if stream.num_choices else "tiles"
        tiled_inputs.write_addresses(given, inputs, takes, ahead, stream)
        call.enqueue()

    def sources(self) -> tuple[Path, ...]:
        others = (sm90_prologue.KERNEL, sm90_order.KERNEL, sm90_fill.KERNEL, sm90_combine.KERNEL)
        weights = "tma" if self.in_place else "weight_tiles"
        modules = ("sm90_stream", *others, "activation_form", "calls", "tiled_inputs", weights, "workspace")
        return cuda_compile.variant_sources(modules, (KERNEL, *others))

    def compile(self, shape: MoEShape, configs: Iterable[Config]) -> list[CompileReport]:
        orders = sm90_order.compiled_forms()
        others = (*sm90_prologue.compiled_forms(), *orders, sm90_fill.compiled(), sm90_combine.compiled())
        reports = [cubin.report(Config(), 0) for cubin in others]
        for config in configs:
            for takes in FORMS:
                cubin, num_bytes = _compile(config, shape, NUM_SMS, self.deterministic, takes, in_place=self.in_place)
                reports.append(cubin.report(config, num_bytes))
        return reports


@register
class SM90StreamDeterministic(SM90Stream):
    """The same bits every time, and for a token whatever else is in the batch: jobs are cut alike in every batch, and a
    last launch adds up each token's rows in the order of its choices."""

    name: ClassVar[str] = "cuda.sm90_stream_deterministic"
    deterministic: ClassVar[bool] = True


@register
class SM90StreamInPlace(SM90Stream):
    """Reads the weights where they lie: it takes no memory for a copy, and sees what is written there. Boxes of rows of
    128 bytes come more slowly than tiles."""

    name: ClassVar[str] = "cuda.sm90_stream_in_place"
    in_place: ClassVar[bool] = True


def _in_place_params(weights: MoEWeights) -> _InPlaceParams:
    """What describes w13 and w2 to the copy engine. InputError where it cannot read them."""
    for name, tensor in (("w13", weights.w13), ("w2", weights.w2)):
        if (address := tensor.data_ptr()) % TENSOR_MAP_ALIGNMENT:
            raise InputError(
                f"{name}: expected an address that is a multiple of {TENSOR_MAP_ALIGNMENT}, got {address:#x}"
            )
    experts, hidden, channels = weights.w2.shape
    half = channels * hidden  # bytes of the gate rows of an expert, or of its up rows
    w13 = tma.encode(
        weights.w13,
        (hidden, channels, 2, experts, 1),
        (hidden, half, 2 * half, 2 * half * experts),
        (128, 128, 2, 1, 1),
    )
    maps = (w13, _w2_map(weights.w2, num_blocks=4), _w2_map(weights.w2, num_blocks=2))
    return _InPlaceParams(*(_TensorMap.from_buffer_copy(each) for each in maps))


def _w2_map(w2: torch.Tensor, num_blocks: int) -> bytes:
    """Of boxes of 64 * num_blocks rows in the order of weight_tiles.tile_w2: row 64 b + 16 w + 8 h + g of a box is row
    16 num_blocks w + 2 num_blocks g + 2 b + h of the group."""
    experts, hidden, channels = w2.shape
    warp_rows = 16 * num_blocks
    return tma.encode(
        w2,
        (channels, 8, 2, experts * hidden // warp_rows, num_blocks),
        tuple(rows * channels for rows in (2 * num_blocks, 1, warp_rows, 2)),
        (128, 8, 2, 4, num_blocks),
    )


def _make_call(prepared: Prepared, key: tiled_inputs.Key) -> Call:
    """The call of `key`, with one launch of the layer."""
    num_tokens, given, config = key
    shape, max_rows = prepared.weights.shape, config.integer("max_rows")
    num_choices, num_chunks = num_tokens * shape.top_k, scale_blocks(shape.intermediate_size)
    params = type(prepared.params).from_buffer_copy(prepared.params)
    takes: Takes = "tiles" if given == "tiled" else taken(shape, num_tokens, config)
    params.inputs_from_previous_kernel = given == "tokens" or (given == "quantised" and takes != "ids")
    params.num_choices = num_choices if takes == "ids" else 0
    params.tile_capacity = tile_capacity(num_choices, max_rows, shape.num_experts)
    stream = prepared.kernel(config, takes).bind(params, prepared.num_ctas, overlap_previous=True)
    marked, others = exchange(num_choices, shape.num_experts, num_chunks, max_rows, config.integer("max_parts"))
    launches = [(stream, {"out": "contributions"})]
    return tiled_inputs.make_call(prepared, key, marked, others, launches, marked=True, takes=takes)


def taken(shape: MoEShape, num_tokens: int, config: Config) -> Takes:
    """What a kernel takes of the routing of a batch that is not in tiles. Where there is room for them each CTA lists
    the tiles itself, rather than wait until another kernel has; and of a small batch orders the choices."""
    num_choices, max_rows = num_tokens * shape.top_k, config.integer("max_rows")
    num_stages = config.integer("num_stages")
    tile_bytes = TILE_BYTES * tile_capacity(num_choices, max_rows, shape.num_experts)
    table_bytes = TILE_BYTES * table_tiles(shape, max_rows, num_stages)
    orders = num_choices <= MOST_ORDERED_CHOICES and config.integer("num_in_flight") < num_stages
    if orders and tile_bytes + CHOICE_BYTES * num_choices <= table_bytes:
        return "ids"
    return "choices" if num_choices <= sm90_order.MAX_CHOICES and tile_bytes <= table_bytes else "tiles"


def exchange(
    num_choices: int, num_experts: int, num_chunks: int, max_rows: int, max_parts: int
) -> tuple[dict[str, int], dict[str, int]]:
    """What CTAs hand each other in one call, as sm90_stream.cu says, by the names of its parameters: bytes of parts
    whose every bit is set before, and of others."""
    flagged = max_parts == FLAGGED_PARTS
    num_jobs = tile_capacity(num_choices, max_rows, num_experts) * num_chunks
    sums = {"sums": num_choices * num_chunks * max_parts * SUMS_ROW_BYTES}
    marked = {
        "ticket_counter": 16,
        "sums_written": num_jobs * FLAG_BYTES if flagged else 0,
        "activations": num_choices * num_chunks * GROUP_SIZE,
        "activation_scales": -(-num_choices * num_chunks * 4 // 16) * 16,
    }
    return (marked, sums) if flagged else (marked | sums, {})


def max_rows_that_fit(shape: MoEShape) -> list[int]:
    """Those that leave room for four stages."""
    return [rows for rows in MAX_ROWS if most_stages(shape, rows) >= 4]


def default_max_rows(shape: MoEShape, num_tokens: int) -> int:
    """The least height that holds the rows of most routed experts, their mean and 1.9 standard deviations, times what
    skew is worth up to 64 rows.

    Under a law that is not uniform a few experts have many rows, and their weights are read once for each tile. Taller
    tiles take longer where experts are small: there they are worth it only if 8 rows would not do
    (experiments/2026-11-28_heights, 2026-11-28_order, 2026-11-28_tall_tiles).
    """
    rows = shape.expected_rows(num_tokens)
    needed = rows + 1.9 * math.sqrt(max(rows - 1.0, 0.0))
    skewed = needed * _skew(shape, needs_taller=needed > MAX_ROWS[0])
    wanted = max(needed, min(skewed, MOST_ROWS_FOR_SKEW))
    fitting = max_rows_that_fit(shape)
    return next((height for height in fitting if height >= wanted), fitting[-1])


def _skew(shape: MoEShape, *, needs_taller: bool) -> float:
    """How much taller tiles are than those that uniform routing asks for."""
    expert_bytes = 3 * shape.intermediate_size * shape.hidden_size
    if shape.num_experts < FEWEST_EXPERTS_WITH_SKEW:
        return 1.0
    if expert_bytes < 1.2e6:
        return 2.8 if needs_taller else 1.0
    return 2.0 if expert_bytes < 4e6 else 3.5


def default_max_parts(shape: MoEShape, num_tokens: int) -> int:
    """Fewer parts of a job as there are more rows to exchange, and where tiles are so many that some are fused."""
    if shape.expected_experts_hit(num_tokens) > FUSED_FROM * NUM_SMS:
        return FLAGGED_PARTS
    return 16 if num_tokens <= 4 else 8 if num_tokens <= 128 else FLAGGED_PARTS
