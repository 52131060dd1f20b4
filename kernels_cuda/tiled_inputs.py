"""Calls of kernels on tiles of rows, and what these need of a batch before they start: quantised tokens and the tiles
of its routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import torch

from kernels_cuda import activation_form, sm90_combine, sm90_fill, sm90_prologue, workspace
from kernels_cuda.calls import Call, ReadyCalls
from kernels_cuda.launch import Launch
from kernels_cuda.workspace import FILLED
from reference.routing import TiledRouting
from workbench.problem import MoEInputs, MoEShape, MoEWeights
from workbench.variant import Config

Given = Literal["tokens", "quantised", "tiled"]
"""What of a batch is there: bf16 tokens and routing, quantised tokens and routing, or quantised tokens and tiles."""

Key = tuple[int, Given, Config]
"""What the launches of a call depend on: the number of tokens, what of the batch is there, and the config."""


class Prepared(Protocol):
    """A layer as the kernels have it."""

    weights: MoEWeights
    deterministic: bool
    calls: ReadyCalls


def align(inputs: MoEInputs, num_experts: int, max_rows: int) -> MoEInputs:
    """`inputs`, quantised, with tiles of at most `max_rows` rows: what is "tiled"."""
    inputs = inputs.quantise()
    if inputs.num_tokens == 0:
        return inputs
    routing = sm90_prologue.empty_tiles(inputs.topk_ids.numel(), num_experts, max_rows, inputs.topk_ids.device)
    sm90_prologue.launch(topk_ids=inputs.topk_ids, num_experts=num_experts, aligned=routing)
    return dataclasses.replace(inputs, aligned=routing)


def given(inputs: MoEInputs, config: Config) -> Given:
    """What a kernel on tiles of the config's height is given by `inputs`."""
    if inputs.x_q is None:
        return "tokens"
    routing = inputs.aligned
    if isinstance(routing, TiledRouting) and routing.max_rows == config.integer("max_rows"):
        return "tiled"
    return "quantised"


def make_call(
    prepared: Prepared,
    key: Key,
    filled: Mapping[str, int],
    others: Mapping[str, int],
    launches: Sequence[tuple[Launch, Mapping[str, str]]],
    *,
    marked: bool,
    routes: bool = False,
) -> Call:
    """A call of `key`: a launch that makes what is missing of the batch and fills memory, then `launches`, and in the
    deterministic form the sum of each token's rows in the part "contributions".

    filled     bytes of the parts that are filled: with zeros, or if `marked` with ones, and then `out` with zeros
    others     bytes of the other parts that `launches` hand each other
    launches   as ReadyCalls.make() takes them
    routes     the first of them takes the choices as they are
    """
    num_tokens, given, config = key
    shape, device, max_rows = prepared.weights.shape, prepared.weights.device, config.integer("max_rows")
    num_out_bytes = num_tokens * shape.hidden_size * 2
    groups = given != "tiled" and not routes
    others = {**others, **_missing_parts(given, groups, shape, num_tokens, max_rows)}
    if prepared.deterministic:
        others = {**others, "contributions": shape.top_k * num_out_bytes}
        launches = [*launches, (sm90_combine.bind(device, num_tokens, shape), {})]
    parts = workspace.layout(filled, others)
    zeros_and_ones = (num_out_bytes, parts.num_filled_bytes) if marked else (parts.num_filled_bytes, 0)
    first = _bind_first(given, groups, shape, num_tokens, max_rows, device, *zeros_and_ones)
    fields = ("poison", "ones") if marked else ("out", "zeros")  # of sm90_prologue, of sm90_fill
    return prepared.calls.make(key, device, parts, [(first, dict.fromkeys(fields, FILLED)), *launches])


def _missing_parts(what: Given, groups: bool, shape: MoEShape, num_tokens: int, max_rows: int) -> Mapping[str, int]:
    """Bytes of what the first launch has to make, by the names of kernels' parameters."""
    num_choices = num_tokens * shape.top_k
    parts = sm90_prologue.tile_parts(num_choices, shape.num_experts, max_rows) if groups else {}
    return parts | (sm90_prologue.quantised_parts(num_tokens, shape.hidden_size) if what == "tokens" else {})


def _bind_first(
    what: Given,
    groups: bool,
    shape: MoEShape,
    num_tokens: int,
    max_rows: int,
    device: torch.device,
    num_zero_bytes: int,
    num_one_bytes: int,
) -> Launch:
    """The launch that makes the missing parts. It also clears and sets every bit of memory of so many bytes, multiples
    of 16: sm90_fill's `zeros` and `ones` if nothing is missing, else sm90_prologue's `out` and `poison`."""
    if what != "tokens" and not groups:
        return sm90_fill.bind(device, num_zero_bytes=num_zero_bytes, num_one_bytes=num_one_bytes)
    return sm90_prologue.bind(
        device,
        num_out_bytes=num_zero_bytes,
        num_values=num_tokens * shape.hidden_size if what == "tokens" else 0,
        num_choices=num_tokens * shape.top_k if groups else 0,
        num_experts=shape.num_experts,
        max_rows=max_rows,
        num_poison_bytes=num_one_bytes,
        power_of_two_scales=activation_form.power_of_two_scales(shape),
        leaves_room=not groups,
    )


def write_addresses(what: Given, inputs: MoEInputs, first: Any, kernel: Any, *, routes: bool = False) -> None:
    """Write where `inputs` are into the parameters of the first launch and of the kernel, which takes tiles or
    `routes`."""
    if what == "tiled":
        routing: Any = inputs.aligned
        kernel.sorted_choices = routing.sorted_choices.data_ptr()
        kernel.tiles = routing.tiles.data_ptr()
    else:
        (kernel if routes else first).topk_ids = inputs.topk_ids.data_ptr()
    if what == "tokens":
        first.x = inputs.tokens.data_ptr()
    else:
        x_q: Any = inputs.x_q
        x_scale: Any = inputs.x_scale
        kernel.x_q, kernel.x_scale = x_q.data_ptr(), x_scale.data_ptr()
    kernel.topk_weights = inputs.topk_weights.data_ptr()
    kernel.routed_scaling_factor = inputs.routed_scaling_factor
