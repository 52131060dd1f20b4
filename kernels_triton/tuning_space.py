"""The configurations of `triton.grouped` that are worth trying for a shape and batch size; the default comes first.

    block_m       choices of one expert in a block: 16, 32, 64 or 128
    swap          weights are the first operand of the products; right for blocks below 64
    fuse_swiglu   SwiGLU in the epilogue of the up projection; then up_block_n is 128 and split_k 1
    up_block_n    columns of a tile of the up projection, 64 or 128; down_block_n: of the down projection
    split_k       programs that share K of the up projection
    down_tiles    tiles of the down projection that one program computes
    up_warps, up_stages, down_warps, down_stages

Nothing here spills registers on dsv3_tp16, dsv3_tp8 and qwen3next_tp4 under Triton 3.6.0; the tests check the defaults.
"""

from __future__ import annotations

from collections.abc import Iterator

from reference.quant import GROUP_SIZE
from workbench.problem import MoEShape
from workbench.variant import Config, ConfigValue

RESIDENT_PROGRAMS = 396
"""Programs with a 128 x 16 tile and four stages that 132 SMs hold at a time: three each. Their loads in flight stream
weights at full bandwidth, and a few programs more would cost a second wave."""


def tuning_space(shape: MoEShape, num_tokens: int) -> list[Config]:
    """At most 16 distinct configurations for a batch of `num_tokens`, the default first."""
    configs = (
        Config(block_m=block_m, swap=block_m < 64, **up, **down)
        for block_m in _block_sizes(shape, num_tokens)
        for down in _down(shape, block_m, _expected_blocks(shape, num_tokens, block_m))
        for up in _up(shape, block_m, _expected_blocks(shape, num_tokens, block_m))
    )
    return list(dict.fromkeys(configs))


def _block_sizes(shape: MoEShape, num_tokens: int) -> tuple[int, ...]:
    """Short blocks waste less of the tensor cores on padding, long ones read weights less often."""
    choices_per_expert = num_tokens * shape.top_k / shape.num_experts
    if choices_per_expert <= 6:
        return (16,)
    if choices_per_expert <= 24:
        return (16, 32)
    if choices_per_expert <= 80:
        return (32, 64)
    return (64, 128)


def _expected_blocks(shape: MoEShape, num_tokens: int, block_m: int) -> int:
    """Blocks in use when routing is uniform."""
    shared, routed = shape.num_shared_experts, shape.num_experts - shape.num_shared_experts
    choices = num_tokens * (shape.top_k - shared)
    hit = routed * (1 - (1 - 1 / routed) ** choices)
    filled = choices / max(hit, 1) / block_m
    return max(1, round(hit * max(1.0, filled + 0.5 * (filled > 0.5)) + shared * -(-num_tokens // block_m)))


def _up(shape: MoEShape, block_m: int, blocks: int) -> Iterator[dict[str, ConfigValue]]:
    def alone(block_n: int, split_k: int, warps: int, stages: int) -> dict[str, ConfigValue]:
        split_k = max(1, min(split_k, shape.hidden_size // GROUP_SIZE))
        return {
            "fuse_swiglu": False,
            "up_block_n": block_n,
            "split_k": split_k,
            "up_warps": warps,
            "up_stages": stages,
        }

    def fused(warps: int, stages: int) -> dict[str, ConfigValue]:
        return {"fuse_swiglu": True, "up_block_n": 128, "split_k": 1, "up_warps": warps, "up_stages": stages}

    fused_programs = blocks * shape.intermediate_size // GROUP_SIZE
    if block_m < 64:
        if 132 <= fused_programs <= 264:  # all resident at once, two on each of 132 SMs
            yield fused(4 if block_m == 16 else 8, 3)
        split_k = max(1, RESIDENT_PROGRAMS // (blocks * shape.w13_rows // 128))
        yield alone(128, split_k, 4, 4)
        yield alone(128, 2 * split_k, 4, 3)
        yield alone(64, split_k, 4, 4)
        if split_k > 1:
            yield alone(128, -(-split_k // 2), 4, 4)
            yield alone(64, -(-split_k // 2), 4, 4)
        elif fused_programs > 264:
            yield fused(4 if block_m == 16 else 8, 3)
    elif block_m == 64:
        yield alone(128, 1, 4, 3)
        yield alone(128, 1, 4, 4)
        yield fused(8, 3)
        yield fused(8, 4)
    else:
        yield alone(128, 1, 8, 3)
        yield alone(128, 1, 8, 4)


def _down(shape: MoEShape, block_m: int, blocks: int) -> Iterator[dict[str, ConfigValue]]:
    """Several tiles a program, which spares loads of its tokens, where programs are many anyway."""
    warps = 8 if block_m == 128 else 4
    tiles_of_block = shape.hidden_size // 128
    if shape.intermediate_size > 2 * GROUP_SIZE:
        yield {"down_block_n": 128, "down_tiles": 1, "down_warps": warps, "down_stages": 3}
        yield {"down_block_n": 128, "down_tiles": 1, "down_warps": warps, "down_stages": 4}
    elif blocks * tiles_of_block <= 2 * RESIDENT_PROGRAMS:
        yield {"down_block_n": 128, "down_tiles": 1, "down_warps": warps, "down_stages": 2}
        yield {"down_block_n": 64, "down_tiles": 1, "down_warps": warps, "down_stages": 2}
    else:
        stages = 3 if shape.intermediate_size == GROUP_SIZE else 2
        for tiles in (4, 8):
            yield {"down_block_n": 128, "down_tiles": tiles, "down_warps": warps, "down_stages": stages}
