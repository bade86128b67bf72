"""A network of images on tiles that overlap: bounded memory for any size.

Sizes, overlaps and blending are those of diffusers' AutoencoderKL, so that the numbers are, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The part of a tile's side that the next tile covers again.
OVERLAP = 0.25


def apply_tiled(
    run: Callable[[Tensor], Tensor], x: Tensor, tile: tuple[int, int] | None, sliced: bool
) -> Tensor:
    """``run(x)`` for x [B, C, H, W], whole or in tiles.

    tile: the side of a tile of x and that of its result, or None; an x that is no larger than one
        tile is not cut. Each tile starts three quarters of a side after the one before, and what
        both cover goes over linearly from one to the other. sliced: one image after the other.
    """
    if sliced and x.shape[0] > 1:
        return torch.cat([apply_tiled(run, image, tile, False) for image in x.split(1)])
    if tile is None or max(x.shape[2:]) <= tile[0]:
        return run(x)
    side, out_side = tile
    step, extent = int(side * (1 - OVERLAP)), int(out_side * OVERLAP)
    if step < 1:
        raise ValueError(f"a tile must have a side of at least 2, got {side} (config.sample_size)")
    keep = out_side - extent
    rows: list[Tensor] = []
    above: list[Tensor] = []
    for top in range(0, x.shape[2], step):
        tiles: list[Tensor] = []
        for j, left in enumerate(range(0, x.shape[3], step)):
            part = run(x[:, :, top : top + side, left : left + side])
            if above:
                part = _blend(above[j], part, extent, dim=2)
            if tiles:
                part = _blend(tiles[-1], part, extent, dim=3)
            tiles.append(part)
        rows.append(torch.cat([part[:, :, :keep, :keep] for part in tiles], dim=3))
        above = tiles
    return torch.cat(rows, dim=2)


def _blend(before: Tensor, after: Tensor, extent: int, dim: int) -> Tensor:
    """``after``, whose first lines go over linearly from the last ones of ``before``."""
    extent = min(before.shape[dim], after.shape[dim], extent)
    if extent == 0:
        return after
    shape = [1, 1, 1, 1]
    shape[dim] = extent
    weight = torch.arange(extent, dtype=torch.float64, device=after.device).view(shape) / extent
    old, new = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
    wide = torch.promote_types(after.dtype, torch.float32)
    mixed = old.to(wide) * (1 - weight).to(wide) + new.to(wide) * weight.to(wide)
    rest = after.narrow(dim, extent, after.shape[dim] - extent)
    return torch.cat([mixed.to(after.dtype), rest], dim=dim)
