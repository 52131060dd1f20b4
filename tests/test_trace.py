"""A trace survives its file unchanged, and a file that is not what this version wrote is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from workbench import trace
from workbench.errors import InputError, RecordError
from workbench.models import ALIASES
from workbench.problem import MoEShape
from workbench.trace import SCHEMA, Accuracy, Environment, Key, Status, Timing, Trace, from_json, to_json
from workbench.variant import CompileReport, Config

FIRST_COMPARISON = Path(__file__).parents[1] / "experiments/2026-11-23_first_comparison/traces.jsonl"
ENVIRONMENT = Environment("NVIDIA H200", "580.159.04", "13.0", "2.11.0", "3.6.0", "14.2.0")
KEY = Key(
    variant="cuda.some",
    config=Config(block_m=64, swap=True, layout="kn"),
    sources="0123456789abcdef",
    shape=MoEShape(257, 7168, 128, 9, 1, name="dsv3_tp16"),
    num_tokens=64,
    routing="zipf:1.2",
    dropped=0.25,
    input_kind="bf16",
    environment=ENVIRONMENT,
)
ACCURACY = Accuracy(rel_err=0.004, max_abs_err=0.5, cosine=0.99999, tolerance=0.016)
VERIFIED = Trace("verify", Status.PASSED, KEY, seed=3, accuracy=ACCURACY, created="2026-01-02T03:04:05+00:00")
BENCHED = dataclasses.replace(
    VERIFIED,
    job="bench",
    scope="layer",
    timing=Timing(30.5, 30.25, 31.0, 40, 6, True, 1980, "SwPowerCap"),
    floor_us=7.4,
)
COMPILED = Trace(
    "compile",
    Status.FAILED,
    KEY,
    message="up: 16 bytes spilled",
    compiled=CompileReport("up", Config(block_m=64), 168, 16, 0, 1024, 200_000, ("C7508", "C7511")),
)


@pytest.mark.parametrize("made", [VERIFIED, BENCHED, COMPILED], ids=lambda made: made.job)
def test_what_is_appended_is_read_back_in_order(tmp_path: Path, made: Trace) -> None:
    path = tmp_path / "new" / "traces.jsonl"
    trace.append(path, made)
    trace.append(path, VERIFIED)
    assert trace.read(path) == [made, VERIFIED]
    assert trace.read(path)[0].key.shape.name == "dsv3_tp16"


def test_a_file_that_is_not_there_holds_no_traces(tmp_path: Path) -> None:
    assert trace.read(tmp_path / "none.jsonl") == []


def test_each_trace_is_one_line_of_plain_json_even_when_a_figure_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    wrong = Accuracy(math.nan, math.inf, math.nan, 0.016)
    trace.append(path, dataclasses.replace(VERIFIED, status=Status.WRONG, accuracy=wrong, message="NaN\nin out"))
    (line,) = path.read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["accuracy"]["rel_err"] == "nan"
    (read,) = trace.read(path)
    assert read.accuracy is not None
    assert math.isnan(read.accuracy.rel_err)
    assert read.accuracy.max_abs_err == math.inf


def test_equal_keys_are_found_and_any_difference_is_a_miss() -> None:
    records = {KEY: "found"}
    renamed = dataclasses.replace(KEY, shape=dataclasses.replace(KEY.shape, name="another name"))
    assert records.get(from_json(to_json(VERIFIED)).key) == "found"
    assert records.get(renamed) == "found", "the alias of a shape is not part of it"
    for change in (
        {"sources": "fedcba9876543210"},
        {"num_tokens": 65},
        {"config": Config(block_m=64)},
        {"environment": dataclasses.replace(ENVIRONMENT, driver="580.160")},
    ):
        assert dataclasses.replace(KEY, **change) not in records


def altered(path: str, value: object) -> dict[str, object]:
    """The record of BENCHED with the field at `path` (dots between names) set, or dropped for Ellipsis."""
    record = to_json(BENCHED)
    place = record
    *outer, last = path.split(".")
    for name in outer:
        place = place[name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return record


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("schema", SCHEMA + 1, f"trace.schema: expected {SCHEMA}, got {SCHEMA + 1}"),
        ("schema", ..., f"trace.schema: expected {SCHEMA}, got None"),
        ("timing", ..., "trace: expected the fields of Trace, got missing 'timing'"),
        ("colour", "red", "trace: expected the fields of Trace, got unknown 'colour'"),
        ("key.sources", ..., "trace.key: expected the fields of Key, got missing 'sources'"),
        ("key.num_tokens", "64", "trace.key.num_tokens: expected int, got '64'"),
        ("key.num_tokens", True, "trace.key.num_tokens: expected int, got True"),
        ("key.num_tokens", 64.0, "trace.key.num_tokens: expected int, got 64.0"),
        ("key.config", [1], r"trace.key.config: expected an object, got \[1\]"),
        ("key.config", {"block_m": 1.5}, "config block_m: expected int, str or bool, got 1.5"),
        ("key.shape.top_k", 300, "top_k: expected 2..257"),
        ("status", "fine", "trace.status: expected one of passed, .*, got 'fine'"),
        ("job", "guess", "trace.job: expected one of verify, bench, tune, compile, got 'guess'"),
        ("timing.median_us", "fast", "trace.timing.median_us: expected a number, got 'fast'"),
        ("timing.median_us", None, "trace.timing.median_us: expected a number, got None"),
        ("timing", None, "a passed bench needs a timing and a scope"),
    ],
)
def test_a_record_that_does_not_fit_exactly_is_refused(path: str, value: object, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        from_json(altered(path, value))


FORM = ("swiglu_limit", "swiglu_alpha", "swiglu_beta", "weight_scales", "activation_scales", "has_bias")


def test_a_record_of_before_a_layer_had_forms_is_of_the_plain_layer() -> None:
    record = to_json(BENCHED)
    for field in FORM:
        del record["key"]["shape"][field]
    assert from_json(record) == BENCHED


def test_the_form_of_the_layer_is_part_of_the_key() -> None:
    limited = dataclasses.replace(KEY, shape=dataclasses.replace(KEY.shape, swiglu_limit=10.0))
    assert from_json(to_json(dataclasses.replace(VERIFIED, key=limited))).key == limited != KEY


def test_the_records_of_the_first_comparison_can_be_read() -> None:
    shapes = {made.key.shape for made in trace.read(FIRST_COMPARISON)}
    assert shapes == {ALIASES[name] for name in ("dsv3_tp16", "dsv3_tp8", "qwen3next_tp4")}


def test_only_a_torn_line_is_said_to_be_mended_by_recover(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_text('{"schema": 2}\n')
    with pytest.raises(RecordError, match=r"expected 1, got 2$"):
        trace.read(path)
    path.write_text('{"schema": 1')
    with pytest.raises(RecordError, match=r"the last line is torn: .*; `workbench recover` cuts it off$"):
        trace.read(path)


def test_a_malformed_line_is_reported_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    trace.append(path, VERIFIED)
    with path.open("a") as file:
        file.write('{"schema": 1, "job": \n')
    with pytest.raises(RecordError, match=rf"{path}:2: Expecting value"):
        trace.read(path)


def test_a_torn_last_line_is_refused_until_it_is_recovered(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    trace.append(path, VERIFIED)
    trace.append(path, BENCHED)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(RecordError, match=rf"{path}:2: the last line is torn"):
        trace.read(path)
    with pytest.raises(RecordError, match="the last line is torn"):
        trace.append(path, COMPILED)
    cut = trace.recover(path)
    assert cut.encode() == whole[:-10].splitlines()[1]
    trace.append(path, COMPILED)
    assert trace.read(path) == [VERIFIED, COMPILED]


def test_recovering_a_whole_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    assert trace.recover(path) == ""
    trace.append(path, VERIFIED)
    assert trace.recover(path) == ""
    assert trace.read(path) == [VERIFIED]


@pytest.mark.parametrize(
    "impossible",
    [
        {"job": "bench", "scope": "kernel"},
        {"job": "tune", "timing": BENCHED.timing},
        {"accuracy": None},
        {"status": Status.CRASHED},
    ],
)
def test_a_trace_that_cannot_be_is_not_built(impossible: dict[str, object]) -> None:
    with pytest.raises(InputError, match="trace: "):
        dataclasses.replace(VERIFIED, **impossible)
