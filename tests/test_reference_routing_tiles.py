"""Tiles of several heights against a loop over experts."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.routing import tile_capacity, tile_rows


def round_up_to_8(rows: int) -> int:
    return (rows + 7) // 8 * 8


def tiles_one_by_one(ids: list[int], max_rows: int, num_experts: int) -> list[tuple[int, int, int, int]]:
    """(expert, first row, rows, tiles of the expert), by cutting each expert's rows in turn; the highest first."""
    tiles_by_class: dict[int, list[tuple[int, int, int, int]]] = {}
    first_row = 0
    for expert in range(num_experts):
        end = first_row + ids.count(expert)
        wanted = -(-(end - first_row) // max_rows)
        height = round_up_to_8(-(-(end - first_row) // wanted)) if wanted else 8
        num_tiles = -(-(end - first_row) // height)
        while first_row < end:
            num_rows = min(height, end - first_row)
            height_class = 0 if 8 * height > 7 * max_rows else 1 if 8 * height > 5 * max_rows else 2
            tiles = tiles_by_class.setdefault(height_class, [])
            tiles.append((expert, first_row, num_rows, num_tiles))
            first_row += num_rows
    return [tile for _, tiles in sorted(tiles_by_class.items()) for tile in tiles]


@settings(deadline=None, max_examples=120)
@given(st.data(), st.integers(0, 40), st.integers(1, 4), st.integers(1, 9), st.sampled_from([8, 16, 24, 64]))
def test_each_experts_choices_are_cut_into_tiles_ordered_by_height(
    data: st.DataObject, num_tokens: int, top_k: int, num_experts: int, max_rows: int
) -> None:
    size = num_tokens * top_k
    likely = data.draw(st.integers(0, num_experts - 1))
    some = st.one_of(st.just(likely), st.integers(-1, num_experts - 1))
    ids = data.draw(st.lists(some, min_size=size, max_size=size))
    tiled = tile_rows(torch.tensor(ids, dtype=torch.int32).view(num_tokens, top_k), max_rows, num_experts)
    expected = tiles_one_by_one(ids, max_rows, num_experts)
    here = [choice for choice, expert in enumerate(ids) if expert >= 0]

    assert tiled.max_rows == max_rows
    assert tiled.tiles.dtype == tiled.sorted_choices.dtype == torch.int32
    assert tuple(tiled.tiles[0].tolist()) == (len(expected), len(here), 0, 0)
    assert [tuple(tile) for tile in tiled.tiles[1 : 1 + len(expected)].tolist()] == expected
    assert len(tiled.tiles) == 1 + tile_capacity(size, max_rows, num_experts)
    assert len(expected) <= tile_capacity(size, max_rows, num_experts)
    assert tiled.sorted_choices[: len(here)].tolist() == sorted(here, key=lambda choice: (ids[choice], choice))
    assert len(tiled.sorted_choices) == size


def test_the_capacity_is_reached() -> None:
    full_and_one_more = torch.arange(3, dtype=torch.int32).repeat_interleave(9).view(-1, 1)
    assert tile_rows(full_and_one_more, 8, 3).tiles[0, 0] == tile_capacity(27, 8, 3) == 6
    one_each = torch.arange(5, dtype=torch.int32).view(1, 5)
    assert tile_rows(one_each, 8, 9).tiles[0, 0] == tile_capacity(5, 8, 9) == 5


def test_an_example_written_out() -> None:
    topk_ids = torch.tensor([[1] * 20 + [0] * 3 + [-1]], dtype=torch.int32)
    tiled = tile_rows(topk_ids, max_rows=16, num_experts=3)
    assert tiled.tiles[:4].tolist() == [[3, 23, 0, 0], [1, 3, 16, 2], [1, 19, 4, 2], [0, 0, 3, 1]]
    assert tiled.sorted_choices[:23].tolist() == [20, 21, 22, *range(20)]
