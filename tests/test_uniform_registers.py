"""What is uniform in the CUDA kernels lives in uniform registers: see registers::uniform() in include/registers.cuh.

The compiler says nothing where it takes a warp for divergent: the kernel is right and slow. The machine code tells. A
product of wgmma takes two descriptors of two uniform registers each; where they are worked out by the lanes, four moves
(R2UR) stand before each, and a loop over the lanes (BRA.U.ANY) around each arrival of asynchronous copies.
"""

from __future__ import annotations

import re

import pytest

from kernels_cuda import sm90_fused, sm90_prefill, sm90_stream
from kernels_cuda.compile import Cubin
from kernels_cuda.sm90 import NUM_SMS
from kernels_cuda.sm90_stream import SM90Stream
from kernels_triton.compile import disassemble
from workbench.models import shape_of_alias
from workbench.problem import MoEShape
from workbench.variant import Config

MOST_MOVES_PER_PRODUCT = 2.5
SHAPES = [shape_of_alias(alias) for alias in ("dsv3_tp16", "dsv3_tp8")]


def assert_uniform(cubin: Cubin, *, loaders: bool = True) -> None:
    """The products of the kernel, and with `loaders` what gathers for them."""
    code = disassemble(cubin.path)
    moves, products = len(re.findall(r"\bR2UR\b", code)), len(re.findall(r"\bQGMMA\.", code))
    assert products > 0
    assert moves <= MOST_MOVES_PER_PRODUCT * products, f"{moves} moves for {products} products"
    if loaders:
        assert re.findall(r"ARRIVES\.LDGSTSBAR[^\n]*\n[^\n]*BRA\.U\.ANY", code) == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_phases_of_prefill(shape: MoEShape) -> None:
    configs = [Config(max_rows=height, **sm90_prefill.downs(shape)[0]) for height in sm90_prefill.HEIGHTS]
    for config in configs:
        assert_uniform(sm90_prefill._compile_up(shape, config, False)[0])
    assert_uniform(sm90_prefill._compile_down(shape, configs[0], False)[0])


@pytest.mark.parametrize("num_tokens", [512, 2048])
def test_stream(num_tokens: int) -> None:
    config = next(iter(SM90Stream().configs(SHAPES[0], num_tokens)))
    cubin = sm90_stream._compile(config, SHAPES[0], NUM_SMS, False)[0]
    assert_uniform(cubin, loaders=False)  # which idle most of the time


@pytest.mark.parametrize("block_m", [8, 64, 96])
def test_fused(block_m: int) -> None:
    config = Config(block_m=block_m, cluster_size=1, num_stages=sm90_fused.most_stages(block_m, 1))
    assert_uniform(sm90_fused._compile(config)[0])


def test_code_of_another_kind_is_noticed() -> None:
    cubin = sm90_fused._compile(Config(block_m=128, cluster_size=1, num_stages=sm90_fused.most_stages(128, 1)))[0]
    with pytest.raises(AssertionError, match="moves for"):
        assert_uniform(cubin)
