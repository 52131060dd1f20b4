"""The division of sm90_prologue.cu in numpy, and how the launcher sizes what the kernel fills.

The kernel divides by a product with the reciprocal and one correction. Scaling values, or the largest of a group, by a
power of two scales every step, so going through all mantissas of bf16 proves it for all values that are not subnormal.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels_cuda import sm90_prologue
from reference.quant import GROUP_SIZE, quantise_activations
from reference.routing import align_block_size, tile_rows
from workbench.errors import InputError

CPU = torch.device("cpu")


def rounded_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b of fp64 arrays, rounded once to fp32: by way of the fp64 sum rounded to odd."""
    total = a + b
    rest = (a - (total - (total - a))) + (b - (total - a))
    even = (total.view(np.int64) & 1) == 0
    odd = np.where(even & (rest != 0), np.nextafter(total, np.copysign(np.inf, rest)), total)
    return odd.astype(np.float32)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of fp32 arrays, rounded once: fp64 holds the product."""
    return rounded_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


def quotient(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """values / scale as the kernel finds it."""
    reciprocal = np.float32(1) / scale
    product = values * reciprocal
    return fma(fma(product, scale, -values), -reciprocal, product)


def scale_of(amax: np.ndarray) -> np.ndarray:
    return np.maximum(amax, np.float32(1e-10)) / np.float32(448)


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


MANTISSAS = (1 + np.arange(128) / 128).astype(np.float32)


@pytest.mark.parametrize("exponent", [-33, -8, 0, 60, 127])
def test_the_quotient_of_all_mantissas_is_the_rounded_one(exponent: int) -> None:
    amax = np.ldexp(MANTISSAS, exponent)
    values = np.ldexp(MANTISSAS, exponent - np.arange(40)[:, None]).reshape(-1)
    values = np.concatenate([values, -values, [0.0, -0.0]]).astype(np.float32)
    scale = scale_of(amax)[:, None]
    assert_same_bits(quotient(values, scale), values / scale)


def test_the_quotient_is_the_rounded_one_where_the_scale_is_at_its_least() -> None:
    values = np.ldexp(MANTISSAS, -np.arange(34, 100)[:, None]).reshape(-1)
    scale = scale_of(np.zeros(1, np.float32))
    assert_same_bits(quotient(values, scale), values / scale)


@pytest.mark.parametrize("magnitude", [1.0, 1e-3, 1e-9, 1e-30, 1e-38, 1e37])
def test_quantising_by_it_is_what_the_reference_does(magnitude: float) -> None:
    """1e-38: values that bf16 holds as subnormals, whose quotients are inexact and far below the least code."""
    values = (torch.randn(2000, GROUP_SIZE) * magnitude).bfloat16()
    values[:, ::16] = -0.0
    x_q, scale = quantise_activations(values)
    found = quotient(values.float().numpy(), scale.numpy())
    codes = torch.from_numpy(np.clip(found, -448, 448)).to(torch.float8_e4m3fn)
    assert torch.equal(codes.view(torch.uint8), x_q.view(torch.uint8))


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(1, 1, 1), (3, 2, 5), (64, 8, 16)])
def test_there_is_as_much_room_as_in_the_reference(num_tokens: int, top_k: int, num_experts: int) -> None:
    topk_ids = torch.zeros(num_tokens, top_k, dtype=torch.int32)
    tiles, expected_tiles = (
        sm90_prologue.empty_tiles(topk_ids.numel(), num_experts, 16, CPU),
        tile_rows(topk_ids, 16, num_experts),
    )
    assert tiles.tiles.shape == expected_tiles.tiles.shape
    assert tiles.sorted_choices.shape == expected_tiles.sorted_choices.shape
    assert tiles.tiles.data_ptr() % 16 == 0
    blocks, expected_blocks = (
        sm90_prologue.empty_alignment(topk_ids.numel(), num_experts, 24, CPU),
        align_block_size(topk_ids, 24, num_experts),
    )
    assert blocks.sorted_token_ids.shape == expected_blocks.sorted_token_ids.shape
    assert blocks.expert_ids.shape == expected_blocks.expert_ids.shape


@pytest.mark.parametrize("max_rows", [0, 12, 512])
def test_heights_that_the_kernel_cannot_order_are_refused(max_rows: int) -> None:
    with pytest.raises(InputError, match=rf"max_rows: expected a multiple of 8 in 8..504, got {max_rows}"):
        sm90_prologue.empty_tiles(64, 8, max_rows, CPU)


def test_clusters_route_many_choices_and_one_cta_few() -> None:
    for form in ("tiles", "blocks"):
        assert sm90_prologue._routing_ctas(9, form) == (1, 1)
        assert sm90_prologue._routing_ctas(1 << 12, form) == (8, 8)
        assert sm90_prologue._routing_ctas(1 << 22, form) == (8, 64)
    assert sm90_prologue._routing_ctas(1 << 10, "tiles") == (1, 1)
    assert sm90_prologue._routing_ctas(1 << 10, "blocks") == (8, 8)
