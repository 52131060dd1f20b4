"""SGLang's MoE functions under their names: `sglang.srt.layers.moe.fused_moe_triton`, `...quantization.fp8_kernel`, and
`sgl_kernel.moe_align_block_size`.

Written against SGLang 0.5. Its expert ids are this rank's, -1 for an expert elsewhere; its alignment counts those as
one expert more, so that they come first, in blocks of expert id -1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from workbench.checks import described
from workbench.compat.alignment import align, check_choices
from workbench.compat.experts import check_kind, experts, refuse
from workbench.compat.quantisation import quantise_groups
from workbench.errors import InputError, UnsupportedError


def moe_align_block_size(
    topk_ids: torch.Tensor, block_size: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sorted_token_ids, expert_ids, num_tokens_post_padded), all int32, of topk_ids int32 or int64 [M, top_k].

    Choices of -1 come first, in blocks of expert id -1. Past what is in use sorted_token_ids holds M * top_k and
    expert_ids -1.
    """
    return _align(topk_ids, block_size, num_experts + 1)


def sgl_moe_align_block_size(
    topk_ids: torch.Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: torch.Tensor,
    experts_ids: torch.Tensor,
    num_tokens_post_pad: torch.Tensor,
    cumsum_buffer: torch.Tensor | None = None,
    pad_sorted_token_ids: bool = False,
) -> None:
    """As sgl_kernel.moe_align_block_size: the alignment into tensors passed in; `num_experts` counts the -1 as one.

    The padding between groups is written whatever pad_sorted_token_ids says. cumsum_buffer is not needed.
    """
    outputs = {
        "sorted_token_ids": sorted_token_ids,
        "experts_ids": experts_ids,
        "num_tokens_post_pad": num_tokens_post_pad,
    }
    for name, tensor in outputs.items():
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 1 or tensor.dtype is not torch.int32:
            raise InputError(f"{name}: expected int32 of one dimension, got {described(tensor)}")
    aligned = _align(topk_ids, block_size, num_experts)
    for (name, given), made, past_use in zip(outputs.items(), aligned, (topk_ids.numel(), -1, 0), strict=True):
        if given.numel() < made.numel():
            raise InputError(f"{name}: expected at least {made.numel()} elements, got {given.numel()}")
        given[: made.numel()] = made
        given[made.numel() :] = past_use


def sglang_per_token_group_quant_fp8(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    column_major_scales: bool = False,
    scale_tma_aligned: bool = False,
    scale_ue8m0: bool = False,
    fuse_silu_and_mul: bool = False,
    masked_m: torch.Tensor | None = None,
    enable_v2: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_q e4m3 [..., H], scales fp32 [..., H / 128]); see quantise_groups.

    scale_ue8m0 (which packs scales into integers), fuse_silu_and_mul and masked_m are refused. enable_v2 chooses among
    kernels that give the same values, and is not needed.
    """
    refuse({"scale_ue8m0": scale_ue8m0, "fuse_silu_and_mul": fuse_silu_and_mul, "masked_m": masked_m})
    return quantise_groups(x, group_size, eps, column_major=column_major_scales, tma_aligned=scale_tma_aligned)


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_output: Any,
    moe_runner_config: Any,
    b1: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    use_fp8_w8a8: bool = False,
    use_int8_w8a8: bool = False,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    per_channel_quant: bool = False,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_zp: torch.Tensor | None = None,
    w2_zp: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_shape: list[int] | None = None,
) -> torch.Tensor:
    """The layer: bf16 `hidden_states` [M, H] -> bf16 [M, H], hidden_states itself when the config says inplace.

    topk_output         (topk_weights fp32 [M, top_k], topk_ids int32 or int64 [M, top_k], anything)
    moe_runner_config   a MoeRunnerConfig: inplace, apply_router_weight_on_input (with top_k 1) and
                        routed_scaling_factor are obeyed

    Weights and scales as in vllm.fused_experts. Raises UnsupportedError, by its name, for what this layer does not
    have, in an argument or in a field of the config, including fields that this file does not know and that differ from
    their defaults. InputError for tensors that do not fit.
    """
    asked = {
        "b1": b1,
        "b2": b2,
        "use_int8_w8a8": use_int8_w8a8,
        "use_int8_w8a16": use_int8_w8a16,
        "use_int4_w4a16": use_int4_w4a16,
        "per_channel_quant": per_channel_quant,
        "w1_zp": w1_zp,
        "w2_zp": w2_zp,
        "a1_scale": a1_scale,
        "a2_scale": a2_scale,
    }
    refuse(asked)
    config = moe_runner_config
    check_kind(config.activation, use_fp8_w8a8, block_shape)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _UNDERSTOOD and value != field.default:
            raise UnsupportedError(f"moe_runner_config.{field.name}: this layer does not have it, got {value!r}")
    topk_weights, topk_ids, *_ = topk_output
    return experts(
        hidden_states,
        w1,
        w2,
        w1_scale,
        w2_scale,
        topk_weights,
        topk_ids,
        inplace=config.inplace,
        apply_router_weight_on_input=config.apply_router_weight_on_input,
        routed_scaling_factor=1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor,
    )


_OBEYED = ("activation", "inplace", "apply_router_weight_on_input", "routed_scaling_factor")
_DESCRIPTIVE = (
    "num_experts",
    "num_local_experts",
    "hidden_size",
    "intermediate_size",
    "intermediate_size_per_partition",
    "layer_id",
    "top_k",
    "num_fused_shared_experts",
    "params_dtype",
    "routing_method_type",
    "layer",
)
_UNDERSTOOD = (*_OBEYED, *_DESCRIPTIVE)


def _align(
    topk_ids: torch.Tensor, block_size: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The alignment of ids that begin at -1, of which there are `num_experts`."""
    check_choices(topk_ids)
    sorted_token_ids, expert_ids, total = align(topk_ids + 1, block_size, num_experts)
    return sorted_token_ids, expert_ids.sub_(1).clamp_(min=-1), total
