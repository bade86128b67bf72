"""y = act((GroupNorm(x + add) * weight + bias) * (1 + scale) + shift), act = SiLU or none.

    x, out       [N, C, HW] or, channels last, [N, HW, C]; fp32, fp16 or bf16
    weight, bias [C]; add, scale, shift [N, C] with any batch stride; each may be absent
    mean, rstd   per image and group, over C // groups channels and HW pixels; fp32

Group normalisation: Wu and He, 2018, https://arxiv.org/abs/1803.08494.

Two ways, chosen by `select`:
- "group": a program holds a whole group in registers. x is read once, out written once.
- "split": statistics in parts (mean and sum of squared distances from it), combined by Chan's rule,
  then a second pass. x is read twice, the second time from L2 where it fits.

The variance is centred everywhere, never E[x^2] - E[x]^2: after a convolution with a large bias
that has no digits left. Offsets of images and rows are widened to int64 before they are multiplied;
offsets inside a tile are bounded by the tile and stay int32.

Limits: a row of N * C or an image's pixels below 2^31.
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

    kind: "group" or "split". block_c, block_hw: the tile of the statistics and of the "group"
    kernel (flat [1, block_hw] for a split channels-first group). splits parts per group (channels
    last: per image) of `span` elements (channels last: pixels) each.
    """

    kind: str
    block_c: int
    block_hw: int
    num_warps: int
    splits: int = 1
    span: int = 0


# 16384 fp32 elements in 16 warps are 32 registers per thread: the largest tile that leaves room for
# the affine vectors at full occupancy.
MAX_TILE = 16384
MIN_TILE = 1024
MAX_BLOCK_C = 128
# Enough programs for a few waves on the largest GPU (148 SMs); more parts only cost to combine.
TARGET_PROGRAMS = 1024
MAX_SPLITS = 64
STATS_BLOCK = 2048  # elements per iteration, 16 per thread
APPLY_BLOCK = 2048
LAST_BLOCK_C = 64  # 128 bytes of bf16: whole cache lines
LAST_BLOCK_HW = 32
FINALIZE_CHUNK = 16


def _power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _tile_warps(tile: int) -> int:
    return min(16, max(4, tile // 1024))


def select(
    N: int, C: int, HW: int, groups: int, dtype: torch.dtype, channels_last: bool, arch: int
) -> Launch:
    """The launch for a shape. Pure: needs no GPU. arch is 80, 90, ...

    dtype and arch do not change the choice: tiles are bounded by fp32 registers, whose number per
    SM is the same from sm_80 on.
    """
    width = C // groups
    block_c = max(4, _power_of_2(width))
    tile = max(MIN_TILE, block_c * _power_of_2(HW))
    if block_c <= MAX_BLOCK_C and tile <= MAX_TILE:
        return Launch("group", block_c, tile // block_c, _tile_warps(tile))
    if channels_last:
        blocks = N * _ceil_div(C, LAST_BLOCK_C)
        splits = min(
            MAX_SPLITS, _ceil_div(TARGET_PROGRAMS, max(1, blocks)), _ceil_div(HW, LAST_BLOCK_HW)
        )
        span = _ceil_div(_ceil_div(HW, splits), LAST_BLOCK_HW) * LAST_BLOCK_HW
        return Launch("split", LAST_BLOCK_C, LAST_BLOCK_HW, 4, _ceil_div(HW, span), span)
    length = width * HW
    programs = max(1, N * groups)
    splits = min(MAX_SPLITS, _ceil_div(TARGET_PROGRAMS, programs), _ceil_div(length, STATS_BLOCK))
    span = _ceil_div(_ceil_div(length, splits), STATS_BLOCK) * STATS_BLOCK
    return Launch("split", 1, STATS_BLOCK, 4, _ceil_div(length, span), span)


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
def _wide(size):
    """int64; Triton makes an argument that equals 1 a constant, which has no `.to`."""
    return tl.full([], 1, tl.int64) * size


@triton.jit
def _activate(y, SILU: tl.constexpr):
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _combine(mean, m2, count):
    """Chan's rule over all parts: the mean and the sum of squared distances of the union."""
    total = tl.sum(count)
    whole = tl.sum(mean * count) / total
    distance = tl.where(count > 0, mean - whole, 0.0)
    return whole, tl.sum(m2 + count * distance * distance), total


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _group_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    add_stride, scale_stride, shift_stride, C, HW, groups,
    eps,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    IS_NHWC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """One program per image and group, the group in registers."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    width = C // groups
    first = (pid % groups) * width
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

    weight = _load_row(weight_ptr, channel, mask_c, HAS_WEIGHT, 1.0)
    bias = _load_row(bias_ptr, channel, mask_c, HAS_BIAS, 0.0)
    scale = 1.0 + _load_row(scale_ptr + n * scale_stride, channel, mask_c, HAS_SCALE, 0.0)
    shift = _load_row(shift_ptr + n * shift_stride, channel, mask_c, HAS_SHIFT, 0.0)
    slope = rstd * weight * scale
    offset = bias * scale + shift
    y = _activate(x * slope[:, None] + offset[:, None], SILU)
    tl.store(out_ptr + base + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _stats_kernel(
    x_ptr,
    add_ptr,
    mean_ptr,  # [N * groups, splits]
    m2_ptr,
    add_stride,
    C,
    HW,
    groups,
    splits,
    span,
    HAS_ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Channels first: part `split` of one group, a run of `span` elements. Welford in each lane."""
    pid = tl.program_id(0)
    split = tl.program_id(1)
    n = (pid // groups).to(tl.int64)
    width = C // groups
    first = (pid % groups) * width
    begin = split.to(tl.int64) * span
    length = tl.minimum(_wide(width) * HW - begin, span).to(tl.int32)
    x_ptr += (n * C + first) * HW + begin
    add_ptr += n * add_stride + first

    lane = tl.arange(0, BLOCK)
    mean = tl.zeros([BLOCK], tl.float32)
    m2 = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    turn = 0.0
    for start in range(0, length, BLOCK):
        index = start + lane
        mask = index < length
        x = tl.load(x_ptr + index, mask=mask, other=0.0).to(tl.float32)
        if HAS_ADD:
            channel = (begin + index) // HW
            x += tl.load(add_ptr + channel, mask=mask, other=0.0).to(tl.float32)
        turn += 1.0
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (
            1.0 / turn
        )  # a lane that has ended adds nothing, so its count needs no care
        m2 += delta * tl.where(mask, x - mean, 0.0)
        count += mask.to(tl.float32)
    whole, squares, _ = _combine(mean, m2, count)
    at = pid.to(tl.int64) * splits + split
    tl.store(mean_ptr + at, whole)
    tl.store(m2_ptr + at, squares)


@triton.jit
def _apply_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    mean_ptr,  # [N * groups, splits]
    m2_ptr,
    add_stride, scale_stride, shift_stride, C, HW, groups,
    splits,
    span,
    eps,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Channels first: a piece of one channel, whose per-channel arguments are scalars."""
    row = tl.program_id(0)
    n = (row // C).to(tl.int64)
    c = row % C
    width = C // groups

    part = tl.arange(0, MAX_SPLITS)
    present = part < splits
    at = (row // width).to(tl.int64) * splits + part  # width divides C: this is n * groups + group
    length = _wide(width) * HW
    count = tl.where(present, tl.minimum(length - part.to(tl.int64) * span, span), 0).to(tl.float32)
    part_mean = tl.load(mean_ptr + at, mask=present, other=0.0)
    part_m2 = tl.load(m2_ptr + at, mask=present, other=0.0)
    # The mean is its first part's, plus a small rest: x - mean - rest keeps digits that one rounded
    # mean would lose.
    centre = tl.sum(tl.where(part == 0, part_mean, 0.0))
    rest, m2, total = _combine(tl.where(present, part_mean - centre, 0.0), part_m2, count)
    rstd = tl.rsqrt((m2 / total + eps).to(tl.float32))

    slope = rstd
    offset = 0.0
    if HAS_WEIGHT:
        slope *= tl.load(weight_ptr + c).to(tl.float32)
    if HAS_BIAS:
        offset += tl.load(bias_ptr + c).to(tl.float32)
    if HAS_SCALE:
        scale = 1.0 + tl.load(scale_ptr + n * scale_stride + c).to(tl.float32)
        slope *= scale
        offset *= scale
    if HAS_SHIFT:
        offset += tl.load(shift_ptr + n * shift_stride + c).to(tl.float32)
    hw = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = hw < HW
    base = row.to(tl.int64) * HW
    x = tl.load(x_ptr + base + hw, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        x += tl.load(add_ptr + n * add_stride + c).to(tl.float32)
    y = _activate(((x - centre) - rest) * slope + offset, SILU)
    tl.store(out_ptr + base + hw, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _stats_last_kernel(
    x_ptr,
    add_ptr,
    mean_ptr,  # [N, splits, C]
    m2_ptr,
    add_stride,
    C,
    HW,
    splits,
    span,
    HAS_ADD: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Channels last: `span` pixels of a block of channels, whatever groups they belong to, so that
    whole cache lines are read. Statistics per channel."""
    n = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = c < C
    begin = split.to(tl.int64) * span
    length = tl.minimum(HW - begin, span).to(tl.int32)
    row = tl.arange(0, BLOCK_HW)
    x_ptr += (n * HW + begin) * C
    if HAS_ADD:
        added = tl.load(add_ptr + n * add_stride + c, mask=mask_c, other=0.0).to(tl.float32)

    mean = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_HW, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_HW], tl.float32)
    turn = 0.0
    for start in range(0, length, BLOCK_HW):
        mask_hw = start + row < length
        mask = mask_hw[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_ADD:
            x += added[None, :]
        turn += 1.0
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / turn)
        m2 += delta * tl.where(mask, x - mean, 0.0)
        count += mask_hw.to(tl.float32)
        x_ptr += _wide(C) * BLOCK_HW
    weights = count[:, None]
    whole = tl.sum(mean * weights, 0) / tl.sum(count)
    distance = mean - whole[None, :]
    squares = tl.sum(m2 + weights * distance * distance, 0)
    at = (n * splits + split) * C + c
    tl.store(mean_ptr + at, whole, mask=mask_c)
    tl.store(m2_ptr + at, squares, mask=mask_c)


@triton.jit
def _finalize_last_kernel(
    part_mean_ptr,  # [N, splits, C]
    part_m2_ptr,
    centre_ptr,  # [N, groups]: the mean is centre + rest
    rest_ptr,
    rstd_ptr,
    C,
    HW,
    groups,
    splits,
    span,
    eps,
    SPLITS: tl.constexpr,  # parts per iteration
    BLOCK_C: tl.constexpr,  # channels per iteration
):
    """Channels last: one group's parts, by channel and split, into its mean and rstd."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    width = C // groups
    first = (pid % groups) * width
    base = n * splits * C + first
    part = tl.arange(0, SPLITS)
    lane = tl.arange(0, BLOCK_C)
    centre = tl.load(part_mean_ptr + base)
    # Means are held relative to `centre`; every part of one split has the same number of pixels.
    total = 0.0
    mean = 0.0
    m2 = 0.0
    for start in range(0, splits, SPLITS):
        split = start + part
        present = split < splits
        pixels = tl.where(present, tl.minimum(HW - split.to(tl.int64) * span, span), 0)
        for channel in range(0, width, BLOCK_C):
            c = channel + lane
            mask = present[:, None] & (c < width)[None, :]
            offsets = split[:, None].to(tl.int64) * C + c[None, :]
            part_mean = tl.load(part_mean_ptr + base + offsets, mask=mask, other=0.0)
            part_m2 = tl.load(part_m2_ptr + base + offsets, mask=mask, other=0.0)
            count = tl.where(mask, pixels[:, None].to(tl.float32), 0.0)
            here, squares, added = _combine(tl.where(mask, part_mean - centre, 0.0), part_m2, count)
            delta = here - mean
            union = total + added
            mean += delta * (added / union)
            m2 += squares + delta * delta * (total * (added / union))
            total = union
    tl.store(centre_ptr + pid, centre)
    tl.store(rest_ptr + pid, mean)
    tl.store(rstd_ptr + pid, tl.rsqrt((m2 / total + eps).to(tl.float32)))


@triton.jit
def _apply_last_kernel(
    x_ptr, add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    centre_ptr,  # [N, groups]
    rest_ptr,
    rstd_ptr,
    add_stride, scale_stride, shift_stride, C, HW, groups,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Channels last: a tile of pixels and channels of one image."""
    n = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_HW
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.arange(0, BLOCK_HW)
    mask_c = c < C
    mask = (pixel + row < HW)[:, None] & mask_c[None, :]
    base = (n * HW + pixel) * C
    offsets = row[:, None] * C + c[None, :]
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_ADD:
        x += _load_row(add_ptr + n * add_stride, c, mask_c, True, 0.0)[None, :]

    group = n * groups + c // (C // groups)
    centre = tl.load(centre_ptr + group, mask=mask_c, other=0.0)
    rest = tl.load(rest_ptr + group, mask=mask_c, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
    weight = _load_row(weight_ptr, c, mask_c, HAS_WEIGHT, 1.0)
    bias = _load_row(bias_ptr, c, mask_c, HAS_BIAS, 0.0)
    scale = 1.0 + _load_row(scale_ptr + n * scale_stride, c, mask_c, HAS_SCALE, 0.0)
    shift = _load_row(shift_ptr + n * shift_stride, c, mask_c, HAS_SHIFT, 0.0)
    slope = rstd * weight * scale
    offset = bias * scale + shift
    y = (x - centre[None, :]) - rest[None, :]
    y = _activate(y * slope[None, :] + offset[None, :], SILU)
    tl.store(out_ptr + base + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)


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
) -> None:
    """Writes `out`, laid out like x. The arguments were checked by fastdiff.ops.group_norm_silu."""
    N, C = x.shape[:2]
    HW = x.numel() // (N * C)
    arch = 0
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        arch = major * 10 + minor
    plan = select(N, C, HW, groups, x.dtype, channels_last, arch)

    def stride(rows: torch.Tensor | None) -> int:
        return 0 if rows is None else rows.stride(0)

    # An absent argument is any valid pointer; HAS_* keeps it from being read.
    vectors = [x if vector is None else vector for vector in (add, weight, bias, scale, shift)]
    strides = (stride(add), stride(scale), stride(shift))
    flags = {
        "HAS_ADD": add is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_SCALE": scale is not None,
        "HAS_SHIFT": shift is not None,
        "SILU": silu,
    }
    has_add = flags["HAS_ADD"]
    with torch.cuda.device_of(x):
        if plan.kind == "group":
            _group_kernel[(N * groups,)](
                x, *vectors, out, *strides, C, HW, groups, eps, **flags,
                IS_NHWC=channels_last, BLOCK_C=plan.block_c, BLOCK_HW=plan.block_hw,
                num_warps=plan.num_warps,
            )  # fmt: skip
        elif channels_last:
            _launch_split_last(x, out, plan, groups, vectors, strides, eps, flags)
        else:
            parts = torch.empty((2, N * groups, plan.splits), dtype=torch.float32, device=x.device)
            _stats_kernel[(N * groups, plan.splits)](
                x, vectors[0], *parts, strides[0], C, HW, groups, plan.splits, plan.span,
                HAS_ADD=has_add, BLOCK=STATS_BLOCK, num_warps=4,
            )  # fmt: skip
            _apply_kernel[(N * C, _ceil_div(HW, APPLY_BLOCK))](
                x, *vectors, out, *parts, *strides, C, HW, groups, plan.splits, plan.span,
                eps, **flags, MAX_SPLITS=MAX_SPLITS, BLOCK=APPLY_BLOCK, num_warps=4,
            )  # fmt: skip


def _launch_split_last(
    x: torch.Tensor,
    out: torch.Tensor,
    plan: Launch,
    groups: int,
    vectors: list[torch.Tensor],
    strides: tuple[int, int, int],
    eps: float,
    flags: dict[str, bool],
) -> None:
    N, C = x.shape[:2]
    HW = x.numel() // (N * C)
    parts = torch.empty((2, N, plan.splits, C), dtype=torch.float32, device=x.device)
    moments = torch.empty((3, N * groups), dtype=torch.float32, device=x.device)
    block_c = LAST_BLOCK_C
    columns = _ceil_div(C, block_c)
    _stats_last_kernel[(N, plan.splits, columns)](
        x, vectors[0], *parts, strides[0], C, HW, plan.splits, plan.span,
        HAS_ADD=flags["HAS_ADD"], BLOCK_HW=LAST_BLOCK_HW, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    _finalize_last_kernel[(N * groups,)](
        *parts, *moments, C, HW, groups, plan.splits, plan.span, eps,
        SPLITS=FINALIZE_CHUNK, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    _apply_last_kernel[(_ceil_div(HW, LAST_BLOCK_HW), N, columns)](
        x, *vectors, out, *moments, *strides, C, HW, groups, **flags,
        BLOCK_HW=LAST_BLOCK_HW, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip


# --- ahead of time --------------------------------------------------------------------------------


def aot_configs() -> Iterator[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any], str]]:
    """(kernel, signature, constexprs, options, label) of every tile `select` can return, with every
    optional argument present (what needs most registers), the widest tiles first."""
    flags = dict.fromkeys(
        ("HAS_ADD", "HAS_WEIGHT", "HAS_BIAS", "HAS_SCALE", "HAS_SHIFT", "SILU"), True
    )
    tiles = [
        (block_c, tile // block_c)
        for tile in (16384, 8192, 4096, 2048, 1024)
        for block_c in (128, 64, 32, 16, 8, 4)
    ]

    def config(kernel: Any, dtype: str, constants: dict[str, Any], warps: int, label: str) -> Any:
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name in _FLOAT_POINTERS:
                signature[name] = "*fp32"
            elif name.endswith("_ptr"):
                signature[name] = f"*{dtype}"
            else:
                signature[name] = "fp32" if name == "eps" else "i32"
        return kernel, signature, constants, {"num_warps": warps}, f"{label} {dtype}"

    for dtype in ("bf16", "fp32"):
        last = {"BLOCK_HW": LAST_BLOCK_HW, "BLOCK_C": LAST_BLOCK_C}
        apply = {**flags, "MAX_SPLITS": MAX_SPLITS, "BLOCK": APPLY_BLOCK}
        stats = {"HAS_ADD": True, "BLOCK": STATS_BLOCK}
        yield config(_apply_kernel, dtype, apply, 4, "apply")
        yield config(_stats_kernel, dtype, stats, 4, "stats")
        yield config(_apply_last_kernel, dtype, {**flags, **last}, 4, "apply last")
        yield config(_stats_last_kernel, dtype, {"HAS_ADD": True, **last}, 4, "stats last")
        if dtype == "fp32":  # reads nothing of x's dtype
            finalize = {"SPLITS": FINALIZE_CHUNK, "BLOCK_C": LAST_BLOCK_C}
            yield config(_finalize_last_kernel, dtype, finalize, 4, "finalize last")
        for block_c, block_hw in tiles:
            for nhwc in (False, True):
                constants = {**flags, "IS_NHWC": nhwc, "BLOCK_C": block_c, "BLOCK_HW": block_hw}
                label = f"group {block_c}x{block_hw}{' last' if nhwc else ''}"
                warps = _tile_warps(block_c * block_hw)
                yield config(_group_kernel, dtype, constants, warps, label)


_FLOAT_POINTERS = {
    "mean_ptr", "m2_ptr", "part_mean_ptr", "part_m2_ptr", "centre_ptr", "rest_ptr", "rstd_ptr",
}  # fmt: skip
