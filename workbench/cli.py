"""The command line: `workbench <command>`, where the commands are

    verify | bench | tune | select | report | compare | list | doctor | recover | ship

Results go to stdout, as tables or with --json as one JSON document; progress and errors go to stderr.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from workbench import compare as comparison
from workbench import doctor as diagnosis
from workbench import registry, shipped
from workbench import report as reports
from workbench import select as selection
from workbench import ship as shipping
from workbench import table as tables
from workbench import trace as records
from workbench import tune as tuning
from workbench.cli_options import (
    EXIT_WRONG,
    TRACES_FILE,
    PlaceOptions,
    ProblemOptions,
    RunOptions,
    command,
    config_limit,
)
from workbench.cli_output import (
    choices,
    explanation,
    print_json,
    print_report,
    print_section,
    print_traces,
    shipped_tables,
    watch,
)
from workbench.compat.alpha_moe_configs import fastest, tunable, write_best_configs
from workbench.compat.kernel import VARIANT
from workbench.doctor import Ability
from workbench.environment import current
from workbench.errors import InputError
from workbench.models import ALIASES, MODELS
from workbench.problem import Workload
from workbench.report import Section
from workbench.rows import cell_of, subjects
from workbench.strict_json import encode
from workbench.sweep import Session, failures
from workbench.table import SCOPES, Cell, Table
from workbench.trace import Trace
from workbench.variant import Variant


class Listing(StrEnum):
    """What `workbench list` lists."""

    VARIANTS = "variants"
    MODELS = "models"


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Prove, time and choose implementations of the FP8 fused Mixture-of-Experts layer.",
)

Configs = Annotated[str, typer.Option(help="Configs per variant: all, default, or a number.")]
OutFile = Annotated[
    Path | None,
    typer.Option(help="Also write the best block_m, block_n, warp_n and stages for each M, as Alpha-MoE's tuner does."),
]
Baseline = Annotated[str | None, typer.Option(help="The variant that speed-ups are against; default the default.")]


@app.callback()
def _set_up() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")


@app.command("verify")
@command
def verify(problem: ProblemOptions, run: RunOptions, configs: Configs = "default") -> int:
    """Check variants against the reference; exit 1 when any is wrong, crashes, hangs or fails."""
    session = run.session(watch)
    workloads = problem.workloads(session.device)
    traces = tuning.verify(session, workloads, list(run.chosen()), config_limit(configs))
    print_traces(traces, run.json)
    return EXIT_WRONG if failures(traces) else 0


@app.command("bench")
@command
def bench(problem: ProblemOptions, run: RunOptions, configs: Configs = "default") -> int:
    """Time variants interleaved, those that pass verification: kernel and layer."""
    session = run.session(watch)
    workloads = problem.workloads(session.device)
    variants, limit = _timeable(session, run.chosen()), config_limit(configs)
    spaces = [tuning.space(variants, workload, limit) for workload in workloads]
    traces = tuning.race(session, workloads, spaces)
    print_traces(traces, run.json)
    return EXIT_WRONG if failures(traces) else 0


@app.command("tune")
@command
def tune(problem: ProblemOptions, run: RunOptions, configs: Configs = "all", out_file: OutFile = None) -> int:
    """Search the variants' configs, and write the selection table."""
    session = run.session(watch)
    workloads = problem.workloads(session.device)
    variants, limit = _timeable(session, run.chosen()), config_limit(configs)
    if out_file is not None:
        _check_nameable(workloads, variants)
    traces = tuning.verify(session, workloads, variants, limit)
    traces += tuning.tune(session, workloads, variants, limit=limit)
    if out_file is not None:
        traces = list(dict.fromkeys(traces + _write_best_configs(out_file, session, workloads)))
    tables.save(_table(run, registry.variants()), run.folder() / tables.SELECTION_FILE)
    print_traces(traces, run.json)
    return EXIT_WRONG if failures(traces) else 0


@app.command("compare")
@command
def compare(problem: ProblemOptions, run: RunOptions, configs: Configs = "4", baseline: Baseline = None) -> int:
    """Verify, tune briefly, bench, select and report: everything this machine can do."""
    session = run.session(watch)
    workloads = problem.workloads(session.device)
    chosen = run.chosen()
    _check_baseline(baseline, chosen)
    made = comparison.compare(session, workloads, list(chosen), config_limit(configs))
    files = comparison.save(made, session, run.folder(), baseline)
    found = reports.sections(made.table, made.traces, chosen, session.device, made.abilities, baseline)
    print_report(found, made.traces, files, run.json)
    return EXIT_WRONG if failures(made.traces) else 0


@app.command("select")
@command
def select(
    problem: ProblemOptions,
    place: PlaceOptions,
    explain: Annotated[bool, typer.Option("--explain", help="Every candidate, and why it lost.")] = False,
) -> int:
    """Choose from what is recorded, and for what is not from what is shipped; write the selection table."""
    device, variants = place.where(), place.chosen()
    if problem.shapes() and not (place.folder() / TRACES_FILE).exists():
        table = Table(current(device), (), {})  # what is shipped may still answer
    else:
        table = _table(place, variants)
        tables.save(table, place.folder() / tables.SELECTION_FILE)
    for shape in problem.shapes() or {cell.shape: None for cell in table.cells}:
        table = shipped.with_shipped(table, shape, variants)
    chosen = [
        (cell, num_tokens, selection.choose(table, cell, num_tokens, variants, device))
        for cell, num_tokens in _questions(problem, table, device)
    ]
    if place.json:
        print_json(
            [{"cell": encode(cell), "num_tokens": num_tokens, **encode(choice)} for cell, num_tokens, choice in chosen]
        )
    elif explain:
        for cell, num_tokens, choice in chosen:
            print_section(explanation(cell, num_tokens, choice))
    else:
        print_section(choices(chosen))
    return 0


@app.command("ship")
@command
def ship(
    run: RunOptions,
    time_limit_total: Annotated[
        float, typer.Option(help="Seconds after which nothing more is begun; a rerun goes on from there.")
    ] = math.inf,
    compile_only: Annotated[
        bool, typer.Option("--compile-only", help="Compile what it takes, which needs no GPU, and measure nothing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder to write the tables to; default the package's.")] = shipped.FOLDER,
) -> int:
    """Measure the selection tables that come with the package, and write them."""
    deadline, variants = time.monotonic() + time_limit_total, run.chosen()
    workloads = shipping.plan()
    if not compile_only and run.where().type != "cuda":
        raise InputError(f"device: expected a GPU to measure on, got {run.where()}; --compile-only needs none")
    shipping.compile_ahead(workloads, variants, None if compile_only else run.where())
    if compile_only:
        return 0
    session = run.session(watch)
    filled = shipping.fill(session, workloads, variants, deadline)
    files = shipped.write(filled.traces, session.environment, variants, out)
    if run.json:
        print_json({"workloads": len(workloads), "left": filled.num_left, "files": [str(file) for file in files]})
    else:
        print_section(shipped_tables(files, filled.traces))
        typer.echo(f"{len(workloads) - filled.num_left} of {len(workloads)} workloads are measured")
    return EXIT_WRONG if failures(filled.traces) else 0


@app.command("report")
@command
def report(place: PlaceOptions, baseline: Baseline = None) -> int:
    """Tables and plots of what is recorded."""
    device, variants = place.where(), place.chosen()
    table = _table(place, variants)
    _check_baseline(baseline, variants)
    traces = [one for one in records.read(_traces_file(place)) if one.key.environment == table.environment]
    how = diagnosis.abilities(variants, device)
    files = reports.save(place.folder(), table, traces, variants, device, how, baseline)
    found = reports.sections(table, traces, variants, device, how, baseline)
    print_report(found, traces, files, place.json)
    return 0


@app.command("list")
@command
def list_(
    problem: ProblemOptions,
    place: PlaceOptions,
    what: Annotated[Listing, typer.Argument(help="What to list.")] = Listing.VARIANTS,
) -> int:
    """Variants with their support for shapes and number of configs; or the models and aliases there are."""
    if what is Listing.MODELS:
        header, lines = _models()
    else:
        header, lines = _variants(problem, place)
    if place.json:
        print_json([dict(zip(header, line, strict=True)) for line in lines])
    else:
        print_section(Section(f"{what}", header, lines))
    return 0


@app.command("doctor")
@command
def doctor(place: PlaceOptions) -> int:
    """What this machine can run, and what is missing; exit 1 when no variant runs."""
    found = diagnosis.diagnose(place.where())
    if place.json:
        print_json({"usable": found.usable, **encode(found)})
    else:
        findings = [[one.subject, "ok" if one.ok else "missing", one.found] for one in found.findings]
        print_section(Section("This machine", ["what", "state", "found"], findings))
        uses = [[one.variant, one.backend, str(one.ability), one.reason or "-"] for one in found.variants]
        print_section(Section("Variants", ["variant", "backend", "how", "why not better"], uses))
    return 0 if found.usable else EXIT_WRONG


@app.command("recover")
@command
def recover(place: PlaceOptions) -> int:
    """Cut a torn last line, as a crash while writing leaves it, off the trace file, so that work can resume."""
    path = _traces_file(place)
    cut = records.recover(path)
    if place.json:
        print_json({"file": str(path), "cut": cut})
    else:
        typer.echo(f"{path}: cut off {cut!r}" if cut else f"{path}: the last line is whole")
    return 0


def _check_baseline(baseline: str | None, variants: Mapping[str, Variant]) -> None:
    if baseline is not None and baseline not in variants:
        raise InputError(f"baseline: expected one of {', '.join(variants)}, got {baseline!r}")


def _timeable(session: Session, variants: Mapping[str, Variant]) -> list[str]:
    """The variants that run here; the others are named with the reason."""
    found = []
    for name, (ability, reason) in diagnosis.abilities(variants, session.device).items():
        if ability is Ability.NATIVE:
            found.append(name)
        else:
            logging.getLogger(__name__).warning("%s is not timed: %s", name, reason)
    if not found:
        raise InputError(f"variants: expected one that runs on {session.device}, got {', '.join(variants)}")
    return found


def _check_nameable(workloads: Sequence[Workload], variants: Sequence[str]) -> None:
    """InputError unless a file that names a batch size alone can hold what is tuned."""
    shapes = {workload.shape: None for workload in workloads}
    if len(shapes) != 1:
        raise InputError(f"out-file: expected one shape, got {', '.join(map(str, shapes))}")
    if VARIANT not in variants:
        raise InputError(f"out-file: expected {VARIANT} among the variants that run, got {', '.join(variants)}")


def _write_best_configs(path: Path, session: Session, workloads: Sequence[Workload]) -> list[Trace]:
    """Time what the file can name, and write the fastest for each M; all traces made or found."""
    spaces = [tuple((VARIANT, config) for config in tunable(one.shape, one.num_tokens)) for one in workloads]
    traces = tuning.race(session, workloads, spaces)
    best = fastest(traces)
    if not best:
        raise InputError(f"out-file: expected a config of {VARIANT} that is right, to write to {path}, found none")
    write_best_configs(path, best)
    return traces


def _traces_file(place: PlaceOptions) -> Path:
    path = place.folder() / TRACES_FILE
    if not path.exists():
        raise InputError(f"results: no {TRACES_FILE} in {place.folder()}; `workbench compare` makes it")
    return path


def _table(place: PlaceOptions, variants: Mapping[str, Variant]) -> Table:
    """The table of all that is recorded of `variants` in this environment."""
    return tables.build(records.read(_traces_file(place)), current(place.where()), variants)


def _questions(problem: ProblemOptions, table: Table, device: torch.device) -> list[tuple[Cell, int]]:
    """The cells and M that were asked for, else all that were measured."""
    if problem.shapes():
        return [
            (Cell(one.shape, one.routing.identity(), one.input_kind, scope, one.dropped), one.num_tokens)
            for one in problem.workloads(device)
            for scope in SCOPES
        ]
    wanted = problem.batch_sizes()
    return [
        (cell_of(subject, scope), num_tokens)
        for subject in subjects(table)
        for scope in SCOPES
        for num_tokens in wanted or sorted(table.cells.get(cell_of(subject, scope), {}))
    ]


def _models() -> tuple[list[str], list[list[str]]]:
    header = ["name", "E", "H", "I", "top_k", "shared", "note"]
    lines = [
        [
            *(model.name, str(model.num_experts + model.num_shared_experts), str(model.hidden_size)),
            *(str(model.intermediate_size), str(model.top_k + model.num_shared_experts)),
            *(str(model.num_shared_experts), model.note),
        ]
        for model in MODELS.values()
    ]
    lines += [
        [
            *(name, str(shape.num_experts), str(shape.hidden_size), str(shape.intermediate_size)),
            *(str(shape.top_k), str(shape.num_shared_experts), "alias: one rank's slice"),
        ]
        for name, shape in ALIASES.items()
    ]
    return header, lines


def _variants(problem: ProblemOptions, place: PlaceOptions) -> tuple[list[str], list[list[str]]]:
    device = place.where()
    header = ["variant", "backend", "shape", "M", "configs", f"on {device}"]
    lines = [
        [
            *(name, variant.backend, str(workload.shape), str(workload.num_tokens)),
            str(len(list(variant.configs(workload.shape, workload.num_tokens)))),
            support.reason or "supported",
        ]
        for name, variant in place.chosen().items()
        for workload in problem.workloads(device)
        for support in [variant.supports(workload.shape, device)]
    ]
    return header, lines


def main() -> None:
    """The console script."""
    app()
