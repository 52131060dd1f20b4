"""The selection table as a file: written whole, read strictly."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded import HERE, SHAPE, both, key, named, timed, variant, verified

from workbench.errors import RecordError
from workbench.table import UNTIMED, UNVERIFIED, Cell, build, load, save
from workbench.trace import Status

FUSED = variant("cuda.sm90_fused", 2)
GROUPED = variant("triton.grouped")
VARIANTS = named(FUSED, GROUPED)
TRACES = [*both(key(FUSED), 10.0), *both(key(FUSED, 1), 8.0), *both(key(GROUPED), 12.0)]


def test_a_table_holds_a_cell_per_scope_with_every_candidate() -> None:
    table = build(TRACES, HERE, VARIANTS)
    found = {
        cell.scope: [(one.name, one.first_config, one.timing.median_us) for one in by_tokens[8] if one.timing]
        for cell, by_tokens in table.cells.items()
    }
    assert found["kernel"] == [
        ("cuda.sm90_fused [block_m=0]", True, 10.0),
        ("cuda.sm90_fused [block_m=1]", False, 8.0),
        ("triton.grouped [block_m=0]", True, 12.0),
    ]
    assert [median_us for _, _, median_us in found["layer"]] == [20.0, 16.0, 24.0]


def test_a_candidate_shows_why_it_may_not_be_chosen() -> None:
    traces = [timed(key(FUSED), 1.0), verified(key(FUSED, 1), Status.HUNG), verified(key(GROUPED))]
    candidates = build(traces, HERE, VARIANTS).cells[Cell(SHAPE, "uniform", "bf16", "kernel")][8]
    assert [one.status for one in candidates] == [UNVERIFIED, Status.HUNG, UNTIMED]
    assert all(one.timing is None for one in candidates)


def test_a_first_pass_of_tuning_is_not_a_figure() -> None:
    assert build([timed(key(FUSED), 1.0, job="tune")], HERE, VARIANTS).cells == {}


def test_a_saved_table_loads_as_it_was(tmp_path: Path) -> None:
    table = build(TRACES, HERE, VARIANTS)
    save(table, tmp_path / "selection.json")
    assert load(tmp_path / "selection.json", HERE, VARIANTS).cells == table.cells
    assert [path.name for path in tmp_path.iterdir()] == ["selection.json"]


def test_a_failed_write_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "selection.json"
    table = build(TRACES, HERE, VARIANTS)
    save(table, path)

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        save(build([], HERE, VARIANTS), path)
    assert load(path, HERE, VARIANTS).cells == table.cells


def test_what_was_measured_with_other_sources_is_dropped_on_loading(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    save(build(TRACES, HERE, VARIANTS), path)
    text = path.read_text().replace(key(FUSED).sources, "0" * 16)
    path.write_text(text)
    assert load(path, HERE, VARIANTS).cells == {}


def _without(content: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in content.items() if other != name}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: json.dumps(content)[:-40], "not a selection table, or truncated"),
        (lambda content: "[]", "expected an object with version, environment and traces"),
        (lambda content: json.dumps(_without(content, "traces")), "expected an object with version"),
        (lambda content: json.dumps(content | {"version": 2}), "expected version 1, got 2"),
        (lambda content: json.dumps(content | {"traces": {}}), "traces: expected a list"),
        (lambda content: json.dumps(content | {"traces": [{"schema": 0}]}), "trace.schema: expected"),
        (lambda content: json.dumps(content | {"environment": {}}), "environment: expected the fields"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_path(
    tmp_path: Path, change: Callable[[dict[str, Any]], str], reason: str
) -> None:
    path = tmp_path / "selection.json"
    save(build(TRACES, HERE, VARIANTS), path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(RecordError, match=reason) as error:
        load(path, HERE, VARIANTS)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_table_of_another_environment_is_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    save(build(TRACES, HERE, VARIANTS), path)
    elsewhere = dataclasses.replace(HERE, driver="999.1")
    with pytest.raises(RecordError, match=r"made in another environment: driver 'none', here '999\.1'"):
        load(path, elsewhere, VARIANTS)


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="not readable"):
        load(tmp_path / "none.json", HERE, VARIANTS)
