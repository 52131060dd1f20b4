"""Tables from rows and traces, for a terminal and for a README: times, speed-ups, accuracy, resources, failures.

A report is a list of sections, each a title with a header and lines of text; both renderings show the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.markup import escape
from rich.table import Table as RichTable

from workbench import plot
from workbench.doctor import Ability
from workbench.rows import ABSENT, Row, rows, subjects, variants_of
from workbench.table import SCOPES, Table
from workbench.trace import Scope, Status, Trace
from workbench.variant import Variant

TABLE_FILE = "table.md"


@dataclass(frozen=True)
class Section:
    """One table of a report."""

    title: str
    header: list[str]
    lines: list[list[str]]


def sections(
    table: Table,
    traces: Sequence[Trace],
    variants: Mapping[str, Variant],
    device: torch.device,
    abilities: Mapping[str, tuple[Ability, str]],
    baseline: str | None = None,
) -> list[Section]:
    """The whole report: how each variant was used, the figures of each subject, resources, and what is not green.

    Speed-ups are against variant `baseline`, or without one against the default.
    """
    against = baseline or "the default"
    found = [_usage(abilities)]
    for subject in subjects(table):
        of_subject = rows(table, subject, variants, device, baseline)
        if any(row.choices for row in of_subject):
            found.append(times(str(subject), of_subject))
            found += [speed_ups(f"{subject}: {scope} speed against {against}", of_subject, scope) for scope in SCOPES]
        found.append(accuracies(f"{subject}: accuracy and roofline", of_subject))
    found += [compiled(traces), not_green(traces)]
    return [section for section in found if section.lines]


def save(
    folder: Path,
    table: Table,
    traces: Sequence[Trace],
    variants: Mapping[str, Variant],
    device: torch.device,
    abilities: Mapping[str, tuple[Ability, str]],
    baseline: str | None = None,
) -> list[Path]:
    """Write the report as Markdown and its plots into `folder`; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = table.environment
    head = (
        f"Device {environment.device}, driver {environment.driver}, CUDA {environment.cuda}, "
        f"torch {environment.torch}, triton {environment.triton}, cupy {environment.cupy}. Microseconds per call, "
        "medians. *kernel*: from quantised, aligned inputs; *layer*: from bf16 tokens and top-k ids.\n"
    )
    found = sections(table, traces, variants, device, abilities, baseline)
    path = folder / TABLE_FILE
    path.write_text("\n".join([head, *(f"## {section.title}\n\n{markdown(section)}" for section in found)]))
    drawn = [
        file
        for subject in subjects(table)
        for file in plot.save(subject, rows(table, subject, variants, device, baseline), folder)
    ]
    return [path, *drawn]


def _usage(abilities: Mapping[str, tuple[Ability, str]]) -> Section:
    lines = [[name, str(ability), reason or ABSENT] for name, (ability, reason) in abilities.items()]
    return Section("Variants on this machine", ["variant", "how", "why not better"], lines)


def times(title: str, rows: Sequence[Row]) -> Section:
    """M, experts hit, floor, each variant's kernel and layer time, the choice for the layer."""
    names = variants_of(rows)
    header = ["M", "experts hit", "floor us"]
    header += [f"{name} {scope} us" for name in names for scope in SCOPES]
    header += ["chosen (kernel)", "chosen (layer)"]
    lines = []
    for row in rows:
        line = [str(row.num_tokens), _number(row.experts_hit, ".0f"), _number(row.floor_us, ".1f")]
        line += [row.figure(name, scope) for name in names for scope in SCOPES]
        line += [row.chosen(scope) for scope in SCOPES]
        lines.append(line)
    return Section(title, header, lines)


def speed_ups(title: str, rows: Sequence[Row], scope: Scope) -> Section:
    """M, and each variant's speed-up over the baseline in one scope."""
    names = variants_of(rows)
    lines = [[str(row.num_tokens), *(row.speed_up(name, scope) for name in names)] for row in rows]
    return Section(title, ["M", *names], lines)


def accuracies(title: str, rows: Sequence[Row]) -> Section:
    """M, and each variant's relative error and fraction of the floor's speed in the kernel scope."""
    names = variants_of(rows)
    header = ["M", *(f"{name} {what}" for name in names for what in ("rel. error", "of the floor"))]
    lines = [
        [
            str(row.num_tokens),
            *(
                text
                for name in names
                for text in (_number(row.rel_err.get(name), ".1e"), _number(row.floor_fraction(name), ".0%"))
            ),
        ]
        for row in rows
    ]
    return Section(title, header, lines)


def compiled(traces: Iterable[Trace]) -> Section:
    """What the compiler said of each kernel."""
    header = [
        "variant",
        "shape",
        "kernel",
        "config",
        "registers",
        "spill bytes",
        "stack bytes",
        "smem bytes",
        "warnings",
    ]
    lines = []
    for trace in traces:
        if trace.job != "compile" or trace.status is Status.UNSUPPORTED:
            continue
        said, start = trace.compiled, [trace.key.variant, str(trace.key.shape)]
        if said is None:
            lines.append(
                [*start, ABSENT, str(trace.key.config), *[ABSENT] * 4, f"{trace.status.upper()}: {trace.message}"]
            )
            continue
        smem_bytes = said.static_smem_bytes + said.dynamic_smem_bytes
        resources = (said.registers, said.spill_bytes, said.stack_bytes, smem_bytes)
        lines.append([*start, said.kernel, str(said.config), *map(str, resources), "; ".join(said.warnings) or "none"])
    # Configs share kernels that do not depend on them.
    lines = [list(line) for line in dict.fromkeys(map(tuple, lines))]
    return Section("Compiled for sm_90a, not run", header, lines)


def not_green(traces: Iterable[Trace]) -> Section:
    """Everything that did not pass, with its message."""
    header = ["job", "variant", "config", "shape", "M", "input", "status", "message"]
    lines = [
        [
            trace.job,
            trace.key.variant,
            str(trace.key.config),
            str(trace.key.shape),
            str(trace.key.num_tokens),
            trace.key.input_kind,
            trace.status.upper(),
            trace.message.partition("\n")[0],
        ]
        for trace in traces
        if trace.status is not Status.PASSED
    ]
    return Section("Not green", header, lines)


def rich_table(section: Section) -> RichTable:
    """The section for a terminal."""
    table = RichTable(title=section.title, title_justify="left")
    for name in section.header:
        table.add_column(name, justify="left" if name == section.header[-1] else "right", overflow="fold")
    for line in section.lines:
        table.add_row(*(escape(text) for text in line))
    return table


def markdown(section: Section) -> str:
    """The section for a README."""
    cells = [section.header, ["---:"] * len(section.header), *section.lines]
    return "".join("| " + " | ".join(text.replace("|", "\\|") for text in line) + " |\n" for line in cells)


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)
