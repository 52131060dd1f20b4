"""The re-laid weights: where every byte goes, stated byte by byte, against a tensor that holds random ones."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda.weight_tiles import TILE, swizzled, tile_w2, tile_w13

TILE_BYTES = TILE * TILE


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def piece_of(column: int, row: int) -> int:
    """Where byte `column` of `row` lies in the swizzled row."""
    return (column // 16 ^ row % 8) * 16 + column % 16


def test_swizzling_twice_changes_nothing():
    tiles = random_bytes(3, TILE, TILE)
    assert not torch.equal(swizzled(tiles), tiles)
    assert torch.equal(swizzled(swizzled(tiles)), tiles)


def test_a_swizzled_row_holds_its_pieces_at_piece_xor_row():
    tiles = random_bytes(1, TILE, TILE)
    placed = swizzled(tiles)
    for row in range(TILE):
        for column in range(0, TILE, 5):
            assert placed[0, row, piece_of(column, row)] == tiles[0, row, column]


def test_w13_has_gate_and_up_of_a_chunk_side_by_side_for_each_128_of_k():
    experts, chunks, num_k = 2, 2, 3
    w13 = random_bytes(experts, 2 * chunks * TILE, num_k * TILE)
    tiles = tile_w13(w13)
    assert tiles.shape == (experts, chunks, num_k, 2, TILE, TILE)
    for expert in range(experts):
        for chunk in range(chunks):
            for k in range(num_k):
                for half in range(2):  # gate, up
                    first_row = (half * chunks + chunk) * TILE
                    expected = w13[expert, first_row : first_row + TILE, k * TILE : (k + 1) * TILE]
                    assert torch.equal(swizzled(tiles[expert, chunk, k, half]), expected)


@pytest.mark.parametrize("row_blocks", [2, 3], ids=["whole groups", "last group half"])
def test_w2_has_groups_of_256_columns_of_the_output_and_in_each_its_chunks(row_blocks):
    experts, chunks = 2, 2
    w2 = random_bytes(experts, row_blocks * TILE, chunks * TILE)
    flat = tile_w2(w2)
    assert flat.shape == (experts, row_blocks * TILE * chunks * TILE)
    for expert in range(experts):
        for block in range(row_blocks):
            group, half = divmod(block, 2)
            blocks_of_group = min(2, row_blocks - 2 * group)
            for chunk in range(chunks):
                start = (2 * group * chunks + chunk * blocks_of_group + half) * TILE_BYTES
                tile = swizzled(flat[expert, start : start + TILE_BYTES].view(1, TILE, TILE))[0]
                for row in range(TILE):
                    b, w, h, g = 2 * half + row // 64, row // 16 % 4, row // 8 % 2, row % 8
                    column_of_group = 64 * w + 8 * g + 2 * b + h if blocks_of_group == 2 else 32 * w + 4 * g + 2 * b + h
                    column_of_out = 2 * group * TILE + column_of_group
                    expected = w2[expert, column_of_out, chunk * TILE : (chunk + 1) * TILE]
                    assert torch.equal(tile[row], expected)


def test_re_laying_keeps_every_byte():
    w13, w2 = random_bytes(1, 256, 384), random_bytes(1, 384, 128)
    assert torch.equal(tile_w13(w13).flatten().sort().values, w13.flatten().sort().values)
    assert torch.equal(tile_w2(w2).flatten().sort().values, w2.flatten().sort().values)


def test_channels_that_do_not_fill_a_chunk_are_followed_by_zeros():
    num_channels, hidden = 176, 256
    w13, w2 = random_bytes(1, 2 * num_channels, hidden), random_bytes(1, hidden, num_channels)
    padded_w13, padded_w2 = (
        torch.zeros(1, 2, 256, hidden, dtype=torch.uint8),
        torch.zeros(1, hidden, 256, dtype=torch.uint8),
    )
    padded_w13[0, :, :num_channels] = w13.view(2, num_channels, hidden)
    padded_w2[0, :, :num_channels] = w2
    assert torch.equal(tile_w13(w13), tile_w13(padded_w13.flatten(1, 2)))
    assert torch.equal(tile_w2(w2), tile_w2(padded_w2))


def test_fp8_weights_are_re_laid_by_their_bytes():
    w2 = random_bytes(1, 256, 128)
    assert torch.equal(tile_w2(w2.view(torch.float8_e4m3fn)), tile_w2(w2))
