"""What a newcomer finds: the package is whole, the Makefile and README do what they say, and nothing in the files
belongs to one machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from reference.moe import moe_from_bf16
from workbench.numerics import measure, passed

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
README = (ROOT / "README.md").read_text()


def files_of_the_repository() -> list[Path]:
    """What git tracks or would add, without what was deleted and not yet committed."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [path for name in found.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def workbench(*arguments: str, variant_modules: str = "", path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m workbench` with `path` importable besides the repository."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(path), str(ROOT)]),
        "MOE_WORKBENCH_VARIANTS": variant_modules,
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "workbench", *arguments]
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True, timeout=240)


def python_blocks() -> dict[str, str]:
    """The README's Python, by the heading it stands under."""
    sections = re.split(r"^## ", README, flags=re.MULTILINE)[1:]
    return {
        section.partition("\n")[0]: block
        for section in sections
        for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    }


def test_every_package_is_packaged() -> None:
    top_level = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    modules = {path.relative_to(ROOT) for name in top_level for path in (ROOT / name).rglob("*.py")}
    assert sorted(PACKAGES) == sorted({".".join(path.parent.parts) for path in modules})


def test_cuda_sources_and_headers_are_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["kernels_cuda"]
    packaged = {path for pattern in patterns for path in (ROOT / "kernels_cuda").glob(pattern)}
    sources = {path for suffix in ("cu", "cuh") for path in (ROOT / "kernels_cuda").rglob(f"*.{suffix}")}
    assert sources
    assert packaged == sources


def test_the_command_is_the_module() -> None:
    assert PROJECT["project"]["scripts"] == {"workbench": "workbench.cli:main"}
    helped = workbench("--help")
    assert helped.returncode == 0, helped.stderr
    for command in ("verify", "bench", "tune", "select", "report", "compare", "list", "doctor"):
        assert re.search(rf"\b{command}\b", helped.stdout), command


@pytest.mark.parametrize("target", ["compare", "test", "check", "gpu", "clean"])
def test_the_makefile_has_the_target(target: str) -> None:
    planned = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr


def test_every_command_line_in_the_readme_names_options_that_exist() -> None:
    commands = re.findall(r"^workbench (\w+)(.*?)(?: {3,}.*)?$", README, flags=re.MULTILINE)
    assert {name for name, _ in commands} >= {"doctor", "list", "verify", "compare", "select", "report"}
    for name in {name for name, _ in commands}:
        helped = workbench(name, "--help").stdout
        for arguments in (arguments for other, arguments in commands if other == name):
            for option in re.findall(r"--[\w-]+", arguments):
                assert f"{option} " in helped, f"workbench {name} {option}"


def test_the_readme_call_from_python_writes_the_layers_output() -> None:
    names: dict[str, Any] = {}
    exec(python_blocks()["Calling it"], names)
    weights, inputs = names["weights"], names["inputs"]
    expected = moe_from_bf16(
        inputs.x,
        weights.w13,
        weights.w13_scale,
        weights.w2,
        weights.w2_scale,
        inputs.topk_weights,
        inputs.topk_ids,
    )
    assert passed(measure(names["out"], expected, names["variant"].tolerance))


def test_the_readme_variant_is_right(tmp_path: Path) -> None:
    (tmp_path / "my_variant.py").write_text(python_blocks()["Adding a variant"])
    (command,) = re.findall(r"^workbench (verify --variants torch.gather .*)$", README, flags=re.MULTILINE)
    verified = workbench(*command.split(), "--results", "results", variant_modules="my_variant", path=tmp_path)
    assert verified.returncode == 0, verified.stderr
    traces = [json.loads(line) for line in (tmp_path / "results" / "traces.jsonl").read_text().splitlines()]
    assert sorted(trace["key"]["num_tokens"] for trace in traces) == [1, 8]
    for trace in traces:
        assert trace["status"] == "passed"
        assert trace["accuracy"]["rel_err"] < 0.005


def test_no_file_names_a_machine_or_a_registry() -> None:
    local = re.compile(r"(?<![\w.])/(work|root|home|opt)/\w|index-url|https?://(?:\d+\.){3}\d+|\.whl\b")
    ours = Path(__file__)
    for path in files_of_the_repository():
        if path == ours or path.name == ".gitignore" or b"\0" in (content := path.read_bytes()):
            continue
        found = local.search(content.decode())
        assert found is None, f"{path.relative_to(ROOT)}: {found[0]}"
