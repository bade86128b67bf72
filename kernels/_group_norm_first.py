"""Group norms, split, channels first: a program has a run of pixels of one channel."""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels._group_norm_parts import (
    activate,
    affine,
    channel_start,
    combine,
    group_moments,
    load_x,
)


@triton.jit
def _stats_kernel(
    x_ptr,
    second_ptr,  # the skip, or the residual
    sum_ptr,  # with a residual
    mean_ptr, m2_ptr,  # [N * C, splits]
    C,
    C_X,  # channels of x: the rest is the skip
    HW, splits, span,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    VEC: tl.constexpr,  # 16 bytes: a row of the tile is one load of one thread
):  # fmt: skip
    """Channels first: one channel's part. Each thread centres what it has loaded on its own mean,
    then adds it to what it had by Chan's rule: four instructions per element."""
    pid = tl.program_id(0)
    row = pid // splits
    split = pid % splits
    length = tl.minimum(HW - split * span, span)
    if HAS_RESIDUAL:
        start = row.to(tl.int64) * HW + split * span
        x_ptr += start
        second_ptr += start
        sum_ptr += start
    else:
        n = (row // C).to(tl.int64)
        x_ptr = channel_start(x_ptr, second_ptr, n, row % C, C, C_X, HW) + split * span
    ROWS: tl.constexpr = BLOCK // VEC
    at = tl.arange(0, ROWS)
    tile = at[:, None] * VEC + tl.arange(0, VEC)[None, :]

    mean = tl.zeros([ROWS], tl.float32)
    m2 = tl.zeros([ROWS], tl.float32)
    turns = length // BLOCK
    turn = 0.0
    for _ in range(turns):
        x = load_x(x_ptr, second_ptr, sum_ptr, tile, None, HAS_RESIDUAL)
        x_ptr += BLOCK
        if HAS_RESIDUAL:
            second_ptr += BLOCK
            sum_ptr += BLOCK
        turn += 1.0
        here = tl.sum(x, 1) / VEC
        distance = x - here[:, None]
        delta = here - mean
        mean += delta * (1.0 / turn)
        m2 += tl.sum(distance * distance, 1) + delta * delta * (VEC * (turn - 1.0) / turn)
    count = tl.full([ROWS], 1.0, tl.float32) * (turn * VEC)
    left = length - turns * BLOCK
    if left > 0:
        mask = tile < left
        x = load_x(x_ptr, second_ptr, sum_ptr, tile, mask, HAS_RESIDUAL)
        added = tl.minimum(tl.maximum(left - at * VEC, 0), VEC).to(tl.float32)
        here = tl.sum(x, 1) / tl.maximum(added, 1.0)
        distance = tl.where(mask, x - here[:, None], 0.0)
        delta = here - mean
        share = added / tl.maximum(count + added, 1.0)
        mean += delta * share
        m2 += tl.sum(distance * distance, 1) + delta * delta * (count * share)
        count += added
    whole, squares, _ = combine(mean, m2, count)
    tl.store(mean_ptr + pid, whole)
    tl.store(m2_ptr + pid, squares)


@triton.jit
def _apply_kernel(
    x_ptr, skip_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    part_mean_ptr, part_m2_ptr,  # [N * C, splits]
    add_stride, scale_stride, shift_stride, C,
    C_X,  # channels of x: the rest is the skip
    HW, groups, splits, span,
    eps,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels first: a piece of one channel, whose per-channel arguments are scalars."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, see the top of the file
    blocks = tl.cdiv(HW, BLOCK)
    row = pid // blocks
    hw = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = hw < HW
    base = row.to(tl.int64) * HW
    n = (row // C).to(tl.int64)
    c = row % C
    x_ptr = channel_start(x_ptr, skip_ptr, n, c, C, C_X, HW)
    x = tl.load(x_ptr + hw, mask=mask, other=0.0, eviction_policy="evict_first")

    width = C // groups
    first = c // width * width
    parts = (n * C + first) * splits
    add_ptr += n * add_stride
    centre, rest, rstd = group_moments(
        part_mean_ptr + parts, part_m2_ptr + parts, add_ptr + first, C, HW, width, splits, span,
        eps, HAS_ADD, False, PARTS,
    )  # fmt: skip
    mean, slope, offset = affine(
        weight_ptr, bias_ptr, add_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride,
        c, c < C, centre, rest, rstd, HAS_ADD, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y = activate((x.to(tl.float32) - mean) * slope + offset, SILU)
    tl.store(out_ptr + base + hw, y.to(out_ptr.dtype.element_ty), mask=mask)
