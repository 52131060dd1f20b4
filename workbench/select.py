"""Table -> choice, and why.

A choice is made for one cell (shape, routing law, input kind, scope) at one M. At a measured M the default stands
unless another verified candidate is faster beyond the noise, so a choice is never a bet. Between measured M each
variant's times are interpolated from both neighbours. What was never measured gets the default, and the log says once
which command would fill it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch

from workbench.errors import UnsupportedError
from workbench.problem import MoEShape, scale_blocks
from workbench.table import UNTIMED, UNVERIFIED, Candidate, Cell, Table
from workbench.trace import Status, Timing
from workbench.variant import Config, Variant

logger = logging.getLogger(__name__)

IN_PLACE, PREFILL = "cuda.sm90_stream_in_place", "cuda.sm90_prefill"
FALLBACK_ORDER = (
    "cuda.sm90_fused",
    IN_PLACE,
    "triton.grouped",
    "cuda.sm90_stream",
    "torch.grouped",
    "torch.loop",
)
"""What runs unmeasured, the first that can, unless another is ahead of it; and what measured candidates are held
against. `cuda.sm90_stream` is often the fastest, but keeps a copy of the weights, for which a caller who has measured
nothing may not have the memory, and weights written in place would not reach it. So it comes behind what reads them
where they lie, and before `torch.grouped`, whose copy is in bf16 and twice as large."""
# What ahead() goes by.
FEW_EXPERTS = 32
"""Of a layer: fewer are few."""
WIDE = 512
"""An intermediate size over this is wide."""
MANY_ROWS, MANY_ROWS_OF_WIDE, MANY_ROWS_OF_FEW_EXPERTS = 72, 16, 40
"""Of an expert, for `cuda.sm90_prefill`: on narrow layers, on wide ones, and where experts are few."""
SMALL_EXPERT_BYTES, ROWS_OF_SMALL_EXPERTS = 5e6, 4
"""Weights of a small expert of a wide layer, and how many rows of it are for `cuda.sm90_fused`."""
CHUNKS_OF_SPREAD, ITEMS_AT_ONCE = 4, 66
"""Chunks of 128 channels of an expert, and most of them in all, where `cuda.sm90_fused` has all under way at a time."""


class Verdict(StrEnum):
    """One timing against another, as their 95 % intervals allow to say it."""

    FASTER = "FASTER"  # the whole interval lies below the other
    SLOWER = "SLOWER"  # the whole interval lies above the other
    SAME = "SAME"  # each median lies within the other's interval
    AMBIGUOUS = "AMBIGUOUS"  # the intervals overlap, and the medians do not settle it


def judge(timing: Timing, baseline: Timing) -> Verdict:
    """What may be said of `timing` against `baseline`."""
    if timing.high_us < baseline.low_us:
        return Verdict.FASTER
    if timing.low_us > baseline.high_us:
        return Verdict.SLOWER
    medians_agree = (
        timing.low_us <= baseline.median_us <= timing.high_us
        and baseline.low_us <= timing.median_us <= baseline.high_us
    )
    return Verdict.SAME if medians_agree else Verdict.AMBIGUOUS


@dataclass(frozen=True)
class Choice:
    """What to run, why, and every candidate with the reason it lost (empty for the chosen one)."""

    variant: str
    config: Config
    reason: str
    measured: bool
    """False on a miss: nothing was measured for this cell, and the choice is the default."""
    untuned: bool
    """Whether `config` is the one that the variant uses untuned."""
    default: Candidate | None = None
    """What the choice was held against."""
    candidates: tuple[tuple[Candidate, str], ...] = ()

    @property
    def identity(self) -> tuple[str, Config]:
        return self.variant, self.config


def choose(table: Table, cell: Cell, num_tokens: int, variants: Mapping[str, Variant], device: torch.device) -> Choice:
    """What to run for `cell` at `num_tokens`. UnsupportedError when no variant supports the shape on the device."""
    measured = {
        at: candidates
        for at, candidates in table.cells.get(cell, {}).items()
        if at > 0 and _default_of(candidates) is not None
    }
    if not measured:
        choice = _default(table, cell, num_tokens, variants, device, "nothing was measured for this cell")
        _log_miss(cell, choice.variant)
        return choice
    if num_tokens in measured:
        return _at(measured[num_tokens], _where(num_tokens, measured[num_tokens]))
    below = max((at for at in measured if at < num_tokens), default=None)
    above = min((at for at in measured if at > num_tokens), default=None)
    if below is None or above is None:
        end = above if below is None else below
        assert end is not None
        choice = _at(measured[end], _where(end, measured[end]))
        return dataclasses.replace(choice, reason=f"outside the measured range, as at its end M={end}: {choice.reason}")
    lower, upper = (_at(measured[at], _where(at, measured[at])) for at in (below, above))
    where = f"between {_where(below, measured[below])} and {_where(above, measured[above])}"
    if lower.identity == upper.identity:
        return dataclasses.replace(lower, reason=f"{where}, where both agree; {lower.reason}")
    untuned = functools.partial(_untuned, variants, cell, num_tokens)
    weight = math.log(num_tokens / below) / math.log(above / below)
    candidates = _interpolated(measured[below], measured[above], weight, untuned)
    if any(found.timing is not None for found in candidates):
        return _at(candidates, f"{where}, interpolated")
    reason = f"{where}: no variant was measured at both"
    return _default(table, cell, num_tokens, variants, device, reason)


def _where(num_tokens: int, candidates: Iterable[Candidate]) -> str:
    """The M of a measurement, and whether it is a shipped one."""
    return f"M={num_tokens}, shipped" if any(found.shipped for found in candidates) else f"M={num_tokens}"


def fallback_rank(variant: str) -> tuple[int, str]:
    """Sorts variants as a default is looked for among measured ones; those not in the order come last, by name."""
    known = FALLBACK_ORDER.index(variant) if variant in FALLBACK_ORDER else len(FALLBACK_ORDER)
    return known, variant


def _default_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """The default among measured candidates: the first in the fallback order that passed with its first config."""
    usable = [found for found in candidates if found.timing is not None and found.first_config]
    return min(usable, key=lambda found: fallback_rank(found.variant), default=None)


def _at(candidates: Sequence[Candidate], where: str) -> Choice:
    """The choice among candidates of one M, of which at least one has a time; without a default, the fastest."""
    passed = sorted((found for found in candidates if found.timing is not None), key=_speed)
    default = _default_of(candidates) or passed[0]
    against = _timing(default)
    faster = [found for found in passed if judge(_timing(found), against) is Verdict.FASTER]
    chosen = faster[0] if faster else default
    if chosen is default:
        reason = f"{where}: the default, {_figure(against)}; nothing is faster beyond the noise"
    else:
        gain = against.median_us / _timing(chosen).median_us
        reason = (
            f"{where}: {_figure(_timing(chosen))}, {gain:.2f}x the speed of the default "
            f"{default.name}, {_figure(against)}"
        )
    return Choice(
        variant=chosen.variant,
        config=chosen.config,
        reason=reason,
        measured=True,
        untuned=chosen.first_config,
        default=default,
        candidates=tuple((found, _why_lost(found, chosen, default)) for found in candidates),
    )


def _why_lost(candidate: Candidate, chosen: Candidate, default: Candidate) -> str:
    if candidate is chosen:
        return ""
    if candidate.timing is None:
        return f"{candidate.status}: {candidate.message}" if candidate.message else candidate.status
    figure = _figure(candidate.timing)
    if candidate is default:
        return f"the default, {figure}, slower than the chosen beyond the noise"
    against_default = judge(candidate.timing, _timing(default))
    if against_default in (Verdict.SAME, Verdict.AMBIGUOUS):
        return f"{figure}: within the noise of the default ({against_default}), which wins ties"
    if against_default is Verdict.SLOWER:
        return f"{figure}: slower than the default, {_figure(_timing(default))}"
    return f"{figure}: faster than the default, slower than the chosen"


def _interpolated(
    below: Sequence[Candidate], above: Sequence[Candidate], weight: float, untuned: Callable[[str], Config]
) -> list[Candidate]:
    """The candidates at an M `weight` of the way between two measured ones, in log M.

    Configs change with M, so it is variants that are followed from one side to the other: each by its own best, with
    the config of the nearer side, and each untuned, with the config it has for this M. What is missing on one side has
    no timing here and loses.
    """
    found = []
    for variant in sorted({one.variant for one in (*below, *above)}):
        sides = [_best(variant, some, untuned_only=False) for some in (below, above)]
        own = [_best(variant, some, untuned_only=True) for some in (below, above)]
        near = sides[0] if weight < 0.5 else sides[1]
        if own[0] is not None and own[1] is not None:
            timing, is_shipped = _mixed(own[0], own[1], weight), own[0].shipped or own[1].shipped
            found.append(Candidate(variant, untuned(variant), Status.PASSED, timing, True, shipped=is_shipped))
        if sides[0] is None or sides[1] is None or near is None:
            found.append(Candidate(variant, untuned(variant), UNTIMED, message="not measured at both neighbours"))
        elif sides != own:
            timing, is_shipped = _mixed(sides[0], sides[1], weight), sides[0].shipped or sides[1].shipped
            found.append(Candidate(variant, near.config, Status.PASSED, timing, shipped=is_shipped))
    return found


def _best(variant: str, candidates: Iterable[Candidate], untuned_only: bool) -> Candidate | None:
    usable = [found for found in candidates if found.variant == variant and found.timing is not None]
    usable = [found for found in usable if found.first_config] if untuned_only else usable
    return min(usable, key=_speed, default=None)


def _mixed(lower: Candidate, upper: Candidate, weight: float) -> Timing:
    """Each bound on a straight line in log time."""
    at_lower, at_upper = _timing(lower), _timing(upper)

    def between(low: float, high: float) -> float:
        return math.exp((1 - weight) * math.log(low) + weight * math.log(high))

    return dataclasses.replace(
        at_lower,
        median_us=between(at_lower.median_us, at_upper.median_us),
        low_us=between(at_lower.low_us, at_upper.low_us),
        high_us=between(at_lower.high_us, at_upper.high_us),
    )


def _untuned(variants: Mapping[str, Variant], cell: Cell, num_tokens: int, variant: str) -> Config:
    return next(iter(variants[variant].configs(cell.shape, num_tokens)))


def ahead(shape: MoEShape, num_tokens: int) -> str:
    """The variant that is tried before those of FALLBACK_ORDER; "" if none is.

    `cuda.sm90_prefill` is ahead with many rows of an expert: more of them on narrow layers, for which
    `cuda.sm90_stream_in_place` has tall tiles. With fewer rows the latter is ahead, but for layers with few experts,
    wide ones of small experts with a few rows each, and so few tokens that `cuda.sm90_fused` has all of a wide layer's
    chunks of channels under way at a time. On 44 layers and M from 1 to 16384 what is ahead was at least 0.9 times as
    fast as the best in 574 of 581 cases (experiments/2026-11-28_shipped, experiments/2026-11-28_untuned).
    """
    rows, num_chunks = shape.expected_rows(num_tokens), scale_blocks(shape.intermediate_size)
    if shape.num_experts < FEW_EXPERTS:
        return PREFILL if rows >= MANY_ROWS_OF_FEW_EXPERTS else ""
    is_wide = shape.intermediate_size > WIDE
    if rows >= (MANY_ROWS_OF_WIDE if is_wide else MANY_ROWS):
        return PREFILL
    expert_bytes = 3 * shape.intermediate_size * shape.hidden_size
    if is_wide and expert_bytes < SMALL_EXPERT_BYTES and rows >= ROWS_OF_SMALL_EXPERTS:
        return ""
    num_items = (shape.expected_experts_hit(num_tokens) + shape.num_shared_experts) * num_chunks
    return "" if num_chunks >= CHUNKS_OF_SPREAD and num_items <= ITEMS_AT_ONCE else IN_PLACE


def _default(
    table: Table, cell: Cell, num_tokens: int, variants: Mapping[str, Variant], device: torch.device, reason: str
) -> Choice:
    """The first variant of the fallback order, or the one ahead of it, that supports the shape and is not recorded red
    on it."""
    red = {
        found.variant: found.status
        for known, by_tokens in table.cells.items()
        if known.shape == cell.shape
        for candidates in by_tokens.values()
        for found in candidates
        if found.status not in (Status.PASSED, UNVERIFIED, UNTIMED)
    }
    first = ahead(cell.shape, num_tokens)
    refused = []
    for name in sorted(variants, key=lambda name: (name != first, fallback_rank(name))):
        support = variants[name].supports(cell.shape, device)
        if support and name not in red:
            config = next(iter(variants[name].configs(cell.shape, num_tokens)))
            return Choice(name, config, f"the default: {reason}", measured=False, untuned=True)
        refused.append(f"{name}: {red.get(name) or support.reason}")
    raise UnsupportedError(f"no variant runs {cell.shape} on {device}: {'; '.join(refused) or 'none is registered'}")


def fill_command(cell: Cell) -> str:
    """The command line that measures `cell`."""
    shape = cell.shape
    if shape.unserved():
        return f"workbench tune --model <a model of the form {shape}>"  # the numbers alone do not name a form
    shared = f"--shared-experts {shape.num_shared_experts}" if shape.num_shared_experts else "--no-shared-expert"
    routing = "replay:<file>" if cell.routing.startswith("replay:") else cell.routing  # the cell holds a digest of it
    dropped = f" --dropped {cell.dropped:g}" if cell.dropped else ""
    return (
        f"workbench tune --E {shape.num_experts} --N {shape.w13_rows} --K {shape.hidden_size} --top-k {shape.top_k} "
        f"{shared} --routing {routing} --input {cell.input_kind}{dropped}"
    )


@functools.cache
def _log_miss(cell: Cell, variant: str) -> None:
    logger.warning("%s: nothing measured, using %s; to fill it: %s", cell.shape, variant, fill_command(cell))


def _speed(candidate: Candidate) -> tuple[float, str]:
    return _timing(candidate).median_us, candidate.name


def _timing(candidate: Candidate) -> Timing:
    assert candidate.timing is not None
    return candidate.timing


def _figure(timing: Timing) -> str:
    return f"{timing.median_us:.1f} us [{timing.low_us:.1f}, {timing.high_us:.1f}]"
