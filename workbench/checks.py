"""What a caller may pass to the layer, checked once, at the public boundary.

Two kinds. Metadata (dtype, shape, layout, device) is checked on every call and costs a few microseconds. Values lie on
the device, and reading them makes the host wait, so ops.py decides when that is worth it. Every error is one line that
names the argument, what was expected and what came.
"""

from __future__ import annotations

import math

import torch

from workbench.errors import InputError
from workbench.problem import FP8, MoEShape, scale_blocks


def weights(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    top_k: int,
    num_shared_experts: int,
) -> MoEShape:
    """The shape that a layer's weights make, in the layouts of problem.py; InputError when they make none."""
    if not isinstance(w13, torch.Tensor) or w13.dtype is not FP8 or w13.ndim != 3 or w13.shape[1] % 2:
        raise InputError(f"w13: expected float8_e4m3fn [E, 2I, H], got {described(w13)}")
    num_experts, rows, hidden = w13.shape
    shape = MoEShape(num_experts, hidden, rows // 2, top_k, num_shared_experts)
    hidden_blocks, intermediate_blocks = scale_blocks(hidden), scale_blocks(rows // 2)
    device = w13.device
    tensor("w13", w13, FP8, (num_experts, rows, hidden), device)
    tensor("w13_scale", w13_scale, torch.float32, (num_experts, 2 * intermediate_blocks, hidden_blocks), device)
    tensor("w2", w2, FP8, (num_experts, hidden, rows // 2), device)
    tensor("w2_scale", w2_scale, torch.float32, (num_experts, hidden_blocks, intermediate_blocks), device)
    return shape


def batch(
    shape: MoEShape,
    device: torch.device,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    routed_scaling_factor: float,
    out: torch.Tensor | None,
) -> None:
    """InputError unless the metadata of one batch, and of `out` if there is one, fit a layer of `shape` on `device`."""
    if not isinstance(x, torch.Tensor) or x.ndim != 2:
        raise InputError(f"x: expected [M, {shape.hidden_size}], got {described(x)}")
    num_tokens, hidden = x.shape[0], shape.hidden_size
    if x_scale is None:
        if x.dtype is FP8:
            raise InputError(
                f"x_scale: expected float32 [{num_tokens}, {scale_blocks(hidden)}] with quantised x, got None"
            )
        tensor("x", x, torch.bfloat16, (num_tokens, hidden), device)
    else:
        tensor("x", x, FP8, (num_tokens, hidden), device)
        tensor("x_scale", x_scale, torch.float32, (num_tokens, scale_blocks(hidden)), device)
    tensor("topk_weights", topk_weights, torch.float32, (num_tokens, shape.top_k), device)
    tensor("topk_ids", topk_ids, torch.int32, (num_tokens, shape.top_k), device)
    if not isinstance(routed_scaling_factor, float | int) or not math.isfinite(routed_scaling_factor):
        raise InputError(f"routed_scaling_factor: expected a finite number, got {routed_scaling_factor!r}")
    if out is not None:
        tensor("out", out, torch.bfloat16, (num_tokens, hidden), device)
        if num_tokens and out.data_ptr() == x.data_ptr():
            raise InputError("out: expected memory of its own, got that of x")


def tensor(name: str, given: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """InputError unless `given` is a contiguous tensor of that dtype and shape on `device`."""
    if (
        isinstance(given, torch.Tensor)
        and given.dtype is dtype
        and given.shape == shape
        and given.device == device
        and given.is_contiguous()
    ):
        return
    if not isinstance(given, torch.Tensor) or given.dtype is not dtype or given.shape != shape:
        raise InputError(f"{name}: expected {_dtype(dtype)} {list(shape)}, got {described(given)}")
    if given.device != device:
        raise InputError(f"{name}: expected a tensor on {device}, where w13 is, got one on {given.device}")
    raise InputError(f"{name}: expected a contiguous tensor {list(shape)}, got strides {list(given.stride())}")


def scale_values(name: str, scale: torch.Tensor) -> None:
    """InputError when a scale is NaN or infinite. Waits for the device."""
    wrong = ~scale.isfinite()
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise InputError(f"{name}: expected finite values, got {scale[tuple(place)].item()} at {place}")


def id_values(topk_ids: torch.Tensor, num_experts: int) -> None:
    """InputError when a choice is no expert and not -1 either. Waits for the device."""
    wrong = (topk_ids < -1) | (topk_ids >= num_experts)
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise InputError(
            f"topk_ids: expected ids in -1..{num_experts - 1}, got {topk_ids[tuple(place)].item()} at {place}"
        )


def described(given: object) -> str:
    """A tensor as `float16 [8, 56]`, anything else by its type."""
    if isinstance(given, torch.Tensor):
        return f"{_dtype(given.dtype)} {list(given.shape)}"
    return "None" if given is None else type(given).__name__


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
