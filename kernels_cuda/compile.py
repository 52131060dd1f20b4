"""CUDA source -> cubin for sm_90a through NVRTC, with or without a GPU, and what ptxas said of it.

NVRTC runs in a child process, because some inputs make it crash. The cubin is kept in a cache folder under a name that
holds a digest of the source, every header, the options and the compiler's version: CuPy memoises modules by path, and
so no two builds share one.

The folder is MOE_WORKBENCH_CACHE, or ~/.cache/moe-workbench. With MOE_WORKBENCH_RACECHECK=1 kernels are built so that
compute-sanitizer's racecheck can follow their barriers (include/mbarrier.cuh).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import CompileError
from workbench.variant import CompileReport, Config

SOURCE_FOLDER = Path(__file__).parent
INCLUDE_FOLDER = SOURCE_FOLDER / "include"
FLAGS = ("-arch=sm_90a", "-std=c++17", "-lineinfo", "--ptxas-options=-v", "--no-cache")
"""NVRTC's own cache is off: with many processes at work it was seen to give a cubin whose log is empty."""
TIME_LIMIT_S = 300


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel: its file, its name in there, and the compiler's log."""

    path: Path
    kernel: str
    log: str

    def report(self, config: Config, dynamic_smem_bytes: int) -> CompileReport:
        """The log's figures. CompileError if ptxas did not print them."""
        used = re.search(r"Used (\d+) registers", self.log)
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", self.log)
        if used is None or spills is None:
            raise CompileError(f"{self.kernel}: ptxas printed no resource usage: {self.log!r}")
        static_smem = re.search(r"(\d+) bytes smem", self.log)
        stack, stores, loads = (int(value) for value in spills.groups())
        return CompileReport(
            kernel=self.kernel,
            config=config,
            registers=int(used[1]),
            spill_bytes=stores + loads,
            stack_bytes=stack,
            static_smem_bytes=int(static_smem[1]) if static_smem else 0,
            dynamic_smem_bytes=dynamic_smem_bytes,
            warnings=tuple(line.strip() for line in self.log.splitlines() if re.search(r"warning|\bC75\d\d\b", line)),
        )


def sources(kernel: str) -> tuple[Path, ...]:
    """The .cu file of `kernel`, and the headers that it includes, directly or not, in the order of their names."""
    source = SOURCE_FOLDER / f"{kernel}.cu"
    headers: set[Path] = set()
    unread = [source]
    while unread:
        including = unread.pop()
        for name in _included(including, including.stat().st_mtime_ns):
            header = INCLUDE_FOLDER / name
            if header not in headers:
                headers.add(header)
                unread.append(header)
    return (source, *sorted(headers))


@functools.cache
def _included(path: Path, mtime_ns: int) -> tuple[str, ...]:
    """The names of the headers that the file includes, read once for each time that it is written."""
    return tuple(re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE))


def variant_sources(modules: Iterable[str], kernels: Iterable[str]) -> tuple[Path, ...]:
    """What a variant depends on: these modules of the package and kernels with their headers, and their building."""
    python = [SOURCE_FOLDER / f"{name}.py" for name in (*modules, "sm90", "launch", "compile")]
    return tuple(dict.fromkeys([*python, *(path for kernel in kernels for path in sources(kernel))]))


def compile_kernel(kernel: str, defines: Mapping[str, int]) -> Cubin:
    """Compile `<kernel>.cu`, whose entry point has the same name, with `-D` for each of `defines`.

    Raises CompileError with NVRTC's log, or saying how the compiler's process ended.
    """
    if os.environ.get("MOE_WORKBENCH_RACECHECK") == "1":
        defines = {**defines, "EACH_LANE_ARRIVES": 1}
    return _compile(kernel, tuple(sorted(defines.items())), _cache_folder())


def _cache_folder() -> Path:
    folder = os.environ.get("MOE_WORKBENCH_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "moe-workbench"


@functools.cache
def _compile(kernel: str, defines: tuple[tuple[str, int], ...], folder: Path) -> Cubin:
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in defines)]
    digest = hashlib.sha256(json.dumps([flags, nvrtc_version()]).encode())
    for source in sources(kernel):
        digest.update(source.name.encode() + source.read_bytes())
    path = folder / f"{kernel}-{digest.hexdigest()[:24]}.cubin"
    log_path = path.with_suffix(".log")
    if not (path.is_file() and log_path.is_file()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / "built.cubin"
            request = {
                "source": str(SOURCE_FOLDER / f"{kernel}.cu"),
                "options": [*flags, f"-I{INCLUDE_FOLDER}"],
                "cubin": str(built),
            }
            log = _run_compiler(kernel, request)
            built_log = Path(scratch) / "built.log"
            built_log.write_text(log)
            built_log.replace(log_path)
            built.replace(path)  # last: the cubin's presence says that both are whole
    return Cubin(path, kernel, log_path.read_text())


def _run_compiler(kernel: str, request: Mapping[str, object]) -> str:
    """NVRTC in a child process; its log."""
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("nvrtc_child.py"))],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if child.returncode != 0:
        raise CompileError(
            f"{kernel}: the compiler ended with status {child.returncode}: {child.stdout}{child.stderr}".strip()
        )
    return child.stdout


@functools.cache
def nvrtc_version() -> str:
    """Version of the NVRTC library in use."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"
