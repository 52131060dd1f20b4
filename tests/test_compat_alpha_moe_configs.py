"""Alpha-MoE's tuned files: what the parameters mean to our kernel, how files are read, and the one that tune writes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from recorded import Worker, named, variant
from typer.testing import CliRunner

from kernels_cuda.sm90_fused import SM90Fused
from workbench import registry, worker
from workbench.cli import app
from workbench.compat import get_best_config
from workbench.compat.alpha_moe_configs import BestConfig, config_of, tunable, write_best_configs
from workbench.errors import InputError, RecordError
from workbench.models import shape_of_alias
from workbench.variant import Config

DSV3 = shape_of_alias("dsv3_tp16")
SMALL = BestConfig(block_m=8, block_n=32, warp_n=8, stages=5)
LARGE = BestConfig(block_m=64, block_n=64, warp_n=4, stages=2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "moe_jit.json"
    path.write_text(json.dumps({"8": SMALL, "16": LARGE, "256": {**LARGE, "block_m": 128}}))
    return path


@pytest.mark.parametrize(
    ("num_tokens", "block_m"), [(0, 8), (1, 8), (8, 8), (11, 8), (12, 8), (13, 64), (136, 64), (137, 128), (9999, 128)]
)
def test_the_nearest_batch_size_counts_and_of_two_the_first(file: Path, num_tokens: int, block_m: int) -> None:
    assert get_best_config(file, num_tokens)["block_m"] == block_m
    assert get_best_config(str(file), num_tokens)["block_m"] == block_m


def test_of_two_as_near_the_one_named_first_counts_whatever_its_size(tmp_path: Path) -> None:
    path = tmp_path / "moe_jit.json"
    path.write_text(json.dumps({"16": LARGE, "8": SMALL}))
    assert get_best_config(path, 12) == LARGE


def test_what_is_returned_is_the_callers_own(file: Path) -> None:
    get_best_config(file, 8)["block_m"] = 128
    assert get_best_config(file, 8) == SMALL


def test_a_file_that_changes_is_read_again(file: Path) -> None:
    assert get_best_config(file, 8) == SMALL
    write_best_configs(file, {8: LARGE})
    os.utime(file, ns=(0, 1))
    assert get_best_config(file, 8) == LARGE


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "moe_jit.json"
    write_best_configs(path, {1024: LARGE, 1: SMALL})
    assert list(json.loads(path.read_text())) == ["1", "1024"]
    assert (get_best_config(path, 1), get_best_config(path, 1000)) == (SMALL, LARGE)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "expected a JSON object: "),
        ('{"8": {"block_m": 8, ', "expected a JSON object: "),
        ("[]", "expected a JSON object of batch sizes, got []"),
        ("{}", "expected a JSON object of batch sizes, got {}"),
        (json.dumps({"eight": SMALL}), "expected batch sizes as keys, got 'eight'"),
        (json.dumps({"-8": SMALL}), "expected batch sizes as keys, got '-8'"),
        ('{"8": 16}', "8: expected block_m, block_n, warp_n, stages and no more, got 16"),
        ('{"8": {"block_m": 8}}', "8: expected block_m, block_n, warp_n, stages and no more, got {'block_m': 8}"),
        (json.dumps({"8": {**SMALL, "block_h": 1}}), "8: expected block_m, block_n, warp_n, stages and no more, got"),
        (json.dumps({"8": {**SMALL, "block_m": 12}}), "8: block_m: expected 8..128 in steps of 8, got 12"),
        (json.dumps({"8": {**SMALL, "block_m": "8"}}), "8: block_m: expected 8..128 in steps of 8, got '8'"),
        (json.dumps({"8": {**SMALL, "warp_n": 4}}), "8: warp_n: expected 8 with block_n=32, got 4"),
        (json.dumps({"8": {**SMALL, "stages": 7}}), "8: stages: expected 1..5, got 7"),
    ],
)
def test_a_malformed_file_is_refused_with_path_and_reason(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "moe_jit.json"
    path.write_text(content)
    with pytest.raises(RecordError) as refused:
        get_best_config(path, 8)
    assert str(refused.value).startswith(f"{path}: {reason}")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "missing.json"
    with pytest.raises(RecordError, match=r"missing\.json: expected a file of tuned configurations: No such file"):
        get_best_config(path, 8)
    with pytest.raises(InputError, match=r"^path: expected the path of a file of tuned configurations, got None$"):
        get_best_config(os.environ.get("ALPHA_MOE_CONFIG_OF_NOBODY"), 8)  # type: ignore[arg-type]


def config(**tuning: Any) -> Config:
    return config_of(DSV3, 1, BestConfig(**{**SMALL, **tuning}))  # type: ignore[typeddict-item]


def test_stages_are_tiles_ahead_of_the_one_in_use() -> None:
    rings = [config(block_n=64, warp_n=4, stages=stages)["num_stages"] for stages in range(1, 6)]
    assert rings == [2, 3, 4, 5, 6]
    assert config(block_m=128, block_n=64, warp_n=4, stages=5)["num_stages"] == 4  # what shared memory holds


@pytest.mark.parametrize("block_m", range(8, 129, 8))
def test_the_shortest_ring_compiles_without_spills_or_warnings(block_m: int) -> None:
    shortest = config(block_m=block_m, block_n=64, warp_n=4, stages=1)
    report = SM90Fused().compile(DSV3, [shortest])[1]
    assert (report.spill_bytes, report.stack_bytes, report.warnings) == (0, 0, ())


def test_block_n_says_whether_a_work_item_is_shared() -> None:
    assert config()["cluster_size"] == 8
    assert config(block_n=64, warp_n=4)["cluster_size"] == 1
    assert config_of(DSV3, 4096, SMALL)["cluster_size"] == 1, "there are no SMs to spare"


@pytest.mark.parametrize("num_tokens", [1, 64, 8192])
def test_what_is_tuned_over_is_what_the_file_can_say(num_tokens: int) -> None:
    names = tunable(DSV3, num_tokens)
    as_called = dataclasses.replace(DSV3, num_shared_experts=0)  # a call does not say which experts are shared
    assert {config_of(as_called, num_tokens, name) for name in names.values()} == set(names)
    default = next(iter(registry.find("cuda.sm90_fused").configs(DSV3, num_tokens)))
    assert default["block_m"] in {name["block_m"] for name in names.values()}


QWEN3_NEXT = ("--E", "512", "--N", "256", "--K", "2048", "--no-shared-expert")


def speed(name: str, config: Config) -> float:
    """Split items are faster, and so are blocks of 16."""
    return 10.0 - (config.integer("cluster_size") > 1) - 2 * (config.integer("block_m") == 16)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Worker:
    """The kernel, which runs on anything and takes as long as `speed` says, and another variant."""
    real: Any = SM90Fused()
    kernel: Any = variant(
        "cuda.sm90_fused", configs=lambda num_tokens: list(real.configs(shape_of_alias(ALIAS), num_tokens))
    )
    kernel.aligned_config = real.aligned_config
    variants = named(kernel, variant("torch.loop"))
    fake = Worker(lambda name, config: speed(name, config) if name == kernel.name else 50.0)
    monkeypatch.setattr(worker, "run", fake.run)
    monkeypatch.setattr(registry, "variants", lambda: variants)
    monkeypatch.setattr(registry, "find", variants.__getitem__)
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    return fake


ALIAS = "qwen3next_tp4"


def tune(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["tune", *arguments, "--device", "cpu"])


def test_tune_writes_the_fastest_that_the_file_can_say_for_each_batch_size(fake: Worker, tmp_path: Path) -> None:
    path = tmp_path / "moe_jit.json"
    result = tune(*QWEN3_NEXT, "--tokens", "1,4096", "--out-file", str(path))
    assert result.exit_code == 0, result.output
    assert get_best_config(path, 1) == {"block_m": 16, "block_n": 32, "warp_n": 8, "stages": 5}
    shape = dataclasses.replace(shape_of_alias(ALIAS), top_k=8)
    for num_tokens in (1, 4096):
        chosen = config_of(shape, num_tokens, get_best_config(path, num_tokens))
        times = {one: speed("", one) for one in tunable(shape, num_tokens)}
        assert times[chosen] == min(times.values())
    assert {path.name for path in tmp_path.iterdir()} == {"moe_jit.json", "selection.json", "traces.jsonl"}


def test_a_shape_by_numbers_has_eight_routed_experts_unless_it_says_otherwise(fake: Worker, tmp_path: Path) -> None:
    tune(*QWEN3_NEXT, "--tokens", "8", "--out-file", str(tmp_path / "a.json"))
    tune("--E", "257", "--N", "256", "--K", "7168", "--shared-experts", "1", "--tokens", "8")
    tune(*QWEN3_NEXT, "--tokens", "8", "--top-k", "10")
    assert [top_k for top_k in dict.fromkeys(task.workload.shape.top_k for task in fake.tasks)] == [8, 9, 10]


def test_the_file_is_for_one_shape_and_for_the_kernel(fake: Worker, tmp_path: Path) -> None:
    path = tmp_path / "moe_jit.json"
    several = tune("--shape", "tiny", "--shape", "tiny_shared", "--out-file", str(path))
    assert (several.exit_code, several.stdout) == (2, "")
    assert several.stderr.startswith("error: out-file: expected one shape, got tiny, tiny_shared")
    without = tune(*QWEN3_NEXT, "--variants", "torch.loop", "--out-file", str(path))
    assert without.stderr.splitlines()[-1] == (
        "error: out-file: expected cuda.sm90_fused among the variants that run, got torch.loop"
    )
    assert fake.asked == []
    assert not path.exists()


def test_no_file_is_written_when_every_config_is_wrong(fake: Worker, tmp_path: Path) -> None:
    fake.wrong = {"cuda.sm90_fused"}
    result = tune(*QWEN3_NEXT, "--tokens", "8", "--out-file", str(tmp_path / "moe_jit.json"))
    assert result.exit_code == 2
    assert "error: out-file: expected a config of cuda.sm90_fused that is right" in result.stderr
    assert not (tmp_path / "moe_jit.json").exists()
