"""Plots: what there is to draw is drawn, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded import CPU, HERE, SHAPE, both, key, named, variant, verified

from workbench import plot
from workbench.problem import MoEShape
from workbench.rows import Row, Subject, rows
from workbench.table import build
from workbench.trace import Trace

FUSED = variant("cuda.sm90_fused")
UNIFORM = Subject(SHAPE, "uniform", "bf16", 0.0)


def rows_of(traces: list[Trace]) -> list[Row]:
    return rows(build(traces, HERE, named(FUSED)), UNIFORM, named(FUSED), CPU)


def drawn(traces: list[Trace], folder: Path) -> list[str]:
    return [path.name.rpartition("_")[2] for path in plot.save(UNIFORM, rows_of(traces), folder)]


def test_times_speed_ups_roofline_and_error_are_drawn(tmp_path: Path) -> None:
    traces = [one for m in (1, 8) for one in both(key(FUSED, num_tokens=m), 10.0)]
    assert drawn(traces, tmp_path) == ["time.png", "speedup.png", "roofline.png", "error.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())


def test_what_was_verified_alone_has_an_error_and_no_times(tmp_path: Path) -> None:
    assert drawn([verified(key(FUSED))], tmp_path) == ["error.png"]


@pytest.mark.parametrize(
    ("subject", "stem"),
    [
        (UNIFORM, "E8_N256_K256_top2_shared0"),
        (Subject(MoEShape(8, 256, 128, 2, name="tiny"), "zipf:1.2", "fp8", 0.5), "tiny_zipf-1.2_fp8_dropped0.5"),
    ],
)
def test_a_file_name_tells_what_is_not_the_default(subject: Subject, stem: str) -> None:
    assert plot.file_stem(subject) == stem


def test_a_batch_of_none_has_no_place_on_a_logarithmic_axis(tmp_path: Path) -> None:
    of_none = rows_of(both(key(FUSED, num_tokens=0), 1.0))
    assert [row.num_tokens for row in of_none] == [0]
    assert plot.save(UNIFORM, of_none, tmp_path) == []
