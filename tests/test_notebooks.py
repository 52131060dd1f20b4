"""The notebooks run from top to bottom, and show what they say they show."""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def comparison() -> dict[str, dict[str, Any]]:
    """01_compare executed: the last output of each tagged cell, by tag, as media type -> content."""
    notebook = jupytext.read(ROOT / "notebooks" / "01_compare.py")
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
    return {
        tag: cell.outputs[-1]["data"]
        for cell in notebook.cells
        for tag in cell.metadata.get("tags", [])
        if cell.outputs
    }


def figures(markdown: str) -> list[dict[str, str]]:
    """The rows of a Markdown table, each as column title -> text."""
    header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_every_variant_that_runs_here_is_right(comparison: dict[str, dict[str, Any]]) -> None:
    assert comparison["failures"]["text/plain"] == "[]"


def test_every_batch_size_has_a_time_for_the_torch_variants_in_both_scopes(
    comparison: dict[str, dict[str, Any]],
) -> None:
    table = figures(comparison["table"]["text/markdown"])
    assert len(table) >= 3
    for row in table:
        assert int(row["M"]) > 0
        for variant in ("torch.loop", "torch.grouped"):
            for scope in ("kernel", "layer"):
                microseconds = float(row[f"{variant} {scope} us"])
                assert math.isfinite(microseconds)
                assert microseconds > 0


def test_the_plot_is_a_picture(comparison: dict[str, dict[str, Any]]) -> None:
    assert base64.b64decode(comparison["plot"]["image/png"]).startswith(PNG_SIGNATURE)


def test_a_choice_is_made_between_measured_batch_sizes(comparison: dict[str, dict[str, Any]]) -> None:
    first, between, last = comparison["choice"]["text/markdown"].splitlines()
    assert first.startswith("- M=1: ")
    assert "between M=" in between
    assert last.count("**") == 2
