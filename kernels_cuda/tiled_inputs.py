"""Calls of kernels on tiles of rows, and what these need of a batch before they start: quantised tokens and the tiles
of its routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from kernels_cuda import activation_form, sm90_combine, sm90_fill, sm90_order, sm90_prologue, workspace
from kernels_cuda.calls import Call, ReadyCalls
from kernels_cuda.launch import Launch
from kernels_cuda.workspace import FILLED
from reference.routing import TiledRouting
from workbench.problem import MoEInputs, MoEWeights
from workbench.variant import Config

Given = Literal["tokens", "quantised", "tiled"]
"""What of a batch is there: bf16 tokens and routing, quantised tokens and routing, or quantised tokens and tiles."""

Takes = Literal["tiles", "choices", "ids"]
"""What a kernel takes of the routing: tiles and the choices in their order, these choices and how many each expert has,
or `topk_ids` alone."""

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
    takes: Takes = "tiles",
) -> Call:
    """A call of `key`: launches that make what is missing of the batch and fill memory, then `launches`, and in the
    deterministic form the sum of each token's rows in the part "contributions".

    filled     bytes of the parts that are filled: with zeros, or if `marked` with ones, and then `out` with zeros
    others     bytes of the other parts that `launches` hand each other
    launches   as ReadyCalls.make() takes them
    takes      what the first of them takes of a batch that is not in tiles
    """
    num_tokens, given, config = key
    shape, device, max_rows = prepared.weights.shape, prepared.weights.device, config.integer("max_rows")
    num_out_bytes, num_choices = num_tokens * shape.hidden_size * 2, num_tokens * shape.top_k
    others = dict(others)
    # Of the last launch ahead, as arguments of sm90_prologue.bind().
    work: dict[str, Any] = {}
    if given == "tokens":
        others |= sm90_prologue.quantised_parts(num_tokens, shape.hidden_size)
        work = {"num_values": num_tokens * shape.hidden_size}
        work["power_of_two_scales"] = activation_form.power_of_two_scales(shape)
    orders, groups = given != "tiled" and takes == "choices", given != "tiled" and takes == "tiles"
    if orders:
        others |= sm90_order.parts(num_choices)
    if groups:
        others |= sm90_prologue.tile_parts(num_choices, shape.num_experts, max_rows)
        work |= {"num_choices": num_choices, "num_experts": shape.num_experts, "max_rows": max_rows}
    if prepared.deterministic:
        others["contributions"] = shape.top_k * num_out_bytes
        launches = [*launches, (sm90_combine.bind(device, num_tokens, shape), {})]
    parts = workspace.layout(filled, others)
    fills: dict[str, Any] = {"num_out_bytes": num_out_bytes, "num_poison_bytes": parts.num_filled_bytes}
    if not marked:
        fills = {"num_out_bytes": parts.num_filled_bytes}
    if work:
        last = sm90_prologue.bind(device, **work, **fills, leaves_room=not groups, overlap_previous=orders)
    else:
        last = sm90_fill.bind(device, **fills, overlap_previous=orders)
    ahead = [(last, {"poison" if marked else "out": FILLED})]
    if orders:
        ahead = [(sm90_order.bind(device, num_choices, shape.num_experts), {}), *ahead]
    return prepared.calls.make(key, device, parts, [*ahead, *launches])


def write_addresses(what: Given, inputs: MoEInputs, takes: Takes, ahead: Sequence[Any], kernel: Any) -> None:
    """Write where `inputs` are into the parameters of the launches ahead and of the kernel, which takes this of a batch
    that is not in tiles."""
    if what == "tiled":
        routing: Any = inputs.aligned
        kernel.sorted_choices = routing.sorted_choices.data_ptr()
        kernel.tiles = routing.tiles.data_ptr()
    else:
        (kernel if takes == "ids" else ahead[0]).topk_ids = inputs.topk_ids.data_ptr()
    if what == "tokens":
        ahead[-1].x = inputs.tokens.data_ptr()
    else:
        x_q: Any = inputs.x_q
        x_scale: Any = inputs.x_scale
        kernel.x_q, kernel.x_scale = x_q.data_ptr(), x_scale.data_ptr()
    kernel.topk_weights = inputs.topk_weights.data_ptr()
    kernel.routed_scaling_factor = inputs.routed_scaling_factor
