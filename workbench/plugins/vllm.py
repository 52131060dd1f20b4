"""The plugin of vLLM, entry point `moe_workbench` of the group `vllm.general_plugins`: wraps Fp8MoEMethod.

Written for vLLM 0.33.0, where the method's `apply(layer, x, topk_weights, topk_ids, shared_experts,
shared_experts_input)` gets a RoutedExperts and returns this rank's sum, unscaled and not yet reduced over ranks. A
method of another signature is left alone. Served are layers of the TRITON backend, which vLLM takes for block-scaled
FP8 under tensor parallelism on Hopper: the other backends keep the weights in layouts of their own.
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

APPLY_PARAMETERS = ("self", "layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input")


def register() -> None:
    """Wrap vLLM's Fp8MoEMethod, once, however often it is called; nothing without vLLM or when switched off."""
    if plugin_mode() == "off":
        logger.debug("vllm: switched off by MOE_WORKBENCH_PLUGIN")
        return
    try:
        from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod
    except ImportError as error:
        logger.debug("vllm: not there: %s", error)
        return
    _wrap(Fp8MoEMethod)


@functools.cache
def _wrap(method_class: Any) -> None:
    given = tuple(inspect.signature(method_class.apply).parameters)
    if given != APPLY_PARAMETERS:
        logger.warning("vllm: left alone: expected Fp8MoEMethod.apply%s, got %s", APPLY_PARAMETERS, given)
        return
    method_class.process_weights_after_loading = _loading(method_class.process_weights_after_loading)
    method_class.apply = _applying(method_class.apply)


def _loading(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def process_weights_after_loading(self: Any, layer: torch.nn.Module) -> None:
        original(self, layer)
        swap.weights_loaded("vllm", layer, functools.partial(_read, self, layer))

    return process_weights_after_loading


def _applying(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply(
        self: Any,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> Any:
        ours = None
        if shared_experts is None:  # else vLLM's kernel runs them in the middle of itself
            ours = swap.layer_for("vllm", layer, x, topk_ids, functools.partial(_read, self, layer))
        if ours is None:
            return original(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
        return ours(x, *swap.routing(topk_weights, topk_ids, layer.expert_map))

    return apply


def _read(method: Any, layer: Any) -> EngineWeights:
    """The weights of a RoutedExperts; NotServedError when it computes another layer than ours or holds it otherwise."""
    config = layer.moe_config
    activation = getattr(layer.activation, "value", layer.activation)
    backend = getattr(method.fp8_backend, "value", method.fp8_backend)
    if list(method.weight_block_size or ()) != [GROUP_SIZE, GROUP_SIZE]:
        raise NotServedError(f"weight_block_size: expected [128, 128], got {method.weight_block_size}")
    if backend != "TRITON":
        raise NotServedError(f"backend: expected TRITON, which keeps the weights as they are served, got {backend}")
    if activation != "silu":
        raise NotServedError(f"activation: expected silu, got {activation}")
    if layer.swiglu_limit is not None or layer.swiglu_alpha is not None or layer.swiglu_beta is not None:
        raise NotServedError("activation: expected SwiGLU without limit, alpha and beta")
    if config.has_bias:
        raise NotServedError("bias: expected none")
    if config.is_lora_enabled:
        raise NotServedError("LoRA: expected none")
    if layer.apply_router_weight_on_input:
        raise NotServedError("apply_router_weight_on_input: expected False")
    if config.moe_parallel_config.use_all2all_kernels:
        raise NotServedError("parallelism: expected no all-to-all, the tokens being on the rank already")
    if config.in_dtype is not torch.bfloat16:
        raise NotServedError(f"in_dtype: expected bfloat16, got {config.in_dtype}")
    return EngineWeights(
        layer.w13_weight.data,
        layer.w13_weight_scale_inv.data,
        layer.w2_weight.data,
        layer.w2_weight_scale_inv.data,
        top_k=layer.top_k,
    )
