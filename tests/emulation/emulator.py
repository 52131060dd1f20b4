"""CUDA kernels on the CPU: their own sources, compiled by g++ against headers that emulate the device.

`include/` mirrors those of kernels_cuda/include that hold PTX, under the same names; all others are used as they are.
`emulated()` puts this in the place of compiling and launching, so that a variant's own prepare, align and run work on
CPU tensors. It proves logic: results, addresses, barriers, rings, missing waits, early releases. It says nothing of
speed, of the memory model's finer points (a missing fence between ordinary stores and wgmma is not seen), or of the
tensor cores' precision.

A kernel that overlaps the one before it in the stream runs first, as far as it gets without grid_dependency::wait();
only then does that one run. Memory from torch.empty is poisoned; what a launch is given lives until all launches are
done.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

from kernels_cuda import compile as cuda_compile
from kernels_cuda import tma, workspace

FOLDER = Path(__file__).parent
COMPILER = "g++"
FLAGS = (
    *("-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # each kernel has its own scheduler
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-reorder", "-Wno-maybe-uninitialized", "-Wno-unused"),
)
SMEM_BYTES_PER_SM = 233_472
RESERVED_SMEM_BYTES = 1024
THREADS_PER_SM = 2048
TENSOR_BOX_TAG = 0x5445_4E53_4F52_4D41
GUARD_BYTES = 1 << 16
GUARD_BYTE = 0xA5
GUARD = "guard of "


class EmulationError(Exception):
    """What the kernel did that it must not do."""


class Grid(ctypes.Structure):
    """A launch. `run_previous` runs the kernel ahead in the stream, when this one waits for it; null: it has run."""

    _fields_ = (
        ("num_ctas", ctypes.c_uint32),
        ("num_threads", ctypes.c_uint32),
        ("cluster_size", ctypes.c_uint32),
        ("dynamic_smem_bytes", ctypes.c_uint32),
        ("seed", ctypes.c_uint64),
        ("run_previous", ctypes.CFUNCTYPE(None)),
    )


@dataclass(frozen=True)
class Source:
    """A kernel to be compiled, in the place of kernels_cuda.compile.Cubin."""

    file: Path
    defines: tuple[tuple[str, int], ...]

    @property
    def kernel(self) -> str:
        return self.file.stem

    @property
    def triggers_early(self) -> bool:
        """Whether the next kernel may start before this one has ended."""
        return "grid_dependency::launch_dependents()" in self.file.read_text()


def compiler_missing() -> str:
    """Why nothing can be emulated here; "" if it can."""
    return "" if shutil.which(COMPILER) else f"{COMPILER} is not installed"


def emulate(file: Path, defines: Mapping[str, int]) -> Callable[[ctypes.Structure, Grid], None]:
    """The kernel in `file`, whose entry point has the file's name, as a function of its parameters and its grid.

    It raises EmulationError with what went wrong: a fault, a trap, or a deadlock with the lines at which threads wait.
    """
    library = ctypes.CDLL(str(_build(Source(file, tuple(sorted(defines.items()))))))
    library.emulated_kernel.restype = ctypes.c_char_p
    library.emulated_kernel.argtypes = (Grid, ctypes.c_void_p, ctypes.c_size_t)

    def run(params: ctypes.Structure, grid: Grid) -> None:
        fault = library.emulated_kernel(grid, ctypes.addressof(params), ctypes.sizeof(params))
        if fault is not None:
            raise EmulationError(f"{file.stem}: {fault.decode()}")

    return run


@functools.cache
def _build(source: Source) -> Path:
    """The shared library, from the cache folder of the real kernels or put there."""
    headers = {path.name: path for path in cuda_compile.INCLUDE_FOLDER.glob("*.cuh")}
    headers |= {path.name: path for path in (FOLDER / "include").glob("*.cuh")}
    headers |= {path.name: path for path in FOLDER.glob("*.hpp")}
    flags = [*FLAGS, *(f"-D{name}={value}" for name, value in source.defines)]
    digest = hashlib.sha256(json.dumps([flags, _compiler_version()]).encode())
    for path in (Path(__file__), source.file, *(headers[name] for name in sorted(headers))):
        digest.update(path.name.encode() + path.read_bytes())
    folder = cuda_compile._cache_folder()
    library = folder / f"{source.kernel}-emulated-{digest.hexdigest()[:24]}.so"
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _compile(source, headers, flags, Path(scratch))
            (Path(scratch) / "built.so").replace(library)
    return library


def _compile(source: Source, headers: Mapping[str, Path], flags: Sequence[str], scratch: Path) -> None:
    for name, path in headers.items():
        (scratch / name).write_text(_as_cpp(path))
    main = scratch / "main.cpp"
    main.write_text(
        '#include "device.hpp"\n'
        f"{_as_cpp(source.file)}\n"
        'extern "C" __attribute__((visibility("default")))\n'
        "const char* emulated_kernel(emulation::Grid grid, const void* params, size_t num_bytes) {\n"
        f"    const auto kernel = [](const void* p) {{ {source.kernel}(*static_cast<const Params*>(p)); }};\n"
        "    return emulation::emulate(grid, kernel, params, num_bytes);\n"
        "}\n"
    )
    command = [COMPILER, *flags, "-I", str(scratch), str(main), "-o", str(scratch / "built.so")]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise EmulationError(f"{source.kernel} does not compile:\n{outcome.stderr}")


def _as_cpp(path: Path) -> str:
    """The text of `path` with the declarations of shared memory replaced, and its own line numbers."""
    text = path.read_text()
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = reinterpret_cast<\1*>(emulation::dynamic_shared());",
        text,
    )
    text = re.sub(
        r"\b__shared__ (?:__align__\(\d+\) )?(\w+) (\w+)((?:\[[^\]]+\])*);",
        r"auto& \2 = emulation::static_shared<\1\3>(__LINE__);",
        text,
    )
    return f'#line 1 "{path}"\n{text}'


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def tensor_map(tensor: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """As kernels_cuda.tma.encode, in the form that the emulated copy engine reads."""
    assert tensor.data_ptr() % 16 == 0
    assert sizes[0] % 16 == 0
    assert all(stride % 16 == 0 for stride in strides)
    assert box[0] == 128
    assert max(box) <= 256
    missing = 5 - len(sizes)
    words = [TENSOR_BOX_TAG, tensor.data_ptr(), len(sizes), *sizes, *[1] * missing, 1, *strides, *[0] * missing]
    extents = bytes(extent - 1 for extent in (*box, *[1] * missing, 1, 1, 1))
    encoded = b"".join(word.to_bytes(8, "little") for word in words) + extents
    return encoded.ljust(tma.TENSOR_MAP_BYTES, b"\0")


@dataclass
class Device:
    """An emulated GPU of `num_sms` SMs with one stream."""

    num_sms: int
    seed: int
    chain: list[Callable[[object], None]] = field(default_factory=list)
    """Launches that have not run: each may overlap the one before it."""
    last_triggers_early: bool = False
    alive: list[torch.Tensor] = field(default_factory=list)
    num_launches: int = 0
    guards: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    """Bytes behind the parts of workspaces, which no kernel may write, and whose."""

    def launch(self, kernel: Kernel, params: ctypes.Structure, num_ctas: int, overlap_previous: bool) -> None:
        if not (overlap_previous and self.last_triggers_early):
            self.synchronize()
        self.num_launches += 1
        copied = type(params).from_buffer_copy(params)
        shape = (num_ctas, kernel.num_threads, kernel.cluster_size, kernel.dynamic_smem_bytes)
        seed = self.seed * 1000 + self.num_launches
        self.chain.append(lambda run_previous: kernel.function(copied, Grid(*shape, seed, run_previous)))
        self.last_triggers_early = kernel.source.triggers_early

    def synchronize(self) -> None:
        """Run what was launched."""
        chain, self.chain = self.chain, []
        errors: list[EmulationError] = []
        self._run(chain, errors)
        if errors:
            raise errors[0]
        for part, guard in self.guards:
            if (guard != GUARD_BYTE).any():
                raise EmulationError(f"a kernel wrote over the end of {part}")

    def allocate(self, parts: workspace.Layout, device: torch.device) -> torch.Tensor:
        """As kernels_cuda.workspace.allocate, for a layout of guarded_layout(): the guards begin where parts end."""
        whole = _poisoned_empty(parts.num_bytes, dtype=torch.uint8, device=device)
        part, end = " or ".join(parts.filled), parts.num_filled_bytes
        for name, size in parts.others.items():
            next_end = parts.offsets[name] + size
            if name.startswith(GUARD):
                self.guards.append((part, whole[end:next_end].fill_(GUARD_BYTE)))
            part, end = name, next_end
        return whole

    def _run(self, chain: Sequence[Callable[[object], None]], errors: list[EmulationError]) -> None:
        if not chain:
            return
        earlier = ctypes.CFUNCTYPE(None)()
        if len(chain) > 1:
            earlier = ctypes.CFUNCTYPE(None)(lambda: self._run(chain[:-1], errors))
        try:
            chain[-1](earlier)
        except EmulationError as error:
            errors.append(error)

    def data_ptr(self, tensor: torch.Tensor) -> int:
        """As torch.Tensor.data_ptr; the tensor lives as long as this."""
        self.alive.append(tensor)
        return _torch_data_ptr(tensor)


def guarded_layout(filled: Mapping[str, int], others: Mapping[str, int]) -> workspace.Layout:
    """As kernels_cuda.workspace.layout, with a guard behind the filled parts and behind each other one."""
    guarded = {f"{GUARD}{workspace.FILLED}": GUARD_BYTES}
    for name, size in others.items():
        guarded |= {name: size, f"{GUARD}{name}": GUARD_BYTES}
    return _layout(filled, guarded)


def _poisoned_empty(*size: object, **options: object) -> torch.Tensor:
    """As torch.empty, with bytes in it that make no sensible value of any kind."""
    return _poisoned(_torch_empty(*size, **options))


def _poisoned_empty_like(tensor: torch.Tensor, **options: object) -> torch.Tensor:
    return _poisoned(_torch_empty_like(tensor, **options))


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_contiguous():
        tensor.view(-1).view(torch.uint8).fill_(0x7F)
    return tensor


_torch_empty, _torch_empty_like, _torch_data_ptr = torch.empty, torch.empty_like, torch.Tensor.data_ptr
_layout = workspace.layout


@dataclass(frozen=True)
class Kernel:
    """In the place of kernels_cuda.launch.Kernel."""

    device: Device
    source: Source
    function: Callable[[ctypes.Structure, Grid], None]
    num_threads: int
    cluster_size: int
    dynamic_smem_bytes: int
    max_clusters: int

    @property
    def name(self) -> str:
        return self.source.kernel

    def bind(self, params: ctypes.Structure, num_ctas: int, *, overlap_previous: bool) -> Launch:
        assert num_ctas > 0
        assert num_ctas % self.cluster_size == 0
        return Launch(self, params, num_ctas, overlap_previous)


@dataclass(frozen=True)
class Launch:
    """In the place of kernels_cuda.launch.Launch."""

    kernel: Kernel
    params: ctypes.Structure
    num_ctas: int
    overlap_previous: bool

    def enqueue(self, stream: int) -> None:
        self.kernel.device.launch(self.kernel, self.params, self.num_ctas, self.overlap_previous)


@contextlib.contextmanager
def emulated(num_sms: int = 6, seed: int = 0) -> Iterator[Device]:
    """Within, CUDA variants run on CPU tensors. What was launched has run at the end, or after synchronize()."""
    gpu = Device(num_sms, seed)

    def compile_kernel(kernel: str, defines: Mapping[str, int]) -> Source:
        return Source(cuda_compile.SOURCE_FOLDER / f"{kernel}.cu", tuple(sorted(defines.items())))

    def load(
        source: Source,
        num_threads: int,
        cluster_size: int,
        dynamic_smem_bytes: int,
        device: torch.device,
        *,
        all_resident: bool = False,
    ) -> Kernel:
        if dynamic_smem_bytes + RESERVED_SMEM_BYTES > SMEM_BYTES_PER_SM:
            raise EmulationError(f"{source.kernel}: {dynamic_smem_bytes} bytes of shared memory do not fit an SM")
        function = emulate(source.file, dict(source.defines))
        ctas_per_sm = min(
            THREADS_PER_SM // num_threads, SMEM_BYTES_PER_SM // (dynamic_smem_bytes + RESERVED_SMEM_BYTES)
        )
        max_clusters = max(num_sms * ctas_per_sm // cluster_size, 1)
        return Kernel(gpu, source, function, num_threads, cluster_size, dynamic_smem_bytes, max_clusters)

    properties = SimpleNamespace(multi_processor_count=num_sms, major=9, minor=0)
    modules = [module for name, module in sys.modules.items() if name.startswith("kernels_cuda.sm90_")]
    _forget_kernels(modules)
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, replacement in (("compile_kernel", compile_kernel), ("load", load)):
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, replacement))
        stack.enter_context(patch.object(tma, "encode", tensor_map))
        stack.enter_context(patch.object(workspace, "layout", guarded_layout))
        stack.enter_context(patch.object(workspace, "allocate", gpu.allocate))
        stack.enter_context(patch.object(torch.Tensor, "data_ptr", lambda tensor: gpu.data_ptr(tensor)))
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))
        stack.enter_context(patch.object(torch, "empty", _poisoned_empty))
        stack.enter_context(patch.object(torch, "empty_like", _poisoned_empty_like))
        stack.enter_context(patch("torch.cuda.get_device_properties", lambda _: properties))
        stack.callback(_forget_kernels, modules)
        yield gpu
        gpu.synchronize()


def _forget_kernels(modules: Sequence[object]) -> None:
    """Launchers keep the kernels they loaded, by device: these are another device's."""
    for module in modules:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
