"""As much of SGLang 0.5.23 as its plugin touches: Fp8MoEMethod with its runner, the dispatch types and HookRegistry.

Names, signatures, defaults and the order of calls are SGLang's; what its Triton kernels compute, the reference does.
"""

from __future__ import annotations

import enum
import functools
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from reference.moe import moe_from_bf16
from workbench.problem import MoEWeights

FP8_MODULE = "sglang.srt.layers.quantization.fp8"
HOOKS_MODULE = "sglang.srt.plugins.hook_registry"
DISPATCHER_MODULE = "sglang.srt.layers.moe.token_dispatcher"


class Format(enum.Enum):
    STANDARD = "standard"
    DEEPEP_LL = "deepep_ll"

    def is_standard(self) -> bool:
        return self is Format.STANDARD


class MoeRunnerBackend(enum.Enum):
    TRITON = "triton"
    DEEP_GEMM = "deep_gemm"

    def is_triton(self) -> bool:
        return self is MoeRunnerBackend.TRITON


@dataclass
class MoeRunnerConfig:
    num_experts: int | None = None
    num_local_experts: int | None = None
    top_k: int | None = None
    num_fused_shared_experts: int | None = None
    activation: str = "silu"
    is_gated: bool = True
    apply_router_weight_on_input: bool = False
    inplace: bool = True
    no_combine: bool = False
    routed_scaling_factor: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None
    swiglu_limit: float | None = None


class StandardTopKOutput(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor

    @property
    def format(self) -> Format:
        return Format.STANDARD


class StandardDispatchOutput(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: StandardTopKOutput
    hidden_states_pre_quant: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def format(self) -> Format:
        return Format.STANDARD


class DeepEPLLDispatchOutput(NamedTuple):
    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_output: StandardTopKOutput

    @property
    def format(self) -> Format:
        return Format.DEEPEP_LL


class StandardCombineInput(NamedTuple):
    hidden_states: torch.Tensor


class MoeRunner:
    """The engine's own kernels: the sum over experts on this rank, times the routed scaling factor."""

    def __init__(self, runner_backend: MoeRunnerBackend, config: MoeRunnerConfig) -> None:
        self.runner_backend, self.config = runner_backend, config
        self.num_calls = 0

    def run(self, dispatch_output: Any, quant_info: SimpleNamespace) -> StandardCombineInput:
        self.num_calls += 1
        x, topk_output = dispatch_output.hidden_states, dispatch_output.topk_output
        factor = 1.0 if self.config.routed_scaling_factor is None else self.config.routed_scaling_factor
        out = moe_from_bf16(
            x,
            quant_info.w13_weight,
            quant_info.w13_scale,
            quant_info.w2_weight,
            quant_info.w2_scale,
            topk_output.topk_weights,
            topk_output.topk_ids,
            factor,
        )
        return StandardCombineInput(out.to(x.dtype))


def method_class() -> type:
    """A new Fp8MoEMethod, so that no test finds it hooked by another."""

    class Fp8MoEMethod:
        def __init__(self, quant_config: SimpleNamespace) -> None:
            self.quant_config = quant_config
            self.weight_block_size = quant_config.weight_block_size
            self.use_mxfp8 = False
            self.is_fp4_expert = False

        def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: MoeRunnerConfig) -> None:
            self.moe_runner_config = moe_runner_config
            self.runner = MoeRunner(MoeRunnerBackend.TRITON, moe_runner_config)

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            pass  # block-scaled weights stay as they were loaded

        def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> StandardCombineInput:
            quant_info = SimpleNamespace(
                w13_weight=layer.w13_weight,
                w13_scale=layer.w13_weight_scale_inv,
                w2_weight=layer.w2_weight,
                w2_scale=layer.w2_weight_scale_inv,
            )
            return self.runner.run(dispatch_output, quant_info)

    return Fp8MoEMethod


class FusedMoE(torch.nn.Module):
    """One layer: dispatch, quant_method.apply, combine."""

    def __init__(
        self, weights: MoEWeights, expert_map: torch.Tensor | None, method: Any, config: MoeRunnerConfig
    ) -> None:
        super().__init__()
        self.local_expert_mapping = expert_map
        self.quant_method = method
        method.create_moe_runner(self, config)
        put(self, weights)

    def forward(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        if self.local_expert_mapping is not None:
            topk_ids = self.local_expert_mapping[topk_ids]
        logits = torch.empty(0)
        dispatched = StandardDispatchOutput(x, None, StandardTopKOutput(topk_weights, topk_ids, logits))
        return self.quant_method.apply(layer=self, dispatch_output=dispatched).hidden_states


def put(layer: torch.nn.Module, weights: MoEWeights) -> None:
    """New parameters, as a loader registers them."""
    for name, tensor in (
        ("w13_weight", weights.w13),
        ("w13_weight_scale_inv", weights.w13_scale),
        ("w2_weight", weights.w2),
        ("w2_weight_scale_inv", weights.w2_scale),
    ):
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))


class HookType(enum.Enum):
    AROUND = "around"


def hook_registry() -> type:
    """A new HookRegistry, of which this knows the AROUND hooks."""

    class HookRegistry:
        hooks: list[tuple[str, Callable[..., Any]]] = []  # noqa: RUF012 of the class, as there

        @classmethod
        def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
            assert hook_type is HookType.AROUND
            cls.hooks.append((target, hook))

        @classmethod
        def apply_hooks(cls) -> None:
            for target, hook in cls.hooks:
                owner, _, attribute = target.rpartition(".")
                of = pkgutil.resolve_name(owner)
                setattr(of, attribute, wrapped_around(getattr(of, attribute), hook))
            cls.hooks.clear()

    return HookRegistry


def wrapped_around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    return wrapper


def install(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Make the imports of SGLang's plugin work; Fp8MoEMethod and HookRegistry."""
    fp8, hooks, dispatcher = ModuleType(FP8_MODULE), ModuleType(HOOKS_MODULE), ModuleType(DISPATCHER_MODULE)
    fp8.Fp8MoEMethod = method_class()  # type: ignore[attr-defined]
    hooks.HookRegistry, hooks.HookType = hook_registry(), HookType  # type: ignore[attr-defined]
    dispatcher.StandardCombineInput = StandardCombineInput  # type: ignore[attr-defined]
    for module in (fp8, hooks, dispatcher):
        parts = module.__name__.split(".")
        for length in range(1, len(parts)):
            name = ".".join(parts[:length])
            if name not in sys.modules:
                package = ModuleType(name)
                package.__path__ = []
                monkeypatch.setitem(sys.modules, name, package)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for length in range(2, len(parts) + 1):  # attributes, for pkgutil.resolve_name
            parent, child = ".".join(parts[: length - 1]), ".".join(parts[:length])
            setattr(sys.modules[parent], parts[length - 1], sys.modules[child])
    return fp8.Fp8MoEMethod, hooks.HookRegistry
