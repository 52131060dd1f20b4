"""`cuda.sm90_prefill`: large batches as two grouped products, sm90_prefill_up.cu and then sm90_prefill_down.cu, or
sm90_prefill_down_wide.cu where the intermediate size is large; behind one small launch that routes and quantises.

Weights stay in the layout they are served in: `prepare` only describes them to the copy engine.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from kernels_cuda import activation_form, sm90, sm90_combine, sm90_fill, sm90_prologue, tiled_inputs, tma
from kernels_cuda import compile as cuda_compile
from kernels_cuda.calls import Call, ReadyCalls
from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, load
from kernels_cuda.sm90 import SMEM_BYTES
from reference.quant import GROUP_SIZE
from workbench.problem import MoEInputs, MoEShape, MoEWeights
from workbench.variant import Backend, CompileReport, Config, Support, Variant, register

UP, DOWN, DOWN_WIDE = "sm90_prefill_up", "sm90_prefill_down", "sm90_prefill_down_wide"
CLUSTER_SIZE = 2
GROUPED_THREADS = 384
MAX_STAGES = 5
MAX_CLUSTERS = 96
MOST_SLAB_CHUNKS = 2
"""Up to so many chunks of 128 channels the weights of a slab of columns stay in shared memory."""
HEIGHTS = {128: 100, 160: 140, 192: 175, 272: math.inf}
"""Heights of tiles, each with the most rows of an expert, on average, up to which it is the default; from 20 to
290 rows were measured (experiments/2026-11-28_prefill_steps, 2026-11-28_prefill_producers)."""
LEAST_STAGES = 4
"""A height whose ring has fewer is not offered."""
SLAB_COLUMNS = (256, 512, 384, 128)
"""Of a slab, the best first: 256 beat 512 by up to 6 %, or tie (experiments/2026-11-27_prefill_tiles)."""
ZEROED_COLUMNS = 512
"""Of `out`, by the up phase; the down phase by slabs zeroes the others. At least one slab."""
JOB_ROWS = 192  # of the last expert; others have more
MAX_HIDDEN_SIZE = 32_640
"""Keeps x_q of 131072 tokens under 2^32 bytes."""
FLAG_BYTES = MAX_CLUSTERS * CLUSTER_SIZE * 4
TAIL_BYTES = (2 * MAX_CLUSTERS + 1) * 4


class _UpParams(ctypes.Structure):
    _fields_ = (
        ("w13", ctypes.c_uint8 * tma.TENSOR_MAP_BYTES),
        ("x_q", ctypes.c_uint64),
        ("x_scale", ctypes.c_uint64),
        ("w13_scale", ctypes.c_uint64),
        ("sorted_choices", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
        ("topk_weights", ctypes.c_uint64),
        ("part_sums", ctypes.c_uint64),
        ("part_written", ctypes.c_uint64),
        ("h", ctypes.c_uint64),
        ("h_scale", ctypes.c_uint64),
        ("destination", ctypes.c_uint64),
        ("jobs", ctypes.c_uint64),
        ("jobs_listed", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("num_out_rows", ctypes.c_uint32),
        ("zeroed_row_bytes", ctypes.c_uint32),
        ("form", activation_form.ActivationForm),
        ("routed_scaling_factor", ctypes.c_float),
        ("top_k", ctypes.c_uint32),
        ("num_experts", ctypes.c_uint32),
        ("num_h_rows", ctypes.c_uint32),
        ("num_choices", ctypes.c_uint32),
        ("padding", ctypes.c_uint8 * 36),  # the kernel's struct is aligned to 64 bytes
    )


class _DownParams(ctypes.Structure):
    _fields_ = (
        ("w2", ctypes.c_uint8 * tma.TENSOR_MAP_BYTES),
        ("h", ctypes.c_uint64),
        ("h_scale", ctypes.c_uint64),
        ("w2_scale", ctypes.c_uint64),
        ("destination", ctypes.c_uint64),
        ("jobs", ctypes.c_uint64),
        ("jobs_listed", ctypes.c_uint64),
        ("ticket_counter", ctypes.c_uint64),
        ("zeroed", ctypes.c_uint64),
        ("stored", ctypes.c_uint64),
        ("looked", ctypes.c_uint64),
        ("topk_ids", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("num_h_rows", ctypes.c_uint32),
        ("num_tokens", ctypes.c_uint32),
        ("top_k", ctypes.c_uint32),
        ("num_experts", ctypes.c_uint32),
        ("padding", ctypes.c_uint8 * 16),  # the kernel's struct is aligned to 64 bytes
    )


class _DownWideParams(ctypes.Structure):
    _fields_ = (
        ("w2", ctypes.c_uint8 * tma.TENSOR_MAP_BYTES),
        ("h", ctypes.c_uint64),
        ("h_scale", ctypes.c_uint64),
        ("w2_scale", ctypes.c_uint64),
        ("destination", ctypes.c_uint64),
        ("tiles", ctypes.c_uint64),
        ("part_sums", ctypes.c_uint64),
        ("part_written", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("num_h_rows", ctypes.c_uint32),
        ("padding", ctypes.c_uint8 * 60),  # the kernel's struct is aligned to 64 bytes
    )


def grouped_smem_bytes(block_m: int, num_k: int, num_stages: int, epilogue: int) -> int:
    """Size of a grouped product's SharedStorage with so many bytes for its epilogue, from above."""
    slots = -(-block_m // 16) * 16
    stage = 2 * 128 * 128 + block_m * 128 + 2 * slots * 4 + 16  # weights, rows and scales, two barriers
    tables = (num_stages + 2) * 24 + num_stages * 4 + 2 * block_m * 4 + block_m * 16 + 4 * num_k * 4
    share = (MAX_CLUSTERS + 1) * 4 + 48
    return num_stages * stage + tables + share + epilogue + 64  # what alignment takes


def up_smem_bytes(block_m: int, num_k: int, num_stages: int) -> int:
    """Size of the up kernel's SharedStorage, from above."""
    return grouped_smem_bytes(block_m, num_k, num_stages, max(block_m * (128 + 4), 1024 * 4 + 64))


def down_smem_bytes(num_chunks: int) -> int:
    """Size of the down kernel's SharedStorage, from above."""
    num_blocks = 9 if num_chunks == 1 else 6
    return 8 * 128 * 128 + num_blocks * (num_chunks * 64 * 128 + 64) + 1024


def most_stages(block_m: int, num_k: int) -> int:
    """The deepest ring that fits the up kernel, at most MAX_STAGES; 0 if none does."""
    return next((n for n in range(MAX_STAGES, 1, -1) if up_smem_bytes(block_m, num_k, n) <= SMEM_BYTES), 0)


def heights(shape: MoEShape) -> dict[int, float]:
    """Those of HEIGHTS that `shape` leaves shared memory for."""
    num_k = max(shape.hidden_size, shape.intermediate_size) // GROUP_SIZE
    return {
        height: most for height, most in HEIGHTS.items() if most_stages(height // CLUSTER_SIZE, num_k) >= LEAST_STAGES
    }


def num_h_rows(num_choices: int, num_experts: int) -> int:
    """Rows of h: each expert's begin at a multiple of 8, and the last block of 64 may be read whole."""
    return -(-num_choices // 8) * 8 + 8 * num_experts + 64


def job_capacity(num_choices: int, num_experts: int) -> int:
    """No routing of so many choices makes more jobs of the down phase."""
    return min(num_choices, num_experts + num_choices // JOB_ROWS)


def is_wide(shape: MoEShape) -> bool:
    """Whether the down phase is a grouped product like the up phase."""
    return shape.intermediate_size // GROUP_SIZE > MOST_SLAB_CHUNKS


def downs(shape: MoEShape) -> list[dict[str, int]]:
    """What the down phase can be, the default first. Of two chunks three warpgroups would spill."""
    if is_wide(shape):
        return [{}]
    num_warpgroups, block_n = (3, 64) if shape.intermediate_size == GROUP_SIZE else (2, 128)
    return [
        {"num_warpgroups": num_warpgroups, "block_n": block_n, "slab_columns": columns}
        for columns in SLAB_COLUMNS
        if shape.hidden_size % columns == 0
    ]


def _grouped_defines(shape: MoEShape, config: Config, deterministic: bool) -> dict[str, int]:
    return {
        "HIDDEN_SIZE": shape.hidden_size,
        "NUM_CHUNKS": shape.intermediate_size // GROUP_SIZE,
        "BLOCK_M": config.integer("max_rows") // CLUSTER_SIZE,
        "DETERMINISTIC": int(deterministic),
    }


def _compile_up(shape: MoEShape, config: Config, deterministic: bool) -> tuple[Cubin, int]:
    block_m, num_k = config.integer("max_rows") // CLUSTER_SIZE, shape.hidden_size // GROUP_SIZE
    num_stages = most_stages(block_m, num_k)
    num_bytes = up_smem_bytes(block_m, num_k, num_stages)
    defines = {
        "NUM_STAGES": num_stages,
        "PLAIN_SWIGLU": int(activation_form.is_plain_swiglu(shape)),
        "SMEM_BYTES": num_bytes,
        "PARAMS_BYTES": ctypes.sizeof(_UpParams),
    }
    return compile_kernel(UP, _grouped_defines(shape, config, deterministic) | defines), num_bytes


def _compile_down(shape: MoEShape, config: Config, deterministic: bool) -> tuple[Cubin, int]:
    num_chunks = shape.intermediate_size // GROUP_SIZE
    if is_wide(shape):
        block_m = config.integer("max_rows") // CLUSTER_SIZE
        num_stages = most_stages(block_m, num_chunks)
        num_bytes = grouped_smem_bytes(block_m, num_chunks, num_stages, TAIL_BYTES)
        sizes = {"NUM_STAGES": num_stages, "SMEM_BYTES": num_bytes, "PARAMS_BYTES": ctypes.sizeof(_DownWideParams)}
        return compile_kernel(DOWN_WIDE, _grouped_defines(shape, config, deterministic) | sizes), num_bytes
    num_bytes = down_smem_bytes(num_chunks)
    defines = {
        "HIDDEN_SIZE": shape.hidden_size,
        "NUM_CHUNKS": num_chunks,
        "NUM_WARPGROUPS": config.integer("num_warpgroups"),
        "BLOCK_N": config.integer("block_n"),
        "SLAB_COLUMNS": config.integer("slab_columns"),
        "ZEROED_COLUMNS": ZEROED_COLUMNS,
        "DETERMINISTIC": int(deterministic),
        "STORES_LAST": int(shape.num_shared_experts > 0 and not deterministic),
        "SMEM_BYTES": num_bytes,
        "PARAMS_BYTES": ctypes.sizeof(_DownParams),
    }
    return compile_kernel(DOWN, defines), num_bytes


@dataclass
class Prepared:
    """A layer's weights, described to the kernels, and the kernels loaded so far."""

    weights: MoEWeights
    up_params: _UpParams
    down_params: _DownParams | _DownWideParams
    deterministic: bool
    kernels: dict[Config, tuple[Kernel, Kernel]] = field(default_factory=dict)
    calls: ReadyCalls = field(default_factory=ReadyCalls)

    def pair(self, config: Config) -> tuple[Kernel, Kernel]:
        """The kernels of `config`, compiled and loaded on first use, which must come before a graph is captured."""
        pair = self.kernels.get(config)
        if pair is None:
            shape, device = self.weights.shape, self.weights.device
            up, up_bytes = _compile_up(shape, config, self.deterministic)
            down, down_bytes = _compile_down(shape, config, self.deterministic)
            if is_wide(shape):
                down_kernel = load(down, GROUPED_THREADS, CLUSTER_SIZE, down_bytes, device)
            else:
                down_kernel = load(down, 128 * (config.integer("num_warpgroups") + 1), 1, down_bytes, device)
            pair = load(up, GROUPED_THREADS, CLUSTER_SIZE, up_bytes, device), down_kernel
            self.kernels[config] = pair
        return pair


def handed_over(
    num_choices: int, shape: MoEShape, max_rows: int, num_clusters: int
) -> tuple[dict[str, int], dict[str, int]]:
    """What the kernels of one call hand each other: bytes of parts that are zero before the first, and of others."""
    num_chunks, h_rows = shape.intermediate_size // GROUP_SIZE, num_h_rows(num_choices, shape.num_experts)
    zeroed = {"ticket_counter": 16, "jobs_listed": 16, "up_written": FLAG_BYTES, "down_written": FLAG_BYTES}
    if not is_wide(shape):
        counters = -(-shape.hidden_size // GROUP_SIZE // 4) * 16  # one for each of the narrowest slabs
        zeroed |= {"zeroed": counters, "stored": counters, "looked": 16}
    others = {
        "part_sums": num_clusters * max_rows * 1024,
        "jobs": 16 * (1 + job_capacity(num_choices, shape.num_experts)),
        "h": h_rows * shape.intermediate_size,
        "h_scale": h_rows * num_chunks * 4,
        "destination": h_rows * 4,
    }
    return zeroed, others


def _make_call(prepared: Prepared, key: tiled_inputs.Key) -> Call:
    """The call of `key`, with a launch of each product."""
    num_tokens, _, config = key
    shape = prepared.weights.shape
    up_kernel, down_kernel = prepared.pair(config)
    num_clusters = min(up_kernel.max_clusters, MAX_CLUSTERS)
    num_choices = num_tokens * shape.top_k
    up = _UpParams.from_buffer_copy(prepared.up_params)
    down = type(prepared.down_params).from_buffer_copy(prepared.down_params)
    up.num_h_rows = down.num_h_rows = num_h_rows(num_choices, shape.num_experts)
    up.num_choices = num_choices
    up.num_out_rows = 0 if prepared.deterministic else num_tokens
    if isinstance(down, _DownWideParams):
        up.zeroed_row_bytes = shape.hidden_size * 2
        num_down_ctas = min(down_kernel.max_clusters, num_clusters) * CLUSTER_SIZE
    else:
        up.zeroed_row_bytes = min(shape.hidden_size, ZEROED_COLUMNS) * 2
        down.num_tokens, down.top_k, down.num_experts = num_tokens, shape.top_k, shape.num_experts
        num_down_ctas = down_kernel.max_clusters
    up_launch = up_kernel.bind(up, num_clusters * CLUSTER_SIZE, overlap_previous=True)
    down_launch = down_kernel.bind(down, num_down_ctas, overlap_previous=True)
    launches = [
        (up_launch, {"part_written": "up_written"}),
        (down_launch, {"part_written": "down_written", "out": "contributions"}),
    ]
    zeroed, others = handed_over(num_choices, shape, config.integer("max_rows"), num_clusters)
    return tiled_inputs.make_call(prepared, key, zeroed, others, launches, marked=False)


@register
class SM90Prefill(Variant):
    """See the heads of sm90_prefill_up.cu and sm90_prefill_down.cu."""

    name: ClassVar[str] = "cuda.sm90_prefill"
    backend: ClassVar[Backend] = "cuda"

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        return sm90.supports_device(device) and self.supports_shape(shape)

    def supports_shape(self, shape: MoEShape) -> Support:
        """supports(), the device left aside."""
        if reason := shape.unserved(*activation_form.SERVED):
            return Support.no(reason)
        if shape.hidden_size % GROUP_SIZE or shape.hidden_size > MAX_HIDDEN_SIZE:
            return Support.no(
                f"hidden_size must be a multiple of {GROUP_SIZE} up to {MAX_HIDDEN_SIZE}, got {shape.hidden_size}"
            )
        if shape.intermediate_size % GROUP_SIZE:
            return Support.no(f"intermediate_size must be a multiple of {GROUP_SIZE}, got {shape.intermediate_size}")
        if shape.num_experts > sm90_prologue.MAX_EXPERTS:
            return Support.no(f"at most {sm90_prologue.MAX_EXPERTS} experts, got {shape.num_experts}")
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        """The default by the expected rows of an expert, then the other heights of tiles, the nearest first, then the
        other down phases."""
        rows = shape.expected_rows(num_tokens)
        offered = heights(shape)
        first = next((height for height, most in offered.items() if rows <= most), max(offered))
        nearest = sorted(offered, key=lambda height: abs(height - first))
        for down in downs(shape):
            for max_rows in nearest:
                yield Config(max_rows=max_rows, **down)

    def prepare(self, weights: MoEWeights) -> Prepared:
        shape = weights.shape
        experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
        # Of 16 rows the even ones come first: a thread's wgmma accumulators are adjacent channels then.
        w13 = tma.encode(
            weights.w13,
            (hidden, 8, 2, experts * 2 * intermediate // 16),
            (2 * hidden, hidden, 16 * hidden),
            (128, 8, 2, 8),
        )
        up_params = _UpParams(
            w13=(ctypes.c_uint8 * len(w13)).from_buffer_copy(w13),
            w13_scale=weights.w13_scale.data_ptr(),
            form=activation_form.activation_form(shape),
            top_k=shape.top_k,
            num_experts=experts,
        )
        down_params: _DownParams | _DownWideParams
        row_strides: tuple[int, ...]
        counts: tuple[int, ...]
        box: tuple[int, ...]
        if is_wide(shape):
            # Row 8 h + g of each 16 rows of a box is row 2 g + h of w2.
            row_strides, counts, box = (2, 1, 16), (8, 2, experts * hidden // 16), (8, 2, 8)
            down_params = _DownWideParams()
        else:
            # Row 8 j + 2 c + b of each 32 rows of a box is row 8 c + 2 j + b of w2.
            row_strides, counts, box = (1, 8, 2, 32), (2, 4, 4, experts * hidden // 32), (2, 4, 4, 4)
            down_params = _DownParams()
        strides = tuple(rows * intermediate for rows in row_strides)
        w2 = tma.encode(weights.w2, (intermediate, *counts), strides, (128, *box))
        down_params.w2 = (ctypes.c_uint8 * len(w2)).from_buffer_copy(w2)
        down_params.w2_scale = weights.w2_scale.data_ptr()
        for helper in (sm90_prologue, sm90_fill, sm90_combine):
            helper.warm(weights.device)
        return Prepared(weights, up_params, down_params, self.deterministic)

    def align(self, prepared: Prepared, inputs: MoEInputs, config: Config) -> MoEInputs:
        return tiled_inputs.align(inputs, prepared.weights.shape.num_experts, config.integer("max_rows"))

    def run(self, prepared: Prepared, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        num_tokens = inputs.num_tokens
        if num_tokens == 0:
            return
        given = tiled_inputs.given(inputs, config)
        key = num_tokens, given, config
        call = prepared.calls.take(key) or _make_call(prepared, key)
        first, up, down, *combine = call.params
        tiled_inputs.write_addresses(given, inputs, "tiles", [first], up)
        if isinstance(down, _DownParams):
            down.topk_ids = inputs.topk_ids.data_ptr()
        elif given == "tiled":
            down.tiles = up.tiles
        address = out.data_ptr()
        if combine:
            combine[0].topk_ids, combine[0].out = inputs.topk_ids.data_ptr(), address
        else:
            up.out = down.out = address
        call.enqueue()

    def sources(self) -> tuple[Path, ...]:
        others = (sm90_prologue.KERNEL, sm90_fill.KERNEL, sm90_combine.KERNEL)
        modules = ("sm90_prefill", *others, "activation_form", "calls", "tiled_inputs", "tma", "workspace")
        return cuda_compile.variant_sources(modules, (UP, DOWN, DOWN_WIDE, *others))

    def compile(self, shape: MoEShape, configs: Iterable[Config]) -> list[CompileReport]:
        others = (*sm90_prologue.compiled_forms(), sm90_fill.compiled(), sm90_combine.compiled())
        reports = [cubin.report(Config(), 0) for cubin in others]
        for config in configs:
            for compile_one in (_compile_up, _compile_down):
                cubin, num_bytes = compile_one(shape, config, self.deterministic)
                reports.append(cubin.report(config, num_bytes))
        return reports


@register
class SM90PrefillDeterministic(SM90Prefill):
    """The same bits every time, and for a token whatever else is in the batch: no item's K is split, and a last launch
    adds up each token's rows in the order of its choices."""

    name: ClassVar[str] = "cuda.sm90_prefill_deterministic"
    deterministic: ClassVar[bool] = True
