"""As much of vLLM 0.33.0 as its plugin touches: Fp8MoEMethod with its kernel, and RoutedExperts, on the reference.

Names, signatures, defaults and the order of calls are vLLM's; what its Triton kernels compute, the reference does.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from reference.moe import moe_from_bf16
from workbench.problem import MoEWeights

MODULE = "vllm.model_executor.layers.quantization.fp8"


class MoEActivation(enum.Enum):
    SILU = "silu"
    GELU = "gelu"


class Fp8MoeBackend(enum.Enum):
    TRITON = "TRITON"
    FLASHINFER_CUTLASS = "FLASHINFER_CUTLASS"


class FusedMoEKernel:
    """The engine's own kernels: the sum over experts on this rank, not scaled."""

    def __init__(self, w1_scale: torch.Tensor, w2_scale: torch.Tensor) -> None:
        self.scales = w1_scale, w2_scale
        self.num_calls = 0

    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.num_calls += 1
        ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
        w1_scale, w2_scale = self.scales
        out = moe_from_bf16(hidden_states, w1, w1_scale, w2, w2_scale, topk_weights, ids.int())
        return out.to(hidden_states.dtype)


class RoutedExperts(torch.nn.Module):
    """The container of one layer's expert weights."""

    def __init__(self, weights: MoEWeights, expert_map: torch.Tensor | None, config: SimpleNamespace) -> None:
        super().__init__()
        self.moe_config = config
        self.global_num_experts = config.num_experts
        self.local_num_experts = config.num_local_experts
        self.top_k = config.experts_per_token
        self.activation = config.activation
        self.swiglu_limit = self.swiglu_alpha = self.swiglu_beta = None
        self.apply_router_weight_on_input = False
        self.register_buffer("_expert_map", expert_map, persistent=False)
        self.w13_input_scale = self.w2_input_scale = None
        put(self, weights)

    @property
    def expert_map(self) -> torch.Tensor | None:
        return self._expert_map  # type: ignore[return-value]

    def forward_modular(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, shared_experts: Any = None
    ) -> torch.Tensor:
        return self.quant_method.apply(  # type: ignore[operator,union-attr]
            layer=self,
            x=x,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            shared_experts=shared_experts,
            shared_experts_input=None if shared_experts is None else x,
        )


def put(layer: torch.nn.Module, weights: MoEWeights) -> None:
    """New parameters, as a loader registers them."""
    for name, tensor in (
        ("w13_weight", weights.w13),
        ("w13_weight_scale_inv", weights.w13_scale),
        ("w2_weight", weights.w2),
        ("w2_weight_scale_inv", weights.w2_scale),
    ):
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))


def parallel_config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"tp_size": 1, "dp_size": 1, "ep_size": 1, "use_all2all_kernels": False, **changes})


def moe_config(weights: MoEWeights, num_experts: int, **changes: Any) -> SimpleNamespace:
    defaults = {
        "num_experts": num_experts,
        "num_local_experts": weights.shape.num_experts,
        "experts_per_token": weights.shape.top_k,
        "hidden_dim": weights.shape.hidden_size,
        "activation": MoEActivation.SILU,
        "in_dtype": torch.bfloat16,
        "has_bias": False,
        "is_lora_enabled": False,
        "moe_parallel_config": parallel_config(),
    }
    return SimpleNamespace(**{**defaults, **changes})


def method_class() -> type:
    """A new Fp8MoEMethod, so that no test finds it wrapped by another."""

    class Fp8MoEMethod:
        def __init__(self, quant_config: SimpleNamespace, layer: RoutedExperts) -> None:
            self.quant_config = quant_config
            self.weight_block_size = quant_config.weight_block_size
            self.fp8_backend = Fp8MoeBackend.TRITON
            self.moe_kernel: FusedMoEKernel | None = None

        def process_weights_after_loading(self, layer: RoutedExperts) -> None:
            self.moe_kernel = FusedMoEKernel(layer.w13_weight_scale_inv, layer.w2_weight_scale_inv)  # type: ignore[arg-type]

        def apply(
            self,
            layer: RoutedExperts,
            x: torch.Tensor,
            topk_weights: torch.Tensor,
            topk_ids: torch.Tensor,
            shared_experts: Any,
            shared_experts_input: torch.Tensor | None,
        ) -> torch.Tensor:
            assert self.moe_kernel is not None
            return self.moe_kernel.apply(
                x,
                layer.w13_weight,  # type: ignore[arg-type]
                layer.w2_weight,  # type: ignore[arg-type]
                topk_weights,
                topk_ids,
                activation=layer.activation,
                global_num_experts=layer.global_num_experts,
                expert_map=layer.expert_map,
                apply_router_weight_on_input=layer.apply_router_weight_on_input,
                shared_experts=shared_experts,
                shared_experts_input=shared_experts_input,
            )

    return Fp8MoEMethod


def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `from vllm.model_executor.layers.quantization.fp8 import Fp8MoEMethod` work; the class."""
    module = ModuleType(MODULE)
    module.Fp8MoEMethod = method_class()  # type: ignore[attr-defined]
    parts = MODULE.split(".")
    for length in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(".".join(parts[:length])))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module.Fp8MoEMethod
