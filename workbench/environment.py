"""What this process runs in: devices, versions, clocks, the digest of a variant's sources, and the settings.

Settings are environment variables. Those of the workbench are all read in this file, but for two:

    MOE_WORKBENCH_RESULTS       folder that traces, tables and reports are written to     default ./results
    MOE_WORKBENCH_VARIANTS      modules to import for further variants, comma-separated   default none
    MOE_WORKBENCH_EXCLUDE       variants that "auto" leaves out, comma-separated; read
                                when a layer is made                                      default none
    MOE_WORKBENCH_PLUGIN        what the plugins of serving engines may do: off, nothing; on, run variants that
                                read the engine's weights where they lie; copies, also those that keep a re-laid
                                copy of them; read when the engine loads its plugins      default on
    MOE_WORKBENCH_SHIPPED       which of the selection tables that come with the package are used: exact, those made
                                in this very environment; device, also those made on this model of device with
                                other versions of the driver and the libraries; off, none; read when a layer is
                                made                                                      default exact
    MOE_WORKBENCH_CHECK_VALUES  1: a layer reads ids and scales on every call and not on its first alone, which
                                waits for the device; read when a layer is made           default off
    MOE_WORKBENCH_CACHE         folder of compiled CUDA kernels; read by kernels_cuda/compile.py, since kernels
                                import nothing of the workbench but its contract
    MOE_WORKBENCH_RACECHECK     1: kernels are built for compute-sanitizer's racecheck; read there too
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from workbench import source_code
from workbench.errors import InputError
from workbench.trace import Environment
from workbench.variant import Variant

NONE = "none"
CUPY_DISTRIBUTIONS = ("cupy", "cupy-cuda13x", "cupy-cuda12x")

PluginMode = Literal["off", "on", "copies"]
ShippedMode = Literal["exact", "device", "off"]


@dataclass(frozen=True)
class Settings:
    """The environment variables at the head of this file, parsed."""

    results: Path
    variant_modules: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    check_values: bool = False


def settings() -> Settings:
    """The settings as they are now."""
    return Settings(
        results=Path(os.environ.get("MOE_WORKBENCH_RESULTS") or "results"),
        variant_modules=_names("MOE_WORKBENCH_VARIANTS"),
        exclude=_names("MOE_WORKBENCH_EXCLUDE"),
        check_values=os.environ.get("MOE_WORKBENCH_CHECK_VALUES") == "1",
    )


def plugin_mode() -> PluginMode:
    """MOE_WORKBENCH_PLUGIN as it is now. InputError when it is none of the modes."""
    given = os.environ.get("MOE_WORKBENCH_PLUGIN") or "on"
    for mode in get_args(PluginMode):
        if given == mode:
            return mode
    raise InputError(f"MOE_WORKBENCH_PLUGIN: expected off, on or copies, got {given!r}")


def shipped_mode() -> ShippedMode:
    """MOE_WORKBENCH_SHIPPED as it is now. InputError when it is none of the modes."""
    given = os.environ.get("MOE_WORKBENCH_SHIPPED") or "exact"
    for mode in get_args(ShippedMode):
        if given == mode:
            return mode
    raise InputError(f"MOE_WORKBENCH_SHIPPED: expected exact, device or off, got {given!r}")


def _names(variable: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in os.environ.get(variable, "").split(",") if name.strip())


@dataclass(frozen=True)
class Clocks:
    """What the device says of its speed at one moment; zero and empty on a CPU."""

    sm_mhz: int = 0
    throttle_reasons: tuple[str, ...] = ()


def device_named(name: str) -> torch.device:
    """The device that torch calls `name`, with its index if it is a GPU. InputError when it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device: expected cpu or cuda[:<index>], got {name!r}") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(f"device: expected cpu or cuda[:<index>], got {name!r}")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InputError(f"device: expected one of {count} CUDA devices, got {name!r}")
    return torch.device("cuda", device.index or 0)


def current(device: torch.device | str) -> Environment:
    """The environment of measurements on `device`; "none" for what is absent."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        driver=_driver() if on_gpu else NONE,
        cuda=torch.version.cuda or NONE,
        torch=str(torch.__version__),
        triton=_version("triton"),
        cupy=_version(*CUPY_DISTRIBUTIONS),
    )


def clocks(device: torch.device | str) -> Clocks:
    """The SM clock and the reasons why it is held down, now.

    Without NVML the clock is 0 and the reason says so, lest a figure look like one made at full speed.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Clocks()
    nvml = _nvml()
    if nvml is None:
        return Clocks(throttle_reasons=("unknown: no NVML",))
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        mhz = nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError as error:
        return Clocks(throttle_reasons=(f"unknown: {error}",))
    return Clocks(mhz, throttle_names(nvml, reasons))


def throttle_names(nvml: Any, reasons: int) -> tuple[str, ...]:
    """The names of the bits set in NVML's mask of throttle reasons, such as SwPowerCap; idling is not one."""
    prefix = "nvmlClocksThrottleReason"
    known = {name.removeprefix(prefix): getattr(nvml, name) for name in dir(nvml) if name.startswith(prefix)}
    for none_or_alias in ("None", "All", "GpuIdle", "UserDefinedClocks"):
        known.pop(none_or_alias, None)
    return tuple(sorted(name for name, bit in known.items() if reasons & bit))


def sources_digest(variant: Variant) -> str:
    """16 hexadecimal digits over the names and the code of the variant's source files, wherever they lie.

    Comments and blank lines do not count (source_code.py).
    """
    digest = hashlib.sha256()
    for path in sorted(variant.sources()):
        file = path.stat()
        code = _code(path, file.st_mtime_ns, file.st_size)
        digest.update(f"{path.name}:{len(code)}\n".encode())
        digest.update(code)
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=256)
def _code(path: Path, mtime_ns: int, num_bytes: int) -> bytes:
    """The code in the file, read once for each time that it is written."""
    return source_code.code(path)


def _processor() -> str:
    """The CPU's model name; platform.processor() is empty on many Linux systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return NONE


def _driver() -> str:
    nvml = _nvml()
    if nvml is None:
        return NONE
    version = nvml.nvmlSystemGetDriverVersion()
    return version.decode() if isinstance(version, bytes) else str(version)


def _nvml() -> ModuleType | None:
    """pynvml, initialised; None when the package or the driver's library is absent."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
