"""The guide: its code runs as it stands, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from test_packaging import workbench

from reference.moe import moe_from_bf16
from workbench import environment, registry
from workbench.numerics import measure, passed
from workbench.plugins import sglang, vllm

GUIDE = (Path(__file__).parent.parent / "docs" / "guide.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
ON_GPU = [block for block in BLOCKS if block.startswith("# on a GPU\n")]
ANYWHERE = [block for block in BLOCKS if block not in ON_GPU]


def run(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/guide.md", "exec"), names)
    return names


def expected(names: dict[str, Any], topk_ids: torch.Tensor) -> torch.Tensor:
    weights, inputs = names["weights"], names["inputs"]
    tensors = weights.w13, weights.w13_scale, weights.w2, weights.w2_scale
    return moe_from_bf16(inputs.x, *tensors, inputs.topk_weights, topk_ids)


def test_the_code_runs_in_order_and_computes_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    assert len(ANYWHERE) >= 4
    names = run(ANYWHERE)
    assert names["layer"].prepared
    reference = expected(names, names["inputs"].topk_ids)
    assert passed(measure(names["out"], reference, registry.find(names["choice"].variant).tolerance))
    assert capsys.readouterr().out.startswith(names["choice"].variant)


@pytest.mark.gpu
def test_the_graph_of_the_guide_replays_with_other_routing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_RESULTS", str(tmp_path))
    names = run(ANYWHERE[:1] + ON_GPU)
    torch.cuda.synchronize()
    reference = expected(names, names["inputs"].topk_ids.flip(0))
    assert passed(measure(names["out"].cpu(), reference, registry.find(names["layer"].choice(4)[0]).tolerance))


def test_code_for_a_gpu_is_python() -> None:
    (block,) = ON_GPU
    compile(block, "docs/guide.md", "exec")


def test_every_command_line_names_options_that_exist() -> None:
    commands = re.findall(r"^workbench (\w+)(.*)$|`workbench (\w+)([^`]*)`", GUIDE, flags=re.MULTILINE)
    named = {(line or quoted, more or rest) for line, more, quoted, rest in commands}
    assert {name for name, _ in named} == {"compare", "select", "list", "ship"}
    for name in {name for name, _ in named}:
        helped = workbench(name, "--help").stdout
        for option in {option for other, rest in named if other == name for option in re.findall(r"--[\w-]+", rest)}:
            assert f"{option} " in helped, f"workbench {name} {option}"


def test_every_environment_variable_is_in_the_table_of_environment_py() -> None:
    named = set(re.findall(r"MOE_WORKBENCH_\w+", GUIDE))
    modes = {"MOE_WORKBENCH_PLUGIN": environment.PluginMode, "MOE_WORKBENCH_SHIPPED": environment.ShippedMode}
    assert named == {"MOE_WORKBENCH_RESULTS", "MOE_WORKBENCH_EXCLUDE", *modes}
    assert all(f"    {name} " in (environment.__doc__ or "") for name in named)
    for name, literal in modes.items():
        table = GUIDE.partition(f"`{name}` is one of:\n\n")[2].partition("\n\n")[0]
        assert tuple(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == get_args(literal)


@pytest.mark.parametrize(("plugin", "engine"), [(vllm, "vLLM"), (sglang, "SGLang")])
def test_the_guide_and_the_plugin_name_the_same_version(plugin: Any, engine: str) -> None:
    (version,) = re.findall(rf"\*\*{engine}\s+([\d.]+)\*\*", GUIDE)
    assert f"Written for {engine} {version}," in (plugin.__doc__ or "")
