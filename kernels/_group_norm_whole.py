"""Group norms: a program holds a whole group in registers; either memory layout."""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels._group_norm_parts import activate, affine, channel_start, load_row, load_x


@triton.jit
def _group_kernel(
    x_ptr,
    second_ptr,  # the skip, or the residual
    sum_ptr,  # with a residual
    add_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    add_stride, scale_stride, shift_stride, C,
    C_X,  # channels of x: the rest is the skip
    HW, groups,
    eps,
    HAS_ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IS_NHWC: tl.constexpr,
    ALIGN: tl.constexpr,  # divides C // groups
    BLOCK_C: tl.constexpr, BLOCK_HW: tl.constexpr,
):  # fmt: skip
    """One program per image and group, which may have channels of both x and skip."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    width = C // groups
    first = (pid % groups) * width
    if ALIGN > 1:
        C = tl.multiple_of(C, ALIGN)
        width = tl.multiple_of(width, ALIGN)
        first = tl.multiple_of(first, ALIGN)
        C_X = tl.multiple_of(C_X, ALIGN)
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
    channel = first + c
    if HAS_SKIP:
        # A pointer per channel, so that each element is still one load.
        inside = channel < C_X
        if IS_NHWC:
            C_S = C - C_X
            start = tl.where(
                inside, x_ptr + n * HW * C_X + channel, second_ptr + n * HW * C_S + (channel - C_X)
            )
            pointers = start[:, None] + tl.where(inside, C_X, C_S)[:, None] * hw[None, :]
        else:
            start = channel_start(x_ptr, second_ptr, n, channel, C, C_X, HW)
            pointers = start[:, None] + hw[None, :]
        x = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    else:
        x_ptr += base
        second_ptr += base
        sum_ptr += base
        x = load_x(x_ptr, second_ptr, sum_ptr, offsets, mask, HAS_RESIDUAL)
    if HAS_ADD:
        x += load_row(add_ptr + n * add_stride, channel, mask_c, True, 0.0)[:, None]
        x = tl.where(mask, x, 0.0)

    count = 1.0 * width * HW
    mean = tl.sum(x) / count
    x = tl.where(mask, x - mean, 0.0)
    # The rounding of the mean leaves a rest, which counts when the mean is far above the deviation.
    rest = tl.sum(x) / count
    x = tl.where(mask, x - rest, 0.0)
    rstd = tl.rsqrt((tl.sum(x * x) / count + eps).to(tl.float32))

    _, slope, offset = affine(
        weight_ptr, bias_ptr, add_ptr, scale_ptr + n * scale_stride, shift_ptr + n * shift_stride,
        channel, mask_c, 0.0, 0.0, rstd, False, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT,
    )  # fmt: skip
    y = activate(x * slope[:, None] + offset[:, None], SILU)
    tl.store(out_ptr + base + offsets, y.to(out_ptr.dtype.element_ty), mask=mask)
