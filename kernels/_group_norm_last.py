"""Group norms, split, channels last: a program has some pixels of a block of channels."""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels._group_norm_parts import activate, affine, group_moments, load_x


@triton.jit
def _column(x_ptr, skip_ptr, column, C, C_X, BLOCK_C: tl.constexpr):
    """Block `column` of the channels of cat([x, skip], 1), all of one tensor.

    (the tensor, its channels, its first channel's place in the whole, channels of the block in it)
    """
    columns = tl.cdiv(C_X, BLOCK_C)
    inside = column < columns
    channels = tl.where(inside, C_X, C - C_X)
    place = tl.where(inside, 0, C_X)
    c = tl.where(inside, column, column - columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    return tl.where(inside, x_ptr, skip_ptr), channels, place, c


@triton.jit
def _stats_last_kernel(
    x_ptr,
    second_ptr,  # the skip, or the residual
    sum_ptr,  # with a residual
    mean_ptr, m2_ptr,  # [N, splits, C]
    C,
    C_X,  # channels of x: the rest is the skip
    HW, splits, span,
    HAS_RESIDUAL: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels last: `span` pixels of a block of channels, whatever groups they belong to, so that
    whole cache lines are read. Welford for each channel and each row of the tile."""
    pid = tl.program_id(0)
    columns = tl.cdiv(C_X, BLOCK_C) + tl.cdiv(C - C_X, BLOCK_C)  # neighbours share rows of memory
    part = pid // columns
    if HAS_RESIDUAL:
        channels = C
        place = 0
        c = pid % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    else:
        x_ptr, channels, place, c = _column(x_ptr, second_ptr, pid % columns, C, C_X, BLOCK_C)
    n = (part // splits).to(tl.int64)
    split = part % splits
    mask_c = c < channels
    length = tl.minimum(HW - split * span, span)
    row = tl.arange(0, BLOCK_HW)
    start = (n * HW + split * span) * channels
    x_ptr += start
    if HAS_RESIDUAL:
        second_ptr += start
        sum_ptr += start
    tile = row[:, None] * channels + c[None, :]

    mean = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    turns = length // BLOCK_HW
    turn = 0.0
    for _ in range(turns):
        x = load_x(x_ptr, second_ptr, sum_ptr, tile, mask_c[None, :], HAS_RESIDUAL)
        step = tl.full([], BLOCK_HW, tl.int64) * channels
        x_ptr += step
        if HAS_RESIDUAL:
            second_ptr += step
            sum_ptr += step
        turn += 1.0
        delta = x - mean
        mean += delta * (1.0 / turn)
        m2 += delta * (x - mean)
    count = tl.full([BLOCK_HW], 1.0, tl.float32) * turn
    left = length - turns * BLOCK_HW
    if left > 0:
        mask = (row < left)[:, None] & mask_c[None, :]
        x = load_x(x_ptr, second_ptr, sum_ptr, tile, mask, HAS_RESIDUAL)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (turn + 1.0))
        m2 += delta * tl.where(mask, x - mean, 0.0)
        count += (row < left).to(tl.float32)
    weights = count[:, None]
    whole = tl.sum(mean * weights, 0) / tl.sum(count)
    distance = mean - whole[None, :]
    squares = tl.sum(m2 + weights * distance * distance, 0)
    at = part.to(tl.int64) * C + place + c
    tl.store(mean_ptr + at, whole, mask=mask_c)
    tl.store(m2_ptr + at, squares, mask=mask_c)


@triton.jit
def _finalize_last_kernel(
    add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    part_mean_ptr, part_m2_ptr,  # [N, splits, C]
    mean_ptr, slope_ptr, offset_ptr,  # [N, C]
    add_stride, scale_stride, shift_stride, C, HW, groups, splits, span,
    eps,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # channels per iteration
):  # fmt: skip
    """Channels last: one group's parts, and its per-channel arguments, into mean, slope, offset."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    width = C // groups
    first = (pid % groups) * width
    parts = n * splits * C + first
    add_ptr += n * add_stride
    centre, rest, rstd = group_moments(
        part_mean_ptr + parts, part_m2_ptr + parts, add_ptr + first, C, HW, width, splits, span,
        eps, HAS_ADD, True, PARTS,
    )  # fmt: skip
    for start in range(0, width, BLOCK_C):
        lane = start + tl.arange(0, BLOCK_C)
        mask = lane < width
        c = first + lane
        mean, slope, offset = affine(
            weight_ptr, bias_ptr, add_ptr, scale_ptr + n * scale_stride,
            shift_ptr + n * shift_stride, c, mask, centre, rest, rstd,
            HAS_ADD, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT,
        )  # fmt: skip
        tl.store(mean_ptr + n * C + c, mean, mask=mask)
        tl.store(slope_ptr + n * C + c, slope, mask=mask)
        tl.store(offset_ptr + n * C + c, offset, mask=mask)


@triton.jit
def _apply_last_kernel(
    x_ptr, skip_ptr, out_ptr,
    mean_ptr, slope_ptr, offset_ptr,  # [N, C]
    C,
    C_X,  # channels of x: the rest is the skip
    HW,
    SILU: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels last: a tile of pixels and channels of one image."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, see the top of the file
    columns = tl.cdiv(C_X, BLOCK_C) + tl.cdiv(C - C_X, BLOCK_C)
    blocks = tl.cdiv(HW, BLOCK_HW)
    x_ptr, channels, place, c = _column(x_ptr, skip_ptr, pid % columns, C, C_X, BLOCK_C)
    pid = pid // columns
    n = (pid // blocks).to(tl.int64)
    pixel = (pid % blocks) * BLOCK_HW
    row = tl.arange(0, BLOCK_HW)
    mask_c = c < channels
    mask = (pixel + row < HW)[:, None] & mask_c[None, :]
    x_ptr += (n * HW + pixel) * channels
    tile = row[:, None] * channels + c[None, :]
    x = tl.load(x_ptr + tile, mask=mask, other=0.0, eviction_policy="evict_first")
    at = n * C + place + c
    mean = tl.load(mean_ptr + at, mask=mask_c, other=0.0)
    slope = tl.load(slope_ptr + at, mask=mask_c, other=0.0)
    offset = tl.load(offset_ptr + at, mask=mask_c, other=0.0)
    y = activate((x.to(tl.float32) - mean[None, :]) * slope[None, :] + offset[None, :], SILU)
    out_ptr += (n * HW + pixel) * C + place
    tile = row[:, None] * C + c[None, :]
    tl.store(out_ptr + tile, y.to(out_ptr.dtype.element_ty), mask=mask)
