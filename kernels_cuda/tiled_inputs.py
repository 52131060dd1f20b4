"""What kernels on tiles of rows need of a batch before they start: quantised tokens and the tiles of its routing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from kernels_cuda import activation_form, sm90_fill, sm90_prologue
from reference.routing import TiledRouting
from workbench.problem import MoEInputs, MoEShape


@dataclass(frozen=True)
class TiledInputs:
    """A batch that is ready."""

    x_q: torch.Tensor
    x_scale: torch.Tensor
    routing: TiledRouting
    made_by_this_call: bool
    """Whether they are written by the launch just before in the stream, and not earlier."""


def align(inputs: MoEInputs, num_experts: int, max_rows: int) -> MoEInputs:
    """`inputs`, quantised, with tiles of at most `max_rows` rows: make_ready() then only fills."""
    inputs = inputs.quantise()
    if inputs.num_tokens == 0:
        return inputs
    routing = sm90_prologue.empty_tiles(inputs.topk_ids.numel(), num_experts, max_rows, inputs.topk_ids.device)
    sm90_prologue.launch(topk_ids=inputs.topk_ids, num_experts=num_experts, aligned=routing)
    return dataclasses.replace(inputs, aligned=routing)


def make_ready(
    inputs: MoEInputs, shape: MoEShape, max_rows: int, *, zeros: torch.Tensor, ones: torch.Tensor | None = None
) -> TiledInputs:
    """One launch for what is missing: quantised tokens, tiles. It also clears every bit of `zeros` and sets every bit
    of `ones`, each contiguous and a multiple of 16 bytes."""
    routing, x_q, x_scale = inputs.aligned, inputs.x_q, inputs.x_scale
    tiled = isinstance(routing, TiledRouting) and routing.max_rows == max_rows
    if tiled and x_q is not None and x_scale is not None:
        assert isinstance(routing, TiledRouting)
        sm90_fill.launch(zeros=zeros, ones=ones)
        return TiledInputs(x_q, x_scale, routing, made_by_this_call=False)
    topk_ids, x = inputs.topk_ids, None
    if x_q is None or x_scale is None:
        x = inputs.tokens
        x_q, x_scale = sm90_prologue.empty_quantised(x)
    made = sm90_prologue.empty_tiles(topk_ids.numel(), shape.num_experts, max_rows, topk_ids.device)
    sm90_prologue.launch(
        out=zeros,
        x=x,
        quantised=(x_q, x_scale),
        topk_ids=topk_ids,
        num_experts=shape.num_experts,
        aligned=made,
        poison=ones,
        power_of_two_scales=activation_form.power_of_two_scales(shape),
    )
    return TiledInputs(x_q, x_scale, made, made_by_this_call=True)
