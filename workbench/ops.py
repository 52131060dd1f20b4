"""The layer as one call: `fused_moe` on tensors, and `torch.ops.moe_workbench` in graphs. See layer.py for MoELayer.

`fused_moe` keeps the layers it makes. A layer lives as long as the weight tensors it was made for: it holds aliases of
their memory and watches the tensors themselves (the base, where one is a view), and goes when the first of them does,
so freed weights are not kept alive. While it lives the memory cannot be handed to other weights, so the address is a
sound key. Weights written in place are not noticed: call `forget_layers`, or hold a MoELayer and make another.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Unpack

import torch
from torch.compiler import is_compiling

from workbench import checks, layer
from workbench.errors import InputError
from workbench.layer import AUTO, MoELayer, PassedBatches
from workbench.problem import PLAIN_FORM, LayerForm

MAX_LAYERS = 512
"""Layers that `fused_moe` keeps, several times what a model has; the least recently used goes first."""


def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    out: torch.Tensor | None = None,
    variant: str = AUTO,
    num_shared_experts: int = 0,
    **form: Unpack[LayerForm],
) -> torch.Tensor:
    """The layer on M tokens; returns `out`, bf16 [M, H]. See MoELayer for the arguments and the errors.

    The layer made on the first call with these weights is kept for as long as they live. Pass the same tensors each
    time: one that is made for the call takes its layer with it when it goes, unless it is a view of one that stays.
    """
    if is_compiling():
        made = torch.ops.moe_workbench.fused_moe(
            x,
            w13,
            w13_scale,
            w2,
            w2_scale,
            topk_weights,
            topk_ids,
            x_scale,
            routed_scaling_factor,
            variant,
            num_shared_experts,
            **form,
        )
        return made if out is None else out.copy_(made)
    weights = (w13, w13_scale, w2, w2_scale)
    call: tuple[object, ...]
    try:
        call = (w13.data_ptr(), w13_scale.data_ptr(), w2.data_ptr(), w2_scale.data_ptr(), num_shared_experts, variant)
    except AttributeError:  # one is no tensor, which is an error below
        call = ()
    if form:
        with_bias = form.get("w13_bias") is not None or form.get("w2_bias") is not None
        call = () if with_bias else (*call, *form.items())
    kept = _calls.get(call)
    if kept is not None:
        kept.last_use = next(_uses)
        made = kept.layer.enqueue_alike(
            kept.passed, weights, x, topk_weights, topk_ids, x_scale, routed_scaling_factor, out
        )
        if made is not None:
            return made
    choices = topk_ids.shape if isinstance(topk_ids, torch.Tensor) else ()
    if len(choices) != 2:
        raise InputError(f"topk_ids: expected int32 [M, top_k], got {checks.described(topk_ids)}")
    kept = _kept_by_layout(weights, choices[1], num_shared_experts, variant, form)
    kept.last_use = next(_uses)
    if not call:
        return kept.layer(
            x, topk_weights, topk_ids, x_scale=x_scale, routed_scaling_factor=routed_scaling_factor, out=out
        )
    _calls[call] = kept
    kept.calls.add(call)
    return kept.layer.enqueue(kept.passed, weights, x, topk_weights, topk_ids, x_scale, routed_scaling_factor, out)


def forget_layers() -> None:
    """Drop the layers that `fused_moe` keeps, so that weights written in place are prepared again."""
    _kept.clear()
    _calls.clear()


@torch.library.custom_op("moe_workbench::fused_moe", mutates_args=())
def _fused_moe_op(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    variant: str = AUTO,
    num_shared_experts: int = 0,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    swiglu_limit: float | None = None,
    swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0,
    activation_scales: str = "group",
) -> torch.Tensor:
    return fused_moe(
        x,
        w13,
        w13_scale,
        w2,
        w2_scale,
        topk_weights,
        topk_ids,
        x_scale=x_scale,
        routed_scaling_factor=routed_scaling_factor,
        variant=variant,
        num_shared_experts=num_shared_experts,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        swiglu_limit=swiglu_limit,
        swiglu_alpha=swiglu_alpha,
        swiglu_beta=swiglu_beta,
        activation_scales=activation_scales,  # type: ignore[arg-type]  # MoEShape checks it
    )


@_fused_moe_op.register_fake
def _(x: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


@torch.library.custom_op("moe_workbench::layer", mutates_args=())
def _layer_op(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_scale: torch.Tensor | None,
    routed_scaling_factor: float,
    number: int,
) -> torch.Tensor:
    """The MoELayer of that number, which a compiled graph holds in place of the object."""
    return layer.by_number[number](
        x, topk_weights, topk_ids, x_scale=x_scale, routed_scaling_factor=routed_scaling_factor
    )


@_layer_op.register_fake
def _(x: torch.Tensor, *rest: object) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


@dataclass(eq=False)
class Kept:
    """A layer of `fused_moe`, and the weak references that drop it when its weights are freed."""

    layer: MoELayer
    watches: tuple[weakref.ref[torch.Tensor], ...]
    passed: PassedBatches = field(default_factory=dict)
    """Batches that came with these weights, as laid out by then."""
    calls: set[tuple[object, ...]] = field(default_factory=set)
    """Keys of `_calls` that lead here."""
    last_use: int = 0


_kept: dict[tuple[object, ...], Kept] = {}
"""By what the tensors are: address, dtype, shape and strides."""
_calls: dict[tuple[object, ...], Kept] = {}
"""By where the weights are and the other arguments that make a layer: the same layers, found faster. What else the
weights are is compared with the batch. Calls that differ in that or in top_k alone take turns."""
_uses = itertools.count(1)


def _forget(key: tuple[object, ...]) -> None:
    kept = _kept.pop(key, None)
    for call in () if kept is None else tuple(kept.calls):
        _calls.pop(call, None)


def _kept_by_layout(
    tensors: tuple[torch.Tensor, ...], top_k: int, num_shared_experts: int, variant: str, form: LayerForm
) -> Kept:
    if not form.keys() <= PLAIN_FORM.keys():  # else a layer that is kept already would run without them
        raise TypeError(f"fused_moe: expected keywords of {', '.join(PLAIN_FORM)}, got {', '.join(form)}")
    whole: LayerForm = {**PLAIN_FORM, **form}
    given_for = dict(zip(("w13", "w13_scale", "w2", "w2_scale"), tensors, strict=True))
    biases = (("w13_bias", whole["w13_bias"]), ("w2_bias", whole["w2_bias"]))
    given_for |= {name: bias for name, bias in biases if bias is not None}
    for name, given in given_for.items():
        if not isinstance(given, torch.Tensor):
            raise InputError(f"{name}: expected a tensor, got {checks.described(given)}")
    layouts = tuple((given.data_ptr(), given.dtype, given.shape, given.stride()) for given in given_for.values())
    numbers = (whole["swiglu_limit"], whole["swiglu_alpha"], whole["swiglu_beta"], whole["activation_scales"])
    key = (layouts, numbers, top_k, num_shared_experts, variant)
    kept = _kept.get(key)
    if kept is not None:
        return kept
    made = MoELayer(*tensors, top_k=top_k, num_shared_experts=num_shared_experts, variant=variant, **form)
    owners = (given if given._base is None else given._base for given in given_for.values())
    kept = _kept[key] = Kept(made, tuple(weakref.ref(owner, lambda _: _forget(key)) for owner in owners))
    if len(_kept) > MAX_LAYERS:
        _forget(min((each for each in _kept if each != key), key=lambda each: _kept[each].last_use))
    return kept
