"""How the commands speak: results to stdout, as tables or as one JSON document; progress to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from workbench.report import Section, rich_table
from workbench.select import Choice
from workbench.sweep import failures
from workbench.table import Cell
from workbench.trace import Status, Trace, to_json

WIDTH_IN_FILES = 200


def watch(title: str, total: int, traces: Iterator[Trace]) -> Iterator[Trace]:
    """Shows progress while traces come: a bar on a terminal, one line elsewhere; what is not green as it comes."""
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    if not console.is_terminal:
        console.print(f"{title}: {total} to do")
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=total)
        for one in traces:
            yield one
            progress.advance(bar)
            if one.status is not Status.PASSED:
                key = one.key
                console.print(
                    f"{one.job} {key.variant} [{key.config}] {key.shape} M={key.num_tokens}: "
                    f"{one.status.upper()}: {one.message}"
                )


def print_json(content: Any) -> None:
    """One JSON document on stdout."""
    json.dump(content, sys.stdout, indent=1, allow_nan=False)
    sys.stdout.write("\n")


def print_section(section: Section) -> None:
    """One table on stdout, as wide as the terminal, or as its content when there is none."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_FILES)
    console.print(rich_table(section))


def print_traces(traces: Sequence[Trace], as_json: bool) -> None:
    """What was measured or found, trace by trace."""
    if as_json:
        print_json({"traces": [to_json(one) for one in traces]})
    else:
        print_section(measurements(traces))


def print_report(sections: Sequence[Section], traces: Sequence[Trace], files: Sequence[Path], as_json: bool) -> None:
    """A whole report, and the files that hold it."""
    if as_json:
        tables = {
            section.title: [dict(zip(section.header, line, strict=True)) for line in section.lines]
            for section in sections
        }
        print_json(
            {"tables": tables, "traces": [to_json(one) for one in traces], "files": [str(file) for file in files]}
        )
        return
    for section in sections:
        print_section(section)
    for file in files:
        print(file)


def measurements(traces: Sequence[Trace]) -> Section:
    """One line per trace: what, how it ended, and the figure or the message."""
    header = ["job", "variant", "config", "shape", "M", "routing", "input", "scope", "status", "result"]
    lines = []
    for one in traces:
        key = one.key
        what = [one.job, key.variant, str(key.config), str(key.shape), str(key.num_tokens), key.routing, key.input_kind]
        lines.append([*what, one.scope or "-", one.status.upper(), _result(one)])
    return Section("Measurements", header, lines)


def choices(chosen: Sequence[tuple[Cell, int, Choice]]) -> Section:
    """One line per cell and M: what to run and why."""
    header = ["shape", "routing", "input", "scope", "M", "variant", "config", "why"]
    lines = [
        [
            *(str(cell.shape), cell.routing, cell.input_kind, cell.scope, str(num_tokens)),
            *(choice.variant, str(choice.config), choice.reason),
        ]
        for cell, num_tokens, choice in chosen
    ]
    return Section("Choices", header, lines)


def explanation(cell: Cell, num_tokens: int, choice: Choice) -> Section:
    """Every candidate for one cell and M, and why it lost."""
    title = (
        f"{cell.shape} M={num_tokens} {cell.routing} {cell.input_kind} {cell.scope}: {choice.variant}, {choice.reason}"
    )
    lines = [
        [one.variant, str(one.config), "shipped" if one.shipped else "here", lost or "CHOSEN"]
        for one, lost in choice.candidates
    ]
    return Section(title, ["variant", "config", "measured", "why it lost"], lines)


def shipped_tables(files: Sequence[Path], traces: Sequence[Trace]) -> Section:
    """One line per shape: how much was measured of it, and what went wrong."""
    lines, wrong = [], failures(traces)
    for shape in dict.fromkeys(one.key.shape for one in traces):
        some = [one for one in traces if one.key.shape == shape]
        cells = {(one.key.num_tokens, one.key.routing) for one in some if one.timing is not None}
        red = sorted({f"{one.key.variant} M={one.key.num_tokens}: {one.status}" for one in some if one in wrong})
        lines.append([str(shape), str(len(cells)), ", ".join(red) or "-"])
    size = sum(file.stat().st_size for file in files)
    return Section(f"{len(files)} tables, {size} bytes", ["shape", "M and law timed", "not passed"], lines)


def _result(one: Trace) -> str:
    if one.status is not Status.PASSED:
        return one.message.partition("\n")[0]
    if one.timing is not None:
        return f"{one.timing.median_us:.1f} us [{one.timing.low_us:.1f}, {one.timing.high_us:.1f}]"
    if one.accuracy is not None:
        return f"relative error {one.accuracy.rel_err:.1e} of {one.accuracy.tolerance:g} allowed"
    if one.compiled is not None:
        return f"{one.compiled.kernel}: {one.compiled.registers} registers, {one.compiled.spill_bytes} bytes spilled"
    return "-"
