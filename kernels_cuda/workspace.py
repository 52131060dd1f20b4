"""What the launches of one call hand each other: parts of one allocation of torch's.

A kernel takes addresses, and no tensor is needed for each part: where the parts lie is worked out once for calls of the
same sizes (`layout`), and a call adds the offsets to where its memory is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

PART_ALIGNMENT = 16
LINE_BYTES = 128

FILLED = "filled"
"""The name of all filled parts together."""


@dataclass(frozen=True)
class Layout:
    """Parts by name, in bytes, in the order in which they lie: first those that one launch fills before the others."""

    filled: Mapping[str, int]
    others: Mapping[str, int]
    offsets: Mapping[str, int]
    num_filled_bytes: int
    num_bytes: int


def layout(filled: Mapping[str, int], others: Mapping[str, int]) -> Layout:
    """Where parts of so many bytes each lie: the filled ones, multiples of 16, behind each other, and each of the
    others at the beginning of a cache line."""
    assert all(size % PART_ALIGNMENT == 0 for size in filled.values()), filled
    whole_lines = [-(-size // LINE_BYTES) * LINE_BYTES for size in (sum(filled.values()), *others.values())]
    offsets = dict(zip(filled, itertools.accumulate(filled.values(), initial=0), strict=False))
    offsets |= dict(zip(others, itertools.accumulate(whole_lines), strict=False))
    return Layout(filled, others, {FILLED: 0, **offsets}, sum(filled.values()), sum(whole_lines))


def allocate(parts: Layout, device: torch.device) -> torch.Tensor:
    """Memory for the parts, uint8."""
    return torch.empty(parts.num_bytes, dtype=torch.uint8, device=device)
