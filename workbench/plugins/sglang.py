"""The plugin of SGLang, entry point `moe_workbench` of the group `sglang.srt.plugins`: hooks around Fp8MoEMethod.

Written for SGLang 0.5.23, whose HookRegistry wraps the methods once all plugins are loaded, and where the method's
`apply(layer, dispatch_output)` returns this rank's sum times the layer's routed_scaling_factor, not yet reduced over
ranks. A method of another signature is left alone. Served are layers of the triton runner, SGLang's own choice for
block-scaled FP8 on Hopper without all-to-all: it keeps the weights as they are served, its dispatcher has made ids
those of the rank's experts or -1, and fused shared experts own the last ids.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from reference.quant import GROUP_SIZE
from workbench.environment import plugin_mode
from workbench.plugins import swap
from workbench.plugins.swap import EngineWeights, NotServedError

logger = logging.getLogger(__name__)

METHOD = "sglang.srt.layers.quantization.fp8.Fp8MoEMethod"
APPLY_PARAMETERS = ("self", "layer", "dispatch_output")


def register() -> None:
    """Hook SGLang's Fp8MoEMethod, once, however often it is called; nothing without SGLang or when switched off."""
    if plugin_mode() == "off":
        logger.debug("sglang: switched off by MOE_WORKBENCH_PLUGIN")
        return
    try:
        from sglang.srt.layers.quantization.fp8 import Fp8MoEMethod
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    except ImportError as error:
        logger.debug("sglang: not there: %s", error)
        return
    _hook(Fp8MoEMethod, HookRegistry, HookType.AROUND)


@functools.cache
def _hook(method_class: Any, hooks: Any, around: Any) -> None:
    given = tuple(inspect.signature(method_class.apply).parameters)
    if given != APPLY_PARAMETERS:
        logger.warning("sglang: left alone: expected Fp8MoEMethod.apply%s, got %s", APPLY_PARAMETERS, given)
        return
    hooks.register(f"{METHOD}.process_weights_after_loading", _process_weights_after_loading, around)
    hooks.register(f"{METHOD}.apply", _apply, around)


def _process_weights_after_loading(original: Callable[..., None], method: Any, layer: torch.nn.Module) -> None:
    original(method, layer)
    swap.weights_loaded("sglang", layer, functools.partial(_read, method, layer))


def _apply(original: Callable[..., Any], method: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
    ours = None
    if dispatch_output.format.is_standard() and topk_output.format.is_standard():
        ours = swap.layer_for("sglang", layer, x, topk_output.topk_ids, functools.partial(_read, method, layer))
    if ours is None:
        return original(method, layer, dispatch_output)
    factor = method.moe_runner_config.routed_scaling_factor
    out = ours(
        x,
        *swap.routing(topk_output.topk_weights, topk_output.topk_ids),
        routed_scaling_factor=1.0 if factor is None else factor,
    )
    return StandardCombineInput(hidden_states=out)


def _read(method: Any, layer: Any) -> EngineWeights:
    """The weights of a FusedMoE; NotServedError when it computes another layer than ours, or holds it otherwise."""
    config = method.moe_runner_config
    backend = getattr(getattr(method, "runner", None), "runner_backend", None)
    if list(method.weight_block_size or ()) != [GROUP_SIZE, GROUP_SIZE] or method.use_mxfp8 or method.is_fp4_expert:
        raise NotServedError(f"weights: expected FP8 in blocks of [128, 128], got {method.weight_block_size}")
    if backend is None or not backend.is_triton():
        raise NotServedError(f"runner: expected triton, which keeps the weights as they are served, got {backend}")
    if config.activation != "silu" or not config.is_gated:
        raise NotServedError(f"activation: expected gated silu, got {config.activation}")
    swiglu = (config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit, config.swiglu_limit)
    if any(value is not None for value in swiglu):
        raise NotServedError("activation: expected SwiGLU without alpha, beta and limit")
    if getattr(layer, "w13_weight_bias", None) is not None or getattr(layer, "w2_weight_bias", None) is not None:
        raise NotServedError("bias: expected none")
    if config.apply_router_weight_on_input:
        raise NotServedError("apply_router_weight_on_input: expected False")
    if config.no_combine:
        raise NotServedError("no_combine: expected False")
    return EngineWeights(
        layer.w13_weight.data,
        layer.w13_weight_scale_inv.data,
        layer.w2_weight.data,
        layer.w2_weight_scale_inv.data,
        top_k=config.top_k,
        num_shared_experts=config.num_fused_shared_experts or 0,
    )
