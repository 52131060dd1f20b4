"""Quantisation to FP8 (e4m3) with block scales.

One rule everywhere: a block's scale maps its largest magnitude onto the largest e4m3 value,

    scale = max(amax, 1e-10) / 448        q = e4m3_rne(clamp(v / scale, -448, 448))

and the stored value means `q * scale`. Activations have blocks of 1 x 128, weights of 128 x 128; or either has one
block per row, which engines call per token and per channel. A block at an edge that 128 does not divide is smaller.
`power_of_two` rounds the scale up to a power of two, as the ue8m0 format holds it.
"""

from __future__ import annotations

from typing import Literal

import torch

ActivationScales = Literal["group", "group_ue8m0", "token"]
"""One scale for each 128 values of a token, the same as a power of two, or one for the whole token."""

GROUP_SIZE = 128
FP8_MAX = 448.0
SMALLEST_AMAX = 1e-10


def quantise_activations(x: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each 128-wide group of each row of `x` [M, H].

    Returns e4m3 [M, H] and scales [M, ceil(H/128)]; computed in fp32, or in fp64 when `x` is fp64.
    """
    return _quantise(x, 1, GROUP_SIZE, power_of_two)


def quantise_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row of `values` [..., R, C] with one scale: tokens of activations, output channels of weights.

    Returns e4m3 [..., R, C] and scales [..., R, 1]; in fp32, or in fp64 when `values` is fp64.
    """
    return _quantise(values, 1, values.shape[-1], power_of_two=False)


def quantise_as(x: torch.Tensor, scales: ActivationScales) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations `x` [M, H]: e4m3 [M, H], and scales [M, ceil(H/128)], or [M, 1] for "token"."""
    return quantise_rows(x) if scales == "token" else quantise_activations(x, power_of_two=scales == "group_ue8m0")


def dequantise_activations(x_q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values [M, H] in `dtype` that `x_q` e4m3 [M, H] with `scale` [M, ceil(H/128)] or [M, 1] stands for."""
    return _dequantise(x_q, scale, 1, GROUP_SIZE, dtype)


def quantise_weights(w: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each 128 x 128 block of the last two dimensions of `w` [..., R, C].

    Returns e4m3 [..., R, C] and scales [..., ceil(R/128), ceil(C/128)]; in fp32, or in fp64 when `w` is fp64.
    """
    return _quantise(w, GROUP_SIZE, GROUP_SIZE, power_of_two)


def dequantise_weights(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values [..., R, C] in `dtype` that e4m3 `q` with one scale per 128 x 128 block, or per row, stands for.

    scale [..., ceil(R/128), ceil(C/128)] or [..., R, 1].
    """
    return _dequantise(q, scale, GROUP_SIZE, GROUP_SIZE, dtype)


def quantise_w13(w13: torch.Tensor, power_of_two: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise gate and up rows of `w13` [..., 2I, H] apart, since 128 need not divide I.

    Returns e4m3 [..., 2I, H] and scales [..., 2*ceil(I/128), ceil(H/128)].
    """
    halves = [quantise_weights(half, power_of_two) for half in w13.chunk(2, dim=-2)]
    quantised, scales = zip(*halves, strict=True)
    return torch.cat(quantised, dim=-2), torch.cat(scales, dim=-2)


def dequantise_w13(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values [..., 2I, H] in `dtype` of a quantised w13, gate rows, then up rows; scaled by blocks or by rows."""
    halves = zip(q.chunk(2, dim=-2), scale.chunk(2, dim=-2), strict=True)
    return torch.cat([dequantise_weights(half, half_scale, dtype) for half, half_scale in halves], dim=-2)


def _quantise(
    values: torch.Tensor, block_rows: int, block_columns: int, power_of_two: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    values = values if values.dtype == torch.float64 else values.float()
    blocks = _blocks(values, block_rows, block_columns)
    amax = blocks.abs().amax(dim=(-3, -1)).clamp(min=SMALLEST_AMAX)
    # Divided by a tensor: for a Python number CUDA multiplies by the reciprocal, an ulp off, which flips codes at ties.
    scale = amax / torch.full_like(amax, FP8_MAX)
    if power_of_two:
        scale = _round_up_to_power_of_two(scale)
    # The cast alone does not saturate in every release of torch: above 464 some give NaN.
    q = (blocks / scale[..., :, None, :, None]).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return _unblocked(q, values.shape), scale


def _dequantise(
    q: torch.Tensor, scale: torch.Tensor, block_rows: int, block_columns: int, dtype: torch.dtype
) -> torch.Tensor:
    if scale.shape[-2:] == (q.shape[-2], 1):  # where a block is a row as well, both mean the same
        block_rows, block_columns = 1, q.shape[-1]
    working = torch.promote_types(dtype, torch.float32)
    blocks = _blocks(q.to(working), block_rows, block_columns)
    return _unblocked(blocks * scale.to(working)[..., :, None, :, None], q.shape).to(dtype)


def _blocks(values: torch.Tensor, block_rows: int, block_columns: int) -> torch.Tensor:
    """[..., R, C] as [..., row blocks, block_rows, column blocks, block_columns], edges filled with zeros."""
    rows, columns = values.shape[-2:]
    padding = (0, -columns % block_columns, 0, -rows % block_rows)
    if any(padding):
        values = torch.nn.functional.pad(values, padding)
    row_blocks, column_blocks = values.shape[-2] // block_rows, values.shape[-1] // block_columns
    return values.unflatten(-1, (column_blocks, block_columns)).unflatten(-3, (row_blocks, block_rows))


def _unblocked(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `_blocks`: contiguous, without the filled edges."""
    rows, columns = shape[-2:]
    return blocks.flatten(-2).flatten(-3, -2)[..., :rows, :columns].contiguous()


def _round_up_to_power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two >= `scale`, exactly: a carry out of the mantissa bits raises the exponent."""
    integer, mantissa = (torch.int64, 2**52 - 1) if scale.dtype == torch.float64 else (torch.int32, 2**23 - 1)
    return ((scale.view(integer) + mantissa) & ~mantissa).view(scale.dtype)
