"""Quantisation against the e4m3 format written out as a table, and against blocks taken one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.quant import (
    FP8_MAX,
    GROUP_SIZE,
    dequantise_activations,
    dequantise_w13,
    dequantise_weights,
    quantise_activations,
    quantise_as,
    quantise_rows,
    quantise_w13,
    quantise_weights,
)

NAN_CODE = 0x7F


def e4m3_value(code: int) -> float:
    """The value of a positive e4m3 code: 4 exponent bits with bias 7, 3 mantissa bits, no infinity."""
    exponent, mantissa = code >> 3, code & 7
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


VALUES = torch.tensor([e4m3_value(code) for code in range(NAN_CODE)], dtype=torch.float64)


def nearest_code(values: torch.Tensor) -> torch.Tensor:
    """The uint8 code nearest to each value, ties to the even code, beyond the largest value the largest."""
    magnitude = values.double().abs()
    upper = torch.searchsorted(VALUES, magnitude).clamp(1, NAN_CODE - 1)
    lower = upper - 1
    below, above = magnitude - VALUES[lower], VALUES[upper] - magnitude
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    code = torch.where(take_upper, upper, lower)
    return (code + 0x80 * values.signbit()).to(torch.uint8)


def test_the_table_is_the_format_that_torch_has() -> None:
    codes = torch.arange(NAN_CODE, dtype=torch.uint8)
    assert torch.equal(codes.view(torch.float8_e4m3fn).double(), VALUES)
    assert VALUES[-1] == FP8_MAX


def test_every_value_and_every_midpoint_rounds_to_the_nearest_even_code() -> None:
    midpoints = (VALUES[1:] + VALUES[:-1]) / 2
    row = torch.cat([VALUES, midpoints, -VALUES, -midpoints, midpoints * (1 + 2**-20), midpoints * (1 - 2**-20)])
    groups = row[: len(row) // 127 * 127].view(-1, 127)
    x = torch.cat([groups, torch.full((len(groups), 1), FP8_MAX)], dim=1).float()  # amax 448: the scale is 1
    x_q, scale = quantise_activations(x)
    assert torch.equal(scale, torch.ones(len(groups), 1))
    assert torch.equal(x_q.view(torch.uint8), nearest_code(x))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 5), st.integers(1, 300), st.integers(-30, 30), st.integers(0, 2**31))
def test_activations_are_quantised_by_rows_of_128(rows: int, columns: int, exponent: int, seed: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x_q, scale = quantise_activations(x)
    assert scale.shape == (rows, -(-columns // GROUP_SIZE))
    for group in range(scale.shape[1]):
        here = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
        expected_scale = x[:, here].abs().amax(dim=1).clamp(min=1e-10) / 448
        assert torch.equal(scale[:, group], expected_scale)
        assert torch.equal(x_q[:, here].view(torch.uint8), nearest_code(x[:, here] / expected_scale[:, None]))
        assert torch.equal(dequantise_activations(x_q, scale)[:, here], x_q[:, here].float() * expected_scale[:, None])


def test_bf16_tokens_quantise_as_their_fp32_values() -> None:
    x = torch.randn(3, 256).bfloat16()
    for from_bf16, from_fp32 in zip(quantise_activations(x), quantise_activations(x.float()), strict=True):
        assert torch.equal(from_bf16.view(torch.uint8), from_fp32.view(torch.uint8))


def test_zeros_get_the_smallest_scale_and_stay_zero() -> None:
    x_q, scale = quantise_activations(torch.zeros(1, 128))
    assert scale.item() == pytest.approx(1e-10 / 448)
    assert not dequantise_activations(x_q, scale).any()


def test_the_largest_magnitude_survives_exactly() -> None:
    x = torch.randn(4, 128)
    x_q, _ = quantise_activations(x)
    assert torch.equal(x_q.float().abs().amax(dim=1), torch.full((4,), FP8_MAX))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_scales_round_up(dtype: torch.dtype) -> None:
    amax = torch.tensor([448.0, 448.5, 447.0, 896.0, 3.0, 0.0], dtype=dtype)
    _, scale = quantise_activations(amax[:, None].expand(-1, 128), power_of_two=True)
    assert scale.flatten().tolist() == [1.0, 2.0, 1.0, 2.0, 2.0**-7, 2.0**-42]


def test_weights_are_quantised_by_blocks_of_128_x_128() -> None:
    w = torch.randn(2, 200, 300) * torch.logspace(-3, 3, 300)
    q, scale = quantise_weights(w)
    assert scale.shape == (2, 2, 3)
    restored = dequantise_weights(q, scale, torch.float64)
    for expert, row, column in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(3)).tolist():
        block = (expert, slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
        expected_scale = w[block].abs().max() / 448
        assert scale[expert, row, column] == expected_scale
        assert torch.equal(q[block].view(torch.uint8), nearest_code(w[block] / expected_scale))
        assert torch.equal(restored[block], q[block].double() * expected_scale.double())


def test_gate_and_up_rows_are_blocked_apart() -> None:
    gate, up = torch.randn(3, 72, 130), 100 * torch.randn(3, 72, 130)
    q, scale = quantise_w13(torch.cat([gate, up], dim=1))
    gate_q, gate_scale = quantise_weights(gate)
    up_q, up_scale = quantise_weights(up)
    assert scale.shape == (3, 2, 2)
    assert torch.equal(scale, torch.cat([gate_scale, up_scale], dim=1))
    assert torch.equal(q.view(torch.uint8), torch.cat([gate_q, up_q], dim=1).view(torch.uint8))
    halves = [dequantise_weights(gate_q, gate_scale), dequantise_weights(up_q, up_scale)]
    assert torch.equal(dequantise_w13(q, scale), torch.cat(halves, dim=1))


@pytest.mark.parametrize("columns", [1, 100, 300])
def test_whole_rows_have_one_scale_each(columns: int) -> None:
    values = torch.randn(3, 4, columns)
    q, scale = quantise_rows(values)
    expected_scale = values.abs().amax(dim=2, keepdim=True) / 448
    assert torch.equal(scale, expected_scale)
    assert torch.equal(q.view(torch.uint8), nearest_code(values / expected_scale))
    assert torch.equal(dequantise_weights(q, scale), q.float() * expected_scale)
    assert torch.equal(dequantise_activations(q[0], scale[0]), q[0].float() * expected_scale[0])


def test_a_row_scale_of_w13_stays_with_its_row() -> None:
    q, scale = quantise_rows(torch.randn(2, 2 * 72, 130))
    assert torch.equal(dequantise_w13(q, scale), q.float() * scale)


def test_activations_are_quantised_as_the_layer_says() -> None:
    x = torch.randn(3, 300)
    for scales, expected in (
        ("group", quantise_activations(x)),
        ("group_ue8m0", quantise_activations(x, power_of_two=True)),
        ("token", quantise_rows(x)),
    ):
        q, scale = quantise_as(x, scales)  # type: ignore[arg-type]
        assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))
        assert torch.equal(scale, expected[1])


def test_dequantised_bf16_is_the_rounded_fp32_value() -> None:
    x_q, scale = quantise_activations(torch.randn(5, 256))
    assert torch.equal(
        dequantise_activations(x_q, scale, torch.bfloat16), dequantise_activations(x_q, scale).bfloat16()
    )
