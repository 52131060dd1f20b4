"""Per-token-group quantisation as vLLM and SGLang both define it, in the layouts of scales that their kernels want."""

from __future__ import annotations

import torch

from reference.quant import GROUP_SIZE, SMALLEST_AMAX, quantise_activations
from workbench.checks import described
from workbench.compat.kernel import kernel, runs_on
from workbench.errors import InputError, UnsupportedError

TMA_ALIGNMENT = 4
"""fp32 values to the 16 bytes at which the copy engine wants a column to begin."""


def quantise_groups(
    x: torch.Tensor,
    group_size: int,
    eps: float,
    *,
    column_major: bool = False,
    tma_aligned: bool = False,
    power_of_two: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [..., H], fp32 scales [..., H / 128]) of contiguous bf16, fp16 or fp32 `x` [..., H].

    column_major   scales lie column by column; x has two dimensions then
    tma_aligned    and each column begins at a multiple of 16 bytes
    power_of_two   each scale is rounded up to a power of two

    InputError for a tensor that does not fit, UnsupportedError for another group_size than 128 or eps than 1e-10.
    """
    if not isinstance(x, torch.Tensor) or x.ndim < 2 or not x.dtype.is_floating_point or x.dtype.itemsize not in (2, 4):
        raise InputError(f"x: expected bfloat16, float16 or float32 [..., H], got {described(x)}")
    if group_size != GROUP_SIZE:
        raise UnsupportedError(f"group_size: expected {GROUP_SIZE}, got {group_size!r}")
    if eps != SMALLEST_AMAX:
        raise UnsupportedError(f"eps: expected {SMALLEST_AMAX}, got {eps!r}")
    if x.shape[-1] % group_size or not x.is_contiguous():
        raise InputError(
            f"x: expected a contiguous tensor whose last dimension {group_size} divides, "
            f"got {described(x)} with strides {list(x.stride())}"
        )
    if column_major and x.ndim != 2:
        raise UnsupportedError(f"column_major_scales: expected x [M, H] with it, got {described(x)}")
    rows = x.flatten(0, -2)
    if runs_on(x.device) and x.dtype is torch.bfloat16 and rows.shape[0] and not power_of_two:
        with torch.cuda.device(x.device):
            x_q, scale = kernel().quantise(rows)
    else:
        x_q, scale = quantise_activations(rows, power_of_two)
    if column_major:
        num_rows, num_groups = scale.shape
        height = -(-num_rows // TMA_ALIGNMENT) * TMA_ALIGNMENT if tma_aligned else num_rows
        columns = torch.empty(num_groups, height, dtype=torch.float32, device=x.device).T[:num_rows]
        return x_q, columns.copy_(scale)
    return x_q.view(x.shape), scale.view(*x.shape[:-1], x.shape[-1] // group_size)
