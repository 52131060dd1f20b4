"""The command line: what each command says, how it ends, and that bad input is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import recorded
from click.testing import Result
from recorded import Worker, named, variant
from typer.testing import CliRunner

from workbench import registry, ship, shipped, worker
from workbench.cli import app
from workbench.errors import UnknownVariantError
from workbench.models import shape_of_alias

GROUPED = variant("torch.grouped", 3)
LOOP = variant("torch.loop")
TRITON = variant("triton.grouped", reason="needs a GPU")
TRITON.backend = "triton"
VARIANTS = named(TRITON, GROUPED, LOOP)
TINY = ("--shape", "tiny", "--tokens", "1,8")


def find(name: str) -> Any:
    if name not in VARIANTS:
        raise UnknownVariantError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Worker:
    """torch.grouped takes 10 us and less with a larger block, torch.loop takes 50."""
    fake = Worker(lambda name, config: 50.0 if name == "torch.loop" else 10.0 - config.integer("block_m"))
    monkeypatch.setattr(worker, "run", fake.run)
    monkeypatch.setattr(registry, "variants", lambda: VARIANTS)
    monkeypatch.setattr(registry, "find", find)
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--device", "cpu"])


def one_line_error(result: Result) -> str:
    """The error of a command that refused its input."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


def test_verify_is_green_when_all_are_right(fake: Worker) -> None:
    result = run("verify", *TINY, "--variants", "torch.loop,torch.grouped")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("PASSED") == 4


def test_verify_ends_with_1_when_one_is_wrong(fake: Worker) -> None:
    fake.wrong = {"torch.loop"}
    result = run("verify", *TINY, "--json")
    assert result.exit_code == 1
    traces = json.loads(result.stdout)["traces"]
    assert {trace["key"]["variant"] for trace in traces if trace["status"] == "wrong"} == {"torch.loop"}


def test_json_is_one_document_on_stdout_and_progress_is_on_stderr(fake: Worker) -> None:
    result = run("bench", *TINY, "--variants", "torch.loop", "--json")
    traces = json.loads(result.stdout)["traces"]
    assert [trace["scope"] for trace in traces if trace["job"] == "bench"] == ["kernel", "layer"] * 2
    assert "bench: 4 to do" in result.stderr


def test_bench_times_only_what_is_right(fake: Worker) -> None:
    fake.wrong = {"torch.loop"}
    assert run("bench", *TINY).exit_code == 1
    assert {name for job, name, *_ in fake.asked if job == "bench"} == {"torch.grouped"}


def test_bench_says_which_variants_it_does_not_time(fake: Worker, caplog: pytest.LogCaptureFixture) -> None:
    run("bench", *TINY)
    assert "triton.grouped is not timed: no GPU" in caplog.text


@pytest.mark.parametrize("command", ["verify", "bench", "tune", "compare"])
def test_a_rerun_measures_nothing_and_says_so(fake: Worker, command: str) -> None:
    first = run(command, *TINY, "--json")
    asked = len(fake.asked)
    again = run(command, *TINY, "--json")
    assert len(fake.asked) == asked > 0
    assert "recorded already" in again.stderr
    assert json.loads(again.stdout)["traces"] == json.loads(first.stdout)["traces"]
    run(command, *TINY, "--fresh")
    assert len(fake.asked) == 2 * asked


def test_an_interrupt_keeps_what_is_done_and_ends_with_130(fake: Worker, tmp_path: Path) -> None:
    fake.interrupt_after = 3
    result = run("compare", *TINY)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.output
    assert len((tmp_path / "traces.jsonl").read_text().splitlines()) == 3


def test_tune_finds_the_fastest_config_and_select_chooses_it(fake: Worker, tmp_path: Path) -> None:
    assert run("tune", *TINY).exit_code == 0
    assert (tmp_path / "selection.json").exists()
    chosen = json.loads(run("select", *TINY, "--json").stdout)
    assert {(one["variant"], one["config"]["block_m"]) for one in chosen} == {("torch.grouped", 2)}
    assert {one["cell"]["scope"] for one in chosen} == {"kernel", "layer"}


def test_explain_shows_what_is_shipped_where_nothing_was_measured(
    fake: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "measured")
    shape = shape_of_alias("tiny")
    of_variants = [recorded.key(GROUPED, 2, 8, shape=shape), recorded.key(LOOP, 0, 8, shape=shape)]
    traces = [one for key, us in zip(of_variants, (8.0, 50.0), strict=True) for one in recorded.both(key, us)]
    shipped.write(traces, recorded.HERE, VARIANTS, shipped.FOLDER)
    result = run("select", "--shape", "tiny", "--tokens", "8", "--explain")
    assert result.exit_code == 0, result.output
    assert "M=8, shipped" in result.stdout
    assert result.stdout.count("shipped") == 2 * 3  # in both scopes the reason, and each of two candidates
    assert not (tmp_path / "selection.json").exists()  # which holds what was measured here
    assert run("verify", "--shape", "tiny", "--tokens", "8").exit_code == 0
    assert run("bench", "--shape", "tiny", "--tokens", "8", "--variants", "torch.loop").exit_code == 0
    mixed = run("select", "--shape", "tiny", "--tokens", "8", "--explain").stdout
    assert "shipped" not in mixed
    assert "torch.loop" in mixed


def test_ship_needs_a_gpu_to_measure_and_none_to_compile(fake: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert one_line_error(run("ship")) == (
        "error: device: expected a GPU to measure on, got cpu; --compile-only needs none"
    )
    compiled: list[Any] = []
    monkeypatch.setattr(ship, "compile_ahead", lambda *given: compiled.append(given))
    assert run("ship", "--compile-only").exit_code == 0
    ((workloads, variants, device),) = compiled
    assert (len(workloads), set(variants), device) == (len(ship.plan()), set(VARIANTS), None)


def test_explain_shows_every_candidate_and_why_it_lost(fake: Worker) -> None:
    run("tune", *TINY)
    result = run("select", "--tokens", "8", "--explain")
    assert result.exit_code == 0, result.output
    assert "CHOSEN" in result.stdout
    assert "slower than the default" in result.stdout


def test_report_writes_what_was_recorded(fake: Worker, tmp_path: Path) -> None:
    run("bench", *TINY)
    result = run("report", "--baseline", "torch.loop", "--json")
    assert result.exit_code == 0, result.output
    tables = json.loads(result.stdout)["tables"]
    assert tables["tiny, routing uniform, bf16 input: kernel speed against torch.loop"][0] == {
        "M": "1",
        "torch.grouped": "5.00x FASTER",
        "torch.loop": "baseline",
    }
    assert (tmp_path / "tiny_time.png").exists()


def test_compare_does_the_whole_job(fake: Worker, tmp_path: Path) -> None:
    result = run("compare", *TINY, "--configs", "3")
    assert result.exit_code == 0, result.output
    assert {"traces.jsonl", "table.md", "selection.json", "tiny_time.png", "tiny_speedup.png"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert "torch.grouped, tuned" in (tmp_path / "table.md").read_text()


def test_a_results_folder_is_where_the_option_says(fake: Worker, tmp_path: Path) -> None:
    run("verify", *TINY, "--results", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "traces.jsonl").exists()
    assert not (tmp_path / "traces.jsonl").exists()


def test_a_shape_comes_by_model_by_alias_or_by_numbers(fake: Worker) -> None:
    numbers = ("--E", "512", "--N", "256", "--K", "2048", "--top-k", "10", "--no-shared-expert")
    result = run(
        "verify", "--model", "deepseek-v3", "--tp", "16", "--shape", "tiny", *numbers, "--tokens", "1", "--json"
    )
    shapes = [trace["key"]["shape"] for trace in json.loads(result.stdout)["traces"]]
    found = {(shape["num_experts"], shape["intermediate_size"], shape["top_k"]) for shape in shapes}
    assert found == {(8, 128, 2), (257, 128, 9), (512, 128, 10)}


def test_a_model_may_leave_its_shared_experts_out(fake: Worker) -> None:
    result = run("verify", "--model", "deepseek-v3", "--tp", "16", "--no-shared-expert", "--tokens", "1", "--json")
    (shape,) = {(one["num_experts"], one["top_k"], one["num_shared_experts"]) for one in shapes_of(result)}
    assert shape == (256, 8, 0)


def shapes_of(result: Result) -> list[dict[str, Any]]:
    return [trace["key"]["shape"] for trace in json.loads(result.stdout)["traces"]]


def test_variants_lists_support_and_configs(fake: Worker) -> None:
    rows = json.loads(run("list", *TINY, "--json").stdout)
    assert [(row["variant"], row["configs"], row["on cpu"]) for row in rows if row["M"] == "8"] == [
        ("triton.grouped", "1", "needs a GPU"),
        ("torch.grouped", "3", "supported"),
        ("torch.loop", "1", "supported"),
    ]


def test_models_lists_the_catalogue_and_the_aliases(fake: Worker) -> None:
    rows = {row["name"]: row for row in json.loads(run("list", "models", "--json").stdout)}
    assert (rows["deepseek-v3"]["E"], rows["deepseek-v3"]["top_k"]) == ("257", "9")
    assert rows["dsv3_tp16"]["I"] == "128"


def test_doctor_ends_well_when_something_runs(fake: Worker) -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["usable"]
    assert {one["variant"]: one["ability"] for one in found["variants"]}["torch.loop"] == "runs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "-1"], "error: tokens: expected integers >= 0 separated by commas, got '-1'"),
        (["--tokens", "1,x"], "error: tokens: expected integers >= 0 separated by commas, got 'x'"),
        (["--shape", "huge"], "error: shape: expected one of"),
        (["--model", "none-v1"], "error: model: expected one of"),
        (["--model", "deepseek-v3", "--tp", "7"], "error: tp: expected a divisor"),
        (["--tp", "8"], "error: tp: expected --model with it"),
        (["--E", "8"], "error: shape: expected --E, --N, --K together, --N, --K missing"),
        (["--top-k", "2"], "error: shape: expected --E, --N, --K together, --E, --N, --K missing"),
        (["--E", "8", "--N", "255", "--K", "256", "--top-k", "2"], "error: N: expected an even number"),
        (["--E", "8", "--N", "256", "--K", "256", "--top-k", "9"], "error: top_k: expected 1..8"),
        (["--routing", "zipf:-1"], "error: routing: zipf expects a positive exponent"),
        (["--routing", "replay:nowhere"], "error: routing: no file 'nowhere' to replay"),
        (["--input", "fp4"], "error: input_kind: expected one of"),
        (["--dropped", "2"], "error: dropped: expected a fraction"),
        (["--variants", "cuda.none"], "error: variant: expected one of"),
        (["--exclude", "torch.loop,torch.grouped,triton.grouped"], "error: variants: expected at least one"),
        (["--configs", "some"], "error: configs: expected all, default or a number >= 1, got 'some'"),
        (["--time-limit", "0"], "error: time-limit: expected a positive number"),
    ],
)
def test_bad_input_is_one_line_that_names_it(fake: Worker, arguments: list[str], message: str) -> None:
    assert one_line_error(run("verify", *arguments)).startswith(message)
    assert fake.asked == []


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(fake: Worker, device: str) -> None:
    result = CliRunner().invoke(app, ["verify", *TINY, "--device", device])
    assert one_line_error(result).startswith("error: device: expected")


@pytest.mark.parametrize("command", ["verify", "bench", "tune", "compare", "select", "report"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: text[:-20], "the last line is torn"),
        (lambda text: text.replace('"schema": 1', '"schema": 99'), "trace.schema: expected 1, got 99"),
        (lambda text: "not json\n", "Expecting value"),
    ],
)
def test_a_trace_file_that_does_not_fit_is_refused(
    fake: Worker, tmp_path: Path, command: str, spoil: Any, reason: str
) -> None:
    path = tmp_path / "traces.jsonl"
    run("verify", *TINY)
    path.write_text(spoil(path.read_text()))
    before, asked = path.read_text(), len(fake.asked)
    error = one_line_error(run(command))
    assert str(path) in error
    assert reason in error
    assert (path.read_text(), len(fake.asked)) == (before, asked)


def test_a_torn_last_line_is_cut_off_by_recover_and_work_resumes(fake: Worker, tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    run("verify", *TINY)
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole)[:-20])
    assert "`workbench recover`" in one_line_error(run("verify", *TINY))
    assert run("recover").exit_code == 0
    assert path.read_text() == "".join(whole[:-1])
    fake.asked.clear()
    assert run("verify", *TINY).exit_code == 0
    assert len(fake.asked) == 1


@pytest.mark.parametrize("command", ["select", "report"])
def test_without_records_the_command_that_makes_them_is_named(fake: Worker, command: str) -> None:
    assert "`workbench compare` makes it" in one_line_error(run(command))


@pytest.mark.slow
def test_the_command_measures_for_real(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "workbench", "bench", "--shape", "tiny", "--tokens", "3", "--device", "cpu"]
    command += ["--variants", "torch.loop,torch.grouped", "--effort", "quick", "--results", str(tmp_path), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    traces = json.loads(ended.stdout)["traces"]
    assert [trace["status"] for trace in traces] == ["passed"] * 6
    assert all(trace["timing"]["median_us"] > 0 for trace in traces if trace["job"] == "bench")
