"""Plots of a report's rows as PNG files: time against M with the floor drawn in, speed-up, roofline and error.

Kernel figures are solid lines and layer figures dotted ones; a variant keeps its colour in every plot.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from workbench.rows import Row, Subject, variants_of
from workbench.select import Verdict, judge

LINE_STYLES = {"kernel": "-", "layer": ":"}


def save(subject: Subject, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write the plots of one subject into `folder`, leaving out those that would show nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.num_tokens > 0]
    drawings: dict[str, Callable[[Axes, Sequence[Row]], bool]] = {
        "time": _times,
        "speedup": _speed_up_grid,
        "roofline": _roofline,
        "error": _errors,
    }
    written = []
    for kind, draw in drawings.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        if timed and draw(axes, timed):
            axes.set_title(f"{subject}", fontsize=10)
            path = folder / f"{file_stem(subject)}_{kind}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def file_stem(subject: Subject) -> str:
    """The subject as a file name; what is the default is left out."""
    parts = [str(subject.shape)]
    parts += [subject.routing] if subject.routing != "uniform" else []
    parts += [subject.input_kind] if subject.input_kind != "bf16" else []
    parts += [f"dropped{subject.dropped:g}"] if subject.dropped else []
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(parts))


def _times(axes: Axes, rows: Sequence[Row]) -> bool:
    drawn = False
    for colour, variant in enumerate(variants_of(rows)):
        for scope, style in LINE_STYLES.items():
            points = [
                (row.num_tokens, timing)
                for row in rows
                if (timing := row.timing(variant, scope)) is not None  # type: ignore[arg-type]
            ]
            if not points:
                continue
            drawn = True
            tokens = [num_tokens for num_tokens, _ in points]
            axes.plot(
                tokens,
                [timing.median_us for _, timing in points],
                style,
                color=f"C{colour}",
                marker="." if scope == "kernel" else None,
                label=f"{variant} {scope}",
            )
            lows, highs = [timing.low_us for _, timing in points], [timing.high_us for _, timing in points]
            axes.fill_between(tokens, lows, highs, color=f"C{colour}", alpha=0.15)
    floor = [(row.num_tokens, row.floor_us) for row in rows if row.floor_us is not None]
    if floor:
        axes.plot(*zip(*floor, strict=True), "k--", linewidth=1, label="floor")
    _against_tokens(axes, rows, "us per call")
    axes.set_yscale("log")
    return drawn


def _speed_up_grid(axes: Axes, rows: Sequence[Row]) -> bool:
    """One cell per M and variant, kernel scope: faster green, slower red, alike yellow, no figure grey."""
    names = variants_of(rows)
    if not any(row.baseline for row in rows):
        return False
    shades = {Verdict.FASTER: 1.0, Verdict.SLOWER: -1.0, Verdict.SAME: 0.0, Verdict.AMBIGUOUS: 0.0}
    grid = []
    for row in rows:
        baseline = row.baseline.get("kernel")
        timings = [row.timing(name, "kernel") for name in names]
        grid.append([shades[judge(timing, baseline)] if timing and baseline else math.nan for timing in timings])
    colours = matplotlib.colormaps["RdYlGn"].with_extremes(bad="lightgrey")
    axes.imshow(grid, cmap=colours, vmin=-2, vmax=2, aspect="auto")
    for i, row in enumerate(rows):
        for j, name in enumerate(names):
            axes.text(j, i, row.speed_up(name, "kernel"), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(rows)), [f"M={row.num_tokens}" for row in rows])
    axes.set_xlabel("speed against the baseline, kernel")
    return True


def _roofline(axes: Axes, rows: Sequence[Row]) -> bool:
    drawn = _lines(axes, rows, lambda row, variant: row.floor_fraction(variant))
    _against_tokens(axes, rows, "fraction of the floor's speed, kernel")
    axes.set_ylim(0, 1)
    return drawn


def _errors(axes: Axes, rows: Sequence[Row]) -> bool:
    drawn = _lines(axes, rows, lambda row, variant: row.rel_err.get(variant))
    _against_tokens(axes, rows, "||out - ref|| / ||ref||")
    axes.set_ylim(bottom=0)
    return drawn


def _lines(axes: Axes, rows: Sequence[Row], value: Callable[[Row, str], float | None]) -> bool:
    """One line per variant; whether any was drawn."""
    drawn = False
    for colour, variant in enumerate(variants_of(rows)):
        points = [(row.num_tokens, y) for row in rows if (y := value(row, variant)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=f"C{colour}", marker=".", label=variant)
            drawn = True
    return drawn


def _against_tokens(axes: Axes, rows: Sequence[Row], what: str) -> None:
    tokens = [row.num_tokens for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(num_tokens) for num_tokens in tokens])
    axes.set_xlabel("tokens M")
    axes.set_ylabel(what)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
