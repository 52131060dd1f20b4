"""`cuda.sm90_fused`: the layer in one kernel (sm90_fused.cu) behind one small launch that aligns, quantises and zeroes.

Weights stay in the layout they are served in: `prepare` only describes them to the copy engine.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch

from kernels_cuda import activation_form, sm90, sm90_prologue, tma, workspace
from kernels_cuda import compile as cuda_compile
from kernels_cuda.activation_form import ActivationForm
from kernels_cuda.calls import Call, ReadyCalls
from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, Launch, load
from kernels_cuda.sm90 import SMEM_BYTES
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting
from workbench.problem import MoEInputs, MoEShape, MoEWeights
from workbench.variant import Backend, CompileReport, Config, Support, Variant, register

KERNEL = "sm90_fused"
NUM_THREADS = 384
WEIGHT_TILE_BYTES = 2 * 128 * 128
MAX_STAGES = 6
BLOCKS = (8, 16, 24, 32, 48, 64, 96, 128)
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
"""Sizes, and how many of each an H100 or H200 has room for: CTAs of one lie in one part of the device."""
Given = Literal["tokens", "quantised", "aligned"]
"""What of a batch is there: bf16 tokens and routing, quantised tokens and routing, or quantised tokens and blocks."""


class _Params(ctypes.Structure):
    _fields_ = (
        ("w13", ctypes.c_uint8 * tma.TENSOR_MAP_BYTES),
        ("w2", ctypes.c_uint8 * tma.TENSOR_MAP_BYTES),
        ("x_q", ctypes.c_uint64),
        ("x_scale", ctypes.c_uint64),
        ("w13_scale", ctypes.c_uint64),
        ("w2_scale", ctypes.c_uint64),
        ("sorted_token_ids", ctypes.c_uint64),
        ("expert_ids", ctypes.c_uint64),
        ("num_tokens_post_padded", ctypes.c_uint64),
        ("topk_weights", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("form", ActivationForm),
        ("routed_scaling_factor", ctypes.c_float),
        ("num_choices", ctypes.c_uint32),
        ("top_k", ctypes.c_uint32),
        ("hidden_size", ctypes.c_uint32),
        ("intermediate_size", ctypes.c_uint32),
        ("inputs_from_previous_kernel", ctypes.c_uint32),
        ("interleaved", ctypes.c_uint32),
        ("padding", ctypes.c_uint8 * 12),  # the kernel's struct is aligned to 64 bytes
    )


def smem_bytes(block_m: int, cluster_size: int, num_stages: int) -> int:
    """Size of the kernel's SharedStorage, from above."""
    stage = WEIGHT_TILE_BYTES + block_m * (128 + 4) + 8 + 16  # weights, tokens and scales, two barriers
    activation = block_m * 128
    exchange = (cluster_size - 1) * block_m * 1024 if cluster_size > 1 else block_m * 4
    rows = block_m * (8 + 2 * 4 + 4 + 8 * 4)
    return -(-(num_stages * stage + activation + exchange + rows + 64) // 1024) * 1024


def most_stages(block_m: int, cluster_size: int) -> int:
    """The deepest ring that fits, at most MAX_STAGES; 0 if none does."""
    return next((n for n in range(MAX_STAGES, 1, -1) if smem_bytes(block_m, cluster_size, n) <= SMEM_BYTES), 0)


def _compile(config: Config) -> tuple[Cubin, int]:
    block_m, cluster_size, num_stages = (config.integer(name) for name in ("block_m", "cluster_size", "num_stages"))
    num_bytes = smem_bytes(block_m, cluster_size, num_stages)
    defines = {
        "BLOCK_M": block_m,
        "CLUSTER_SIZE": cluster_size,
        "NUM_STAGES": num_stages,
        "SMEM_BYTES": num_bytes,
        "PARAMS_BYTES": ctypes.sizeof(_Params),
    }
    return compile_kernel(KERNEL, defines), num_bytes


@dataclass
class Prepared:
    """A layer's weights, described to the kernel, and the kernels loaded so far."""

    weights: MoEWeights
    params: _Params
    kernels: dict[Config, Kernel] = field(default_factory=dict)
    calls: ReadyCalls = field(default_factory=ReadyCalls)

    def kernel(self, config: Config) -> Kernel:
        """The kernel of `config`, compiled and loaded on first use, which must come before a graph is captured."""
        kernel = self.kernels.get(config)
        if kernel is None:
            cubin, num_bytes = _compile(config)
            kernel = load(cubin, NUM_THREADS, config.integer("cluster_size"), num_bytes, self.weights.device)
            self.kernels[config] = kernel
        return kernel


@register
class SM90Fused(Variant):
    """See the head of sm90_fused.cu."""

    name: ClassVar[str] = "cuda.sm90_fused"
    backend: ClassVar[Backend] = "cuda"

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        return self.supports_device(device) and self.supports_shape(shape)

    def supports_device(self, device: torch.device) -> Support:
        """supports(), the shape left aside."""
        return sm90.supports_device(device)

    def supports_shape(self, shape: MoEShape) -> Support:
        """supports(), the device left aside."""
        if reason := shape.unserved(*activation_form.SERVED):
            return Support.no(reason)
        if shape.hidden_size % GROUP_SIZE:
            return Support.no(f"hidden_size must be a multiple of {GROUP_SIZE}, got {shape.hidden_size}")
        if shape.intermediate_size % GROUP_SIZE:
            return Support.no(f"intermediate_size must be a multiple of {GROUP_SIZE}, got {shape.intermediate_size}")
        if shape.num_experts > sm90_prologue.MAX_EXPERTS:
            return Support.no(f"at most {sm90_prologue.MAX_EXPERTS} experts, got {shape.num_experts}")
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        """The default by the expected rows of an expert and number of blocks, then neighbours, likelier ones first."""
        block_m = default_block_m(shape, num_tokens)
        position = BLOCKS.index(block_m)
        larger, smaller = BLOCKS[position + 1 : position + 3], BLOCKS[max(position - 2, 0) : position][::-1]

        def cluster_sizes(block: int, *factors: float) -> Iterator[tuple[int, int]]:
            default = default_cluster_size(shape, num_tokens, block)
            yield from ((block, int(default * factor)) for factor in factors)

        wanted = [
            *cluster_sizes(block_m, 1, 2),
            *(pair for block in (*larger, *smaller) for pair in cluster_sizes(block, 1)),
            *cluster_sizes(block_m, 0.5),
            *(pair for block in (*larger, *smaller) for pair in cluster_sizes(block, 2, 0.5)),
        ]
        for block, cluster_size in wanted:
            if cluster_size in cluster_sizes_that_fit(shape, block):
                yield Config(block_m=block, cluster_size=cluster_size, num_stages=most_stages(block, cluster_size))

    def aligned_config(
        self, shape: MoEShape, num_tokens: int, block_m: int, *, split_items: bool, num_stages: int
    ) -> Config:
        """The config for routing aligned to `block_m`, a multiple of 8 in 8..128.

        split_items  share an item among as many CTAs as the untuned kernel would, rather than giving it to one
        num_stages   depth of the ring of weight tiles, cut to what fits
        """
        cluster_size = default_cluster_size(shape, num_tokens, block_m) if split_items else 1
        num_stages = min(num_stages, most_stages(block_m, cluster_size))
        return Config(block_m=block_m, cluster_size=cluster_size, num_stages=num_stages)

    def prepare(self, weights: MoEWeights) -> Prepared:
        shape = weights.shape
        rows = shape.num_experts * 2 * shape.intermediate_size
        w13 = tma.encode(weights.w13, (shape.hidden_size, rows), (shape.hidden_size,), (128, 128))
        return self._prepare(weights, w13, interleaved=False)

    def prepare_interleaved(self, weights: MoEWeights) -> Prepared:
        """As `prepare`, for w13 interleaved by 8 rows and w13_scale by 1, as reference.layout.interleave does it."""
        shape = weights.shape
        hidden, intermediate = shape.hidden_size, shape.intermediate_size
        w13 = tma.encode(
            weights.w13,
            (hidden, 8, 2, intermediate // 8, shape.num_experts),
            tuple(rows * hidden for rows in (1, 8, 16, 2 * intermediate)),
            (128, 8, 1, 16, 1),
        )
        return self._prepare(weights, w13, interleaved=True)

    def _prepare(self, weights: MoEWeights, w13: bytes, interleaved: bool) -> Prepared:
        shape = weights.shape
        experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
        # The rows of a box of w2 are so ordered that a thread's accumulators are adjacent columns of `out`: row
        # 64 t + 16 w + 8 h + g of the tile is row 32 w + 4 g + 2 t + h of the 128.
        w2 = tma.encode(
            weights.w2,
            (intermediate, 8, 2, experts * hidden // 32, 2),
            tuple(rows * intermediate for rows in (4, 1, 32, 2)),
            (128, 8, 2, 4, 2),
        )
        params = _Params(
            w13=(ctypes.c_uint8 * len(w13)).from_buffer_copy(w13),
            w2=(ctypes.c_uint8 * len(w2)).from_buffer_copy(w2),
            w13_scale=weights.w13_scale.data_ptr(),
            w2_scale=weights.w2_scale.data_ptr(),
            form=activation_form.activation_form(shape),
            hidden_size=hidden,
            intermediate_size=intermediate,
            interleaved=interleaved,
        )
        sm90_prologue.warm(weights.device)
        return Prepared(weights, params)

    def align(self, prepared: Prepared, inputs: MoEInputs, config: Config) -> MoEInputs:
        if inputs.num_tokens == 0:
            return inputs.quantise()
        num_experts = prepared.weights.shape.num_experts
        aligned = sm90_prologue.empty_alignment(
            inputs.topk_ids.numel(), num_experts, config.integer("block_m"), inputs.topk_ids.device
        )
        sm90_prologue.launch(topk_ids=inputs.topk_ids, num_experts=num_experts, aligned=aligned)
        return dataclasses.replace(inputs.quantise(), aligned=aligned)

    def run(self, prepared: Prepared, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        num_tokens = inputs.num_tokens
        if num_tokens == 0:
            return
        x_q, x_scale, aligned = inputs.x_q, inputs.x_scale, inputs.aligned
        given: Given = "tokens" if x_q is None else "quantised"
        if x_q is not None and isinstance(aligned, AlignedRouting) and aligned.block_size == config.integer("block_m"):
            given = "aligned"
        key = num_tokens, given, config
        call = prepared.calls.take(key) or _make_call(prepared, key)
        first, fused = call.params
        if isinstance(aligned, AlignedRouting) and given == "aligned":
            _write_routing(fused, aligned)
        else:
            first.topk_ids = inputs.topk_ids.data_ptr()
        if x_q is not None and x_scale is not None:
            fused.x_q, fused.x_scale = x_q.data_ptr(), x_scale.data_ptr()
        else:
            first.x = inputs.tokens.data_ptr()
        fused.topk_weights, fused.routed_scaling_factor = inputs.topk_weights.data_ptr(), inputs.routed_scaling_factor
        first.out = fused.out = out.data_ptr()
        call.enqueue()

    def run_aligned(
        self,
        prepared: Prepared,
        x_q: torch.Tensor,
        x_scale: torch.Tensor,
        aligned: AlignedRouting,
        topk_weights: torch.Tensor,
        routed_scaling_factor: float,
        out: torch.Tensor,
        config: Config,
    ) -> None:
        """Add to `out` what the layer makes of routing aligned by someone else, for M > 0, with `prepared` from either
        preparation. Of `aligned` only what is in use is read; choices of M * top_k and above are padding."""
        (num_tokens, top_k), num_blocks = topk_weights.shape, aligned.expert_ids.numel()
        key = num_tokens, top_k, num_blocks, config
        call = prepared.calls.take(key)
        if call is None:  # alone: the kernel ahead of it in the stream may be anyone's
            fused = _bind(prepared, config, num_tokens, top_k, num_blocks, overlap_previous=False)
            call = prepared.calls.make(key, out.device, workspace.layout({}, {}), [(fused, {})])
        (params,) = call.params
        _write_routing(params, aligned)
        params.x_q, params.x_scale = x_q.data_ptr(), x_scale.data_ptr()
        params.topk_weights, params.routed_scaling_factor = topk_weights.data_ptr(), routed_scaling_factor
        params.out = out.data_ptr()
        call.enqueue()

    def align_choices(self, topk_ids: torch.Tensor, block_m: int, num_experts: int) -> AlignedRouting:
        """As reference.routing.align_block_size, for M > 0; the order of an expert's choices is not fixed."""
        aligned = sm90_prologue.empty_alignment(topk_ids.numel(), num_experts, block_m, topk_ids.device)
        sm90_prologue.launch(topk_ids=topk_ids, num_experts=num_experts, aligned=aligned)
        return aligned

    def quantise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """reference.quant.quantise_activations of bf16 [M, H], bit for bit; M > 0 and 128 divides H."""
        quantised = sm90_prologue.empty_quantised(x)
        sm90_prologue.launch(x=x, quantised=quantised)
        return quantised

    def sources(self) -> tuple[Path, ...]:
        modules = ("sm90_fused", sm90_prologue.KERNEL, "activation_form", "calls", "tma", "workspace")
        return cuda_compile.variant_sources(modules, (KERNEL, sm90_prologue.KERNEL))

    def compile(self, shape: MoEShape, configs: Iterable[Config]) -> list[CompileReport]:
        reports = [cubin.report(Config(), 0) for cubin in sm90_prologue.compiled_forms()]
        for config in configs:
            cubin, num_bytes = _compile(config)
            reports.append(cubin.report(config, num_bytes))
        return reports


def _make_call(prepared: Prepared, key: tuple[int, Given, Config]) -> Call:
    """The launches of a call: one for what is missing and to clear `out`, and the layer."""
    num_tokens, given, config = key
    shape, device, block_m = prepared.weights.shape, prepared.weights.device, config.integer("block_m")
    num_choices, num_values = num_tokens * shape.top_k, num_tokens * shape.hidden_size
    blocks = sm90_prologue.block_parts(num_choices, shape.num_experts, block_m)
    missing = {} if given == "aligned" else dict(blocks)
    if given == "tokens":
        missing |= sm90_prologue.quantised_parts(num_tokens, shape.hidden_size)
    first = sm90_prologue.bind(
        device,
        num_out_bytes=2 * num_values,
        num_values=num_values if given == "tokens" else 0,
        num_choices=0 if given == "aligned" else num_choices,
        num_experts=shape.num_experts,
        form="blocks",
        max_rows=block_m,
        power_of_two_scales=activation_form.power_of_two_scales(shape),
    )
    num_blocks = blocks["expert_ids"] // 4
    fused = _bind(prepared, config, num_tokens, shape.top_k, num_blocks, overlap_previous=True)
    fused.params.inputs_from_previous_kernel = given != "aligned"
    parts = workspace.layout({}, missing)
    return prepared.calls.make(key, device, parts, [(first, {"sorted_choices": "sorted_token_ids"}), (fused, {})])


def _bind(
    prepared: Prepared, config: Config, num_tokens: int, top_k: int, num_blocks: int, overlap_previous: bool
) -> Launch:
    """A launch of the kernel on so many tokens and choices in at most `num_blocks` blocks."""
    params = _Params.from_buffer_copy(prepared.params)
    params.num_choices, params.top_k = num_tokens * top_k, top_k
    kernel = prepared.kernel(config)
    most_items = num_blocks * (params.intermediate_size // GROUP_SIZE)
    num_ctas = min(kernel.max_clusters, most_items) * kernel.cluster_size
    return kernel.bind(params, num_ctas, overlap_previous=overlap_previous)


def _write_routing(params: _Params, aligned: AlignedRouting) -> None:
    params.sorted_token_ids = aligned.sorted_token_ids.data_ptr()
    params.expert_ids = aligned.expert_ids.data_ptr()
    params.num_tokens_post_padded = aligned.num_tokens_post_padded.data_ptr()


def expected_rows(shape: MoEShape, num_tokens: int) -> tuple[float, float]:
    """Under uniform routing: routed experts hit, and rows of each that is hit."""
    hit = shape.expected_experts_hit(num_tokens)
    return hit, num_tokens * (shape.top_k - shape.num_shared_experts) / hit if hit else 0.0


def default_block_m(shape: MoEShape, num_tokens: int) -> int:
    """The smallest block that holds the rows of nearly every routed expert: their mean and 2.8 standard deviations."""
    _, rows = expected_rows(shape, num_tokens)
    wanted = rows + 2.8 * math.sqrt(max(rows - 1.0, 0.0))
    return next((block for block in BLOCKS if block >= wanted), BLOCKS[-1])


def cluster_sizes_that_fit(shape: MoEShape, block_m: int) -> list[int]:
    """Those that leave room for three stages and give every CTA a part of K."""
    return [size for size in CLUSTERS if size <= shape.hidden_size // GROUP_SIZE and most_stages(block_m, size) >= 3]


def default_cluster_size(shape: MoEShape, num_tokens: int, block_m: int) -> int:
    """The largest cluster at which every item still gets one of its own at once."""
    hit, rows = expected_rows(shape, num_tokens)
    blocks = hit * max(1.0, rows / block_m) + shape.num_shared_experts * math.ceil(num_tokens / block_m)
    items = blocks * (shape.intermediate_size // GROUP_SIZE)
    fitting = cluster_sizes_that_fit(shape, block_m)
    return max((size for size in fitting if items <= CLUSTERS[size]), default=1)
