"""Loading a cubin through CuPy and launching it.

Kernels take one struct by value. CuPy's own launch has neither a run-time cluster size nor programmatic dependent
launch, so the function handle goes to cuLaunchKernelEx.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cupy
import torch
from cuda.bindings import driver

from kernels_cuda.compile import Cubin
from workbench.errors import WorkbenchError


class LaunchError(WorkbenchError):
    """The driver refused a launch."""


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid_x", ctypes.c_uint32),
        ("grid_y", ctypes.c_uint32),
        ("grid_z", ctypes.c_uint32),
        ("block_x", ctypes.c_uint32),
        ("block_y", ctypes.c_uint32),
        ("block_z", ctypes.c_uint32),
        ("shared_mem_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_uint64),
        ("attributes", ctypes.c_uint64),
        ("num_attributes", ctypes.c_uint32),
    )


INVALID_CONTEXT = int(driver.CUresult.CUDA_ERROR_INVALID_CONTEXT)


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel with its launch shape. It belongs to the device that was current when it was loaded."""

    name: str
    function: int
    cluster_size: int
    max_clusters: int
    """How many clusters (CTAs, if cluster_size is 1) are resident on the device at a time."""
    device_index: int
    config: LaunchConfig = field(repr=False)
    """Of every launch, but for the grid and the stream."""
    overlapping_config: LaunchConfig = field(repr=False)
    """`config`, and leave to overlap the previous kernel."""
    owners: tuple[driver.CUlaunchConfig, ...] = field(repr=False)
    """Of the attributes that the configs point to."""

    def bind(self, params: ctypes.Structure, num_ctas: int, *, overlap_previous: bool) -> Launch:
        """A launch of `num_ctas` CTAs with what is in `params` whenever it is enqueued.

        overlap_previous  may start before the kernel ahead of it in the stream has ended; the kernel must then execute
                          griddepcontrol.wait before it touches what that one writes
        """
        return Launch(self, params, num_ctas, self.overlapping_config if overlap_previous else self.config)


class Launch:
    """A kernel with parameters and a grid, to be enqueued again and again.

    Whoever holds it may change `params` between two calls of `enqueue`: the driver has copied them when a launch
    returns. Two threads must not hold it at a time.
    """

    __slots__ = ("_addresses", "_arguments", "_config", "_driver_launch", "_kernel", "_stream", "params")

    def __init__(self, kernel: Kernel, params: ctypes.Structure, num_ctas: int, config: LaunchConfig) -> None:
        self.params: Any = params
        """Of the kernel's own type, whose fields the caller knows."""
        self._kernel = kernel
        self._config = LaunchConfig.from_buffer_copy(config)
        self._config.grid_x = num_ctas
        self._stream = 0  # as in the config
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        self._addresses = ctypes.addressof(self._config), kernel.function, ctypes.addressof(self._arguments), None
        self._driver_launch = _launcher()

    def enqueue(self, stream: int) -> None:
        """Enqueue on the stream of this handle. Raises LaunchError when the driver refuses."""
        if stream != self._stream:
            self._config.stream = self._stream = stream
        result = self._driver_launch(*self._addresses)
        if result == INVALID_CONTEXT:  # of a thread that has done nothing on the GPU yet
            _enter_context(self._kernel.device_index)
            result = self._driver_launch(*self._addresses)
        if result:
            launch = f"{self._kernel.name}: launch of {self._config.grid_x} CTAs"
            raise LaunchError(f"{launch} failed: {driver.CUresult(result)!r}")


def current_stream(device_index: int) -> int:
    """The handle of torch's current stream on the device."""
    return torch._C._cuda_getCurrentRawStream(device_index)


@functools.cache
def _launcher() -> Callable[..., int]:
    """cuLaunchKernelEx, by ctypes: the bindings take a launch config apart and build it again on every call."""
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    launch.argtypes = [ctypes.c_void_p] * 4
    return launch


def _enter_context(device_index: int) -> None:
    """Make the context that torch uses on the device this thread's."""
    _, device = driver.cuDeviceGet(device_index)
    _, context = driver.cuDevicePrimaryCtxRetain(device)
    driver.cuCtxSetCurrent(context)


def load(
    cubin: Cubin,
    num_threads: int,
    cluster_size: int,
    dynamic_smem_bytes: int,
    device: torch.device,
    *,
    all_resident: bool = False,
) -> Kernel:
    """Load on `device` and find out how much of it is resident at a time.

    all_resident  a launch starts only when all its CTAs can be resident at a time (they may then wait for one another),
                  and fails when they never can
    """
    with torch.cuda.device(device), cupy.cuda.Device(torch.cuda.current_device()):
        torch.cuda.current_stream()  # torch's context is the one CuPy joins
        function = cupy.RawModule(path=str(cubin.path)).get_function(cubin.kernel)
        if dynamic_smem_bytes > 48 * 1024:
            function.max_dynamic_shared_size_bytes = dynamic_smem_bytes
        handle = function.kernel.ptr
        _modules.append(function)
        config = _config(num_threads, cluster_size, dynamic_smem_bytes, [_cluster_attribute(cluster_size)])
        result, max_clusters = driver.cuOccupancyMaxActiveClusters(handle, config)
        if result != driver.CUresult.CUDA_SUCCESS or max_clusters < 1:
            raise LaunchError(
                f"{cubin.kernel}: {cluster_size} CTAs of {num_threads} threads with {dynamic_smem_bytes} bytes of "
                f"shared memory each do not fit the device: {result!r}"
            )
    index = torch.cuda.current_device() if device.index is None else device.index
    return kernel_of(
        cubin.kernel, handle, num_threads, cluster_size, dynamic_smem_bytes, max_clusters, index, all_resident
    )


def kernel_of(
    name: str,
    function: int,
    num_threads: int,
    cluster_size: int,
    dynamic_smem_bytes: int,
    max_clusters: int,
    device_index: int,
    all_resident: bool,
) -> Kernel:
    """The Kernel of a loaded function."""
    attributes = [_cluster_attribute(cluster_size)] if cluster_size > 1 else []
    if all_resident:
        attributes.append(_cooperative_attribute())
    owners = tuple(
        _config(num_threads, cluster_size, dynamic_smem_bytes, some)
        for some in (attributes, [*attributes, _overlap_attribute()])
    )
    num_bytes = ctypes.sizeof(LaunchConfig)
    plain, overlapping = (LaunchConfig.from_buffer_copy(ctypes.string_at(each.getPtr(), num_bytes)) for each in owners)
    return Kernel(name, function, cluster_size, max_clusters, device_index, plain, overlapping, owners)


def _config(
    num_threads: int, num_ctas: int, dynamic_smem_bytes: int, attributes: list[driver.CUlaunchAttribute]
) -> driver.CUlaunchConfig:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = num_ctas, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
    config.sharedMemBytes = dynamic_smem_bytes
    config.numAttrs = len(attributes)
    config.attrs = attributes
    return config


_modules: list[cupy.RawKernel] = []  # a module unloads when its last kernel object goes


def _cluster_attribute(cluster_size: int) -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster_size, 1, 1
    return attribute


def _cooperative_attribute() -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
    attribute.value.cooperative = 1
    return attribute


def _overlap_attribute() -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute
