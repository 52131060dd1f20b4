"""What the commands share: groups of options as dataclasses, and how a command ends.

A command is a function that takes such groups and returns an exit code; `command` turns it into what typer understands.
Exit codes: 0 all well, 1 something is wrong, crashed, hung or failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import typer
from rich.console import Console

from workbench import compare, registry, timing
from workbench.environment import device_named, settings
from workbench.errors import InputError, RecordError, WorkbenchError
from workbench.models import shape_of_alias, shape_of_model
from workbench.problem import InputKind, MoEShape, RoutingLaw, Workload
from workbench.select import fallback_rank
from workbench.sweep import Session, Watch, open_session
from workbench.variant import Variant

EXIT_WRONG, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130
TRACES_FILE = "traces.jsonl"
TOP_K = 8
"""Routed experts per token of most models, and of a shape by numbers that does not say."""
EFFORTS = {"quick": timing.QUICK, "normal": timing.NORMAL}

_PROBLEM, _RUN = "Problem", "Run"


@dataclass(frozen=True)
class ProblemOptions:
    """Which layers and batches."""

    shape: Annotated[list[str] | None, typer.Option(help="A shape's alias; repeatable.", rich_help_panel=_PROBLEM)] = (
        None
    )
    model: Annotated[str | None, typer.Option(help="A model's name; see --tp.", rich_help_panel=_PROBLEM)] = None
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks of --model.", rich_help_panel=_PROBLEM)] = 1
    num_experts: Annotated[
        int | None, typer.Option("--E", help="Experts, shared ones included.", rich_help_panel=_PROBLEM)
    ] = None
    w13_rows: Annotated[int | None, typer.Option("--N", help="Rows of w13, 2I.", rich_help_panel=_PROBLEM)] = None
    hidden_size: Annotated[int | None, typer.Option("--K", help="Hidden size.", rich_help_panel=_PROBLEM)] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Experts per token, shared ones included; default with --E 8 and the shared ones.",
            rich_help_panel=_PROBLEM,
        ),
    ] = None
    shared_experts: Annotated[int, typer.Option(help="How many of --E are shared.", rich_help_panel=_PROBLEM)] = 0
    no_shared_expert: Annotated[
        bool,
        typer.Option(
            "--no-shared-expert",
            help="None of --E is shared; with --model alone, its routed experts alone.",
            rich_help_panel=_PROBLEM,
        ),
    ] = False
    tokens: Annotated[str | None, typer.Option(help="Batch sizes M, such as 1,2,8.", rich_help_panel=_PROBLEM)] = None
    routing: Annotated[
        str, typer.Option(help="uniform, zipf:<exponent>, one-expert or replay:<file>.", rich_help_panel=_PROBLEM)
    ] = "uniform"
    input_kind: Annotated[
        str, typer.Option("--input", help="Tokens as bf16 or as quantised fp8.", rich_help_panel=_PROBLEM)
    ] = "bf16"
    seed: Annotated[int, typer.Option(rich_help_panel=_PROBLEM)] = 0
    dropped: Annotated[float, typer.Option(help="Fraction of choices that are -1.", rich_help_panel=_PROBLEM)] = 0.0

    def shapes(self) -> list[MoEShape]:
        """The shapes that were asked for, by whatever way; empty when none was."""
        found = [shape_of_alias(alias) for alias in self.shape or []]
        numbers = {"--E": self.num_experts, "--N": self.w13_rows, "--K": self.hidden_size}
        given = {name: value for name, value in numbers.items() if value is not None}
        if self.model is not None:
            routed_alone = self.no_shared_expert and not given
            found.append(shape_of_model(self.model, self.tp, shared_as_experts=not routed_alone))
        elif self.tp != 1:
            raise InputError("tp: expected --model with it")
        if len(given) == len(numbers):
            found.append(self._shape_of_numbers(*given.values()))
        elif given or self.top_k is not None or self.shared_experts or (self.no_shared_expert and self.model is None):
            missing = ", ".join(name for name in numbers if name not in given)
            raise InputError(f"shape: expected {', '.join(numbers)} together, {missing} missing")
        return list(dict.fromkeys(found))

    def batch_sizes(self) -> list[int]:
        """The values of --tokens; empty when it was not given."""
        if self.tokens is None:
            return []
        return list(dict.fromkeys(_batch_size(text) for text in self.tokens.split(",")))

    def workloads(self, device: torch.device) -> list[Workload]:
        """Every shape with every batch size; what was not given is what `compare` takes on this device."""
        on_gpu = device.type == "cuda"
        default_shapes = compare.GPU_SHAPES if on_gpu else compare.CPU_SHAPES
        shapes = self.shapes() or [shape_of_alias(alias) for alias in default_shapes]
        batch_sizes = self.batch_sizes() or (compare.GPU_TOKENS if on_gpu else compare.CPU_TOKENS)
        law = RoutingLaw.parse(self.routing)
        kind: InputKind = self.input_kind  # type: ignore[assignment]  # Workload checks it
        return [
            Workload(shape, num_tokens, law, self.seed, kind, self.dropped)
            for shape in shapes
            for num_tokens in batch_sizes
        ]

    def _shape_of_numbers(self, num_experts: int, w13_rows: int, hidden_size: int) -> MoEShape:
        if w13_rows % 2:
            raise InputError(f"N: expected an even number, gate and up rows, got {w13_rows}")
        if self.no_shared_expert and self.shared_experts:
            raise InputError(f"shared-experts: expected 0 with --no-shared-expert, got {self.shared_experts}")
        top_k = TOP_K + self.shared_experts if self.top_k is None else self.top_k
        return MoEShape(num_experts, hidden_size, w13_rows // 2, top_k, self.shared_experts)


@dataclass(frozen=True)
class PlaceOptions:
    """Which variants, where, and where results are."""

    variants: Annotated[
        str | None, typer.Option(help="Variants to use, such as a,b; default all.", rich_help_panel=_RUN)
    ] = None
    exclude: Annotated[str | None, typer.Option(help="Variants to leave out.", rich_help_panel=_RUN)] = None
    device: Annotated[
        str | None, typer.Option(help="cuda, cuda:<n> or cpu; default the GPU if there is one.", rich_help_panel=_RUN)
    ] = None
    results: Annotated[
        Path | None, typer.Option(help="Folder of traces and reports; default results.", rich_help_panel=_RUN)
    ] = None
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout, for machines.", rich_help_panel=_RUN)] = False

    def where(self) -> torch.device:
        """The device. InputError when it is not there."""
        if self.device is None:
            return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        return device_named(self.device)

    def chosen(self) -> dict[str, Variant]:
        """The variants asked for, in the order in which a default is looked for among them."""
        wanted = _names(self.variants) or list(registry.variants())
        unwanted = [registry.find(name).name for name in _names(self.exclude)]
        found = {name: registry.find(name) for name in sorted(wanted, key=fallback_rank) if name not in unwanted}
        if not found:
            raise InputError(f"variants: expected at least one, all of {', '.join(wanted) or 'none'} are excluded")
        return found

    def folder(self) -> Path:
        return self.results or settings().results


@dataclass(frozen=True)
class RunOptions(PlaceOptions):
    """And how to measure."""

    effort: Annotated[
        Literal["quick", "normal"], typer.Option(help="How many samples to take.", rich_help_panel=_RUN)
    ] = "normal"
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which a measurement counts as hung.", rich_help_panel=_RUN)
    ] = 120.0
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what is recorded already.", rich_help_panel=_RUN)
    ] = False

    def session(self, watch: Watch) -> Session:
        """A session that records to the results folder."""
        if self.time_limit <= 0:
            raise InputError(f"time-limit: expected a positive number of seconds, got {self.time_limit:g}")
        return open_session(
            self.where(),
            self.folder() / TRACES_FILE,
            time_limit_s=self.time_limit,
            effort=EFFORTS[self.effort],
            fresh=self.fresh,
            watch=watch,
        )


def config_limit(text: str) -> int | None:
    """How many configs of a variant `all`, `default` or a number stand for; None is all."""
    if text in ("all", "default"):
        return None if text == "all" else 1
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"configs: expected all, default or a number >= 1, got {text!r}")
    return int(text)


def command(function: Callable[..., int]) -> Callable[..., None]:
    """A typer command from a function: option groups become options, errors one line, and its result the exit code."""
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            groups[parameter.name] = parameter.annotation  # type: ignore[assignment]
            parameters += _options_of(parameter.annotation)  # type: ignore[arg-type]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    def run(**values: Any) -> None:
        arguments = {
            name: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
            for name, group in groups.items()
        }
        raise typer.Exit(_exit_code(functools.partial(function, **arguments, **values)))

    run.__name__, run.__doc__ = function.__name__, function.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _exit_code(call: Callable[[], int]) -> int:
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        return call()
    except RecordError as error:
        errors.print(f"error: {error} (--results names another folder)")
        return EXIT_BAD_INPUT
    except WorkbenchError as error:
        errors.print(f"error: {error}")
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        errors.print("interrupted: what was measured is kept, and a rerun goes on from there")
        return EXIT_INTERRUPTED


def _options_of(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(group)
    ]


def _batch_size(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise InputError(f"tokens: expected integers >= 0 separated by commas, got {text.strip()!r}")
    return value


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
