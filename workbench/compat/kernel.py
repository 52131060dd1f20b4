"""The steps of `cuda.sm90_fused`, one by one, for callers that bring or want them apart.

A variant runs a whole layer; engines hand over routing that they have aligned and tokens that they have quantised, or
ask for just that. The workbench knows the kernel by its name in the registry and by what is declared here.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch

from reference.routing import AlignedRouting
from workbench import registry
from workbench.problem import MoEShape, MoEWeights
from workbench.variant import Config, Support

VARIANT = "cuda.sm90_fused"


class SteppedKernel(Protocol):
    """What `cuda.sm90_fused` offers besides the Variant contract; its own docstrings say what each does."""

    def supports(self, shape: MoEShape, device: torch.device) -> Support: ...

    def supports_device(self, device: torch.device) -> Support: ...

    def aligned_config(
        self, shape: MoEShape, num_tokens: int, block_m: int, *, split_items: bool, num_stages: int
    ) -> Config: ...

    def prepare_interleaved(self, weights: MoEWeights) -> Any: ...

    def run_aligned(
        self,
        prepared: Any,
        x_q: torch.Tensor,
        x_scale: torch.Tensor,
        aligned: AlignedRouting,
        topk_weights: torch.Tensor,
        routed_scaling_factor: float,
        out: torch.Tensor,
        config: Config,
    ) -> None: ...

    def align_choices(self, topk_ids: torch.Tensor, block_m: int, num_experts: int) -> AlignedRouting: ...

    def quantise(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


def kernel() -> SteppedKernel:
    """The kernel. UnknownVariantError, with the reason, when its package does not load."""
    return cast(SteppedKernel, registry.find(VARIANT))


def runs_on(device: torch.device) -> bool:
    """Whether the kernel's steps run on `device`; elsewhere the reference serves."""
    return device.type == "cuda" and bool(kernel().supports_device(device))
