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
from typing import ClassVar

import torch

from kernels_cuda import activation_form, sm90, sm90_prologue, tma
from kernels_cuda import compile as cuda_compile
from kernels_cuda.activation_form import ActivationForm
from kernels_cuda.compile import Cubin, compile_kernel
from kernels_cuda.launch import Kernel, load, pointer
from kernels_cuda.sm90 import NUM_SMS, SMEM_BYTES
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting
from workbench.problem import MoEInputs, MoEShape, MoEWeights
from workbench.variant import Backend, CompileReport, Config, Support, Variant, register

KERNEL = "sm90_fused"
NUM_THREADS = 384
WEIGHT_TILE_BYTES = 2 * 128 * 128
MAX_STAGES = 6
BLOCKS = (8, 16, 24, 32, 48, 64, 96, 128)
CLUSTERS = (1, 2, 4, 8)


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
            w13_scale=pointer(weights.w13_scale),
            w2_scale=pointer(weights.w2_scale),
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
        if inputs.num_tokens == 0:
            return
        block_m = config.integer("block_m")
        aligned = inputs.aligned
        if isinstance(aligned, AlignedRouting) and aligned.block_size == block_m and inputs.x_q is not None:
            x_q, x_scale = inputs.x_q, inputs.x_scale
            sm90_prologue.launch(out=out)
            inputs_from_previous_kernel = False
        else:
            x_q, x_scale, aligned = self._prologue(prepared, inputs, out, block_m)
            inputs_from_previous_kernel = True
        params = _batch_params(prepared, x_q, x_scale, aligned, inputs.topk_weights, inputs.routed_scaling_factor, out)
        params.inputs_from_previous_kernel = inputs_from_previous_kernel
        _launch(prepared.kernel(config), params, aligned, overlap_previous=True)

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
        params = _batch_params(prepared, x_q, x_scale, aligned, topk_weights, routed_scaling_factor, out)
        _launch(prepared.kernel(config), params, aligned, overlap_previous=False)  # that kernel may be anyone's

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

    def _prologue(
        self, prepared: Prepared, inputs: MoEInputs, out: torch.Tensor, block_m: int
    ) -> tuple[torch.Tensor, torch.Tensor, AlignedRouting]:
        """One launch for whatever is missing: zero `out`, quantise x, align the routing."""
        shape = prepared.weights.shape
        aligned = sm90_prologue.empty_alignment(inputs.topk_ids.numel(), shape.num_experts, block_m, out.device)
        if inputs.x_q is not None and inputs.x_scale is not None:
            x, x_q, x_scale = None, inputs.x_q, inputs.x_scale
        else:
            x = inputs.tokens
            x_q, x_scale = sm90_prologue.empty_quantised(x)
        sm90_prologue.launch(
            out=out,
            x=x,
            quantised=(x_q, x_scale),
            topk_ids=inputs.topk_ids,
            num_experts=shape.num_experts,
            aligned=aligned,
            power_of_two_scales=activation_form.power_of_two_scales(shape),
        )
        return x_q, x_scale, aligned

    def sources(self) -> tuple[Path, ...]:
        modules = ("sm90_fused", sm90_prologue.KERNEL, "activation_form", "tma")
        return cuda_compile.variant_sources(modules, (KERNEL, sm90_prologue.KERNEL))

    def compile(self, shape: MoEShape, configs: Iterable[Config]) -> list[CompileReport]:
        reports = [sm90_prologue.compiled().report(Config(), 0)]
        for config in configs:
            cubin, num_bytes = _compile(config)
            reports.append(cubin.report(config, num_bytes))
        return reports


def _batch_params(
    prepared: Prepared,
    x_q: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    aligned: AlignedRouting,
    topk_weights: torch.Tensor,
    routed_scaling_factor: float,
    out: torch.Tensor,
) -> _Params:
    params = _Params.from_buffer_copy(prepared.params)
    params.x_q, params.x_scale = pointer(x_q), pointer(x_scale)
    params.sorted_token_ids = pointer(aligned.sorted_token_ids)
    params.expert_ids = pointer(aligned.expert_ids)
    params.num_tokens_post_padded = pointer(aligned.num_tokens_post_padded)
    params.topk_weights = pointer(topk_weights)
    params.out = pointer(out)
    params.routed_scaling_factor = routed_scaling_factor
    params.num_choices, params.top_k = topk_weights.numel(), topk_weights.shape[1]
    return params


def _launch(kernel: Kernel, params: _Params, aligned: AlignedRouting, overlap_previous: bool) -> None:
    most_items = aligned.expert_ids.numel() * (params.intermediate_size // GROUP_SIZE)
    num_ctas = min(kernel.max_clusters, most_items) * kernel.cluster_size
    kernel.launch(params, num_ctas, overlap_previous=overlap_previous)


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
    return max((size for size in fitting if items * size <= NUM_SMS + 1), default=1)
