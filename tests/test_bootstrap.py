"""What the Makefile installs: everything a target needs, pinned, and nothing that is there already."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import bootstrap

EXTRAS = ("gpu", "test", "check", "notebook")


def test_a_requirement_starts_with_the_name_of_its_distribution() -> None:
    assert bootstrap.distribution("torch>=2.11") == "torch"
    assert bootstrap.distribution("cupy-cuda13x == 14.2.0") == "cupy-cuda13x"
    assert bootstrap.distribution("numpy") == "numpy"


def test_every_requirement_is_pinned_to_one_version() -> None:
    pins = bootstrap.pins()
    assert set(bootstrap.requirements(EXTRAS)) <= set(pins)
    assert all(pin.startswith(f"{name}==") for name, pin in pins.items())


@pytest.mark.parametrize("target", sorted(bootstrap.EXTRAS))
def test_every_target_needs_what_the_hot_path_imports(target: str) -> None:
    assert {"torch", "triton", "cupy-cuda13x", "cuda-bindings"} <= set(bootstrap.requirements(bootstrap.EXTRAS[target]))


def test_on_an_empty_path_everything_but_the_gpu_libraries_is_missing(tmp_path: Path) -> None:
    wanted = ["torch", "triton", "cupy-cuda13x", "rich", "nvidia-ml-py"]
    assert bootstrap.missing(wanted, [str(tmp_path)]) == ["rich", "nvidia-ml-py"]


def test_a_distribution_on_the_path_is_not_missing(tmp_path: Path) -> None:
    metadata = tmp_path / "Nvidia_ML_py-13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: Nvidia_ML_py\nVersion: 13.0\n")
    assert bootstrap.missing(["nvidia-ml-py", "rich"], [str(tmp_path)]) == ["rich"]
