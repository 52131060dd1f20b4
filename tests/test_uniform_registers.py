"""What is uniform in the CUDA kernels lives in uniform registers: see registers::uniform() in include/registers.cuh.

The compiler says nothing where it takes a warp for divergent: the kernel is right and slow. The machine code tells. A
product of wgmma takes two descriptors of two uniform registers each; where they are worked out by the lanes, four moves
(R2UR) stand before each, and a loop over the lanes (BRA.U.ANY) around each bulk copy and each arrival of asynchronous
copies.
"""

from __future__ import annotations

import re

import pytest

from kernels_cuda import sm90_fused, sm90_prefill, sm90_stream
from kernels_cuda.compile import Cubin
from kernels_cuda.sm90 import NUM_SMS
from kernels_cuda.sm90_stream import SM90Stream, SM90StreamInPlace
from kernels_cuda.tiled_inputs import Takes
from kernels_triton.compile import disassemble
from workbench.models import shape_of_alias
from workbench.problem import MoEShape
from workbench.variant import Config

MOST_MOVES_PER_PRODUCT = 2.5
SHAPES = [shape_of_alias(alias) for alias in ("dsv3_tp16", "dsv3_tp8")]
WIDE = MoEShape(8, 4096, 1792, 2)


def moves_and_products(code: str) -> tuple[int, int]:
    return len(re.findall(r"\bR2UR\b", code)), len(re.findall(r"\bQGMMA\.", code))


def loops_over_lanes(code: str) -> list[str]:
    """The instructions of each."""
    ends = re.finditer(r"BRA\.U\.ANY `\((\S+)\)", code)
    return [code[code.rindex(f"\n{end[1]}:", 0, end.start()) : end.end()] for end in ends]


def conditional_reductions(code: str) -> list[str]:
    """ptxas 13.0 has been seen to put them under the wrong predicate: see Loader.take() in include/prefill_load.cuh."""
    return re.findall(r"@!?U?P\d+ +REDUX\b.*", code)


def assert_no_conditional_reduction(cubin: Cubin) -> None:
    assert conditional_reductions(disassemble(cubin.path)) == []


def assert_few_moves(cubin: Cubin) -> None:
    moves, products = moves_and_products(disassemble(cubin.path))
    assert products > 0
    assert moves <= MOST_MOVES_PER_PRODUCT * products, f"{moves} moves for {products} products"


def assert_no_loop_over_lanes(cubin: Cubin) -> None:
    assert loops_over_lanes(disassemble(cubin.path)) == []


def assert_no_loop_of_arrivals(cubin: Cubin) -> None:
    """Of bulk copies by one thread there may be some, of one round each."""
    assert [loop for loop in loops_over_lanes(disassemble(cubin.path)) if "ARRIVES." in loop] == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_phases_of_prefill(shape: MoEShape) -> None:
    configs = [Config(max_rows=height, **sm90_prefill.downs(shape)[0]) for height in sm90_prefill.HEIGHTS]
    cubins = [sm90_prefill._compile_up(shape, config, False)[0] for config in configs]
    for cubin in (*cubins, sm90_prefill._compile_down(shape, configs[0], False)[0]):
        assert_few_moves(cubin)
        assert_no_loop_of_arrivals(cubin)
        assert_no_conditional_reduction(cubin)


def test_both_phases_of_prefill_on_a_wide_layer() -> None:
    for compile_one in (sm90_prefill._compile_up, sm90_prefill._compile_down):
        assert_no_conditional_reduction(compile_one(WIDE, Config(max_rows=128), False)[0])


@pytest.mark.parametrize(
    ("num_tokens", "takes"),
    [(1, "tiles"), (1, "ids"), (64, "tiles"), (64, "ids"), (256, "choices"), (512, "tiles"), (2048, "tiles")],
)
def test_stream(num_tokens: int, takes: Takes) -> None:
    assert_stream_is_uniform(SM90Stream(), num_tokens, takes)


@pytest.mark.parametrize(("num_tokens", "takes"), [(1, "tiles"), (1, "ids"), (256, "choices"), (2048, "tiles")])
def test_stream_in_place(num_tokens: int, takes: Takes) -> None:
    assert_stream_is_uniform(SM90StreamInPlace(), num_tokens, takes)


def assert_stream_is_uniform(variant: SM90Stream, num_tokens: int, takes: Takes) -> None:
    config = next(iter(variant.configs(SHAPES[0], num_tokens)))
    cubin = sm90_stream._compile(config, SHAPES[0], NUM_SMS, False, takes, in_place=variant.in_place)[0]
    if config.integer("max_rows") > 16:  # up to which products of the up phase are not those of wgmma
        assert_few_moves(cubin)
    assert_no_loop_over_lanes(cubin)
    assert_no_conditional_reduction(cubin)


def fused(block_m: int) -> Cubin:
    num_stages = sm90_fused.most_stages(block_m, 1)
    return sm90_fused._compile(Config(block_m=block_m, cluster_size=1, num_stages=num_stages))[0]


@pytest.mark.parametrize("block_m", [8, 64, 96])
def test_fused(block_m: int) -> None:
    assert_few_moves(fused(block_m))
    assert_no_loop_over_lanes(fused(block_m))
    assert_no_conditional_reduction(fused(block_m))


def test_the_tallest_blocks_of_fused_move_more() -> None:
    """For want of registers: see uniform_if_room() in sm90_fused.cu. What loads for them is uniform all the same."""
    with pytest.raises(AssertionError, match="moves for"):
        assert_few_moves(fused(128))
    assert_no_loop_over_lanes(fused(128))
    assert_no_conditional_reduction(fused(128))


def test_a_conditional_reduction_is_noticed() -> None:
    code = """
        /*cab0*/               @P5 LDG.E.128 R20, desc[UR20][R20.64] ;
        /*cb80*/                   REDUX.OR UR31, R34 ;
        /*cb90*/               @P1 REDUX.OR UR37, R21 ;
"""
    assert conditional_reductions(code) == ["@P1 REDUX.OR UR37, R21 ;"]


def test_a_loop_over_lanes_is_noticed() -> None:
    code = """
.L_x_1:
        /*4180*/                   VIADD R4, R34, 0x31eb0 ;
.L_x_2:
        /*41a0*/               @P1 R2UR P0, UR4, R4 ;
        /*41c0*/              @!P0 ARRIVES.LDGSTSBAR.64.ARVCNT [UR4] ;
        /*41d0*/                   PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0 ;
        /*41e0*/               @P1 BRA.U.ANY `(.L_x_2) ;
        /*41f0*/                   NOP ;
"""
    (loop,) = loops_over_lanes(code)
    assert "ARRIVES." in loop
    assert "VIADD" not in loop
