"""What this machine can run, and what is missing for the rest.

Libraries are looked at in the order in which they fail: Python, torch, the GPU, then what each backend needs. The
NVRTC check compiles in a child process, because a broken compiler library may take its process with it.
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from workbench import registry
from workbench.environment import current
from workbench.models import ALIASES
from workbench.variant import Variant

COMPILE_TIME_LIMIT_S = 60
COMPILE_PROBE = """
from cuda.bindings import nvrtc
source = b'extern "C" __global__ void probe() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }'
error, program = nvrtc.nvrtcCreateProgram(source, b"probe.cu", 0, [], [])
error, = nvrtc.nvrtcCompileProgram(program, 1, [b"-arch=sm_90a"])
if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
    raise SystemExit(f"NVRTC: {error.name}")
error, major, minor = nvrtc.nvrtcVersion()
print(f"NVRTC {major}.{minor}")
"""


class Ability(StrEnum):
    """How a variant can be used on a device."""

    NATIVE = "runs"
    INTERPRETED = "interpreter"  # right answers, no times
    COMPILE_ONLY = "compile only"  # for sm_90a: registers, spills, warnings
    NONE = "cannot"


@dataclass(frozen=True)
class Finding:
    """One thing this machine has, or lacks with what to do about it."""

    subject: str
    ok: bool
    found: str


@dataclass(frozen=True)
class VariantFinding:
    """How one variant can be used here, and why not better."""

    variant: str
    backend: str
    ability: Ability
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All findings; the machine is of use when at least one variant runs on it."""

    findings: tuple[Finding, ...]
    variants: tuple[VariantFinding, ...]

    @property
    def usable(self) -> bool:
        return any(found.ability is Ability.NATIVE for found in self.variants)


def diagnose(device: torch.device) -> Diagnosis:
    """Look at everything that a variant may need on `device`. Never raises for what is missing."""
    compiler = _compiler()
    findings = (
        Finding("python", sys.version_info >= (3, 11), platform.python_version()),
        Finding("torch", True, f"{torch.__version__}, built for CUDA {torch.version.cuda or 'none'}"),
        _gpu(device),
        _library("triton"),
        _library("cupy"),
        _library("cuda.bindings"),
        compiler,
    )
    variants = tuple(
        VariantFinding(name, variant.backend, *ability(variant, device))
        for name, variant in sorted(registry.variants().items())
    )
    skipped = tuple(
        VariantFinding(module, "?", Ability.NONE, f"skipped: {reason}")
        for module, reason in registry.load_failures().items()
    )
    return Diagnosis(findings, variants + skipped)


def ability(variant: Variant, device: torch.device) -> tuple[Ability, str]:
    """How `variant` can be used on `device`, and why not natively."""
    if device.type == "cpu" and variant.backend == "triton":
        return (Ability.INTERPRETED, "no GPU: verified in Triton's interpreter, not timed")
    if device.type == "cpu" and variant.backend == "cuda":
        return Ability.COMPILE_ONLY, "no GPU: compiled for sm_90a, not run"
    answers = [variant.supports(shape, device) for shape in ALIASES.values()]
    if any(answers):
        return Ability.NATIVE, ""
    return Ability.NONE, answers[0].reason


def abilities(variants: Mapping[str, Variant], device: torch.device) -> dict[str, tuple[Ability, str]]:
    """How each variant can be used on `device`, and why not natively."""
    return {name: ability(variant, device) for name, variant in variants.items()}


def _gpu(device: torch.device) -> Finding:
    if not torch.cuda.is_available():
        reason = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no device"
        return Finding("gpu", False, f"none: {reason}; Triton variants are interpreted, CUDA variants only compiled")
    where = device if device.type == "cuda" else torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(where)
    found = f"{torch.cuda.get_device_name(where)}, compute capability {major}.{minor}, driver {current(where).driver}"
    return Finding(
        "gpu", (major, minor) == (9, 0), found if (major, minor) == (9, 0) else f"{found} (CUDA variants need 9.0)"
    )


def _library(name: str) -> Finding:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken installation can raise anything
        return Finding(name, False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Finding(name, True, str(getattr(module, "__version__", "present")))


def _compiler() -> Finding:
    """Whether NVRTC compiles for sm_90a."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", COMPILE_PROBE], capture_output=True, text=True, timeout=COMPILE_TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return Finding("sm_90a compiler", False, f"no answer within {COMPILE_TIME_LIMIT_S} s")
    if probe.returncode:
        said = probe.stderr.strip().splitlines()
        return Finding("sm_90a compiler", False, said[-1] if said else f"the compiler died, exit {probe.returncode}")
    return Finding("sm_90a compiler", True, probe.stdout.strip())
