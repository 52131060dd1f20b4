"""What the launches of one call hand each other: parts of one allocation of torch's."""

from __future__ import annotations

from collections.abc import Mapping

import torch

PART_ALIGNMENT = 16


def carve(
    filled: Mapping[str, int], others: Mapping[str, int], device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """All parts by name, uint8 of so many bytes each, multiples of 16; and those of `filled` as one tensor: they stand
    together, so that one launch can fill them before."""
    sizes = {**filled, **others}
    assert all(size % PART_ALIGNMENT == 0 for size in sizes.values()), sizes
    whole = torch.empty(sum(sizes.values()), dtype=torch.uint8, device=device)
    parts = dict(zip(sizes, whole.split_with_sizes(list(sizes.values())), strict=True))
    return parts, whole[: sum(filled.values())]
