"""How far an output is from the reference, and the poison that shows what an output silently depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from workbench.errors import InputError
from workbench.trace import Accuracy

# torch's caching allocator keeps a pool for requests up to 1 MiB and another for larger ones: reach into both.
_POISONED_SIZES = (*[1 << power for power in range(9, 20)] * 4, *[1 << power for power in range(20, 27)] * 4, 1 << 30)


def measure(out: torch.Tensor, reference: torch.Tensor, tolerance: float) -> Accuracy:
    """Compare `out` with `reference`, both [M, H] of any floating dtype, in fp64.

    The relative error is ||out - reference|| / ||reference|| over the whole batch; where the reference is zero
    throughout, any non-zero output is infinitely wrong. A NaN or an infinity in `out` makes the errors NaN or infinite.
    Raises InputError when the shapes differ.
    """
    if out.shape != reference.shape:
        raise InputError(f"out: expected the reference's shape {list(reference.shape)}, got {list(out.shape)}")
    if not out.numel():
        return Accuracy(rel_err=0.0, max_abs_err=0.0, cosine=1.0, tolerance=tolerance)
    sums, largest = torch.zeros(4, dtype=torch.float64), torch.zeros(())
    for some_out, some_reference in zip(out.split(1024), reference.split(1024), strict=True):
        got, expected = some_out.double(), some_reference.double()
        error = got - expected
        products = ((error, error), (got, got), (expected, expected), (got, expected))
        sums += torch.stack([(a * b).sum() for a, b in products]).cpu()
        largest = torch.maximum(largest, error.abs().max().cpu())  # propagates NaN
    error_norm, out_norm, reference_norm = sums[:3].sqrt().tolist()
    norms = out_norm * reference_norm
    return Accuracy(
        rel_err=error_norm / reference_norm if reference_norm else (math.inf if error_norm else 0.0),
        max_abs_err=largest.item(),
        cosine=sums[3].item() / norms if norms else 1.0,
        tolerance=tolerance,
    )


def passed(accuracy: Accuracy) -> bool:
    """Whether the relative error is a number within the tolerance; NaN and infinity never are."""
    return math.isfinite(accuracy.max_abs_err) and accuracy.rel_err <= accuracy.tolerance


def poison(t: torch.Tensor) -> torch.Tensor:
    """Fill `t` in place with 0xFF bytes, which are NaN in every floating dtype and -1 in every signed integer one."""
    t.view(torch.uint8).fill_(0xFF)
    return t


def poison_free_memory(device: torch.device) -> None:
    """Make free memory that the next torch.empty on this CUDA device may receive hold 0xFF bytes.

    On a CPU it does nothing: there `poisoned_allocations` fills each new tensor instead.
    """
    if device.type != "cuda":
        return
    free_bytes, _ = torch.cuda.mem_get_info(device)
    sizes = [size for size in _POISONED_SIZES if size < free_bytes // 16]
    blocks = [poison(torch.empty(size, dtype=torch.uint8, device=device)) for size in sizes]
    torch.cuda.synchronize(device)
    del blocks


@contextmanager
def poisoned_allocations(device: torch.device) -> Iterator[None]:
    """While open, fresh memory is poison: a result that depends on uninitialised memory turns NaN.

    CUDA: free blocks of the allocator hold 0xFF bytes on entry. CPU: torch fills every new tensor with NaN.
    """
    poison_free_memory(device)
    if device.type == "cuda":
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
