"""`triton.grouped`: the layer as a chain of grouped products, one Triton kernel a step.

    (align, quantise)  ->  up projection  ->  SwiGLU and quantise  ->  down projection  ->  weighted sum

The steps are chained by programmatic dependent launch. With `fuse_swiglu` the third sits in the epilogue of the second
(`up_swiglu.py`). Without, programs may share K of the up projection, for batches that hit too few experts to fill the
GPU, and SwiGLU sums their shares (`grouped_gemm.py`, `swiglu.py`). Either way values stay in fp32 until they are
quantised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from kernels_triton import interpreter
from kernels_triton.align import align
from kernels_triton.combine import combine
from kernels_triton.compile import compiled_launches
from kernels_triton.grouped_gemm import GemmConfig, grouped_gemm
from kernels_triton.quantise import quantise
from kernels_triton.swiglu import swiglu
from kernels_triton.tuning_space import tuning_space
from kernels_triton.up_swiglu import up_swiglu
from reference.quant import GROUP_SIZE
from reference.routing import AlignedRouting
from workbench.problem import FP8, MoEInputs, MoEShape, MoEWeights
from workbench.variant import CompileReport, Config, Support, Variant, register


@register
class TritonGrouped(Variant):
    """The configuration is described at the head of tuning_space.py."""

    name = "triton.grouped"
    backend = "triton"

    def supports(self, shape: MoEShape, device: torch.device) -> Support:
        for field in ("hidden_size", "intermediate_size"):
            size = getattr(shape, field)
            if size % GROUP_SIZE:
                return Support.no(f"{field}: expected a multiple of {GROUP_SIZE}, got {size}")
        if reason := shape.unserved():
            return Support.no(reason)
        if interpreter.requested():
            return Support.yes()
        if device.type != "cuda" or not torch.cuda.is_available():
            return Support.no("Triton needs a GPU or TRITON_INTERPRET=1")
        major, minor = torch.cuda.get_device_capability(device)
        if major < 9:
            return Support.no(f"fp8 tensor cores: expected sm_90 or later, got sm_{major}{minor}")
        return Support.yes()

    def configs(self, shape: MoEShape, num_tokens: int) -> Iterable[Config]:
        return tuning_space(shape, num_tokens)

    def prepare(self, weights: MoEWeights) -> MoEWeights:
        """The weights as they are: the kernels read the field's layout."""
        return weights

    def align(self, prepared: MoEWeights, inputs: MoEInputs, config: Config) -> MoEInputs:
        x_q, x_scale = _quantised(inputs)
        routing = align(inputs.topk_ids, config.integer("block_m"), prepared.shape.num_experts)
        return dataclasses.replace(inputs, x=None, x_q=x_q, x_scale=x_scale, aligned=routing)

    def run(self, prepared: MoEWeights, inputs: MoEInputs, out: torch.Tensor, config: Config) -> None:
        if not inputs.num_tokens:
            return
        routing = inputs.aligned
        if not isinstance(routing, AlignedRouting) or routing.block_size != config["block_m"]:
            routing = align(inputs.topk_ids, config.integer("block_m"), prepared.shape.num_experts)
        x_q, x_scale = _quantised(inputs)

        shape, device = prepared.shape, out.device
        num_choices = inputs.topk_ids.numel()
        activated = torch.empty((num_choices, shape.intermediate_size), dtype=FP8, device=device)
        activated_scale = torch.empty(
            (num_choices, shape.intermediate_size // GROUP_SIZE), dtype=torch.float32, device=device
        )
        swap = bool(config["swap"])
        up = GemmConfig(
            block_n=config.integer("up_block_n"),
            tiles=1,
            split_k=config.integer("split_k"),
            swap=swap,
            num_warps=config.integer("up_warps"),
            num_stages=config.integer("up_stages"),
        )
        w13, w13_scale = prepared.w13, prepared.w13_scale
        if config["fuse_swiglu"]:
            up_swiglu(x_q, x_scale, w13, w13_scale, activated, activated_scale, routing, shape.top_k, up)
        else:
            partial = torch.empty((up.split_k, num_choices, shape.w13_rows), dtype=torch.float32, device=device)
            grouped_gemm(x_q, x_scale, w13, w13_scale, partial, routing, shape.top_k, up, prefetch=False)
            swiglu(partial, inputs.topk_ids, activated, activated_scale)

        down = GemmConfig(
            block_n=config.integer("down_block_n"),
            tiles=config.integer("down_tiles"),
            split_k=1,
            swap=swap,
            num_warps=config.integer("down_warps"),
            num_stages=config.integer("down_stages"),
        )
        expert_out = torch.empty((1, num_choices, shape.hidden_size), dtype=torch.bfloat16, device=device)
        w2, w2_scale = prepared.w2, prepared.w2_scale
        grouped_gemm(activated, activated_scale, w2, w2_scale, expert_out, routing, 1, down, prefetch=True)
        combine(expert_out, inputs.topk_ids, inputs.topk_weights, out, inputs.routed_scaling_factor)

    def sources(self) -> tuple[Path, ...]:
        folder = Path(__file__).parent
        beside = {"compile.py", "tuning_space.py"}  # what these decide is in the configuration
        return tuple(sorted(path for path in folder.glob("*.py") if path.name not in beside))

    def compile(self, shape: MoEShape, configs: Iterable[Config]) -> list[CompileReport]:
        reports = []
        for config in configs:
            prepared, inputs = without_storage(shape)
            with compiled_launches() as launches:
                self.run(prepared, inputs, torch.empty_like(inputs.tokens), config)
            reports += [
                CompileReport(
                    kernel=launch.kernel,
                    config=config,
                    registers=launch.registers,
                    spill_bytes=launch.spill_bytes,
                    stack_bytes=launch.stack_bytes,
                    static_smem_bytes=0,
                    dynamic_smem_bytes=launch.shared_bytes,
                    warnings=launch.warnings,
                )
                for launch in launches
            ]
        return reports


def _quantised(inputs: MoEInputs) -> tuple[torch.Tensor, torch.Tensor]:
    if inputs.x_q is not None and inputs.x_scale is not None:
        return inputs.x_q, inputs.x_scale
    return quantise(inputs.tokens)


def without_storage(shape: MoEShape, num_tokens: int = 64) -> tuple[MoEWeights, MoEInputs]:
    """Weights and a batch of `shape` that have dtypes and shapes alone, to compile for."""

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    experts, hidden, intermediate = shape.num_experts, shape.hidden_size, shape.intermediate_size
    weights = MoEWeights(
        shape=shape,
        w13=empty(experts, 2 * intermediate, hidden, dtype=FP8),
        w13_scale=empty(experts, 2 * intermediate // GROUP_SIZE, hidden // GROUP_SIZE),
        w2=empty(experts, hidden, intermediate, dtype=FP8),
        w2_scale=empty(experts, hidden // GROUP_SIZE, intermediate // GROUP_SIZE),
    )
    inputs = MoEInputs(
        topk_ids=empty(num_tokens, shape.top_k, dtype=torch.int32),
        topk_weights=empty(num_tokens, shape.top_k),
        x=empty(num_tokens, hidden, dtype=torch.bfloat16),
    )
    return weights, inputs
