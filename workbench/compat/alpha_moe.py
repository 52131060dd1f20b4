"""The interface of Alpha-MoE (github.com/Aleph-Alpha/Alpha-MoE), served by our kernel.

An engine patched for that project aligns the routing and quantises the tokens itself, and keeps gate and up rows
interleaved. Our kernel reads all of it as it lies; on CPU tensors the reference computes the same. `install_modules`
lets such an engine import this file under the names it knows.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

from reference.layout import deinterleave, interleave
from reference.moe import moe
from reference.routing import AlignedRouting
from workbench import checks
from workbench.compat.alpha_moe_configs import BestConfig, check_tuning, config_of, get_best_config
from workbench.compat.kernel import VARIANT, kernel
from workbench.errors import InputError, UnsupportedError
from workbench.ops import MAX_LAYERS
from workbench.problem import FP8, MoEShape, MoEWeights, scale_blocks
from workbench.variant import Config

WEIGHT_ROWS_INTERLEAVED = 8
SCALE_ROWS_INTERLEAVED = 1

OPERATOR = "alpha_moe::fused_moe_w8a8_up_down"
SCHEMA = (
    "(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor w2, Tensor w2_scale, Tensor sorted_token_ids, "
    "Tensor expert_ids, Tensor num_tokens_post_padded, Tensor topk_weights, Tensor(a!) out, int top_k, int block_m, "
    "int block_n, int warp_n, int stages, float scaling_factor) -> ()"
)


def interleave_tensor(tensor: torch.Tensor, rep: int = 8) -> torch.Tensor:
    """Gate rows then up rows, `tensor` [E, N, K], to alternating chunks of `rep` rows of each.

    Weights are interleaved with rep=8, their scales with rep=1. Returns a contiguous copy; InputError unless N is a
    multiple of 2 * rep.
    """
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 3 or rep < 1 or tensor.shape[1] % (2 * rep):
        raise InputError(f"tensor: expected [E, N, K] with N a multiple of {2 * rep}, got {checks.described(tensor)}")
    return interleave(tensor, rep)


def fused_moe_w8a8_up_down(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    sorted_token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens_post_padded: torch.Tensor,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
    top_k: int,
    block_m: int,
    block_n: int,
    warp_n: int,
    stages: int,
    scaling_factor: float,
) -> torch.Tensor:
    """Add the layer's output to `out`, which the caller has zeroed; returns `out`.

    x, x_scale               e4m3 [M, K] and fp32 [M, K/128]
    w, w_scale               e4m3 [E, N, K] and fp32 [E, N/128, K/128], from interleave_tensor with rep=8 and rep=1
    w2, w2_scale             e4m3 [E, K, N/2] and fp32 [E, K/128, N/256]; scales of any sign
    sorted_token_ids         int32: choices token * top_k + slot by expert, each expert's padded to whole blocks of
                             block_m with values of M * top_k or more
    expert_ids               int32: the expert of each block, negative for a block to skip
    num_tokens_post_padded   int32 [1]: how many entries of sorted_token_ids are in use
    topk_weights             fp32 [M, top_k]
    out                      bf16 [M, K]
    block_m                  8..128 in steps of 8: the block size of the alignment, and rows of a work item
    block_n, warp_n          (64, 4): a work item goes to one CTA, for large batches; (32, 8): to a cluster, as large as
                             there are SMs for, and to one CTA when there are none to spare
    stages                   1..5: tiles of weights loaded ahead of the one in use, cut to what shared memory holds
    scaling_factor           multiplies the output

    All tensors contiguous and on one device. The weights are described to the copy engine once and not copied. A call
    may be captured in a CUDA graph once it was made with the same M and tuning parameters outside of one.

    Raises InputError for an argument that does not fit, UnsupportedError for a shape or device that the kernel does not
    serve.
    """
    tuning = BestConfig(block_m=block_m, block_n=block_n, warp_n=warp_n, stages=stages)
    check_tuning(tuning)
    if type(top_k) is not int or top_k < 1:
        raise InputError(f"top_k: expected an integer >= 1, got {top_k!r}")
    if not isinstance(scaling_factor, float | int) or not math.isfinite(scaling_factor):
        raise InputError(f"scaling_factor: expected a finite number, got {scaling_factor!r}")
    if not isinstance(w, torch.Tensor) or w.dtype is not FP8 or w.ndim != 3 or w.shape[1] % 16:
        raise InputError(f"w: expected float8_e4m3fn [E, N, K] with N a multiple of 16, got {checks.described(w)}")
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        raise InputError(f"x: expected float8_e4m3fn [M, {w.shape[2]}], got {checks.described(x)}")
    for name, ids in (("sorted_token_ids", sorted_token_ids), ("expert_ids", expert_ids)):
        if not isinstance(ids, torch.Tensor) or ids.ndim != 1:
            raise InputError(f"{name}: expected int32 of one dimension, got {checks.described(ids)}")
    num_tokens, (num_experts, rows, hidden), device = x.shape[0], w.shape, w.device
    row_blocks, hidden_blocks = scale_blocks(rows // 2), scale_blocks(hidden)
    for name, tensor, dtype, shape in (
        ("x", x, FP8, (num_tokens, hidden)),
        ("x_scale", x_scale, torch.float32, (num_tokens, hidden_blocks)),
        ("w", w, FP8, (num_experts, rows, hidden)),
        ("w_scale", w_scale, torch.float32, (num_experts, 2 * row_blocks, hidden_blocks)),
        ("w2", w2, FP8, (num_experts, hidden, rows // 2)),
        ("w2_scale", w2_scale, torch.float32, (num_experts, hidden_blocks, row_blocks)),
        ("topk_weights", topk_weights, torch.float32, (num_tokens, top_k)),
        ("out", out, torch.bfloat16, (num_tokens, hidden)),
        ("num_tokens_post_padded", num_tokens_post_padded, torch.int32, (1,)),
        ("sorted_token_ids", sorted_token_ids, torch.int32, sorted_token_ids.shape),
        ("expert_ids", expert_ids, torch.int32, expert_ids.shape),
    ):
        if isinstance(tensor, torch.Tensor) and tensor.device != device:
            raise InputError(f"{name}: expected a tensor on {device}, where w is, got one on {tensor.device}")
        checks.tensor(name, tensor, dtype, shape, device)
    num_blocks = -(-sorted_token_ids.numel() // block_m)
    if expert_ids.numel() < num_blocks:
        raise InputError(
            f"expert_ids: expected one for each of {num_blocks} blocks of {block_m} sorted_token_ids, "
            f"got {expert_ids.numel()}"
        )
    if num_tokens == 0:
        return out

    aligned = AlignedRouting(sorted_token_ids, expert_ids, num_tokens_post_padded, block_m)
    with torch.no_grad():
        if device.type == "cpu":
            topk_ids = _choices(aligned, num_tokens, top_k)
            w13 = deinterleave(w, WEIGHT_ROWS_INTERLEAVED)
            w13_scale = deinterleave(w_scale, SCALE_ROWS_INTERLEAVED)
            out.add_(moe(x, x_scale, w13, w13_scale, w2, w2_scale, topk_weights, topk_ids, scaling_factor))
        else:
            with torch.cuda.device(device):
                layer = _layer_of((w, w_scale, w2, w2_scale))
                config = layer.config(num_tokens, top_k, tuning)
                kernel().run_aligned(layer.prepared, x, x_scale, aligned, topk_weights, scaling_factor, out, config)
    return out


@functools.cache
def register_torch_ops() -> None:
    """Define `torch.ops.alpha_moe.fused_moe_w8a8_up_down`, which returns nothing and modifies `out`.

    UnsupportedError when it is defined already, by the project itself.
    """
    namespace, name = OPERATOR.split("::")
    if hasattr(getattr(torch.ops, namespace), name):
        raise UnsupportedError(f"{OPERATOR}: expected it not to be defined yet; the package that did so is in use")

    def run(*arguments: Any) -> None:
        fused_moe_w8a8_up_down(*arguments)

    operator = torch.library.custom_op(OPERATOR, run, mutates_args=("out",), schema=SCHEMA)
    operator.register_fake(lambda *arguments: None)


def install_modules() -> None:
    """Let `import alpha_moe` and `from alpha_moe_python.utils import ...` find what is here, in this process.

    Registers the torch operator too. UnsupportedError when the project itself is imported already.
    """
    for name, module in _modules().items():
        if sys.modules.get(name, module) is not module:
            raise UnsupportedError(f"{name}: expected it not to be imported yet, got {sys.modules[name]!r}")
    register_torch_ops()
    sys.modules.update(_modules())


@functools.cache
def _modules() -> dict[str, ModuleType]:
    """Modules with the names of the project's own, by name."""
    contents: dict[str, dict[str, object]] = {
        "alpha_moe": {},
        "alpha_moe_ops": {"fused_moe_w8a8_up_down": fused_moe_w8a8_up_down},
        "alpha_moe_python.alpha_moe_ops": {"fused_moe_w8a8_up_down": fused_moe_w8a8_up_down},
        "alpha_moe_python.utils": {"interleave_tensor": interleave_tensor, "get_best_config": get_best_config},
    }
    modules = {name: ModuleType(name, __doc__) for name in contents}
    for name, content in contents.items():
        vars(modules[name]).update(content)
    package = modules["alpha_moe_python"] = ModuleType("alpha_moe_python", __doc__)
    vars(package).update(
        __path__=[], alpha_moe_ops=modules["alpha_moe_python.alpha_moe_ops"], utils=modules["alpha_moe_python.utils"]
    )
    return modules


def _choices(aligned: AlignedRouting, num_tokens: int, top_k: int) -> torch.Tensor:
    """The topk_ids int32 [M, top_k] that were aligned; -1 for choices that no block names."""
    num_used = int(aligned.num_tokens_post_padded)
    choices = aligned.sorted_token_ids[:num_used].long()
    experts = aligned.expert_ids[: num_used // aligned.block_size].repeat_interleave(aligned.block_size).clamp(min=-1)
    real = (choices >= 0) & (choices < num_tokens * top_k)
    topk_ids = torch.full((num_tokens * top_k,), -1, dtype=torch.int32)
    topk_ids[choices[real]] = experts[real]
    return topk_ids.view(num_tokens, top_k)


@dataclass
class _Layer:
    """Weights described to the kernel, the configs used with them, and what drops the layer when they are freed."""

    shape: MoEShape
    prepared: Any
    configs: dict[tuple[int, ...], Config] = field(default_factory=dict)
    watches: tuple[weakref.ref[torch.Tensor], ...] = ()

    def config(self, num_tokens: int, top_k: int, tuning: BestConfig) -> Config:
        key = (num_tokens, top_k, tuning["block_m"], tuning["block_n"], tuning["stages"])
        config = self.configs.get(key)
        if config is None:
            _refuse_capture(f"this call has not been made with M={num_tokens} and {dict(tuning)} before")
            top_k = min(top_k, self.shape.num_experts)  # an expert may be chosen twice
            config = self.configs[key] = config_of(replace(self.shape, top_k=top_k), num_tokens, tuning)
        return config


_layers: OrderedDict[tuple[object, ...], _Layer] = OrderedDict()


def _layer_of(tensors: tuple[torch.Tensor, ...]) -> _Layer:
    """The layer kept for these weights, made if there is none, and dropped when one of them is freed."""
    key = tuple((tensor.data_ptr(), tensor.shape) for tensor in tensors)
    layer = _layers.get(key)
    if layer is not None:
        _layers.move_to_end(key)
        return layer
    _refuse_capture("weights are prepared on their first call")
    num_experts, rows, hidden = tensors[0].shape
    shape = MoEShape(num_experts, hidden, rows // 2, top_k=1)
    device = tensors[0].device
    support = kernel().supports(shape, device)
    if not support:
        raise UnsupportedError(f"{VARIANT}: does not run {shape} on {device}: {support.reason}")

    def drop(_: object) -> None:
        _layers.pop(key, None)

    owners = (tensor if tensor._base is None else tensor._base for tensor in tensors)
    prepared = kernel().prepare_interleaved(MoEWeights(shape, *(tensor.data for tensor in tensors)))
    layer = _layers[key] = _Layer(shape, prepared, watches=tuple(weakref.ref(owner, drop) for owner in owners))
    if len(_layers) > MAX_LAYERS:
        _layers.popitem(last=False)
    return layer


def _refuse_capture(reason: str) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(f"a CUDA graph is being captured, but {reason}")
