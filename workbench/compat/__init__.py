"""The interfaces of other projects, for engines that were written against them.

    alpha_moe   Alpha-MoE's fused kernel and tuned files; its names are also here
    vllm        vLLM's alignment, quantisation and fused_experts
    sglang      SGLang's

Names, argument orders and semantics are theirs; what this layer does not have is refused by the argument's name.
"""

from workbench.compat.alpha_moe import (
    fused_moe_w8a8_up_down,
    install_modules,
    interleave_tensor,
    register_torch_ops,
)
from workbench.compat.alpha_moe_configs import get_best_config

__all__ = [
    "fused_moe_w8a8_up_down",
    "get_best_config",
    "install_modules",
    "interleave_tensor",
    "register_torch_ops",
]
