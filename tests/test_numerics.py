"""The error figures on cases worked out by hand, and the poison."""

from __future__ import annotations

import math

import pytest
import torch

from workbench.errors import InputError
from workbench.numerics import measure, passed, poison, poison_free_memory, poisoned_allocations


def test_an_equal_output_has_no_error() -> None:
    out = torch.randn(5, 8)
    accuracy = measure(out, out.double(), tolerance=0.0)
    assert (accuracy.rel_err, accuracy.max_abs_err) == (0.0, 0.0)
    assert accuracy.cosine == pytest.approx(1.0)
    assert passed(accuracy)


def test_figures_by_hand() -> None:
    accuracy = measure(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]), tolerance=0.5)
    assert accuracy.rel_err == pytest.approx(4 / 5)
    assert accuracy.max_abs_err == 4.0
    assert accuracy.cosine == pytest.approx(9 / 15)
    assert not passed(accuracy)


def test_a_batch_longer_than_one_slice_is_measured_whole() -> None:
    reference = torch.ones(3000, 4)
    out = reference.clone()
    out[2999, 3] = 3.0
    accuracy = measure(out, reference, tolerance=0.1)
    assert accuracy.rel_err == pytest.approx(2 / math.sqrt(12000))
    assert accuracy.max_abs_err == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 2000])
def test_nan_and_infinity_never_pass(bad: float, row: int) -> None:
    reference = torch.ones(2001, 2)
    out = reference.clone()
    out[row, 1] = bad
    assert not passed(measure(out, reference, tolerance=math.inf))


def test_against_a_zero_reference_only_zero_passes() -> None:
    zero = torch.zeros(2, 2)
    assert passed(measure(zero, zero, tolerance=0.01))
    assert measure(zero + 1e-9, zero, tolerance=0.01).rel_err == math.inf
    assert not passed(measure(zero + 1e-9, zero, tolerance=0.01))


def test_an_empty_batch_passes() -> None:
    assert passed(measure(torch.empty(0, 8), torch.empty(0, 8), tolerance=0.0))


def test_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"out: expected the reference's shape \[2, 3\], got \[3, 2\]"):
        measure(torch.zeros(3, 2), torch.zeros(2, 3), tolerance=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_poison_is_nan_in_every_floating_dtype(dtype: torch.dtype) -> None:
    assert poison(torch.zeros(3, 4, dtype=dtype)).float().isnan().all()


def test_fresh_memory_is_poison_on_a_cpu_and_only_meanwhile() -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    with poisoned_allocations(torch.device("cpu")):
        assert torch.empty(1000).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.gpu
@pytest.mark.parametrize("size", [512, 4096, 1 << 19, 1 << 22, 1 << 26])
def test_fresh_memory_is_poison_on_a_gpu(size: int) -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    poison_free_memory(device)
    assert (torch.empty(size, dtype=torch.uint8, device=device) == 0xFF).all()
