"""vLLM's MoE functions under their names: `vllm.model_executor.layers.fused_moe` and `...quantization.utils.fp8_utils`.

Written against vLLM 0.9 to 0.11. Its later versions gather the quantisation's arguments in one `quant_config`; either
way is understood.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from workbench.checks import described
from workbench.compat.alignment import align, check_choices
from workbench.compat.experts import check_kind, experts, refuse
from workbench.compat.quantisation import quantise_groups
from workbench.errors import InputError, UnsupportedError
from workbench.problem import FP8, LayerForm


def moe_align_block_size(
    topk_ids: torch.Tensor,
    block_size: int,
    num_experts: int,
    expert_map: torch.Tensor | None = None,
    pad_sorted_ids: bool = False,
    ignore_invalid_experts: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sorted_token_ids, expert_ids, num_tokens_post_padded), all int32, of topk_ids int32 or int64 [M, top_k].

    num_experts              of all ranks, when there is an expert_map
    expert_map               int [num_experts]: the id on this rank of each expert, -1 if it is elsewhere; blocks of
                             experts elsewhere stay and have expert id -1
    pad_sorted_ids           make the length of sorted_token_ids a multiple of block_size
    ignore_invalid_experts   leave experts elsewhere out instead

    An id that is no expert is left out. Past what is in use sorted_token_ids holds M * top_k and expert_ids -1.
    """
    check_choices(topk_ids)
    if expert_map is not None and ignore_invalid_experts:
        topk_ids = on_this_rank(topk_ids, expert_map, num_experts)
    sorted_token_ids, expert_ids, total = align(topk_ids, block_size, num_experts, pad_sorted_ids)
    if expert_map is not None and not ignore_invalid_experts:
        expert_ids = on_this_rank(expert_ids, expert_map, num_experts)
    return sorted_token_ids, expert_ids, total


def per_token_group_quant_fp8(
    x: torch.Tensor,
    group_size: int,
    eps: float = 1e-10,
    dtype: torch.dtype | None = None,
    column_major_scales: bool = False,
    tma_aligned_scales: bool = False,
    out_q: torch.Tensor | None = None,
    use_ue8m0: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_q e4m3 [..., H], scales fp32 [..., H / 128]); see quantise_groups.

    use_ue8m0 rounds scales up to powers of two and keeps them fp32. `dtype` other than e4m3 is refused.
    """
    if dtype not in (None, FP8):
        raise UnsupportedError(f"dtype: expected float8_e4m3fn, got {dtype}")
    x_q, scale = quantise_groups(
        x,
        group_size,
        eps,
        column_major=column_major_scales,
        tma_aligned=tma_aligned_scales,
        power_of_two=bool(use_ue8m0),
    )
    if out_q is None:
        return x_q, scale
    if out_q.dtype is not FP8 or out_q.shape != x.shape:
        raise InputError(f"out_q: expected float8_e4m3fn {list(x.shape)}, got {described(out_q)}")
    return out_q.copy_(x_q), scale


def fused_experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    inplace: bool = False,
    activation: Any = "silu",
    apply_router_weight_on_input: bool = False,
    *,
    use_fp8_w8a8: bool = False,
    use_int8_w8a8: bool = False,
    use_int8_w8a16: bool = False,
    use_int4_w4a16: bool = False,
    use_mxfp4_w4a4: bool = False,
    per_channel_quant: bool = False,
    global_num_experts: int = -1,
    expert_map: torch.Tensor | None = None,
    w1_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    w1_zp: torch.Tensor | None = None,
    w2_zp: torch.Tensor | None = None,
    a1_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    block_shape: list[int] | None = None,
    w1_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    quant_config: Any = None,
    allow_deep_gemm: bool = False,
    allow_cutlass_block_scaled_grouped_gemm: bool = False,
) -> torch.Tensor:
    """The layer: bf16 `hidden_states` [M, H] -> bf16 [M, H], hidden_states itself when `inplace`.

    w1 e4m3 [E, 2I, H], w1_scale fp32, w2 e4m3 [E, H, I], w2_scale fp32, as w13 and w2 in problem.py; topk_weights fp32
    and topk_ids int32 or int64 [M, top_k], -1 for no expert. With an expert_map int [global_num_experts] the ids are
    those of all ranks, and experts elsewhere contribute nothing. apply_router_weight_on_input wants top_k 1. A
    quant_config, as vLLM's FusedMoEQuantConfig, stands for the arguments of its attributes' names. The `allow_`
    arguments permit what this layer does not need.

    w1_bias [E, 2I] and w2_bias [E, H] are added to what w1 and w2 give. A quant_config's gemm1_clamp_limit, gemm1_alpha
    and gemm1_beta are the swiglu_limit, swiglu_alpha and swiglu_beta of MoEShape.

    Raises UnsupportedError, by its name, for what this layer does not have: another quantisation, static activation
    scales, zero points, another activation. InputError for tensors that do not fit.
    """
    if quant_config is not None:
        use_fp8_w8a8, block_shape = quant_config.use_fp8_w8a8, quant_config.block_shape
        w1_scale, w2_scale = quant_config.w1_scale, quant_config.w2_scale
        w1_bias, w2_bias = (getattr(quant_config, name, None) for name in ("w1_bias", "w2_bias"))
        refuse({name: getattr(quant_config, name, None) for name in _NOT_IN_CONFIG})
    asked = {
        "use_int8_w8a8": use_int8_w8a8,
        "use_int8_w8a16": use_int8_w8a16,
        "use_int4_w4a16": use_int4_w4a16,
        "use_mxfp4_w4a4": use_mxfp4_w4a4,
        "per_channel_quant": per_channel_quant,
        "w1_zp": w1_zp,
        "w2_zp": w2_zp,
        "a1_scale": a1_scale,
        "a2_scale": a2_scale,
    }
    refuse(asked)
    check_kind(activation, use_fp8_w8a8, block_shape)
    check_choices(topk_ids)
    if expert_map is not None:
        num_experts = expert_map.numel() if global_num_experts == -1 else global_num_experts
        topk_ids = on_this_rank(topk_ids, expert_map, num_experts)
    elif global_num_experts not in (-1, w1.shape[0]):
        raise InputError(f"global_num_experts: expected {w1.shape[0]} without an expert_map, got {global_num_experts}")
    return experts(
        hidden_states,
        w1,
        w2,
        w1_scale,
        w2_scale,
        topk_weights,
        topk_ids,
        inplace=inplace,
        apply_router_weight_on_input=apply_router_weight_on_input,
        **_form(w1_bias, w2_bias, quant_config),
    )


def _form(w1_bias: torch.Tensor | None, w2_bias: torch.Tensor | None, quant_config: Any) -> LayerForm:
    """The layer's form: what is None, or absent from `quant_config`, is the plain layer's."""
    names = {"gemm1_clamp_limit": "swiglu_limit", "gemm1_alpha": "swiglu_alpha", "gemm1_beta": "swiglu_beta"}
    given = {ours: getattr(quant_config, theirs, None) for theirs, ours in names.items()}
    given |= {"w13_bias": w1_bias, "w2_bias": w2_bias}
    return cast(LayerForm, {name: value for name, value in given.items() if value is not None})


_NOT_IN_CONFIG = (
    "use_int8_w8a8",
    "use_int8_w8a16",
    "use_int4_w4a16",
    "use_mxfp4_w4a4",
    "use_mxfp4_w4a16",
    "per_act_token_quant",
    "per_out_ch_quant",
    "w1_zp",
    "w2_zp",
    "a1_scale",
    "a2_scale",
)


def on_this_rank(ids: torch.Tensor, expert_map: torch.Tensor, num_experts: int) -> torch.Tensor:
    """`ids` of all ranks' experts as this rank's, -1 for those elsewhere and for what is no expert."""
    if expert_map.dtype not in (torch.int32, torch.int64) or expert_map.shape != (num_experts,):
        raise InputError(f"expert_map: expected int32 or int64 [{num_experts}], got {described(expert_map)}")
    known = (ids >= 0) & (ids < num_experts)
    return expert_map[ids.clamp(0, num_experts - 1).long()].masked_fill(~known, -1).int()
