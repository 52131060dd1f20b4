"""The repaired interpreter computes fp8 and bf16 as a GPU does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import kernels_triton  # noqa: F401  installs the repair
from kernels_triton import interpreter

FP8 = torch.float8_e4m3fn
FP8_TYPES = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def cast_kernel(source, target, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(target + lane, tl.load(source + lane).to(target.dtype.element_ty))


@triton.jit
def arithmetic_kernel(a, b, total, product, smaller, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    x, y = tl.load(a + lane), tl.load(b + lane)
    tl.store(total + lane, x + y)
    tl.store(product + lane, x * y)
    tl.store(smaller + lane, x < y)


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    x, y = tl.load(a + m * K + k[None, :]), tl.load(b + n * K + k[:, None])
    tl.store(c + m * N + n, tl.dot(x, y))


@triton.jit
def atomic_add_kernel(target, addends, SIZE: tl.constexpr, TARGETS: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.atomic_add(target + lane % TARGETS, tl.load(addends + lane), mask=lane != 0)


@triton.jit
def sum_of_range_kernel(bounds, total):
    result = 0
    for i in tl.range(tl.load(bounds), tl.load(bounds + 1), num_stages=2):
        result += i
    tl.store(total, result)


@triton.jit
def sum_kernel(source, total, SIZE: tl.constexpr):
    tl.store(total, tl.sum(tl.load(source + tl.arange(0, SIZE)), axis=0))


def cast(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`source` cast by a kernel, padded with zeros to the power of two that a block needs."""
    size = triton.next_power_of_2(source.numel())
    padded = torch.zeros(size).to(source.dtype)
    padded[: source.numel()] = source
    target = torch.empty(size, dtype=torch.float32).to(dtype)
    cast_kernel[(1,)](padded, target, SIZE=size)
    return target[: source.numel()]


def codes(values: torch.Tensor) -> torch.Tensor:
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[values.element_size()])


def neighbours(values: torch.Tensor) -> torch.Tensor:
    """Finite `values`, the points half way between them, and the floats next to those."""
    ordered = values[values.isfinite()].sort().values
    halves = (ordered[1:] + ordered[:-1]) / 2
    infinity = torch.tensor(torch.inf)
    return torch.cat([ordered, halves, torch.nextafter(halves, infinity), torch.nextafter(halves, -infinity)])


@pytest.mark.parametrize("dtype", FP8_TYPES)
def test_every_fp8_code_decodes_to_its_value(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert torch.equal(codes(cast(every, torch.float32)), codes(every.float()))


@pytest.mark.parametrize("dtype", FP8_TYPES)
def test_fp8_rounds_to_nearest_even_at_every_boundary(dtype: torch.dtype) -> None:
    values = neighbours(torch.arange(256, dtype=torch.uint8).view(dtype).float())
    values = torch.cat([values, torch.randn(4096) * torch.logspace(-4, 2, 4096)])
    assert torch.equal(codes(cast(values, dtype)), codes(values.to(dtype)))


@pytest.mark.parametrize(("dtype", "largest"), [(FP8_TYPES[0], 448.0), (FP8_TYPES[1], 57344.0)])
def test_fp8_saturates_and_keeps_nan(dtype: torch.dtype, largest: float) -> None:
    values = torch.tensor([largest * 1.2, 1e30, torch.inf, -torch.inf, torch.nan])
    got = cast(values, dtype).float()
    assert got[:4].tolist() == [largest, largest, largest, -largest]
    assert got[4].isnan()


def test_bf16_rounds_to_nearest_even() -> None:
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, 0.0, torch.inf])
    values = torch.cat([ties, torch.randn(4096), neighbours(torch.randn(256).bfloat16().float())])
    assert cast(ties, torch.bfloat16).float()[:3].tolist() == [1.0, 1 + 2**-6, -1.0]
    assert torch.equal(codes(cast(values, torch.bfloat16)), codes(values.bfloat16()))


def test_every_bf16_code_decodes_to_its_value() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(codes(cast(every, torch.float32)), codes(every.float()))


@pytest.mark.parametrize(("source", "target"), [(torch.bfloat16, FP8), (FP8, torch.bfloat16), (FP8, torch.float16)])
def test_casts_between_narrow_types_go_through_values(source: torch.dtype, target: torch.dtype) -> None:
    values = (torch.randn(1024) * 20).to(source)
    assert torch.equal(codes(cast(values, target)), codes(values.float().to(target)))


def test_integers_and_narrow_floats_convert_by_value() -> None:
    assert cast(torch.tensor([-3, 0, 7, 300], dtype=torch.int32), torch.bfloat16).tolist() == [-3.0, 0.0, 7.0, 300.0]
    assert cast(torch.tensor([-3.75, 0.0, 7.5]).bfloat16(), torch.int32).tolist() == [-3, 0, 7]


def test_round_towards_zero_never_grows() -> None:
    values = torch.cat([torch.randn(512), torch.tensor([1e-3, 100.3, -447.9])]).numpy()
    for dtype in (tl.bfloat16, tl.float8e4nv):
        rounded = interpreter.decode(interpreter.encode(values, dtype, towards_zero=True), dtype)
        nearest = interpreter.decode(interpreter.encode(values, dtype), dtype)
        assert (np.abs(rounded) <= np.abs(values)).all()
        shrunk = np.abs(nearest) <= np.abs(values)
        assert np.array_equal(rounded[shrunk], nearest[shrunk])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_and_comparison_are_of_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
    total, product, smaller = torch.empty_like(a), torch.empty_like(a), torch.empty(256, dtype=torch.bool)
    arithmetic_kernel[(1,)](a, b, total, product, smaller, SIZE=256)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(smaller, a < b)


@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16, torch.float16, torch.float32])
def test_dot_is_of_values(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 64).to(dtype), torch.randn(32, 64).to(dtype)
    c = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, c, M=16, N=32, K=64)
    torch.testing.assert_close(c.double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_atomic_addition_adds_each_enabled_value_once(dtype: torch.dtype) -> None:
    target, addends = torch.zeros(4, dtype=dtype), torch.ones(32, dtype=dtype)
    atomic_add_kernel[(3,)](target, addends, SIZE=32, TARGETS=4)
    assert target.tolist() == [21.0, 24.0, 24.0, 24.0]


def test_loop_bounds_may_be_computed_in_the_kernel() -> None:
    total = torch.zeros(1, dtype=torch.int32)
    sum_of_range_kernel[(1,)](torch.tensor([3, 7], dtype=torch.int32), total)
    assert total.item() == 3 + 4 + 5 + 6


def test_a_reduction_of_raw_codes_is_refused() -> None:
    with pytest.raises(Exception, match="convert to float32 first"):
        sum_kernel[(1,)](torch.randn(16).bfloat16(), torch.empty(1, dtype=torch.bfloat16), SIZE=16)


def test_installing_twice_changes_nothing() -> None:
    before = interpreter.InterpreterBuilder.binary_op
    interpreter.install()
    assert interpreter.InterpreterBuilder.binary_op is before
