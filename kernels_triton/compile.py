"""Compile kernels for sm_90a on a machine without a GPU, by running their launchers on tensors without storage.

Inside `compiled_launches` a driver that only knows its target stands in for the GPU's, and Triton's hook before a
compilation takes each launch aside: the kernel is compiled as it would have been on the GPU, and never launched. Hence
what is compiled is what the launchers ask for: the same specialisation, warps and stages.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels_triton import interpreter
from workbench.errors import CompileError

TARGET = GPUTarget("cuda", 90, 32)
ARCHITECTURE = "sm_90a"
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassemble(cubin: Path) -> str:
    """The machine code of a compiled kernel, as nvdisasm prints it."""
    command = [str(BINARIES / "nvdisasm"), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class CompiledLaunch:
    """One kernel as ptxas built it; sizes in bytes, per thread (registers, spills, stack) or per block (smem)."""

    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    warnings: tuple[str, ...]
    cubin: bytes

    def sass(self) -> str:
        """The machine code, as nvdisasm prints it."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(self.cubin)
            return disassemble(Path(file.name))


class _TargetOnly:
    """The part of a Triton driver that is asked before a kernel is compiled."""

    def get_current_device(self) -> str:
        return ARCHITECTURE

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET


@contextmanager
def compiled_launches() -> Iterator[list[CompiledLaunch]]:
    """Inside, kernels launched on `meta` tensors are compiled instead; the list grows by each distinct one.

    Raises CompileError with the compiler's log, or when Triton interprets kernels in this process.
    """
    if interpreter.requested():
        raise CompileError("triton: expected a process without TRITON_INTERPRET=1 to compile in, got one with it")
    launches: list[CompiledLaunch] = []
    seen: set[tuple[str, str]] = set()

    def compile_instead(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if (fn.name, key) not in seen:
            seen.add((fn.name, key))
            launches.append(_compile(fn, compile))
        return True

    config, runtime = triton.runtime.driver, triton.knobs.runtime
    previous_driver, previous_hook = config._active, runtime.jit_cache_hook
    config._active, runtime.jit_cache_hook = _TargetOnly(), compile_instead
    try:
        yield launches
    finally:
        config._active, runtime.jit_cache_hook = previous_driver, previous_hook


def _compile(function: Any, launch: dict[str, Any]) -> CompiledLaunch:
    source = ASTSource(function.jit_function, launch["signature"], launch["constants"], launch["configs"][0])
    # All options, as the launch has them: they are part of the key of Triton's cache, whose entry a GPU run then finds.
    options = {name: _tuples(value) for name, value in json.loads(launch["specialization_data"])["options"].items()}
    try:
        kernel = triton.compile(source, target=TARGET, options=options)
    except Exception as error:  # Triton's own classes of error share no base
        raise CompileError(f"{function.name}: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        command = [str(BINARIES / "ptxas"), "-v", f"--gpu-name={ARCHITECTURE}", str(ptx), "-o", str(cubin)]
        ptxas = subprocess.run(command, capture_output=True, text=True)
        if ptxas.returncode:
            raise CompileError(f"{function.name}: {ptxas.stderr}")
        log, binary = ptxas.stderr, cubin.read_bytes()
    return CompiledLaunch(
        kernel=function.name,
        registers=_number(r"Used (\d+) registers", log),
        spill_bytes=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_bytes=kernel.metadata.shared,
        warnings=tuple(line for line in log.splitlines() if "warning" in line.lower()),
        cubin=binary,
    )


def _tuples(value: Any) -> Any:
    """JSON has lists where Triton's options have tuples."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found[1]) if found else 0
