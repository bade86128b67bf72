"""Group norms: the device helpers that the ways and memory layouts share.

The variance is centred everywhere, never E[x^2] - E[x]^2: after a convolution with a large bias
that has no digits left. Offsets of images and rows are widened to int64 before they are multiplied;
offsets inside a tile are bounded by the tile and stay int32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(pointer, offsets, mask, PRESENT: tl.constexpr, other: tl.constexpr):
    """A per-channel argument in fp32; the constant where it is absent."""
    if PRESENT:
        value = tl.load(pointer + offsets, mask=mask, other=other).to(tl.float32)
    else:
        value = tl.full(offsets.shape, other, tl.float32)
    return value


@triton.jit
def load_x(x_ptr, second_ptr, sum_ptr, offsets, mask, HAS_RESIDUAL: tl.constexpr):
    """x in fp32; with a residual their sum, rounded to memory's dtype as it is written."""
    if mask is None:
        x = tl.load(x_ptr + offsets).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(second_ptr + offsets).to(tl.float32)
    else:
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(second_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + offsets, total, mask=mask)
        x = total.to(tl.float32)
    return x


@triton.jit
def channel_start(x_ptr, skip_ptr, n, c, C, C_X, HW):
    """Where channel c of image n of cat([x, skip], 1) starts, channels first; n is int64."""
    inside = c < C_X
    channels = tl.where(inside, C_X, C - C_X)
    local = tl.where(inside, c, c - C_X)
    return tl.where(inside, x_ptr, skip_ptr) + (n * channels + local) * HW


@triton.jit
def activate(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def chan(mean_a, m2_a, count_a, mean_b, m2_b, count_b):
    """Chan's rule: mean, sum of squared distances and count of the union of two parts."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / count, 0.0)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + delta * delta * (count_a * share), count


@triton.jit
def combine(mean, m2, count):
    """Chan's rule over all parts, in one reduction: three would wait for each other."""
    return tl.reduce((mean, m2, count), 0, chan)


@triton.jit
def group_moments(
    part_mean_ptr, part_m2_ptr, add_ptr,  # at the group's first part, its first channel
    C, HW, width, splits, span,
    eps,
    HAS_ADD: tl.constexpr, IS_NHWC: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(centre, rest, rstd) of one group of x + add, whose mean is centre + rest.

    Two numbers, because x - centre - rest keeps digits that one rounded mean would lose when it is
    far above the deviation. centre is the mean of the first part.
    """
    centre = tl.load(part_mean_ptr)
    if HAS_ADD:
        centre += tl.load(add_ptr).to(tl.float32)
    total, mean, m2 = 0.0, 0.0, 0.0
    for start in range(0, width * splits, PARTS):
        index = start + tl.arange(0, PARTS)
        present = index < width * splits
        if IS_NHWC:
            channel, split = index % width, index // width
            offset = split.to(tl.int64) * C + channel
        else:
            channel, split = index // splits, index % splits
            offset = index
        part = tl.load(part_mean_ptr + offset, mask=present, other=0.0)
        squares = tl.load(part_m2_ptr + offset, mask=present, other=0.0)
        if HAS_ADD:
            part += tl.load(add_ptr + channel, mask=present, other=0.0).to(tl.float32)
        pixels = tl.minimum(HW - split * span, span).to(tl.float32)
        count = tl.where(present, pixels, 0.0)
        here, squares, added = combine(tl.where(present, part - centre, 0.0), squares, count)
        mean, m2, total = chan(mean, m2, total, here, squares, added)
    return centre, mean, tl.rsqrt((m2 / total + eps).to(tl.float32))


@triton.jit
def affine(
    weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr,  # the rows of one image
    c, mask,
    centre, rest, rstd,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """(mean, slope, offset) of channels c, so that the result is (x - mean) * slope + offset.

    mean = centre - add, rounded; what rounding takes from it (Knuth's two-sum) goes, like rest,
    into the offset.
    """
    weight = load_row(weight_ptr, c, mask, HAS_WEIGHT, 1.0)
    bias = load_row(bias_ptr, c, mask, HAS_BIAS, 0.0)
    scale = 1.0 + load_row(scale_ptr, c, mask, HAS_SCALE, 0.0)
    shift = load_row(shift_ptr, c, mask, HAS_SHIFT, 0.0)
    less = -load_row(add_ptr, c, mask, HAS_ADD, 0.0)
    mean = centre + less
    virtual = mean - centre
    lost = (centre - (mean - virtual)) + (less - virtual)
    slope = rstd * weight * scale
    return mean, slope, bias * scale + shift - (rest + lost) * slope
