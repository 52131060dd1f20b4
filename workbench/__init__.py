"""The MoE kernel workbench: proves, times and selects implementations of one fused FP8 Mixture-of-Experts layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.layer import MoELayer
    from workbench.ops import fused_moe

__all__ = ["MoELayer", "fused_moe"]


def __getattr__(name: str) -> Any:
    """The public calls, imported on first use: they need torch, which takes seconds to import."""
    if name in __all__:
        from workbench import layer, ops

        return {"MoELayer": layer.MoELayer, "fused_moe": ops.fused_moe}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
