"""The table as rows: what a report says of one M of one subject, before it is laid out as text or drawn.

Two figures are kept apart throughout: *kernel* (from quantised, aligned inputs) and *layer* (from bf16 tokens and
top-k ids). A variant whose gate is not green shows its status word where its figure would be, and has no speed-up;
a difference inside the noise is called SAME or AMBIGUOUS.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from workbench.problem import InputKind, MoEShape
from workbench.select import Choice, Verdict, choose, fallback_rank, judge
from workbench.table import SCOPES, UNTIMED, Candidate, Cell, Table
from workbench.trace import Scope, Timing, Trace
from workbench.variant import Config, Variant

ABSENT = "-"


@dataclass(frozen=True)
class Subject:
    """What one table is about: everything of a cell but the scope."""

    shape: MoEShape
    routing: str
    input_kind: InputKind
    dropped: float

    def __str__(self) -> str:
        dropped = f", {self.dropped:g} of the choices dropped" if self.dropped else ""
        return f"{self.shape}, routing {self.routing}, {self.input_kind} input{dropped}"


@dataclass(frozen=True)
class Row:
    """One M of one subject."""

    num_tokens: int
    experts_hit: float | None
    """By the routing law, on average; None where the law does not tell."""
    floor_us: float | None
    """Of the kernel scope."""
    best: Mapping[tuple[str, Scope], Candidate]
    """The fastest passed candidate of each variant, or where none passed, the one that says why."""
    rel_err: Mapping[str, float]
    choices: Mapping[Scope, Choice]
    """Empty where nothing was timed."""
    baseline: Mapping[Scope, Timing]
    """What speed-ups are against."""

    def timing(self, variant: str, scope: Scope) -> Timing | None:
        found = self.best.get((variant, scope))
        return found.timing if found is not None else None

    def figure(self, variant: str, scope: Scope) -> str:
        """Microseconds, or the status word, or a dash when nothing was tried."""
        found = self.best.get((variant, scope))
        if found is None:
            return ABSENT
        return f"{found.timing.median_us:.1f}" if found.timing is not None else status_word(found)

    def speed_up(self, variant: str, scope: Scope) -> str:
        """How many times the baseline's speed, with the verdict; the status word where the gate is not green."""
        timing, baseline = self.timing(variant, scope), self.baseline.get(scope)
        if timing is None or baseline is None:
            return self.figure(variant, scope) if timing is None else ABSENT
        if timing is baseline:
            return "baseline"
        verdict = judge(timing, baseline)
        if verdict in (Verdict.SAME, Verdict.AMBIGUOUS):
            return str(verdict)
        return f"{baseline.median_us / timing.median_us:.2f}x {verdict}"

    def floor_fraction(self, variant: str) -> float | None:
        """How much of the speed that the floor allows the kernel reaches, 0..1."""
        timing = self.timing(variant, "kernel")
        return self.floor_us / timing.median_us if timing is not None and self.floor_us is not None else None

    def chosen(self, scope: Scope) -> str:
        """The variant that `select` picks, and whether with another config than its own."""
        choice = self.choices.get(scope)
        if choice is None:
            return ABSENT
        return choice.variant if choice.untuned else f"{choice.variant}, tuned"


def status_word(candidate: Candidate) -> str:
    """What stands where a figure would: the status in capitals, or `verified` for what was not timed."""
    return "verified" if candidate.status == UNTIMED else candidate.status.upper()


def subjects(table: Table) -> list[Subject]:
    """What the table has measurements of, in a fixed order."""
    found = {Subject(cell.shape, cell.routing, cell.input_kind, cell.dropped) for cell in table.cells}
    timed = [subject for subject in found if any(cell_is_timed(table, subject, scope) for scope in SCOPES)]
    return sorted(timed or found, key=str)


def cell_is_timed(table: Table, subject: Subject, scope: Scope) -> bool:
    """Whether any candidate of this cell has a time."""
    by_tokens = table.cells.get(cell_of(subject, scope), {})
    return any(found.timing is not None for candidates in by_tokens.values() for found in candidates)


def rows(
    table: Table, subject: Subject, variants: Mapping[str, Variant], device: torch.device, baseline: str | None = None
) -> list[Row]:
    """One row per M. Speed-ups are against the best of variant `baseline`, or without one against the default."""
    floors, errors = _floors(table, subject), _errors(table, subject)
    by_scope = {scope: table.cells.get(cell_of(subject, scope), {}) for scope in SCOPES}
    made = []
    for num_tokens in sorted({num_tokens for by_tokens in by_scope.values() for num_tokens in by_tokens}):
        best: dict[tuple[str, Scope], Candidate] = {}
        choices: dict[Scope, Choice] = {}
        for scope, by_tokens in by_scope.items():
            candidates = sorted(by_tokens.get(num_tokens, ()), key=_rank)
            for found in reversed(candidates):
                best[found.variant, scope] = found
            if any(found.timing is not None for found in candidates):
                choices[scope] = choose(table, cell_of(subject, scope), num_tokens, variants, device)
        made.append(
            Row(
                num_tokens,
                experts_hit=expected_experts_hit(subject, num_tokens),
                floor_us=floors.get(num_tokens),
                best=best,
                rel_err=_errors_of(best.values(), errors.get(num_tokens, {})),
                choices=choices,
                baseline=_baselines(best, choices, baseline),
            )
        )
    return made


def expected_experts_hit(subject: Subject, num_tokens: int) -> float | None:
    """How many experts a batch reaches on average; None for laws that a formula does not cover."""
    shape = subject.shape
    routed_hit = {
        "uniform": shape.expected_experts_hit(num_tokens, subject.dropped),
        "one-expert": (shape.top_k - shape.num_shared_experts) * (1 - subject.dropped**num_tokens),
    }.get(subject.routing)
    if routed_hit is None:
        return None
    return (shape.num_shared_experts if num_tokens else 0) + routed_hit


def cell_of(subject: Subject, scope: Scope) -> Cell:
    """The table's cell of one scope of the subject."""
    return Cell(subject.shape, subject.routing, subject.input_kind, scope, subject.dropped)


def _rank(candidate: Candidate) -> tuple[bool, float, bool, str]:
    """Timed before untimed, fast before slow, and among those without a time the variant's own default first."""
    median = candidate.timing.median_us if candidate.timing is not None else math.inf
    return candidate.timing is None, median, not candidate.first_config, candidate.name


def _baselines(
    best: Mapping[tuple[str, Scope], Candidate], choices: Mapping[Scope, Choice], baseline: str | None
) -> dict[Scope, Timing]:
    """What speed-ups are against in each scope; a scope without it is left out."""
    against = {
        scope: choice.default if baseline is None else best.get((baseline, scope)) for scope, choice in choices.items()
    }
    return {scope: one.timing for scope, one in against.items() if one is not None and one.timing is not None}


def _floors(table: Table, subject: Subject) -> dict[int, float]:
    return {
        trace.key.num_tokens: trace.floor_us
        for trace in table.traces
        if trace.scope == "kernel" and trace.floor_us is not None and _is_of(trace, subject)
    }


def _errors(table: Table, subject: Subject) -> dict[int, dict[tuple[str, Config], float]]:
    """M -> (variant, config) -> relative error."""
    errors: dict[int, dict[tuple[str, Config], float]] = defaultdict(dict)
    for trace in table.traces:
        if trace.job == "verify" and trace.accuracy is not None and _is_of(trace, subject):
            errors[trace.key.num_tokens][trace.key.variant, trace.key.config] = trace.accuracy.rel_err
    return errors


def _errors_of(best: Iterable[Candidate], errors: Mapping[tuple[str, Config], float]) -> dict[str, float]:
    """By variant, the largest error of the configs that are shown."""
    found: dict[str, float] = {}
    for one in best:
        if one.identity in errors:
            found[one.variant] = max(errors[one.identity], found.get(one.variant, 0.0))
    return found


def _is_of(trace: Trace, subject: Subject) -> bool:
    key = trace.key
    return Subject(key.shape, key.routing, key.input_kind, key.dropped) == subject


def variants_of(rows: Sequence[Row]) -> list[str]:
    """The variants that any row tells of, in the order in which a default is looked for."""
    return sorted({variant for row in rows for variant, _ in row.best}, key=fallback_rank)
