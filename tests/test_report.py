"""Tables and plots: figures where the gate is green, a word where it is not."""

from __future__ import annotations

from pathlib import Path

from recorded import CPU, HERE, SHAPE, both, key, named, variant, verified

from workbench import plot, report
from workbench.doctor import Ability
from workbench.problem import MoEShape
from workbench.report import Section
from workbench.rows import Row, Subject, rows, subjects
from workbench.table import build
from workbench.trace import CompileReport, Status, Trace
from workbench.variant import Config

FUSED = variant("cuda.sm90_fused", 2)
GROUPED = variant("triton.grouped")
LOOP = variant("torch.loop")
VARIANTS = named(FUSED, GROUPED, LOOP)
ABILITIES = {name: (Ability.NATIVE, "") for name in VARIANTS}
BATCHES = (1, 8, 64)
UNIFORM = Subject(SHAPE, "uniform", "bf16", 0.0)


def recorded() -> list[Trace]:
    """fused 10 us, its other config 8, triton 9.95, loop 40, at every M."""
    figures = [(FUSED, 0, 10.0), (FUSED, 1, 8.0), (GROUPED, 0, 9.95), (LOOP, 0, 40.0)]
    return [one for m in BATCHES for of, config, us in figures for one in both(key(of, config, m), us)]


def rows_of(traces: list[Trace], baseline: str | None = None) -> list[Row]:
    return rows(build(traces, HERE, VARIANTS), UNIFORM, VARIANTS, CPU, baseline)


def column(section: Section, name: str) -> list[str]:
    return [line[section.header.index(name)] for line in section.lines]


def test_kernel_and_layer_figures_stand_apart() -> None:
    section = report.times("", rows_of(recorded()))
    assert column(section, "M") == ["1", "8", "64"]
    assert column(section, "cuda.sm90_fused kernel us") == ["8.0"] * 3
    assert column(section, "cuda.sm90_fused layer us") == ["16.0"] * 3
    assert column(section, "chosen (kernel)") == ["cuda.sm90_fused, tuned"] * 3


def test_a_speed_up_carries_its_verdict() -> None:
    section = report.speed_ups("", rows_of(recorded()), "kernel")
    assert section.lines[0] == ["1", "1.25x FASTER", "SAME", "0.25x SLOWER"]


def test_a_baseline_by_name_is_what_speed_ups_are_against() -> None:
    section = report.speed_ups("", rows_of(recorded(), baseline="torch.loop"), "layer")
    assert section.lines[0] == ["1", "5.00x FASTER", "4.02x FASTER", "baseline"]


def test_compiled_kernels_show_their_resources_once_however_many_configs_share_them() -> None:
    prologue = CompileReport("prologue", Config(), 40, 0, 0, 100, 20)
    fused = CompileReport("fused", Config(block_m=1), 168, 16, 8, 0, 1000, ("C7511: wgmma serialised",))
    traces = [
        Trace("compile", Status.PASSED, key(FUSED, 0), compiled=prologue),
        Trace("compile", Status.PASSED, key(FUSED, 1), compiled=prologue),
        Trace("compile", Status.FAILED, key(FUSED, 1), compiled=fused, message="16 bytes spilled"),
        Trace("compile", Status.FAILED, key(GROUPED), message="no such instruction"),
    ]
    section = report.compiled(traces)
    assert [line[2:] for line in section.lines] == [
        ["prologue", "default", "40", "0", "0", "120", "none"],
        ["fused", "block_m=1", "168", "16", "8", "1000", "C7511: wgmma serialised"],
        ["-", "block_m=0", "-", "-", "-", "-", "FAILED: no such instruction"],
    ]


def test_what_is_not_green_is_listed_with_its_message() -> None:
    section = report.not_green([*both(key(FUSED), 1.0), verified(key(GROUPED), Status.HUNG)])
    assert [(line[1], line[-2], line[-1]) for line in section.lines] == [("triton.grouped", "HUNG", "so the test says")]


def test_markdown_escapes_what_would_break_a_row() -> None:
    text = report.markdown(Section("", ["a", "b"], [["x|y", "1"]]))
    assert text == "| a | b |\n| ---: | ---: |\n| x\\|y | 1 |\n"


def test_a_report_is_markdown_and_plots_per_subject(tmp_path: Path) -> None:
    shape = MoEShape(8, 512, 128, 2, name="other")
    traces = recorded() + both(key(FUSED, shape=shape), 5.0) + both(key(FUSED, routing="zipf:1.2"), 5.0)
    table = build(traces, HERE, VARIANTS)
    files = report.save(tmp_path, table, traces, VARIANTS, CPU, ABILITIES)
    stems = [plot.file_stem(subject) for subject in subjects(table)]
    assert sorted(stems) == ["E8_N256_K256_top2_shared0", "E8_N256_K256_top2_shared0_zipf-1.2", "other"]
    kinds = ("time", "speedup", "roofline", "error")
    assert sorted(file.name for file in files) == sorted(["table.md", *(f"{s}_{k}.png" for s in stems for k in kinds)])
    assert all(file.stat().st_size > 1000 for file in files)
    text = (tmp_path / "table.md").read_text()
    assert "## other, routing uniform, bf16 input\n" in text
    assert "1.25x FASTER" in text
