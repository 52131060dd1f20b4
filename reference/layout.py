"""The gate/up interleave: kernels that fuse SwiGLU want a gate row and its up row in the same tile.

`w13` holds all gate rows, then all up rows. Interleaved in chunks of `rep` rows it holds gate chunk 0, up chunk 0, gate
chunk 1, up chunk 1, ... Weights are interleaved by 8 rows (one matrix fragment), their scales by 1.
"""

from __future__ import annotations

import torch


def interleave(t: torch.Tensor, rep: int) -> torch.Tensor:
    """Gate rows then up rows, `t` [E, 2R, ...], to alternating chunks of `rep` rows of each; contiguous.

    Raises ValueError when `t.shape[1]` is not a multiple of 2 * rep.
    """
    _check(t, rep)
    return t.unflatten(1, (2, -1, rep)).transpose(1, 2).flatten(1, 3).contiguous()


def deinterleave(t: torch.Tensor, rep: int) -> torch.Tensor:
    """The inverse of `interleave`: back to all gate rows, then all up rows; contiguous.

    Raises ValueError when `t.shape[1]` is not a multiple of 2 * rep.
    """
    _check(t, rep)
    return t.unflatten(1, (-1, 2, rep)).transpose(1, 2).flatten(1, 3).contiguous()


def _check(t: torch.Tensor, rep: int) -> None:
    if rep < 1 or t.shape[1] % (2 * rep):
        raise ValueError(f"t: expected a multiple of 2 * rep = {2 * rep} rows in dimension 1, got {list(t.shape)}")
