"""What a caller may pass to the layer, checked once, at the public boundary.

Two kinds. Metadata (dtype, shape, layout, device) is checked on every call; that costs a few microseconds, so a caller
may instead ask whether it is `alike` to what has passed, in one call into torch. Values lie on the device, and reading
them makes the host wait, so layer.py decides when that is worth it. Every error is one line that names the argument,
what was expected and what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from reference.quant import ActivationScales
from workbench.errors import InputError
from workbench.problem import FP8, MoEShape, MoEWeights, WeightScales, scale_blocks


def weights(
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    top_k: int,
    num_shared_experts: int,
    *,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    swiglu_limit: float | None = None,
    swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0,
    activation_scales: ActivationScales = "group",
) -> MoEWeights:
    """The layer that these weights make, on aliases of their memory; InputError when they make none.

    Layouts are those of problem.py. Besides, scales may be float8_e8m0fnu, and one for each expert, [E] or [E, 1, 1],
    or for its gate and its up rows, [E, 2]; and biases may be bf16. These are converted, which is exact.
    """
    if not isinstance(w13, torch.Tensor) or w13.dtype is not FP8 or w13.ndim != 3 or w13.shape[1] % 2:
        raise InputError(f"w13: expected float8_e4m3fn [E, 2I, H], got {described(w13)}")
    num_experts, rows, hidden = w13.shape
    tensor("w13", w13, FP8, (num_experts, rows, hidden), w13.device)
    w13_scale, weight_scales = _scales("w13_scale", w13_scale, w13, 2)
    tensor("w2", w2, FP8, (num_experts, hidden, rows // 2), w13.device)
    w2_scale, w2_scales = _scales("w2_scale", w2_scale, w2, 1)
    if weight_scales != w2_scales:
        raise InputError(f"w2_scale: expected one scale per {weight_scales}, as w13_scale has, got {w2_scales} scales")
    if (w13_bias is None) != (w2_bias is None):
        missing, other = ("w13_bias", "w2_bias") if w13_bias is None else ("w2_bias", "w13_bias")
        raise InputError(f"{missing}: expected one with {other}, got None")
    shape = MoEShape(
        num_experts,
        hidden,
        rows // 2,
        top_k,
        num_shared_experts,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        swiglu_beta=swiglu_beta,
        weight_scales=weight_scales,
        activation_scales=activation_scales,
        has_bias=w13_bias is not None,
    )
    biases = _bias("w13_bias", w13_bias, w13), _bias("w2_bias", w2_bias, w2)
    return MoEWeights(shape, w13.data, w13_scale.data, w2.data, w2_scale.data, *biases)


def _scales(name: str, given: torch.Tensor, w: torch.Tensor, halves: int) -> tuple[torch.Tensor, WeightScales]:
    """The scales of w e4m3 [E, R, C] as variants take them, and of what kind; blocks do not cross its `halves`."""
    num_experts, rows, columns = w.shape
    row_blocks, column_blocks = halves * scale_blocks(rows // halves), scale_blocks(columns)
    if isinstance(given, torch.Tensor) and given.dtype is torch.float8_e8m0fnu:
        given = given.float()
    shape = tuple(given.shape) if isinstance(given, torch.Tensor) else ()
    if shape != (num_experts, row_blocks, column_blocks):
        if shape == (num_experts, rows, 1):
            tensor(name, given, torch.float32, shape, w.device)
            return given, "channel"
        if shape in ((num_experts,), (num_experts, 1, 1), (num_experts, halves)):
            tensor(name, given, torch.float32, shape, w.device)
            by_half = given.view(num_experts, -1, 1)  # [E, 1 or halves, 1]
            by_row = by_half.repeat_interleave(row_blocks // by_half.shape[1], dim=1)
            return by_row.expand(-1, -1, column_blocks).contiguous(), "block"
    tensor(name, given, torch.float32, (num_experts, row_blocks, column_blocks), w.device)
    return given, "block"


def _bias(name: str, given: torch.Tensor | None, w: torch.Tensor) -> torch.Tensor | None:
    """fp32 [E, R], a bias for each row of w [E, R, C]."""
    if given is None:
        return None
    dtype = torch.bfloat16 if isinstance(given, torch.Tensor) and given.dtype is torch.bfloat16 else torch.float32
    tensor(name, given, dtype, tuple(w.shape[:2]), w.device)
    return given.data.float()


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
                f"x_scale: expected float32 [{num_tokens}, {shape.scales_per_token}] with quantised x, got None"
            )
        tensor("x", x, torch.bfloat16, (num_tokens, hidden), device)
    else:
        tensor("x", x, FP8, (num_tokens, hidden), device)
        tensor("x_scale", x_scale, torch.float32, (num_tokens, shape.scales_per_token), device)
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


def alike(*tensors: torch.Tensor) -> Callable[..., bool]:
    """A predicate of as many objects, none a nested tensor: are they, in this order, like these, and no two the same?

    Alike are tensors of one type, dtype, shape, strides, device and requires_grad, and with the same dispatch keys in
    the calling thread, in which autocast and inference mode show. Memory and values are not compared, nor kept. The
    comparison is torch.compile's own, which takes as long as two attributes of each tensor in Python do. For a nested
    tensor it ends the process: torch lets an exception through that Python cannot catch.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        compared: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    except (ImportError, TypeError):  # a later torch without it: nothing is alike, and callers check everything
        return lambda *others: False
    return compared


def finite_values(name: str, given: torch.Tensor) -> None:
    """InputError when a scale or bias is NaN or infinite. Waits for the device."""
    wrong = ~given.isfinite()
    if wrong.any():
        place = wrong.nonzero()[0].tolist()
        raise InputError(f"{name}: expected finite values, got {given[tuple(place)].item()} at {place}")


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
