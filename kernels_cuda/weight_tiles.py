"""Weights re-laid as the tiles that a kernel fetches, each one contiguous and swizzled as wgmma reads it.

A tile is 128 rows of 128 bytes; the 16-byte piece c of row r lies at piece c ^ (r % 8). On the H200 contiguous fetches
of 32 KB reach 4.65 TB/s, where boxes of 128 bytes by 128 rows out of the served layout reach 4.27 TB/s.
"""

from __future__ import annotations

import torch

TILE = 128
PIECE_BYTES = 16


def tile_w13(w13: torch.Tensor) -> torch.Tensor:
    """`w13` [E, 2I, H] as uint8 [E, ceil(I/128), H/128, 2, 128, 128]: for each chunk of 128 channels and each 128 of K
    the gate tile and the up tile. H is a multiple of 128; channels past I are zeros."""
    num_experts, rows, hidden = w13.shape
    num_channels, num_k = rows // 2, hidden // TILE
    chunks = -(-num_channels // TILE)
    tiles = torch.empty(num_experts, chunks, num_k, 2, TILE, TILE, dtype=torch.uint8, device=w13.device)
    halves = torch.zeros(2, chunks * TILE, hidden, dtype=torch.uint8, device=w13.device)
    for expert in range(num_experts):
        halves[:, :num_channels] = w13[expert].view(torch.uint8).view(2, num_channels, hidden)
        tiles[expert] = swizzled(halves.view(2, chunks, TILE, num_k, TILE).permute(1, 3, 0, 2, 4))
    return tiles


def tile_w2(w2: torch.Tensor) -> torch.Tensor:
    """`w2` [E, H, I] as uint8 [E, H * ceil(I/128) * 128]: groups of 256 rows, in each its chunks of 128 channels, in
    each its rows of 128 bytes (the last group may have only 128). H is a multiple of 128; channels past I are zeros.

    Rows of a group are so ordered that a thread's wgmma accumulators are adjacent columns of `out`, and a warp's too:
    row 64 b + 16 w + 8 h + g is row 64 w + 8 g + 2 b + h of the 256, or 32 w + 4 g + 2 b + h of 128.
    """
    num_experts, hidden, num_channels = w2.shape
    chunks = -(-num_channels // TILE)
    tiles = torch.empty(num_experts, hidden * chunks * TILE, dtype=torch.uint8, device=w2.device)
    padded = torch.zeros(hidden, chunks * TILE, dtype=torch.uint8, device=w2.device)
    whole = hidden // (2 * TILE) * (2 * TILE)
    for expert in range(num_experts):
        padded[:, :num_channels] = w2[expert].view(torch.uint8)
        tiles[expert] = torch.cat([_groups(padded[:whole], 4).flatten(), _groups(padded[whole:], 2).flatten()])
    return tiles


def _groups(rows: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """uint8 [R, chunks * 128] as [groups, chunks, 64 * num_blocks, 128], the rows of a group in the order that tile_w2
    says, swizzled."""
    chunks = rows.shape[1] // TILE
    named = rows.reshape(-1, 4, 8, num_blocks, 2, chunks, TILE)  # [group, w, g, b, h, chunk, 128]
    ordered = named.permute(0, 5, 3, 1, 4, 2, 6)  # [group, chunk, b, w, h, g, 128]
    return swizzled(ordered.reshape(len(named), chunks, 64 * num_blocks, TILE))


def swizzled(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 [..., R, 128] with the 16-byte pieces of each row in swizzled order; its own inverse."""
    pieces = tiles.contiguous().view(*tiles.shape[:-1], TILE // PIECE_BYTES, PIECE_BYTES)
    row = torch.arange(tiles.shape[-2], device=tiles.device)
    piece = torch.arange(TILE // PIECE_BYTES, device=tiles.device)
    source = piece ^ (row % 8).unsqueeze(1)  # [R, 8]
    return pieces[..., row.unsqueeze(1), source, :].flatten(-2)
