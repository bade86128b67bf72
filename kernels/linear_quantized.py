"""out = x (weight_q * scale)^T + bias, weights of one byte with a scale per row.

    x        [outer, inner, K], contiguous rows at two strides; fp16 or bf16; M = outer * inner
    weight_q [N, K], contiguous rows; int8 or fp8 e4m3
    scale    [N] fp32; bias [N] like x, may be absent; out [M, N] like x

int8: weight-only. The product reads bytes, which fp16 and bf16 hold exactly, and runs on the 16-bit
tensor cores. fp8: x is quantised as well, each row by its largest value over 448, by a kernel of
its own (M K bytes written and read again); the product runs on the fp8 tensor cores, sm_89 on.
Accumulators are fp32; Hopper's fp8 units keep fewer bits, so sums leave them every 128 products.
The scales are applied to the sums.

Bytes: x, weight_q and scale read once, out written once; fp8: x read twice in all, and its bytes
written and read.

Limits: K a multiple of 16; M, N and K below 2^31; offsets of rows are int64.

Row-wise fp8: Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels._common import INTERPRETED, arch_of
from fastdiff.kernels._linear import (
    FAMILIES,
    FULL,
    LEAST_SHARED,
    MAX_STAGES,
    SHARED,
    Launch,
    products,
    tile_of,
)

LARGEST = 448.0  # of fp8 e4m3
QUANTIZE_BLOCK = 1024  # values of a row at a time: 4 warps of 8

# --- launch policy --------------------------------------------------------------------------------


def select(M: int, N: int, K: int, fp8: bool, arch: int) -> Launch:
    """The launch for x [M, K] and N results per row. Pure: needs no GPU. arch is 80, 90, ...

    As in `_linear.py`: the largest tile that leaves no processor without work, and at least the 64
    rows of the matrix instructions. block_k is 128 bytes of a row of x. An int8 tile is held twice,
    as bytes and widened.
    """
    if M > 64 and triton.cdiv(M, 128) * triton.cdiv(N, 128) >= FULL:
        block_m, block_n, warps = 128, 128, 8
    elif triton.cdiv(M, 64) * triton.cdiv(N, 64) >= FULL:
        block_m, block_n, warps = 64, 64, 4
    else:
        block_m, block_n, warps = 64, 32, 4
    block_k = 128 if fp8 else 64
    stage = block_k * (block_m + block_n if fp8 else 2 * block_m + block_n)
    widened = 0 if fp8 else 2 * block_k * block_n
    shared = SHARED.get(arch, LEAST_SHARED) - widened
    return Launch(block_m, block_n, block_k, warps, min(MAX_STAGES, shared // stage))


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _to_fp8(x):
    """fp32 to e4m3, to nearest even. The interpreter cuts digits off: there x is rounded first."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        normal = bits.to(tl.float32, bitcast=True)
        magic = tl.where(x < 0, -24576.0, 24576.0)  # its last place is 2^-9, e4m3's smallest
        x = tl.where(tl.abs(x) < 0.015625, (x + magic) - magic, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def _quantize_kernel(
    x_ptr,
    out_ptr,  # [M, K] e4m3
    scale_ptr,  # [M]
    K, inner, outer_stride, inner_stride,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its largest magnitude, then its values over that; the second pass finds it in L2."""
    m = tl.program_id(0).to(tl.int64)
    x_ptr += (m // inner) * outer_stride + (m % inner) * inner_stride
    k = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    largest = tl.max(largest, 0)
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, tl.full([], LARGEST, tl.float32)))
    tl.store(scale_ptr + m, scale)
    for start in range(0, K, BLOCK):
        x = tl.load(x_ptr + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        y = tl.div_rn(x, tl.zeros_like(x) + scale)
        tl.store(out_ptr + m * K + start + k, _to_fp8(y), mask=start + k < K)


@triton.jit
def _quantized_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr,
    M, N, K, inner, outer_stride, inner_stride, weight_stride,
    FP8: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one: no masks in the loop, and nothing of them is stored.
    row = tl.minimum(m, M - 1)
    column = tl.minimum(n, N - 1)
    rows = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x_ptrs = x_ptr + rows[:, None] + k[None, :]
    weight_ptrs = weight_ptr + (column.to(tl.int64) * weight_stride)[None, :] + k[:, None]
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(weight_ptrs)
        else:
            x = tl.load(x_ptrs, mask=(k < K - start)[None, :], other=0.0)
            w = tl.load(weight_ptrs, mask=(k < K - start)[:, None], other=0.0 if FP8 else 0)
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if FP8:
            y = tl.dot(x, w, y, max_num_imprecise_acc=128)
        else:
            y = tl.dot(x, w.to(x.dtype), y)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    if FP8:
        y *= tl.load(x_scale_ptr + row)[:, None]
    y *= tl.load(scale_ptr + column)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    out_ptrs = out_ptr + (m.to(tl.int64) * N)[:, None] + n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


# --- launcher -------------------------------------------------------------------------------------


def launch(
    x: torch.Tensor,
    rows: tuple[int, int, int, int],
    weight_q: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Writes `out`. rows: outer, inner, outer_stride, inner_stride of x; not empty."""
    M, (N, K) = rows[0] * rows[1], weight_q.shape
    fp8 = weight_q.dtype != torch.int8
    plan = select(M, N, K, fp8, arch_of(x))
    x_scale = scale
    with torch.cuda.device_of(x):
        if fp8:
            quantized = torch.empty((M, K), dtype=torch.float8_e4m3fn, device=x.device)
            x_scale = torch.empty(M, dtype=torch.float32, device=x.device)
            _quantize_kernel[(M,)](
                x, quantized, x_scale, K, *rows[1:], LARGEST=LARGEST, BLOCK=QUANTIZE_BLOCK,
                num_warps=4,
            )  # fmt: skip
            x, rows = quantized, (1, M, 0, K)
        programs = triton.cdiv(M, plan.block_m) * triton.cdiv(N, plan.block_n)
        _quantized_kernel[(programs,)](
            x, x_scale, weight_q, scale, out if bias is None else bias, out,
            M, N, K, *rows[1:], weight_q.stride(0),
            FP8=fp8, HAS_BIAS=bias is not None, EVEN_K=K % plan.block_k == 0,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip


# --- ahead of time --------------------------------------------------------------------------------

SHAPES = ((8192, 8192), (512, 1024), (50, 512))  # one for every tile: M, N


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every tile `select` can return, in the terms of fastdiff.ops.AotConfig."""
    known = ("K", "outer_stride", "inner_stride", "weight_stride")
    for fp8 in (False, True):
        for family, architectures in FAMILIES.items():
            if fp8 and family < 89:
                continue
            for M, N in SHAPES:
                for even in (True, False):
                    plan = select(M, N, 1024, fp8, family)
                    constants: dict[str, Any] = {
                        "FP8": fp8, "HAS_BIAS": True, "EVEN_K": even, "BLOCK_M": plan.block_m,
                        "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k,
                    }  # fmt: skip
                    signature = dict.fromkeys(_quantized_kernel.arg_names, "i32")
                    signature |= dict.fromkeys(constants, "constexpr")
                    signature |= dict.fromkeys(("x_scale_ptr", "scale_ptr"), "*fp32")
                    signature |= dict.fromkeys(("bias_ptr", "out_ptr"), "*bf16")
                    signature["x_ptr"] = "*fp8e4nv" if fp8 else "*bf16"
                    signature["weight_ptr"] = "*fp8e4nv" if fp8 else "*i8"
                    tile = f"{plan.block_m}x{plan.block_n}x{plan.block_k}"
                    kind = f"{'fp8' if fp8 else 'int8'}{'' if even else ' tail'}"
                    yield {
                        "kernel": _quantized_kernel, "signature": signature,
                        "constexprs": constants, "multiples_of_16": known,
                        "options": {"num_warps": plan.num_warps, "num_stages": plan.num_stages},
                        "label": f"{kind} {tile} stages {plan.num_stages} sm_{family}",
                        "architectures": architectures,
                        "tensor_cores": products("fp8" if fp8 else "bf16", architectures)
                        if plan.block_m >= 64 else {},
                    }  # fmt: skip
    constants = {"LARGEST": LARGEST, "BLOCK": QUANTIZE_BLOCK}
    signature = dict.fromkeys(_quantize_kernel.arg_names, "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    signature |= {"x_ptr": "*bf16", "out_ptr": "*fp8e4nv", "scale_ptr": "*fp32"}
    yield {
        "kernel": _quantize_kernel, "signature": signature, "constexprs": constants,
        "options": {"num_warps": 4}, "label": "quantize rows", "multiples_of_16": known[:3],
        "architectures": (89, 90, 100),
    }  # fmt: skip
