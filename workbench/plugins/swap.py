"""What the plugins share: one engine layer as a MoELayer, and the batch sizes at which it runs in the engine's place.

A layer is made when the engine has loaded its weights, on aliases of the engine's tensors, and with it everything a
call needs. It runs for M tokens if the selection table, made in this environment, has verified measurements of this
shape on both sides of M or at it, and chooses by them a variant that is none of the engine's own; else the engine's
kernels run untouched. The engine's own kernels are peers in the table if variants named `<engine>.<...>` are measured.

Nothing is made and nothing decided while a CUDA graph is being captured: what is not ready then is the engine's.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from workbench import registry, select
from workbench.environment import plugin_mode
from workbench.errors import InputError, UnsupportedError
from workbench.layer import ROUTING, MoELayer
from workbench.table import Cell

logger = logging.getLogger(__name__)

Engine = Literal["vllm", "sglang"]

COPIED_FRACTION = 0.1
"""A variant whose prepared tensors exceed this part of the weights keeps a copy of them; workspaces stay below it."""


class NotServedError(Exception):
    """Why the engine's kernels run for a layer, whatever M."""


@dataclass(frozen=True)
class EngineWeights:
    """What an adapter read of an engine's layer; tensors as in problem.py."""

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    top_k: int
    num_shared_experts: int = 0


@dataclass
class _Swap:
    """One engine layer: ours, or None where the engine's runs whatever M; and whether ours runs, for each M seen."""

    layer: MoELayer | None
    pointers: tuple[int, ...] = ()
    ours: dict[int, bool] = field(default_factory=dict)


_swaps: weakref.WeakKeyDictionary[torch.nn.Module, _Swap] = weakref.WeakKeyDictionary()
_copying: dict[tuple[object, ...], set[str]] = {}
"""By shape, variants found to keep a copy of the weights, so that not every layer of a model has to find out."""


def weights_loaded(engine: Engine, module: Any, read: Callable[[], EngineWeights]) -> None:
    """Make the layer for the weights that `module` holds now; `read` raises NotServedError if there can be none.

    A layer whose weights were written in place stays as it is, with what CUDA graphs captured of it, unless variants
    may keep copies: those would hold the old weights.
    """
    swap = _swaps.get(module)
    if swap is not None and swap.layer is not None and swap.pointers == _pointers(module):
        if plugin_mode() != "copies":
            return
        _say(logging.WARNING, f"{engine}: weights were loaded again; CUDA graphs captured before may hold the old ones")
    _swaps[module] = _made(engine, module, read)


def layer_for(
    engine: Engine, module: Any, x: torch.Tensor, topk_ids: torch.Tensor, read: Callable[[], EngineWeights]
) -> MoELayer | None:
    """The layer to call, now, in place of the engine's kernels for this batch; or None: the engine's run."""
    swap = _swaps.get(module)
    if swap is None or (swap.layer is not None and swap.pointers != _pointers(module)):
        if _capturing():
            return None
        swap = _swaps[module] = _made(engine, module, read)
    layer, num_tokens = swap.layer, x.shape[0]
    if layer is None or not _fits(layer, x, topk_ids):
        return None
    ours = swap.ours.get(num_tokens)
    if ours is None:
        if _capturing():
            return None
        ours = swap.ours[num_tokens] = not _why_not(engine, layer, num_tokens)
    return layer if ours else None


def routing(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """An engine's routing as ours: fp32 weights and int32 ids, contiguous.

    expert_map [global experts] holds each expert's id on this rank, or -1; without one the ids are such already.
    """
    if expert_map is not None:
        topk_ids = expert_map[topk_ids.clamp(min=0).long()].masked_fill(topk_ids < 0, -1)
    return topk_weights.float().contiguous(), topk_ids.to(torch.int32).contiguous()


def _fits(layer: MoELayer, x: torch.Tensor, topk_ids: torch.Tensor) -> bool:
    """Whether a batch is one of the layer's: bf16 tokens of its width, and its number of choices."""
    shape = layer.shape
    return (
        x.dtype is torch.bfloat16
        and x.ndim == 2
        and x.shape[1] == shape.hidden_size
        and x.is_contiguous()
        and topk_ids.shape[1] == shape.top_k
    )


def _made(engine: Engine, module: Any, read: Callable[[], EngineWeights]) -> _Swap:
    try:
        return _Swap(_warmed_layer(engine, read()), _pointers(module))
    except (NotServedError, InputError, UnsupportedError, torch.OutOfMemoryError) as reason:
        _say(logging.INFO, f"{engine}: the engine's own kernels run: {reason}")
    except AttributeError as error:  # an engine of another version than the adapter was written for
        _say(logging.WARNING, f"{engine}: the engine's own kernels run: not a version that is known: {error}")
    return _Swap(None)


def _warmed_layer(engine: Engine, weights: EngineWeights) -> MoELayer:
    """The layer with each (variant, config) that the table chooses at a measured M prepared, compiled and loaded."""
    copies = plugin_mode() == "copies"
    key = (weights.w13.shape, weights.w2.shape, weights.top_k, weights.num_shared_experts)
    excluded = set() if copies else _copying.setdefault(key, set())
    while True:
        layer = MoELayer(
            weights.w13,
            weights.w13_scale,
            weights.w2,
            weights.w2_scale,
            top_k=weights.top_k,
            num_shared_experts=weights.num_shared_experts,
            exclude=excluded,
        )
        copying = _warm_choices(engine, layer, copies)
        if copying is None:
            _say(logging.INFO, f"{engine}: {layer.shape}: {_decisions(engine, layer)}{_left_out(excluded)}")
            return layer
        excluded.add(copying)


def _warm_choices(engine: Engine, layer: MoELayer, copies: bool) -> str | None:
    """Warm one M for each choice at a measured M; or the first variant that keeps a copy, where none may."""
    warmed = set()
    for num_tokens in layer.measured_tokens():
        choice = layer.explain(num_tokens)
        if choice.identity in warmed or _not_ours(engine, choice.variant):
            continue
        layer.warm([num_tokens])
        warmed.add(choice.identity)
        if not copies and _keeps_copy(layer, choice.variant):
            return choice.variant
    return None


def _keeps_copy(layer: MoELayer, variant: str) -> bool:
    """Whether what the variant prepared holds more memory of its own than workspaces do."""
    served = tuple(_tensors(layer.weights))
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in _tensors(layer.prepared[variant])}
    for each in served:
        storages.pop(each.untyped_storage().data_ptr(), None)
    held = sum(storage.nbytes() for storage in storages.values())
    return held > COPIED_FRACTION * sum(each.nbytes for each in served)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a prepared value: in dataclasses, mappings and sequences, however nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for each in dataclasses.fields(value):
            yield from _tensors(getattr(value, each.name))
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from _tensors(part)


def _why_not(engine: Engine, layer: MoELayer, num_tokens: int) -> str:
    """Why the engine's kernels run at this M; empty where ours do."""
    measured = layer.measured_tokens()
    if not measured:
        command = select.fill_command(Cell(layer.shape, ROUTING, "bf16", "layer"))
        return f"nothing was measured for this shape in this environment; to measure it: {command}"
    if not measured[0] <= num_tokens <= measured[-1]:
        return f"outside the measured M={measured[0]} to {measured[-1]}"
    choice = layer.explain(num_tokens)
    if not choice.measured:
        return choice.reason
    if reason := _not_ours(engine, choice.variant):
        return reason
    if choice.variant not in layer.prepared:
        return f"{choice.variant} was not chosen at any measured M, and its weights not prepared"
    return ""


def _not_ours(engine: Engine, variant: str) -> str:
    """Why a chosen variant does not run in the engine's place; empty where it does."""
    if variant.startswith(f"{engine}."):
        return f"{variant}, the engine's own, is chosen"
    if not registry.find(variant).graph_capturable:
        return f"{variant} reads device data on the host"
    return ""


def _decisions(engine: Engine, layer: MoELayer) -> str:
    """What runs at the measured M, in words."""
    measured = layer.measured_tokens()
    if not measured:
        return f"the engine's own kernels run: {_why_not(engine, layer, 1)}"
    runs: dict[str, list[str]] = {}
    for num_tokens in measured:
        reason = _why_not(engine, layer, num_tokens)
        what = f"the engine's own kernels ({reason})" if reason else layer.explain(num_tokens).variant
        runs.setdefault(what, []).append(str(num_tokens))
    parts = [f"{what} at M={', '.join(at)}" for what, at in runs.items()]
    return f"{'; '.join(parts)}; outside of these the engine's own"


def _left_out(excluded: Collection[str]) -> str:
    if not excluded:
        return ""
    return f"; left out for keeping a copy of the weights: {', '.join(sorted(excluded))} (MOE_WORKBENCH_PLUGIN=copies)"


def _pointers(module: Any) -> tuple[int, ...]:
    """Where the weights of an engine's layer lie: both engines name them so."""
    return (
        module.w13_weight.data_ptr(),
        module.w13_weight_scale_inv.data_ptr(),
        module.w2_weight.data_ptr(),
        module.w2_weight_scale_inv.data_ptr(),
    )


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _say(level: int, message: str) -> None:
    """Log a message once: the layers of a model are many and alike."""
    logger.log(level, message)
