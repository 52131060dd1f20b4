"""Loading a cubin through CuPy and launching it on torch's current stream.

Kernels take one struct by value. CuPy's own launch has neither a run-time cluster size nor programmatic dependent
launch, so the function handle goes to cuLaunchKernelEx.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import cupy
import torch
from cuda.bindings import driver

from kernels_cuda.compile import Cubin
from workbench.errors import WorkbenchError


class LaunchError(WorkbenchError):
    """The driver refused a launch."""


def pointer(tensor: torch.Tensor | None) -> int:
    """The device address of `tensor`, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel with its launch shape. It belongs to the device that was current when it was loaded."""

    name: str
    function: int
    num_threads: int
    cluster_size: int
    dynamic_smem_bytes: int
    max_clusters: int
    """How many clusters (CTAs, if cluster_size is 1) are resident on the device at a time."""
    attributes: list[driver.CUlaunchAttribute] = field(repr=False)
    overlapping_attributes: list[driver.CUlaunchAttribute] = field(repr=False)
    """`attributes`, and leave to overlap the previous kernel."""

    def launch(self, params: ctypes.Structure, num_ctas: int, *, overlap_previous: bool) -> None:
        """Enqueue on torch's current stream.

        overlap_previous  may start before the kernel ahead of it in the stream has ended; the kernel must then execute
                          griddepcontrol.wait before it touches what that one writes
        """
        attributes = self.overlapping_attributes if overlap_previous else self.attributes
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = num_ctas, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.num_threads, 1, 1
        config.sharedMemBytes = self.dynamic_smem_bytes
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.numAttrs = len(attributes)
        config.attrs = attributes
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        (result,) = driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(arguments), 0)
        if result != driver.CUresult.CUDA_SUCCESS:
            raise LaunchError(f"{self.name}: launch of {num_ctas} CTAs failed: {result!r}")


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
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = cluster_size, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = num_threads, 1, 1
        config.sharedMemBytes = dynamic_smem_bytes
        cluster_attribute = _cluster_attribute(cluster_size)
        config.numAttrs = 1
        config.attrs = [cluster_attribute]
        result, max_clusters = driver.cuOccupancyMaxActiveClusters(handle, config)
        if result != driver.CUresult.CUDA_SUCCESS or max_clusters < 1:
            raise LaunchError(
                f"{cubin.kernel}: {cluster_size} CTAs of {num_threads} threads with {dynamic_smem_bytes} bytes of "
                f"shared memory each do not fit the device: {result!r}"
            )
    attributes = [cluster_attribute] if cluster_size > 1 else []
    if all_resident:
        attributes.append(_cooperative_attribute())
    overlapping = [*attributes, _overlap_attribute()]
    return Kernel(
        cubin.kernel, handle, num_threads, cluster_size, dynamic_smem_bytes, max_clusters, attributes, overlapping
    )


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
