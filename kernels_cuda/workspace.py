"""What the launches of one call hand each other: parts of one allocation of torch's.

A kernel takes addresses. A call whose sizes are known from its last one therefore needs no tensor for each part: where
the parts lie is worked out once (`layout`), and a call adds the offsets to where its memory is (`allocate`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

PART_ALIGNMENT = 16


@dataclass(frozen=True)
class Layout:
    """Parts by name, in bytes, in the order in which they lie: first those that one launch fills before the others."""

    filled: Mapping[str, int]
    others: Mapping[str, int]
    offsets: tuple[tuple[str, int], ...]
    num_filled_bytes: int
    num_bytes: int


def layout(filled: Mapping[str, int], others: Mapping[str, int]) -> Layout:
    """Where parts of so many bytes each, multiples of 16, lie."""
    sizes = {**filled, **others}
    assert all(size % PART_ALIGNMENT == 0 for size in sizes.values()), sizes
    ends = list(itertools.accumulate(sizes.values(), initial=0))
    offsets = tuple(zip(sizes, ends[:-1], strict=True))
    return Layout(filled, others, offsets, ends[len(filled)], ends[-1])


def allocate(parts: Layout, device: torch.device) -> tuple[dict[str, int], torch.Tensor]:
    """The parts' addresses by name, and the filled ones as one tensor, uint8. All of them live as long as it does."""
    whole = torch.empty(parts.num_bytes, dtype=torch.uint8, device=device)
    start = whole.data_ptr()
    addresses = {name: start + offset for name, offset in parts.offsets}
    return addresses, whole if parts.num_filled_bytes == parts.num_bytes else whole[: parts.num_filled_bytes]
