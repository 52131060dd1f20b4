"""What vLLM's and SGLang's `fused_experts` have in common: the layer under their names, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Unpack

import torch

from reference.quant import GROUP_SIZE, SMALLEST_AMAX
from workbench.checks import described
from workbench.compat.alignment import check_choices
from workbench.compat.quantisation import quantise_groups
from workbench.errors import InputError, UnsupportedError
from workbench.ops import fused_moe
from workbench.problem import LayerForm

THEIR_NAMES = {"x": "hidden_states", "w13": "w1", "w13_scale": "w1_scale", "w13_bias": "w1_bias"}


def refuse(features: Mapping[str, object]) -> None:
    """UnsupportedError, by its name, for the first feature that is asked for: anything but None and False."""
    for name, value in features.items():
        if value is not None and value is not False:
            asked = described(value) if isinstance(value, torch.Tensor) else repr(value)
            raise UnsupportedError(f"{name}: this layer does not have it, got {asked}")


def check_kind(activation: object, use_fp8_w8a8: bool, block_shape: object) -> None:
    """UnsupportedError unless the layer asked for is FP8 with blocks of 128 x 128 and SwiGLU."""
    name = getattr(activation, "value", activation)  # vLLM has an enumeration of them
    if name != "silu":
        raise UnsupportedError(f"activation: expected 'silu', which is gated, got {name!r}")
    if use_fp8_w8a8 is not True:
        raise UnsupportedError(f"use_fp8_w8a8: expected True, got {use_fp8_w8a8!r}")
    if not isinstance(block_shape, list | tuple) or list(block_shape) != [GROUP_SIZE, GROUP_SIZE]:
        raise UnsupportedError(f"block_shape: expected [{GROUP_SIZE}, {GROUP_SIZE}], got {block_shape!r}")


def experts(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w1_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    inplace: bool,
    apply_router_weight_on_input: bool,
    routed_scaling_factor: float = 1.0,
    **form: Unpack[LayerForm],
) -> torch.Tensor:
    """The layer on bf16 `hidden_states` [M, H]; topk_ids int32 or int64 [M, top_k], -1 for an expert elsewhere.

    `inplace` writes to hidden_states and returns it. `apply_router_weight_on_input` scales the input instead of the
    output: the weight multiplies the scales of the quantised token, which is exact.
    """
    check_choices(topk_ids)
    if w1_scale is None or w2_scale is None:
        raise InputError(
            f"{'w1_scale' if w1_scale is None else 'w2_scale'}: expected the scales of FP8 weights, got None"
        )
    topk_ids, x, x_scale = topk_ids.int().contiguous(), hidden_states, None
    try:
        if apply_router_weight_on_input:
            if topk_ids.shape[1] != 1:
                raise UnsupportedError(
                    f"apply_router_weight_on_input: expected top_k 1 with it, got {topk_ids.shape[1]}"
                )
            x, x_scale = quantise_groups(hidden_states, GROUP_SIZE, SMALLEST_AMAX)
            x_scale = x_scale * topk_weights
            topk_weights = torch.ones_like(topk_weights)
        out = fused_moe(
            x,
            w1,
            w1_scale,
            w2,
            w2_scale,
            topk_weights,
            topk_ids,
            x_scale=x_scale,
            routed_scaling_factor=routed_scaling_factor,
            **form,
        )
    except InputError as error:
        ours, colon, rest = str(error).partition(":")
        raise InputError(THEIR_NAMES.get(ours, ours) + colon + rest) from error
    return hidden_states.copy_(out) if inplace else out
