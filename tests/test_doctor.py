"""What a machine can run, and why not more."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest
import torch
from recorded import CPU, named, variant

from workbench import doctor, registry
from workbench.doctor import Ability, ability, diagnose

RUNS = variant("torch.loop")
TRITON = variant("triton.grouped")
TRITON.backend = "triton"
CUDA = variant("cuda.sm90_fused")
CUDA.backend = "cuda"
REFUSES = variant("torch.grouped", reason="grouped_mm is absent")


@pytest.fixture
def variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "variants", lambda: named(RUNS, TRITON, CUDA, REFUSES))
    monkeypatch.setattr(registry, "load_failures", lambda: {"third.party": "ImportError: no module"})


def test_each_backend_is_used_without_a_gpu_as_far_as_it_goes() -> None:
    assert ability(RUNS, CPU) == (Ability.NATIVE, "")
    assert ability(TRITON, CPU)[0] is Ability.INTERPRETED
    assert ability(CUDA, CPU)[0] is Ability.COMPILE_ONLY
    assert ability(REFUSES, CPU) == (Ability.NONE, "grouped_mm is absent")


def test_on_a_gpu_the_variant_itself_says_whether_it_runs() -> None:
    gpu = torch.device("cuda")
    assert ability(CUDA, gpu) == (Ability.NATIVE, "")
    assert ability(REFUSES, gpu) == (Ability.NONE, "grouped_mm is absent")


@pytest.mark.usefixtures("variants")
def test_modules_that_did_not_load_are_named_with_the_reason() -> None:
    found = diagnose(CPU)
    assert [(one.variant, one.ability, one.reason) for one in found.variants][-1] == (
        "third.party",
        Ability.NONE,
        "skipped: ImportError: no module",
    )
    assert found.usable


def test_a_machine_on_which_nothing_runs_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "variants", lambda: named(CUDA, REFUSES))
    assert not diagnose(CPU).usable


@pytest.mark.usefixtures("variants")
def test_a_library_that_does_not_import_is_missing_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise OSError("libcudart.so: cannot open\nmore")

    monkeypatch.setattr("importlib.import_module", broken)
    found = {one.subject: one for one in diagnose(CPU).findings}
    assert not found["cupy"].ok
    assert found["cupy"].found == "OSError: libcudart.so: cannot open"


@pytest.mark.usefixtures("variants")
@pytest.mark.parametrize(
    ("result", "said"),
    [
        (subprocess.CompletedProcess([], -11, "", ""), "the compiler died, exit -11"),
        (subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no nvrtc\n"), "ImportError: no nvrtc"),
        (subprocess.TimeoutExpired("python", 60), "no answer within 60 s"),
    ],
)
def test_a_compiler_that_dies_or_hangs_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, result: subprocess.CompletedProcess | Exception, said: str
) -> None:
    def ended(*arguments: object, **options: object) -> subprocess.CompletedProcess:
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(doctor.subprocess, "run", ended)
    compiler = next(one for one in diagnose(CPU).findings if one.subject == "sm_90a compiler")
    assert (compiler.ok, compiler.found) == (False, said)
