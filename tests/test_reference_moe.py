"""The layer against a loop over single numbers that shares no code with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.moe import moe, moe_from_bf16, swiglu
from reference.quant import (
    ActivationScales,
    quantise_activations,
    quantise_as,
    quantise_rows,
    quantise_w13,
    quantise_weights,
)

POSITIVE_E4M3 = sorted(
    (1 + m / 8) * 2.0 ** (e - 7) if e else m / 8 * 2.0**-6 for e in range(16) for m in range(8) if (e, m) != (15, 7)
)

Matrix = list[list[float]]


@dataclass(frozen=True)
class Form:
    """What makes a layer another than the plain one."""

    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0
    activation_scales: ActivationScales = "group"
    has_bias: bool = False
    channel_weights: bool = False


PLAIN = Form()
FORMS = {
    "plain": PLAIN,
    "ue8m0": Form(activation_scales="group_ue8m0"),
    "deepseek-v4": Form(limit=1.5, activation_scales="group_ue8m0"),
    "gpt-oss": Form(limit=0.7, alpha=1.702, beta=1.0, has_bias=True),
    "channel and token": Form(activation_scales="token", channel_weights=True),
    "all": Form(0.7, 1.702, 1.0, "token", has_bias=True, channel_weights=True),
}


def nearest_e4m3(value: float) -> float:
    """Round to the nearest e4m3 value, ties to the even code, saturating at 448."""
    size = min(abs(value), 448.0)
    code = min(range(127), key=lambda code: (abs(POSITIVE_E4M3[code] - size), code % 2))
    return math.copysign(POSITIVE_E4M3[code], value)


def rounded(values: list[float], scales: ActivationScales) -> list[float]:
    result: list[float] = []
    size = len(values) if scales == "token" else 128
    for start in range(0, len(values), size):
        group = values[start : start + size]
        scale = max(max(abs(v) for v in group), 1e-10) / 448
        if scales == "group_ue8m0":
            mantissa, exponent = math.frexp(scale)  # scale = mantissa * 2^exponent, 1/2 <= mantissa < 1
            scale = 2.0 ** (exponent - (mantissa == 0.5))
        result += [nearest_e4m3(v / scale) * scale for v in group]
    return result


def activation(gate: float, up: float, form: Form) -> float:
    if form.limit is not None:
        gate, up = min(gate, form.limit), max(-form.limit, min(up, form.limit))
    return gate / (1 + math.exp(-form.alpha * gate)) * (up + form.beta)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def layer_one_number_at_a_time(
    x: Matrix,
    w13: list[Matrix],
    w2: list[Matrix],
    weights: Matrix,
    ids: list[list[int]],
    factor: float,
    form: Form,
    w13_bias: Matrix,
    w2_bias: Matrix,
) -> Matrix:
    """The layer in Python floats (fp64) on dequantised tokens and weights; biases of zero where the form has none."""
    out = [[0.0] * len(row) for row in x]
    for token, row in enumerate(x):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            if expert == -1:
                continue
            intermediate = len(w13[expert]) // 2
            activated = []
            for i in range(intermediate):
                gate = dot(w13[expert][i], row) + w13_bias[expert][i]
                up = dot(w13[expert][intermediate + i], row) + w13_bias[expert][intermediate + i]
                activated.append(activation(gate, up, form))
            activated = rounded(activated, form.activation_scales)
            for h in range(len(row)):
                out[token][h] += factor * weight * (dot(w2[expert][h], activated) + w2_bias[expert][h])
    return out


def dequantised(
    q: torch.Tensor, scale: torch.Tensor, first_row_of_second_half: int | None = None, by_row: bool = False
) -> list[Matrix]:
    """e4m3 [E, R, C] with a scale per 128 x 128 block, number by number; the halves of w13 have blocks of their own."""
    result = []
    for values, scales in zip(q.double().tolist(), scale.double().tolist(), strict=True):
        rows = []
        for r, row in enumerate(values):
            block = r // 128
            if first_row_of_second_half is not None and r >= first_row_of_second_half:
                block = len(scales) // 2 + (r - first_row_of_second_half) // 128
            factors = scales[r] * len(row) if by_row else [scales[block][c // 128] for c in range(len(row))]
            rows.append([value * factor for value, factor in zip(row, factors, strict=True)])
        result.append(rows)
    return result


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    data=st.data(),
    num_tokens=st.integers(0, 4),
    num_experts=st.integers(1, 4),
    top_k=st.integers(1, 3),
    hidden_size=st.sampled_from([16, 130]),
    intermediate_size=st.sampled_from([8, 128, 132]),
    power_of_two=st.booleans(),
    name=st.sampled_from(sorted(FORMS)),
)
def test_the_layer_is_what_its_definition_says(
    data: st.DataObject,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    intermediate_size: int,
    power_of_two: bool,
    name: str,
) -> None:
    form = FORMS[name]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    ids = data.draw(
        st.lists(
            st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k),
            min_size=num_tokens,
            max_size=num_tokens,
        )
    )
    x_q, x_scale = quantise_as(torch.randn(num_tokens, hidden_size, generator=generator), form.activation_scales)
    w13 = torch.randn(num_experts, 2 * intermediate_size, hidden_size, generator=generator)
    w2 = torch.randn(num_experts, hidden_size, intermediate_size, generator=generator)
    if form.channel_weights:
        (w13_q, w13_scale), (w2_q, w2_scale) = quantise_rows(w13), quantise_rows(w2)
    else:
        (w13_q, w13_scale), (w2_q, w2_scale) = quantise_w13(w13, power_of_two), quantise_weights(w2, power_of_two)
    w13_bias, w2_bias = (
        torch.randn(num_experts, rows, generator=generator) * form.has_bias
        for rows in (2 * intermediate_size, hidden_size)
    )
    weights = torch.randn(num_tokens, top_k, generator=generator)
    topk_ids = torch.tensor(ids, dtype=torch.int32).view(num_tokens, top_k)

    expected = layer_one_number_at_a_time(
        [matrix[0] for matrix in dequantised(x_q[:, None], x_scale[:, None], by_row=form.activation_scales == "token")],
        dequantised(w13_q, w13_scale, first_row_of_second_half=intermediate_size, by_row=form.channel_weights),
        dequantised(w2_q, w2_scale, by_row=form.channel_weights),
        weights.double().tolist(),
        ids,
        2.5,
        form,
        w13_bias.double().tolist(),
        w2_bias.double().tolist(),
    )
    arguments = (x_q, x_scale, w13_q, w13_scale, w2_q, w2_scale, weights, topk_ids, 2.5)
    expected_out = torch.tensor(expected, dtype=torch.float64).view(num_tokens, hidden_size)
    in_form = {
        "w13_bias": w13_bias if form.has_bias else None,
        "w2_bias": w2_bias if form.has_bias else None,
        "swiglu_limit": form.limit,
        "swiglu_alpha": form.alpha,
        "swiglu_beta": form.beta,
        "activation_scales": form.activation_scales,
    }
    in_fp64 = moe(*arguments, dtype=torch.float64, **in_form)
    in_fp32 = moe(*arguments, **in_form)
    assert in_fp64.dtype == torch.float64
    assert in_fp32.dtype == torch.float32
    assert (in_fp64 - expected_out).norm() <= 1e-12 * expected_out.norm()
    assert (in_fp32 - expected_out).norm() <= 2e-3 * expected_out.norm()  # a value on a rounding boundary may move


def test_swiglu_is_clamped_from_above_in_gate_and_on_both_sides_in_up() -> None:
    gate, up = torch.tensor([-20.0, -20.0, 20.0, 20.0, 3.0]), torch.tensor([-20.0, 20.0, -20.0, 20.0, 3.0])
    silu = torch.nn.functional.silu
    expected = silu(torch.tensor([-20.0, -20.0, 10.0, 10.0, 3.0])) * torch.tensor([-10.0, 10.0, -10.0, 10.0, 3.0])
    assert torch.equal(swiglu(gate, up, limit=10.0), expected)
    assert torch.equal(swiglu(gate, up), silu(gate) * up)


def test_the_form_of_gpt_oss_is_a_sigmoid_of_alpha_times_the_gate_and_up_plus_one() -> None:
    gate, up = torch.tensor([-1.0, 2.0, 8.0]), torch.tensor([-8.0, 0.5, 8.0])
    expected = [
        -1.0 / (1 + math.exp(1.702)) * -6.0,
        2.0 / (1 + math.exp(-1.702 * 2)) * 1.5,
        7.0 / (1 + math.exp(-1.702 * 7)) * 8.0,
    ]
    assert swiglu(gate, up, limit=7.0, alpha=1.702, beta=1.0).tolist() == pytest.approx(expected)


def small_layer() -> tuple[torch.Tensor, ...]:
    """w13, w13_scale, w2, w2_scale with E 3, H 128, I 64."""
    return (*quantise_w13(torch.randn(3, 128, 128)), *quantise_weights(torch.randn(3, 128, 64)))


def relative_difference(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out - expected).norm() / expected.norm()).item()


def test_bf16_tokens_are_quantised_first() -> None:
    weights, x = small_layer(), torch.randn(5, 128).bfloat16()
    topk_weights, topk_ids = torch.rand(5, 2), torch.randint(0, 3, (5, 2), dtype=torch.int32)
    expected = moe(*quantise_activations(x), *weights, topk_weights, topk_ids, 1.5)
    assert torch.equal(moe_from_bf16(x, *weights, topk_weights, topk_ids, 1.5), expected)


def test_bf16_tokens_are_quantised_in_the_way_asked_for() -> None:
    weights, x = small_layer(), 3 * torch.randn(5, 128).bfloat16()
    topk_weights, topk_ids = torch.rand(5, 2), torch.randint(0, 3, (5, 2), dtype=torch.int32)
    tokens = quantise_activations(x, power_of_two=True)
    expected = moe(*tokens, *weights, topk_weights, topk_ids, activation_scales="group_ue8m0")
    assert torch.equal(moe_from_bf16(x, *weights, topk_weights, topk_ids, activation_scales="group_ue8m0"), expected)


def test_a_repeated_expert_counts_as_often_as_it_is_chosen() -> None:
    weights, x = small_layer(), torch.randn(1, 128).bfloat16()
    twice = moe_from_bf16(x, *weights, torch.tensor([[0.25, 0.5]]), torch.tensor([[1, 1]]))
    once = moe_from_bf16(x, *weights, torch.tensor([[0.75]]), torch.tensor([[1]]))
    assert relative_difference(twice, once) < 1e-6


@pytest.mark.parametrize(("rows", "values"), [(4, 2**26), (8192, 1), (4, 1), (40, 2 * 256 * 128)])
def test_more_tokens_or_experts_than_are_taken_at_once(monkeypatch: pytest.MonkeyPatch, rows: int, values: int) -> None:
    weights, x = small_layer(), torch.randn(23, 128).bfloat16()
    topk_weights, topk_ids = torch.rand(23, 2), torch.randint(-1, 3, (23, 2), dtype=torch.int32)
    at_once = moe_from_bf16(x, *weights, topk_weights, topk_ids)
    monkeypatch.setattr("reference.moe.ROWS_AT_ONCE", rows)
    monkeypatch.setattr("reference.moe.WEIGHTS_AT_ONCE", {"cpu": values})
    in_parts = moe_from_bf16(x, *weights, topk_weights, topk_ids)
    assert relative_difference(in_parts, at_once) < 1e-3  # a value on a rounding boundary may move


def test_the_callers_choice_of_tf32_is_restored_and_not_used() -> None:
    chosen = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        moe_from_bf16(torch.randn(1, 128), *small_layer(), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = chosen


@pytest.mark.gpu
def test_on_a_gpu_fp32_is_as_good_as_fp64_even_where_tf32_is_allowed() -> None:
    chosen = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        x = torch.randn(64, 512, device="cuda").bfloat16()
        weights = (*quantise_w13(torch.randn(4, 256, 512)), *quantise_weights(torch.randn(4, 512, 128)))
        weights = tuple(tensor.cuda() for tensor in weights)
        topk_weights, topk_ids = torch.rand(64, 2).cuda(), torch.randint(0, 4, (64, 2)).cuda()
        in_fp32 = moe_from_bf16(x, *weights, topk_weights, topk_ids)
        in_fp64 = moe_from_bf16(x, *weights, topk_weights, topk_ids, dtype=torch.float64)
    finally:
        torch.backends.cuda.matmul.fp32_precision = chosen
    assert relative_difference(in_fp32, in_fp64) < 1e-3
