"""Registering the plugins: once, where the engine is there, and as the package's entry points say."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines.driven import VLLM, SGLang, nothing_kept, said

from workbench.errors import InputError
from workbench.plugins import sglang, vllm

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    yield from nothing_kept(monkeypatch, tmp_path)


@pytest.fixture(params=[VLLM, SGLang], ids=["vllm", "sglang"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VLLM:
    return request.param(monkeypatch)


def test_a_method_of_another_signature_is_left_alone(engine: VLLM, caplog: pytest.LogCaptureFixture) -> None:
    def apply(self: Any, layer: Any, x: torch.Tensor, router_logits: torch.Tensor) -> torch.Tensor:
        return x

    engine.method_class.apply = apply
    engine.register()
    assert engine.method_class.apply is apply
    (line,) = said(caplog, logging.WARNING)
    assert "router_logits" in line


def test_off_leaves_the_engine_as_it_is(engine: VLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine.wrapped()
    monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", "off")
    engine.register()
    assert engine.wrapped() == before


def test_a_mode_that_there_is_not(engine: VLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_WORKBENCH_PLUGIN", "yes")
    with pytest.raises(InputError, match=r"^MOE_WORKBENCH_PLUGIN: expected off, on or copies, got 'yes'$"):
        engine.register()


def test_registering_again_wraps_once(engine: VLLM) -> None:
    before = engine.wrapped()
    for _ in range(3):
        engine.register()
    assert [each.__wrapped__ for each in engine.wrapped()] == list(before)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
def test_without_the_engine_registering_does_nothing(name: str) -> None:
    """In a process of its own, with the engine hidden should it be installed."""
    program = (
        "import logging, sys\n"
        f"sys.modules[{name!r}] = None\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        f"from workbench.plugins.{name} import register\n"
        "register()\n"
        "assert not [loaded for loaded in sys.modules if loaded.startswith('kernels_')]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"DEBUG:workbench.plugins.{name}:{name}: not there:" in done.stderr


@pytest.mark.parametrize(("group", "plugin"), [("vllm.general_plugins", vllm), ("sglang.srt.plugins", sglang)])
def test_the_entry_points_name_the_plugins(group: str, plugin: Any) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][group]
    assert list(points) == ["moe_workbench"]
    module, _, function = points["moe_workbench"].partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.register
