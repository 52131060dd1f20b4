"""What cuLaunchKernelEx is given, without a driver: the bindings' own structs say what it should be."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from cuda.bindings import driver

from kernels_cuda import launch
from kernels_cuda.launch import Kernel, LaunchConfig, LaunchError


class Params(ctypes.Structure):
    _fields_ = (("tokens", ctypes.c_uint64), ("num_tokens", ctypes.c_uint32))


ATTRIBUTE_BYTES = 72
CLUSTER, COOPERATIVE, OVERLAP = (
    int(getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}"))
    for name in ("CLUSTER_DIMENSION", "COOPERATIVE", "PROGRAMMATIC_STREAM_SERIALIZATION")
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a driver that takes every launch would have read."""
    seen: list[dict[str, Any]] = []

    def take(config_address: int, function: int, arguments: int, extra: None) -> int:
        config = LaunchConfig.from_buffer_copy(ctypes.string_at(config_address, 56))
        attributes = ctypes.string_at(config.attributes, ATTRIBUTE_BYTES * config.num_attributes)
        ids = [int.from_bytes(attributes[at : at + 4], "little") for at in range(0, len(attributes), ATTRIBUTE_BYTES)]
        values = {each: attributes[at * ATTRIBUTE_BYTES + 8 : at * ATTRIBUTE_BYTES + 20] for at, each in enumerate(ids)}
        address = int.from_bytes(ctypes.string_at(arguments, 8), "little")
        params = Params.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(Params)))
        seen.append({"config": config, "attributes": values, "function": function, "params": params})
        return 0

    monkeypatch.setattr(launch, "_launcher", lambda: take)
    return seen


def kernel(cluster_size: int = 1, all_resident: bool = False) -> Kernel:
    return launch.kernel_of("sm90_test", 0xF00, 384, cluster_size, 99_000, 66, 3, all_resident)


def test_the_struct_is_the_bindings() -> None:
    assert ctypes.sizeof(LaunchConfig) == 56
    theirs = driver.CUlaunchConfig()
    theirs.gridDimX, theirs.gridDimY, theirs.gridDimZ = 1, 2, 3
    theirs.blockDimX, theirs.blockDimY, theirs.blockDimZ = 4, 5, 6
    theirs.sharedMemBytes, theirs.hStream = 7, 8
    ours = LaunchConfig.from_buffer_copy(ctypes.string_at(theirs.getPtr(), 56))
    assert [getattr(ours, name) for name, _ in LaunchConfig._fields_] == [1, 2, 3, 4, 5, 6, 7, 8, 0, 0]


@pytest.mark.parametrize("overlap_previous", [False, True])
@pytest.mark.parametrize(("cluster_size", "all_resident"), [(1, False), (2, False), (1, True), (8, True)])
def test_a_launch(
    launched: list[dict[str, Any]], cluster_size: int, all_resident: bool, overlap_previous: bool
) -> None:
    bound = kernel(cluster_size, all_resident).bind(Params(0x55, 7), 40, overlap_previous=overlap_previous)
    bound.enqueue(0x1003)
    (seen,) = launched
    config = seen["config"]
    assert (config.grid_x, config.grid_y, config.grid_z) == (40, 1, 1)
    assert (config.block_x, config.block_y, config.block_z, config.shared_mem_bytes) == (384, 1, 1, 99_000)
    assert config.stream == 0x1003
    assert seen["function"] == 0xF00
    assert (seen["params"].tokens, seen["params"].num_tokens) == (0x55, 7)
    wanted = {}
    if cluster_size > 1:
        wanted[CLUSTER] = b"".join(size.to_bytes(4, "little") for size in (cluster_size, 1, 1))
    if all_resident:
        wanted[COOPERATIVE] = (1).to_bytes(12, "little")
    if overlap_previous:
        wanted[OVERLAP] = (1).to_bytes(12, "little")
    assert {each: value[: len(wanted[each])] for each, value in seen["attributes"].items()} == wanted


def test_a_launch_leaves_nothing_behind_for_the_next(launched: list[dict[str, Any]]) -> None:
    one = kernel(2)
    for num_ctas, overlap_previous in ((40, True), (2, False), (40, True)):
        one.bind(Params(), num_ctas, overlap_previous=overlap_previous).enqueue(0)
    assert [(seen["config"].grid_x, seen["config"].num_attributes) for seen in launched] == [(40, 2), (2, 1), (40, 2)]
    assert one.config.grid_x == 2  # a cluster, as it was loaded


def test_a_launch_is_made_again_with_what_is_in_its_parameters_by_then(launched: list[dict[str, Any]]) -> None:
    bound = kernel(2).bind(Params(0x55, 7), 40, overlap_previous=True)
    for tokens, stream in ((0x55, 0), (0x66, 0x1003), (0x77, 0)):
        bound.params.tokens = tokens
        bound.enqueue(stream)
    assert [(seen["params"].tokens, seen["config"].stream) for seen in launched] == [
        (0x55, 0),
        (0x66, 0x1003),
        (0x77, 0),
    ]
    assert {(seen["params"].num_tokens, seen["config"].grid_x) for seen in launched} == {(7, 40)}


def test_a_refused_launch_says_which(launched: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_launcher", lambda: lambda *arguments: 1)
    message = r"^sm90_test: launch of 40 CTAs failed: <CUresult\.CUDA_ERROR_INVALID_VALUE: 1>"
    with pytest.raises(LaunchError, match=message):
        kernel().bind(Params(), 40, overlap_previous=False).enqueue(0)


def test_a_thread_that_is_new_to_the_gpu_enters_torchs_context(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    invalid = int(driver.CUresult.CUDA_ERROR_INVALID_CONTEXT)
    monkeypatch.setattr(launch, "_launcher", lambda: lambda *arguments: 0 if entered else invalid)
    monkeypatch.setattr(launch, "_enter_context", entered.append)
    kernel().bind(Params(), 40, overlap_previous=False).enqueue(0)
    assert entered == [3]
