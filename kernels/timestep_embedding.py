"""out = [sin(a), cos(a)] or [cos(a), sin(a)], a = scale * (t * frequency), zero-padded to dim.

    t    [S] at any stride; any dtype, read as fp32
    out  [S, dim], contiguous; fp32, fp16 or bf16 (rounded once from fp32)
    frequency[i] = exp(-log(max_period) * i / (dim // 2 - downscale_freq_shift))

DDPM, Ho et al., 2020, https://arxiv.org/abs/2006.11239, appendix B; the positions of Vaswani et
al., 2017, https://arxiv.org/abs/1706.03762.

The frequencies and the angles are rounded to fp32 where PyTorch's chain rounds them: at t = 999 a
frequency off by one last place moves the angle by 6e-5. exp, sin and cos of those fp32 numbers
are computed in fp64 and rounded once: there is little to compute, fp64 reduces any angle that
matters without the tables that CUDA's sin keeps in local memory.

Bytes: out written once. Limits: S below 2^31, dim below 2^30; offsets of rows are int64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# --- launch policy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Steps and frequencies of one program."""

    block_s: int
    block_f: int
    num_warps: int = 4


def select(S: int, dim: int, dtype: torch.dtype, arch: int) -> Launch:
    """The launch for S steps. Pure: needs no GPU. Nothing changes the choice.

    512 angles: 50 steps of 320 values are then 26 programs, each a few hundred fp64 instructions
    deep. The launch itself takes longer.
    """
    return Launch(4, 128)


# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _sin_cos(x):
    """sin and cos of fp32 x, each rounded once to fp32.

    x = q pi/2 + r with |r| <= pi/4, pi/2 in two fp64 parts, so r is off by 1e-16 |x|; Taylor
    polynomials, whose first missing terms are below 3e-14. Where r means nothing any more the
    result is only kept within [-1, 1]; infinite x gives NaN.
    """
    x = x.to(tl.float64)
    q = tl.floor(x * 0.6366197723675814 + 0.5)
    r = (x - q * 1.5707963267948966) - q * 6.123233995736766e-17
    z = r * r
    s = 1.605904383682161e-10 * z - 2.505210838544172e-08
    s = s * z + 2.7557319223985893e-06
    s = s * z - 0.0001984126984126984
    s = s * z + 0.008333333333333333
    s = s * z - 0.16666666666666666
    s = r + r * (z * s)
    c = -1.1470745597729725e-11 * z + 2.08767569878681e-09
    c = c * z - 2.755731922398589e-07
    c = c * z + 2.48015873015873e-05
    c = c * z - 0.001388888888888889
    c = c * z + 0.041666666666666664
    c = c * z - 0.5
    c = 1.0 + z * c
    quarter = q - 4.0 * tl.floor(q * 0.25)  # 0, 1, 2 or 3
    odd = (quarter == 1.0) | (quarter == 3.0)
    sin = tl.where(odd, c, s)
    cos = tl.where(odd, s, c)
    sin = tl.where(quarter >= 2.0, -sin, sin)
    cos = tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos)
    return _within_one(sin).to(tl.float32), _within_one(cos).to(tl.float32)


@triton.jit
def _within_one(x):
    x = tl.where(x > 1.0, 1.0, x)
    return tl.where(x < -1.0, -1.0, x)


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def _embedding_kernel(
    t_ptr, out_ptr,
    S, t_stride, dim,
    slope,  # -log(max_period)
    divisor,  # dim // 2 - downscale_freq_shift
    scale,
    FLIP: tl.constexpr,  # cos first
    BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    half = dim // 2
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    i = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    exponent = tl.full([BLOCK_F], slope, tl.float32) * i.to(tl.float32)
    exponent = tl.div_rn(exponent, tl.full([BLOCK_F], divisor, tl.float32))
    frequency = tl.exp(exponent.to(tl.float64)).to(tl.float32)
    t = tl.load(t_ptr + s.to(tl.int64) * t_stride, mask=s < S, other=0.0).to(tl.float32)
    angle = t[:, None] * frequency[None, :]
    sin, cos = _sin_cos(tl.full(angle.shape, scale, tl.float32) * angle)
    out_ptrs = out_ptr + (s.to(tl.int64) * dim)[:, None] + i[None, :]
    mask = (s < S)[:, None] & (i < half)[None, :]
    first, second = sin, cos
    if FLIP:
        first, second = cos, sin
    tl.store(out_ptrs, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptrs + half, second.to(out_ptr.dtype.element_ty), mask=mask)
    # An odd dim leaves one column.
    padding = (s < S)[:, None] & (i == 0)[None, :] & (dim % 2 == 1)
    zeros = tl.zeros([BLOCK_S, BLOCK_F], out_ptr.dtype.element_ty)
    tl.store(out_ptrs + 2 * half, zeros, mask=padding)


# --- launcher -------------------------------------------------------------------------------------


def launch(
    t: torch.Tensor,
    out: torch.Tensor,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float,
    scale: float,
) -> None:
    """Writes `out` [S, dim]; not empty."""
    S, dim = out.shape
    plan = select(S, dim, out.dtype, 0)
    grid = (triton.cdiv(S, plan.block_s), triton.cdiv(max(dim // 2, 1), plan.block_f))
    with torch.cuda.device_of(t):
        _embedding_kernel[grid](
            t, out, S, t.stride(0), dim,
            -math.log(max_period), dim // 2 - downscale_freq_shift, scale,
            FLIP=flip_sin_to_cos, BLOCK_S=plan.block_s, BLOCK_F=plan.block_f,
            num_warps=plan.num_warps,
        )  # fmt: skip


# --- ahead of time --------------------------------------------------------------------------------


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every configuration, in the terms of fastdiff.ops.AotConfig."""
    plan = select(50, 320, torch.float32, 90)
    for t_dtype, dtype in (("fp32", "fp32"), ("i64", "bf16"), ("bf16", "bf16")):
        constants = {"FLIP": True, "BLOCK_S": plan.block_s, "BLOCK_F": plan.block_f}
        names = _embedding_kernel.arg_names
        signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
        signature |= dict.fromkeys(("slope", "divisor", "scale"), "fp32")
        signature |= {"t_ptr": f"*{t_dtype}", "out_ptr": f"*{dtype}"}
        yield {
            "kernel": _embedding_kernel, "signature": signature, "constexprs": constants,
            "options": {"num_warps": plan.num_warps}, "label": f"{t_dtype} to {dtype}",
            "multiples_of_16": ("dim",),
        }  # fmt: skip
