"""The layer on weights that stay: checked and prepared once, and a (variant, config) picked once for each M.

After that a call is a comparison of its tensors with ones that have passed the checks, one dictionary look-up and the
variant's `run`. It may be captured in a CUDA graph once it has been made, or warmed, with that M outside of one. There
is no backward pass: results require no gradient. Autocast is off inside.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch.compiler import is_compiling

from workbench import checks, registry, select, shipped
from workbench import table as tables
from workbench.environment import current, settings
from workbench.errors import InputError, RecordError, UnsupportedError
from workbench.problem import FP8, InputKind, LayerForm, MoEInputs, MoEShape
from workbench.table import Cell, Table
from workbench.trace import Environment
from workbench.variant import Config, Variant

logger = logging.getLogger(__name__)

AUTO = "auto"
ROUTING = "uniform"
"""The law whose measurements decide: a call does not know how its tokens will choose."""
MAX_PASSED = 256
"""Batches that are remembered as checked, a kilobyte for each; beyond that it begins anew."""


@dataclass(frozen=True)
class Plan:
    """What runs for one M: a variant, its prepared weights, and a config."""

    variant: Variant
    prepared: Any
    config: Config


PassedBatches = dict[tuple[torch.Size, bool, bool], tuple[Callable[..., bool], Plan]]
"""By x.shape, whether x_scale is None, and whether out is None, of batches that passed the checks: are tensors like
theirs, and what runs on them."""


class MoELayer:
    """One layer's weights, prepared, and what to run on them for each M.

    w13, w13_scale, w2, w2_scale   as in problem.py, contiguous and on one device; never written, and not copied unless
                                   a variant needs another layout. Scales may also be one for each expert or output
                                   channel, or float8_e8m0fnu, as checks.weights says
    top_k                          choices per token, shared experts included
    num_shared_experts             how many of the experts are shared; they own the last ids
    variant                        a variant's name, or "auto": the fastest verified one by the selection table
    table                          the selection table; without one selection.json of the results folder is used, if it
                                   is there and was made in this environment, and for what it lacks the one that is
                                   shipped
    exclude                        names of variants that "auto" leaves out, besides those of MOE_WORKBENCH_EXCLUDE
    form                           w13_bias [E, 2I] and w2_bias [E, H], fp32 or bf16; swiglu_limit, swiglu_alpha,
                                   swiglu_beta and activation_scales as MoEShape describes them

    Raises InputError for weights that do not fit or whose scales are not finite, UnknownVariantError, and
    UnsupportedError with the variant's reason, when it is named and does not serve this shape on this device.
    """

    def __init__(
        self,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        *,
        top_k: int,
        num_shared_experts: int = 0,
        variant: str = AUTO,
        table: Table | None = None,
        exclude: Collection[str] = (),
        **form: Unpack[LayerForm],
    ) -> None:
        self.weights = checks.weights(w13, w13_scale, w2, w2_scale, top_k, num_shared_experts, **form)
        shape = self.weights.shape
        self._device, self._device_index = self.weights.device, self.weights.device.index
        self._activation_scales = shape.activation_scales
        self._on_gpu = self._device.type == "cuda"
        excluded = frozenset(exclude).union(settings().exclude) if variant == AUTO else frozenset()
        self._variants = _candidates(variant, shape, self._device, excluded)
        self._forced = variant != AUTO
        _refuse_capture(self._on_gpu, "a layer is prepared on its first call")
        for name in ("w13_scale", "w2_scale", *(("w13_bias", "w2_bias") if shape.has_bias else ())):
            checks.finite_values(name, getattr(self.weights, name))
        self._table = _without(_table_for(self._device, shape, table), excluded)
        self._prepared: dict[str, Any] = {}
        self._plans: dict[tuple[int, bool], Plan] = {}
        self._passed: PassedBatches = {}
        self._check_values_always = settings().check_values
        self._values_unchecked = {False, True}
        self._number = next(_numbers)
        by_number[self._number] = self

    @property
    def shape(self) -> MoEShape:
        return self.weights.shape

    @property
    def prepared(self) -> Mapping[str, Any]:
        """What `prepare` returned, by the name of the variant, for those that were needed so far."""
        return self._prepared

    def __call__(
        self,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        *,
        x_scale: torch.Tensor | None = None,
        routed_scaling_factor: float = 1.0,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer on M tokens, enqueued on the current stream; returns `out`, bf16 [M, H].

        x               bf16 [M, H], or e4m3 [M, H] with x_scale fp32 [M, ceil(H/128)], or [M, 1] if scaled by token
        topk_weights    fp32 [M, top_k]
        topk_ids        int32 [M, top_k], -1 for an expert that is not on this rank
        out             bf16 [M, H] to write to; a new tensor if None

        Raises InputError when a tensor does not fit; UnsupportedError when no variant runs the shape here, or when a
        CUDA graph is being captured and the call needs what can only be made outside of one. Values (ids in range,
        scales finite) are read on the first call, and on every call if MOE_WORKBENCH_CHECK_VALUES=1 was
        set when the layer was made.
        """
        if is_compiling():
            made = torch.ops.moe_workbench.layer(
                x, topk_weights, topk_ids, x_scale, routed_scaling_factor, self._number
            )
            return made if out is None else out.copy_(made)
        made = self.enqueue_alike(self._passed, (), x, topk_weights, topk_ids, x_scale, routed_scaling_factor, out)
        if made is None:
            made = self.enqueue(self._passed, (), x, topk_weights, topk_ids, x_scale, routed_scaling_factor, out)
        return made

    def enqueue_alike(
        self,
        passed: PassedBatches,
        weights: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        x_scale: torch.Tensor | None,
        routed_scaling_factor: float,
        out: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """`__call__` for a batch like one of `passed`, which implies that all checks would pass; None for any other.

        weights   are compared too; as many as when `enqueue` added to `passed`
        """
        try:
            known = passed.get((x.shape, x_scale is None, out is None))
            if known is None or topk_weights.is_nested or topk_ids.is_nested:  # checks.alike must not be asked of these
                return None
            given: tuple[torch.Tensor, ...] = (x, topk_weights, topk_ids)
            if x_scale is not None:
                if x_scale.is_nested:
                    return None
                given += (x_scale,)
            if out is not None:
                if out.is_nested or out.data_ptr() == x.data_ptr():
                    return None
                given += (out,)
        except AttributeError:  # one is no tensor
            return None
        alike, plan = known
        if not (
            alike(*(weights + given))
            and isinstance(routed_scaling_factor, (float, int))
            and math.isfinite(routed_scaling_factor)
            and self._is_on_current_device()
        ):
            return None
        if out is None:
            out = torch.empty(*x.shape, dtype=torch.bfloat16, device=self._device)
        x_bf16, x_q = (x, None) if x_scale is None else (None, x)
        inputs = MoEInputs(
            topk_ids, topk_weights, x_bf16, x_q, x_scale, routed_scaling_factor, None, self._activation_scales
        )
        plan.variant.run(plan.prepared, inputs, out, plan.config)
        return out

    def enqueue(
        self,
        passed: PassedBatches,
        weights: tuple[torch.Tensor, ...],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        x_scale: torch.Tensor | None,
        routed_scaling_factor: float,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """`__call__` for any batch; enqueue_alike takes ones like it from then on, if it can."""
        shape, device, quantised = self.weights.shape, self._device, x_scale is not None
        checks.batch(shape, device, x, x_scale, topk_weights, topk_ids, routed_scaling_factor, out)
        if quantised in self._values_unchecked:
            self._check_values(topk_ids, x_scale)
        key, num_tokens = (x.shape, x_scale is None, out is None), x.shape[0]
        given = [*weights, x, topk_weights, topk_ids, *(each for each in (x_scale, out) if each is not None)]
        if out is None:
            out = torch.empty((num_tokens, shape.hidden_size), dtype=torch.bfloat16, device=device)
        if num_tokens == 0:
            return out
        plan = self._plans.get((num_tokens, quantised)) or self._make_plan(num_tokens, quantised)
        if not plan.variant.graph_capturable:
            _refuse_capture(self._on_gpu, f"{plan.variant.name} reads device data on the host")
        if self._may_skip_checks(plan, x, topk_weights, x_scale):
            if len(passed) >= MAX_PASSED:
                passed.clear()
            passed[key] = checks.alike(*given), plan
        inputs = MoEInputs(
            topk_ids,
            topk_weights,
            x=None if quantised else x,
            x_q=x if quantised else None,
            x_scale=x_scale,
            routed_scaling_factor=routed_scaling_factor,
            activation_scales=shape.activation_scales,
        )
        with _plainly(device):
            plan.variant.run(plan.prepared, inputs, out, plan.config)
        return out

    def warm(self, num_tokens: Iterable[int], quantised: bool = False) -> None:
        """Make what calls with these M need, so that the first of them, or a CUDA graph capture, makes nothing more.

        For each M the choice, the variant's prepared weights, and its compiled and loaded kernels: the layer runs once,
        on tokens that go to no expert. `quantised` says that x will come with an x_scale. Raises UnsupportedError
        while a CUDA graph is being captured, and InputError for an M that is not an integer >= 0.
        """
        shape, device = self.shape, self._device
        _refuse_capture(self._on_gpu, "a layer is warmed outside of one")
        for tokens in num_tokens:
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
                raise InputError(f"num_tokens: expected integers >= 0, got {tokens!r}")
            if tokens == 0:
                continue
            plan = self._plans.get((tokens, quantised)) or self._make_plan(tokens, quantised)
            topk_ids = torch.full((tokens, shape.top_k), -1, dtype=torch.int32, device=device)
            topk_weights = torch.zeros((tokens, shape.top_k), device=device)
            x = torch.zeros((tokens, shape.hidden_size), dtype=FP8 if quantised else torch.bfloat16, device=device)
            if quantised:
                x_scale = torch.ones((tokens, shape.scales_per_token), device=device)
                inputs = MoEInputs(topk_ids, topk_weights, x_q=x, x_scale=x_scale)
            else:
                inputs = MoEInputs(topk_ids, topk_weights, x=x, activation_scales=shape.activation_scales)
            out = torch.empty((tokens, shape.hidden_size), dtype=torch.bfloat16, device=device)
            with _plainly(device):
                plan.variant.run(plan.prepared, inputs, out, plan.config)

    def measured_tokens(self, quantised: bool = False) -> tuple[int, ...]:
        """The M, ascending, for which the table has a time of a verified variant on this shape."""
        by_tokens = self._table.cells.get(self._cell(quantised), {})
        return tuple(sorted(at for at, found in by_tokens.items() if at > 0 and any(one.timing for one in found)))

    def choice(self, num_tokens: int, quantised: bool = False) -> tuple[str, Config]:
        """The (variant, config) that a call with `num_tokens` runs."""
        return self.explain(num_tokens, quantised).identity

    def explain(self, num_tokens: int, quantised: bool = False) -> select.Choice:
        """What a call with `num_tokens` runs, and why."""
        cell, table = self._cell(quantised), self._table
        if self._forced:
            (variant,) = self._variants.values()
            own = {
                at: tuple(found for found in candidates if found.variant == variant.name)
                for at, candidates in table.cells.get(cell, {}).items()
            }
            if not any(found.timing and found.first_config for candidates in own.values() for found in candidates):
                config = next(iter(variant.configs(self.shape, num_tokens)))
                return select.Choice(variant.name, config, "named, and not measured", measured=False, untuned=True)
            table = replace(table, cells={cell: own})
        return select.choose(table, cell, num_tokens, self._variants, self._device)

    def _cell(self, quantised: bool) -> Cell:
        kind: InputKind = "fp8" if quantised else "bf16"
        return Cell(self.shape, ROUTING, kind, "layer")

    def _make_plan(self, num_tokens: int, quantised: bool) -> Plan:
        _refuse_capture(self._on_gpu, f"this layer has not been called with M={num_tokens} before")
        name, config = self.choice(num_tokens, quantised)
        if name not in self._prepared:
            with torch.inference_mode(False), _plainly(self._device):
                self._prepared[name] = self._variants[name].prepare(self.weights)
                if self._on_gpu:
                    torch.cuda.current_stream().synchronize()  # other streams may use it from now on
        plan = Plan(self._variants[name], self._prepared[name], config)
        self._plans[num_tokens, quantised] = plan
        return plan

    def _check_values(self, topk_ids: torch.Tensor, x_scale: torch.Tensor | None) -> None:
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            return
        checks.id_values(topk_ids, self.shape.num_experts)
        if x_scale is not None:
            checks.finite_values("x_scale", x_scale)
        if not self._check_values_always:
            self._values_unchecked.discard(x_scale is not None)

    def _may_skip_checks(
        self, plan: Plan, x: torch.Tensor, topk_weights: torch.Tensor, x_scale: torch.Tensor | None
    ) -> bool:
        """Whether `run` may be called as it is on batches like this one: values need not be read, and there is nothing
        to refuse, to differentiate or to cast, on the current device."""
        if (x_scale is not None) in self._values_unchecked or (self._on_gpu and not plan.variant.graph_capturable):
            return False
        if x.requires_grad or topk_weights.requires_grad or (x_scale is not None and x_scale.requires_grad):
            return False
        if torch.is_autocast_enabled(self._device.type):
            return False
        return self._is_on_current_device()

    def _is_on_current_device(self) -> bool:
        return not self._on_gpu or torch._C._cuda_getDevice() == self._device_index


_numbers = itertools.count()
by_number: weakref.WeakValueDictionary[int, MoELayer] = weakref.WeakValueDictionary()
"""Every layer that lives: a compiled graph holds its number in place of the object."""


def _candidates(
    variant: str, shape: MoEShape, device: torch.device, excluded: Collection[str]
) -> Mapping[str, Variant]:
    """The variants that may be chosen: all but the excluded, or the one named, if it serves the shape on the device."""
    if variant == AUTO:
        return {name: each for name, each in registry.variants().items() if name not in excluded}
    named = registry.find(variant)
    support = named.supports(shape, device)
    if not support:
        raise UnsupportedError(f"{variant}: does not run {shape} on {device}: {support.reason}")
    return {variant: named}


def _table_for(device: torch.device, shape: MoEShape, given: Table | None) -> Table:
    """`given`, or the recorded table with what is shipped of `shape`."""
    environment = _environment(device)
    if given is not None:
        if given.environment != environment:
            raise InputError(f"table: expected one made in {environment}, got one made in {given.environment}")
        return given
    own, path = Table(environment, (), {}), settings().results / tables.SELECTION_FILE
    if path.is_file():
        own = _recorded_table(path.resolve(), path.stat().st_mtime_ns, environment)
    return shipped.with_shipped(own, shape, registry.variants())


def _without(table: Table, excluded: Collection[str]) -> Table:
    """The table as if the excluded variants had never been measured."""
    if not excluded:
        return table
    cells = {
        cell: {at: tuple(one for one in found if one.variant not in excluded) for at, found in by_tokens.items()}
        for cell, by_tokens in table.cells.items()
    }
    return replace(table, cells=cells)


@functools.lru_cache(maxsize=8)
def _recorded_table(path: Path, mtime_ns: int, environment: Environment) -> Table:
    """The table at `path`; an empty one, with a warning, when it is refused."""
    try:
        return tables.load(path, environment, registry.variants())
    except RecordError as error:
        logger.warning("selection table not used: %s", error)
        return Table(environment, (), {})


@functools.cache
def _environment(device: torch.device) -> Environment:
    return current(device)


def _refuse_capture(on_gpu: bool, reason: str) -> None:
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(f"a CUDA graph is being captured, but {reason}")


@contextlib.contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Without gradients and autocast, and with `device` current."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
        yield
