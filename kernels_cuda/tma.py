"""Tensor maps: descriptions of a tensor in global memory from which the copy engine fetches boxes.

Encoded once per weight tensor, on the host, by the driver; a kernel takes them by value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workbench.errors import CompileError

TENSOR_MAP_BYTES = 128


def encode(tensor: torch.Tensor, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> bytes:
    """A map over the bytes of `tensor`, 128-byte swizzled in shared memory.

    sizes    extent of each dimension, innermost first; the innermost counts bytes
    strides  bytes from one index to the next, of all dimensions but the innermost; multiples of 16
    box      extent of what one copy fetches; the innermost is at most 128 bytes

    Raises CompileError when the driver refuses, with the numbers it refused.
    """
    from cuda.bindings import driver

    result, tensor_map = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        len(sizes),
        tensor.data_ptr(),
        [driver.cuuint64_t(size) for size in sizes],
        [driver.cuuint64_t(stride) for stride in strides],
        [driver.cuuint32_t(extent) for extent in box],
        [driver.cuuint32_t(1)] * len(sizes),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if result != driver.CUresult.CUDA_SUCCESS:
        numbers = f"sizes {tuple(sizes)}, strides {tuple(strides)}, box {tuple(box)}"
        raise CompileError(f"tensor map: the driver answered {result!r} to {numbers}")
    return b"".join(int(word).to_bytes(8, "little") for word in tensor_map.opaque)
