"""How the group norms are launched: tiles, warps and parts, from the shape alone.

Two ways:
- "group": a program holds a whole group in registers. Everything is read once, written once.
- "split": statistics per channel and run of pixels, then a second pass.

What reads a second tensor (a skip that is joined with x, or a residual that is added) takes the
first way for the groups and layouts of real models only: each tile is one more configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True)
class Launch:
    """How one shape is launched.

    kind: "group" or "split". block_c, block_hw: the tile of a program; block_c is 1 for a split
    group with channels first. align: 4 where that divides the channels per group and loads are
    wider for knowing it, else 1. splits: parts of `span` pixels each; stats_warps: of the programs
    that take their statistics.
    """

    kind: str
    block_c: int
    block_hw: int
    num_warps: int
    align: int = 1
    splits: int = 1
    span: int = 0
    stats_warps: int = 0


# 16384 fp32 elements in 16 warps are 32 registers per thread: the largest tile that leaves room for
# the affine vectors without spilling (`python -m fastdiff.aot`).
MAX_TILE = 16384
MIN_TILE = 1024
# The least with a second tensor: 40 to 80 channels per group at 8x8 and 16x16 are the shapes of
# U-Nets that fit a tile.
SECOND_MIN_TILE = 4096
SECOND_MIN_BLOCK_C = 64
MAX_BLOCK_C = 128
MAX_REGISTERS = 128  # what 16 warps have; named, because left alone ptxas spills to save registers
ALIGN = 4  # loads of 8 bytes of bf16, 16 of fp32
VECTOR = 16  # Triton loads 16 bytes at once where strides are known to be multiples of 16
# Two waves of 4-warp programs, eight per SM, on the largest GPU; more parts only cost to combine.
TARGET_PROGRAMS = 2048
MAX_BLOCK_HW = 4096  # 32 elements per thread: 64 bytes of bf16 in flight
MIN_BLOCK_HW = 512
MAX_PARTS = 1024  # per group, channels first: every program of the second pass combines them
LAST_MAX_SPLITS = 512
LAST_BLOCK_C = 64  # 128 bytes of bf16: whole cache lines
LAST_BLOCK_HW = 32
APPLY_PARTS = 128  # combined per iteration
FINALIZE_PARTS = 1024
FLAGS = ("HAS_ADD", "HAS_WEIGHT", "HAS_BIAS", "HAS_SCALE", "HAS_SHIFT")


def warps_of(elements: int, least: int) -> int:
    """Of a tile: 32 elements per thread, from `least` to 16 warps."""
    return min(16, max(least, elements // 1024))


def stats_warps(warps: int, second: str) -> int:
    """Of the statistics' programs: one warp has no registers for a residual's addresses as well."""
    return max(2, warps) if second == "residual" else warps


def select(
    N: int, C: int, HW: int, groups: int, dtype: torch.dtype, channels_last: bool, arch: int,
    split: bool = False, block_hw: int = 0, programs: int = TARGET_PROGRAMS,  # for tuning
    second: str = "", first: int = 0,
) -> Launch:  # fmt: skip
    """The launch for a shape. Pure: needs no GPU. arch is 80, 90, ...

    second: "skip" where the last C - first of the C channels are a tensor of their own, "residual"
    where one is added to x, else "".

    dtype and arch do not change the choice: tiles are bounded by fp32 registers, whose number per
    SM is the same from sm_80 on. An odd number of pixels (channels last: of channels) takes an
    address for every element: half the elements per thread, or registers spill.
    """
    width = C // groups
    align = ALIGN if channels_last and C % VECTOR == 0 and width % ALIGN == 0 else 1
    if second == "skip" and first % VECTOR:
        align = 1
    odd = 1 if align > 1 or (HW % VECTOR == 0 and not channels_last) else 2
    block_c = max(SECOND_MIN_BLOCK_C if second else 4, triton.next_power_of_2(width))
    least = SECOND_MIN_TILE if second else MIN_TILE
    tile = max(least, block_c * triton.next_power_of_2(HW))
    fits = block_c <= MAX_BLOCK_C and tile * odd <= MAX_TILE
    if fits and not split and not (second and odd > 1):
        return Launch("group", block_c, tile // block_c, warps_of(tile * odd, 4), align)
    if channels_last:
        first = first if second == "skip" else C
        columns = triton.cdiv(first, LAST_BLOCK_C) + triton.cdiv(C - first, LAST_BLOCK_C)
        rows, most = N * columns, LAST_MAX_SPLITS
        block_c, block_hw, warps = LAST_BLOCK_C, LAST_BLOCK_HW, 4
    else:
        rows, most = N * C, max(1, MAX_PARTS // width)
        block_c = 1
        widest = min(MAX_BLOCK_HW // odd, max(MIN_BLOCK_HW, triton.next_power_of_2(HW)))
        block_hw = min(block_hw or widest, widest)
        warps = warps_of(block_hw * odd, 1)
    splits = min(most, triton.cdiv(programs, max(1, rows)), triton.cdiv(HW, block_hw))
    span = triton.cdiv(triton.cdiv(HW, splits), block_hw) * block_hw
    parts = triton.cdiv(HW, span)
    stats = stats_warps(warps, second)
    return Launch("split", block_c, block_hw, warps, 1, parts, span, stats)
