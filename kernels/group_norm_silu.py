"""y = act((GroupNorm(x + add) * weight + bias) * (1 + scale) + shift), act = SiLU or none.

    x, out       [N, C, HW] or, channels last, [N, HW, C]; fp32, fp16 or bf16
    weight, bias [C]; add, scale, shift [N, C] with any batch stride; each may be absent
    mean, rstd   per image and group, over C // groups channels and HW pixels; fp32

Group normalisation: Wu and He, 2018, https://arxiv.org/abs/1803.08494.

Two ways, chosen by `select`:
- "group": a program holds a whole group in registers. x is read once, out written once.
- "split": statistics per channel and run of pixels (mean and sum of squared distances from it),
  combined by Chan's rule, then a second pass over x. `add` only moves a channel's mean, so the
  statistics do not read it. The second pass goes through x backwards: it starts with what the
  first has just left in L2. What L2 does not hold is read twice from memory.

The variance is centred everywhere, never E[x^2] - E[x]^2: after a convolution with a large bias
that has no digits left. Offsets of images and rows are widened to int64 before they are multiplied;
offsets inside a tile are bounded by the tile and stay int32.

Limits: channels, an image's pixels, and the rows N * C below 2^31.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# --- launch policy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How one shape is launched.

    kind: "group" or "split". block_c, block_hw: the tile of a program; block_c is 1 for a split
    group with channels first. align: 4 where that divides the channels per group and loads are
    wider for knowing it, else 1. splits: parts of `span` pixels each.
    """

    kind: str
    block_c: int
    block_hw: int
    num_warps: int
    align: int = 1
    splits: int = 1
    span: int = 0


# 16384 fp32 elements in 16 warps are 32 registers per thread: the largest tile that leaves room for
# the affine vectors without spilling (`python -m fastdiff.aot`).
MAX_TILE = 16384
MIN_TILE = 1024
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


def _warps(elements: int, least: int) -> int:
    return min(16, max(least, elements // 1024))


def select(
    N: int, C: int, HW: int, groups: int, dtype: torch.dtype, channels_last: bool, arch: int,
    split: bool = False, block_hw: int = 0, programs: int = TARGET_PROGRAMS,  # for tuning
) -> Launch:  # fmt: skip
    """The launch for a shape. Pure: needs no GPU. arch is 80, 90, ...

    dtype and arch do not change the choice: tiles are bounded by fp32 registers, whose number per
    SM is the same from sm_80 on. An odd number of pixels (channels last: of channels) takes an
    address for every element: half the elements per thread, or registers spill.
    """
    width = C // groups
    align = ALIGN if channels_last and C % VECTOR == 0 and width % ALIGN == 0 else 1
    odd = 1 if align > 1 or (HW % VECTOR == 0 and not channels_last) else 2
    block_c = max(4, triton.next_power_of_2(width))
    tile = max(MIN_TILE, block_c * triton.next_power_of_2(HW))
    if not split and block_c <= MAX_BLOCK_C and tile * odd <= MAX_TILE:
        return Launch("group", block_c, tile // block_c, _warps(tile * odd, 4), align)
    if channels_last:
        rows, most = N * triton.cdiv(C, LAST_BLOCK_C), LAST_MAX_SPLITS
        block_c, block_hw, warps = LAST_BLOCK_C, LAST_BLOCK_HW, 4
    else:
        rows, most = N * C, max(1, MAX_PARTS // width)
        block_c = 1
        widest = min(MAX_BLOCK_HW // odd, max(MIN_BLOCK_HW, triton.next_power_of_2(HW)))
        block_hw = min(block_hw or widest, widest)
        warps = _warps(block_hw * odd, 1)
    splits = min(most, triton.cdiv(programs, max(1, rows)), triton.cdiv(HW, block_hw))
    span = triton.cdiv(triton.cdiv(HW, splits), block_hw) * block_hw
    return Launch("split", block_c, block_hw, warps, 1, triton.cdiv(HW, span), span)


# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _load_row(pointer, offsets, mask, PRESENT: tl.constexpr, other: tl.constexpr):
    """A per-channel argument in fp32; the constant where it is absent."""
    if PRESENT:
        value = tl.load(pointer + offsets, mask=mask, other=other).to(tl.float32)
    else:
        value = tl.full(offsets.shape, other, tl.float32)
    return value


@triton.jit
def _activate(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _chan(mean_a, m2_a, count_a, mean_b, m2_b, count_b):
    """Chan's rule: mean, sum of squared distances and count of the union of two parts."""
    count = count_a + count_b
    share = tl.where(count > 0, count_b / count, 0.0)
    delta = mean_b - mean_a
    return mean_a + delta * share, m2_a + m2_b + delta * delta * (count_a * share), count


@triton.jit
def _combine(mean, m2, count):
    """Chan's rule over all parts, in one reduction: three would wait for each other."""
    return tl.reduce((mean, m2, count), 0, _chan)


@triton.jit
def _group_moments(
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
        here, squares, added = _combine(tl.where(present, part - centre, 0.0), squares, count)
        mean, m2, total = _chan(mean, m2, total, here, squares, added)
    return centre, mean, tl.rsqrt((m2 / total + eps).to(tl.float32))


@triton.jit
def _affine(
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
    weight = _load_row(weight_ptr, c, mask, HAS_WEIGHT, 1.0)
    bias = _load_row(bias_ptr, c, mask, HAS_BIAS, 0.0)
    scale = 1.0 + _load_row(scale_ptr, c, mask, HAS_SCALE, 0.0)
    shift = _load_row(shift_ptr, c, mask, HAS_SHIFT, 0.0)
    less = -_load_row(add_ptr, c, mask, HAS_ADD, 0.0)
    mean = centre + less
    virtual = mean - centre
    lost = (centre - (mean - virtual)) + (less - virtual)
    slope = rstd * weight * scale
    return mean, slope, bias * scale + shift - (rest + lost) * slope


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _group_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    add_stride, scale_stride, shift_stride, C, HW, groups,
    eps,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    IS_NHWC: tl.constexpr,
    ALIGN: tl.constexpr,  # divides C // groups
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """One program per image and group, the group in registers."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    width = C // groups
    first = (pid % groups) * width
    if ALIGN > 1:
        C = tl.multiple_of(C, ALIGN)
        width = tl.multiple_of(width, ALIGN)
        first = tl.multiple_of(first, ALIGN)
    c = tl.arange(0, BLOCK_C)
    hw = tl.arange(0, BLOCK_HW)
    mask_c = c < width
    mask = mask_c[:, None] & (hw < HW)[None, :]
    if IS_NHWC:
        base = n * HW * C + first
        offsets = hw[None, :] * C + c[:, None]
    else:
        base = (n * C + first) * HW
        offsets = c[:, None] * HW + hw[None, :]
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    channel = first + c
    if HAS_ADD:
        x += _load_row(add_ptr + n * add_stride, channel, mask_c, True, 0.0)[:, None]
        x = tl.where(mask, x, 0.0)

    count = 1.0 * width * HW
    mean = tl.sum(x) / count
    x = tl.where(mask, x - mean, 0.0)
    # The rounding of the mean leaves a rest, which counts when the mean is far above the deviation.
    rest = tl.sum(x) / count
    x = tl.where(mask, x - rest, 0.0)
    rstd = tl.rsqrt((tl.sum(x * x) / count + eps).to(tl.float32))

    _, slope, offset = _affine(
        weight_ptr, bias_ptr, add_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride,
        channel, mask_c, 0.0, 0.0, rstd, False, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y = _activate(x * slope[:, None] + offset[:, None], SILU)
    tl.store(out_ptr + base + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _stats_kernel(
    x_ptr,
    mean_ptr, m2_ptr,  # [N * C, splits]
    HW, splits, span,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,  # 16 bytes: a row of the tile is one load of one thread
):  # fmt: skip
    """Channels first: one channel's part. Each thread centres what it has loaded on its own mean,
    then adds it to what it had by Chan's rule: four instructions per element."""
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    split = pid % splits
    length = tl.minimum(HW - split * span, span)
    x_ptr += row * HW + split * span
    ROWS: tl.constexpr = BLOCK // VEC
    at = tl.arange(0, ROWS)
    tile = at[:, None] * VEC + tl.arange(0, VEC)[None, :]

    mean = tl.zeros([ROWS], tl.float32)
    m2 = tl.zeros([ROWS], tl.float32)
    turns = length // BLOCK
    turn = 0.0
    for _ in range(turns):
        x = tl.load(x_ptr + tile).to(tl.float32)
        x_ptr += BLOCK
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
        x = tl.load(x_ptr + tile, mask=mask, other=0.0).to(tl.float32)
        added = tl.minimum(tl.maximum(left - at * VEC, 0), VEC).to(tl.float32)
        here = tl.sum(x, 1) / tl.maximum(added, 1.0)
        distance = tl.where(mask, x - here[:, None], 0.0)
        delta = here - mean
        share = added / tl.maximum(count + added, 1.0)
        mean += delta * share
        m2 += tl.sum(distance * distance, 1) + delta * delta * (count * share)
        count += added
    whole, squares, _ = _combine(mean, m2, count)
    tl.store(mean_ptr + pid, whole)
    tl.store(m2_ptr + pid, squares)


@triton.jit
def _apply_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    part_mean_ptr, part_m2_ptr,  # [N * C, splits]
    add_stride, scale_stride, shift_stride, C, HW, groups, splits, span,
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
    x = tl.load(x_ptr + base + hw, mask=mask, other=0.0, eviction_policy="evict_first")

    n = (row // C).to(tl.int64)
    c = row % C
    width = C // groups
    first = c // width * width
    parts = (n * C + first) * splits
    add_ptr += n * add_stride
    centre, rest, rstd = _group_moments(
        part_mean_ptr + parts, part_m2_ptr + parts, add_ptr + first, C, HW, width, splits, span,
        eps, HAS_ADD, False, PARTS,
    )  # fmt: skip
    mean, slope, offset = _affine(
        weight_ptr, bias_ptr, add_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride,
        c, c < C, centre, rest, rstd, HAS_ADD, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y = _activate((x.to(tl.float32) - mean) * slope + offset, SILU)
    tl.store(out_ptr + base + hw, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _stats_last_kernel(
    x_ptr,
    mean_ptr, m2_ptr,  # [N, splits, C]
    C, HW, splits, span,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels last: `span` pixels of a block of channels, whatever groups they belong to, so that
    whole cache lines are read. Welford for each channel and each row of the tile."""
    pid = tl.program_id(0)
    columns = tl.cdiv(C, BLOCK_C)  # neighbours share rows of memory
    c = (pid % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = pid // columns
    n = (part // splits).to(tl.int64)
    split = part % splits
    mask_c = c < C
    length = tl.minimum(HW - split * span, span)
    row = tl.arange(0, BLOCK_HW)
    x_ptr += (n * HW + split * span) * C
    tile = row[:, None] * C + c[None, :]

    mean = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    turns = length // BLOCK_HW
    turn = 0.0
    for _ in range(turns):
        x = tl.load(x_ptr + tile, mask=mask_c[None, :], other=0.0).to(tl.float32)
        x_ptr += tl.full([], BLOCK_HW, tl.int64) * C
        turn += 1.0
        delta = x - mean
        mean += delta * (1.0 / turn)
        m2 += delta * (x - mean)
    count = tl.full([BLOCK_HW], 1.0, tl.float32) * turn
    left = length - turns * BLOCK_HW
    if left > 0:
        mask = (row < left)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + tile, mask=mask, other=0.0).to(tl.float32)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / (turn + 1.0))
        m2 += delta * tl.where(mask, x - mean, 0.0)
        count += (row < left).to(tl.float32)
    weights = count[:, None]
    whole = tl.sum(mean * weights, 0) / tl.sum(count)
    distance = mean - whole[None, :]
    squares = tl.sum(m2 + weights * distance * distance, 0)
    at = part.to(tl.int64) * C + c
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
    centre, rest, rstd = _group_moments(
        part_mean_ptr + parts, part_m2_ptr + parts, add_ptr + first, C, HW, width, splits, span,
        eps, HAS_ADD, True, PARTS,
    )  # fmt: skip
    for start in range(0, width, BLOCK_C):
        lane = start + tl.arange(0, BLOCK_C)
        mask = lane < width
        c = first + lane
        mean, slope, offset = _affine(
            weight_ptr, bias_ptr, add_ptr, scale_ptr + n * scale_stride,
            shift_ptr + n * shift_stride, c, mask, centre, rest, rstd,
            HAS_ADD, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT,
        )  # fmt: skip
        tl.store(mean_ptr + n * C + c, mean, mask=mask)
        tl.store(slope_ptr + n * C + c, slope, mask=mask)
        tl.store(offset_ptr + n * C + c, offset, mask=mask)


@triton.jit
def _apply_last_kernel(
    x_ptr, out_ptr,
    mean_ptr, slope_ptr, offset_ptr,  # [N, C]
    C, HW,
    SILU: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels last: a tile of pixels and channels of one image."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, see the top of the file
    columns = tl.cdiv(C, BLOCK_C)
    blocks = tl.cdiv(HW, BLOCK_HW)
    c = (pid % columns) * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // columns
    n = (pid // blocks).to(tl.int64)
    pixel = (pid % blocks) * BLOCK_HW
    row = tl.arange(0, BLOCK_HW)
    mask_c = c < C
    mask = (pixel + row < HW)[:, None] & mask_c[None, :]
    base = (n * HW + pixel) * C
    tile = row[:, None] * C + c[None, :]
    x = tl.load(x_ptr + base + tile, mask=mask, other=0.0, eviction_policy="evict_first")
    mean = tl.load(mean_ptr + n * C + c, mask=mask_c, other=0.0)
    slope = tl.load(slope_ptr + n * C + c, mask=mask_c, other=0.0)
    offset = tl.load(offset_ptr + n * C + c, mask=mask_c, other=0.0)
    y = _activate((x.to(tl.float32) - mean[None, :]) * slope[None, :] + offset[None, :], SILU)
    tl.store(out_ptr + base + tile, y.to(out_ptr.dtype.element_ty), mask=mask)


# --- launcher -------------------------------------------------------------------------------------


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    eps: float,
    silu: bool,
    channels_last: bool,
    plan: Launch | None = None,
) -> None:
    """Writes `out`, laid out like x, by `plan` or what `select` gives; the op has checked them."""
    N, C = x.shape[:2]
    HW = x.numel() // (N * C)
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    plan = plan or select(N, C, HW, groups, x.dtype, channels_last, major * 10 + minor)

    given = (add, weight, bias, scale, shift)
    flags = {f: vector is not None for f, vector in zip(FLAGS, given, strict=True)}
    # An absent argument is any valid pointer; HAS_* keeps it from being read.
    vectors = [x if vector is None else vector for vector in given]
    strides = [0 if rows is None else rows.stride(0) for rows in (add, scale, shift)]
    with torch.cuda.device_of(x):
        if plan.kind == "group":
            _group_kernel[(N * groups,)](
                x, *vectors, out, *strides, C, HW, groups, eps, **flags, SILU=silu,
                IS_NHWC=channels_last, ALIGN=plan.align, BLOCK_C=plan.block_c,
                BLOCK_HW=plan.block_hw, num_warps=plan.num_warps, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
        elif channels_last:
            _launch_split_last(x, out, plan, groups, vectors, strides, eps, silu, flags)
        else:
            block = plan.block_hw
            parts = torch.empty((2, N * C, plan.splits), dtype=torch.float32, device=x.device)
            _stats_kernel[(N * C * plan.splits,)](
                x, *parts, HW, plan.splits, plan.span,
                BLOCK=block, VEC=16 // x.element_size(), num_warps=plan.num_warps,
            )  # fmt: skip
            _apply_kernel[(N * C * triton.cdiv(HW, block),)](
                x, *vectors, out, *parts, *strides, C, HW, groups, plan.splits, plan.span,
                eps, **flags, SILU=silu, PARTS=APPLY_PARTS, BLOCK=block, num_warps=plan.num_warps,
                maxnreg=MAX_REGISTERS,
            )  # fmt: skip


def _launch_split_last(
    x: torch.Tensor,
    out: torch.Tensor,
    plan: Launch,
    groups: int,
    vectors: list[torch.Tensor],
    strides: list[int],
    eps: float,
    silu: bool,
    flags: dict[str, bool],
) -> None:
    N, C = x.shape[:2]
    HW = x.numel() // (N * C)
    parts = torch.empty((2, N, plan.splits, C), dtype=torch.float32, device=x.device)
    affine = torch.empty((3, N, C), dtype=torch.float32, device=x.device)
    columns = triton.cdiv(C, plan.block_c)
    tile: dict[str, Any] = {"BLOCK_HW": plan.block_hw, "BLOCK_C": plan.block_c}
    tile["num_warps"] = plan.num_warps
    _stats_last_kernel[(N * plan.splits * columns,)](
        x, *parts, C, HW, plan.splits, plan.span, **tile
    )
    _finalize_last_kernel[(N * groups,)](
        *vectors, *parts, *affine, *strides, C, HW, groups, plan.splits, plan.span, eps, **flags,
        PARTS=FINALIZE_PARTS, BLOCK_C=plan.block_c, num_warps=4,
    )  # fmt: skip
    _apply_last_kernel[(N * triton.cdiv(HW, plan.block_hw) * columns,)](
        x, out, *affine, C, HW, SILU=silu, **tile
    )


# --- ahead of time --------------------------------------------------------------------------------


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every tile `select` can return, in the terms of fastdiff.ops.AotConfig, with every optional
    argument present (what needs most registers)."""
    rows = dict.fromkeys(FLAGS, True)

    def config(
        kernel: Any, label: str, dtype: str, warps: int, known: tuple[str, ...], **constants: Any
    ) -> dict[str, Any]:
        signature = {name: "fp32" if name == "eps" else "i32" for name in kernel.arg_names}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name.endswith("_ptr"):
                signature[name] = "*fp32" if name in _FLOAT_POINTERS else f"*{dtype}"
        label = f"{label} {dtype}{'' if known else ' odd'}"
        limit = {"maxnreg": MAX_REGISTERS} if kernel in (_group_kernel, _apply_kernel) else {}
        return {
            "kernel": kernel, "signature": signature, "constexprs": constants, "label": label,
            "options": {"num_warps": warps, **limit}, "multiples_of_16": known,
        }  # fmt: skip

    for dtype, vec in (("bf16", 8), ("fp32", 4)):
        for known in (("C", "HW", "span"), ()):
            odd = 1 if known else 2
            last = {"BLOCK_HW": LAST_BLOCK_HW, "BLOCK_C": LAST_BLOCK_C}
            parts = {"PARTS": FINALIZE_PARTS, "BLOCK_C": LAST_BLOCK_C}
            yield config(_apply_last_kernel, "apply last", dtype, 4, known, SILU=True, **last)
            yield config(_stats_last_kernel, "stats last", dtype, 4, known, **last)
            yield config(_finalize_last_kernel, "finalize last", dtype, 4, known, **rows, **parts)
            for block in (4096, 2048, 1024, 512)[odd - 1 :]:
                part = {"BLOCK": block, "PARTS": APPLY_PARTS}
                vector = {"BLOCK": block, "VEC": vec}
                w = _warps(block * odd, 1)
                label = f"apply {block}"
                yield config(_apply_kernel, label, dtype, w, known, **rows, SILU=True, **part)
                yield config(_stats_kernel, f"stats {block}", dtype, w, known, **vector)
            for tile in (16384, 8192, 4096, 2048, 1024):
                for block_c in (128, 64, 32, 16, 8, 4):
                    shape = {"BLOCK_C": block_c, "BLOCK_HW": tile // block_c}
                    label = f"group {block_c}x{tile // block_c}"
                    every = {**rows, **shape, "SILU": True}
                    w = _warps(tile * odd, 4)
                    if tile * odd > MAX_TILE:
                        continue
                    nchw = {**every, "IS_NHWC": False, "ALIGN": 1}
                    yield config(_group_kernel, label, dtype, w, known, **nchw)
                    nhwc = {**every, "IS_NHWC": True, "ALIGN": ALIGN if known else 1}
                    yield config(_group_kernel, f"{label} last", dtype, w, known[:1], **nhwc)


_FLOAT_POINTERS = {
    "mean_ptr", "m2_ptr", "part_mean_ptr", "part_m2_ptr", "slope_ptr", "offset_ptr",
}  # fmt: skip
