"""out = act(x W^T + b), or, gated, out = (x V^T + c) * act(x W^T + b): one matrix product.

    x      [outer, inner, K], contiguous rows at two strides; M = outer * inner rows
    weight [N, K], or, gated, [2N, K]: hidden and gate rows, in either order; contiguous rows
    bias   [N] or [2N], may be absent
    out    [M, N], contiguous
    all of one dtype: fp16, bf16 (tensor cores, fp32 accumulators) or fp32 (fp32 products)

A gated program holds two accumulators, of the hidden and of the gate columns that belong together,
so the [M, 2N] product never reaches memory. The bias, the activation and the product of the halves
are in fp32; the result is rounded once.

Bytes: x, weight and bias read and out written once, as far as L2 holds what programs share:
programs go through `GROUP_M` blocks of rows for each block of columns, which keeps both in L2.

Limits: M, N and K below 2^31; offsets of rows are widened to int64 before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels._common import INTERPRETED, activate, arch_of

# --- launch policy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The tile of a program, and how many tiles of the operands are in flight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# Shared memory a block may have, in bytes; the architectures that are not named have 99 KiB.
SHARED = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10}
LEAST_SHARED = 99 << 10
# Fewer programs leave processors of an A100 (108) or H100 (132) without work.
FULL = 128
MAX_STAGES = 4  # 64 values of K each: more in flight than the latency of memory needs
GROUP_M = tl.constexpr(8)  # blocks of rows that share a block of columns of weight in L2


def select(
    M: int, N: int, K: int, dtype: torch.dtype, arch: int, gated: bool, aligned: bool
) -> Launch:
    """The launch for x [M, K] and N results per row. Pure: needs no GPU. arch is 80, 90, ...

    aligned: rows start at multiples of 16 values and K is one, so tiles are copied 16 bytes at a
    time; anything else is loaded value by value through registers, which leaves room for small
    tiles only. fp32 products run on the ordinary units from registers: small tiles as well.
    A block of 64 rows is the least that sm_90 and sm_100 give their matrix instructions; where M is
    smaller, reading the weight is the work, and the lost products cost nothing.
    """
    halves = 2 if gated else 1
    if dtype == torch.float32:
        return Launch(32, 32, 32, 4, 2)
    if not aligned:
        # From sm_100 on the product comes out of tensor memory whole, beside the addresses.
        return Launch(64, 64 // halves, 32, 8 if arch >= 100 else 4, 2)

    # Widths of the product: of both halves. 128 x 128 in 8 warps, or 128 x 64 in 4, are 64 fp32
    # accumulators per thread; with twice as many the exact GELU spills.
    def programs(block_m: int, width: int) -> int:
        return triton.cdiv(M, block_m) * triton.cdiv(N * halves, width)

    if M > 64 and programs(128, 128) >= FULL:
        block_m, width, warps = 128, 128, 8
    elif M > 64 and programs(128, 64) >= FULL:
        block_m, width, warps = 128, 64, 4
    elif programs(64, 64) >= FULL:
        block_m, width, warps = 64, 64, 4
    else:
        block_m, width, warps = 64, 32, 4
    row = 2 * (block_m + width)  # bytes of one value of K
    shared = SHARED.get(arch, LEAST_SHARED)
    block_k = 64 if 3 * 64 * row <= shared else 32  # two tiles do not cover the latency of memory
    stages = min(MAX_STAGES, shared // (block_k * row))
    return Launch(block_m, width // halves, block_k, warps, stages)


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def blocks_of(pid, rows, columns):
    """The numbers of program `pid`'s blocks, of so many of rows and of columns: GROUP_M blocks of
    rows at a time."""
    group = pid // (GROUP_M * columns)
    height = tl.minimum(rows - group * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * columns)
    return group * GROUP_M + inside % height, inside // height


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows and columns of program `pid`."""
    m, n = blocks_of(pid, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N))
    return m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def load_tile(pointers, keep, EVEN_K: tl.constexpr):
    """A tile of an operand; keep: which of it is there, everything if EVEN_K."""
    if EVEN_K:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=keep, other=0.0)


@triton.jit
def multiply(x, w, acc):
    """acc + x w, in fp32."""
    if INTERPRETED:
        x, w = x.to(tl.float32), w.to(tl.float32)
    return tl.dot(x, w, acc, input_precision="ieee")


@triton.jit
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    M, N, K, inner, outer_stride, inner_stride, weight_stride,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, GATE_FIRST: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m, n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows past the end read the last one: no masks in the loop, and nothing of them is stored.
    row = tl.minimum(m, M - 1)
    column = tl.minimum(n, N - 1).to(tl.int64)
    rows = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x_ptrs = x_ptr + rows[:, None] + k[None, :]
    first_ptrs = weight_ptr + (column * weight_stride)[None, :] + k[:, None]
    second_ptrs = first_ptrs + tl.full([], N, tl.int64) * weight_stride

    first = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        keep = k < K - start
        x = load_tile(x_ptrs, keep[None, :], EVEN_K)
        first = multiply(x, load_tile(first_ptrs, keep[:, None], EVEN_K), first)
        if GATED:
            second = multiply(x, load_tile(second_ptrs, keep[:, None], EVEN_K), second)
            second_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        first_ptrs += BLOCK_K

    mask_n = n < N
    if HAS_BIAS:
        first += tl.load(bias_ptr + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            second += tl.load(bias_ptr + N + n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        if GATE_FIRST:
            y = activate(first, ACTIVATION) * second
        else:
            y = first * activate(second, ACTIVATION)
    else:
        y = activate(first, ACTIVATION)
    out_ptrs = out_ptr + (m.to(tl.int64) * N)[:, None] + n[None, :]
    mask = (m < M)[:, None] & mask_n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


# --- launcher -------------------------------------------------------------------------------------


def launch(
    x: torch.Tensor,
    rows: tuple[int, int, int, int],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: str,
    gated: bool = False,
    gate_first: bool = False,
) -> None:
    """Writes `out`. rows: outer, inner, outer_stride, inner_stride of x; not empty."""
    outer, inner, outer_stride, inner_stride = rows
    M, K, N = outer * inner, x.shape[-1], out.shape[-1]
    steps = (K, outer_stride, inner_stride, weight.stride(0))
    aligned = all(step % 16 == 0 for step in steps)
    aligned = aligned and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    plan = select(M, N, K, x.dtype, arch_of(x), gated, aligned)
    programs = triton.cdiv(M, plan.block_m) * triton.cdiv(N, plan.block_n)
    with torch.cuda.device_of(x):
        _linear_kernel[(programs,)](
            x, weight, x if bias is None else bias, out,
            M, N, K, inner, outer_stride, inner_stride, weight.stride(0),
            HAS_BIAS=bias is not None, ACTIVATION=activation,
            GATED=gated, GATE_FIRST=gate_first, EVEN_K=K % plan.block_k == 0,
            BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, BLOCK_K=plan.block_k,
            num_warps=plan.num_warps, num_stages=plan.num_stages,
        )  # fmt: skip


# --- ahead of time --------------------------------------------------------------------------------

# One shape for every tile (M, columns of the product), and which architectures share a plan: what
# differs between them is the shared memory.
SHAPES = ((8192, 8192), (1024, 1024), (576, 1024), (50, 512))
FAMILIES = {80: (80,), 89: (89,), 90: (90, 100)}


def aot_configs(kinds: tuple[tuple[str, bool], ...]) -> Iterator[dict[str, Any]]:
    """Every tile `select` can return; kinds: (activation, gated)."""
    for activation, gated in kinds:
        for family, architectures in FAMILIES.items():
            for M, width in SHAPES:
                plan = select(
                    M, width // (2 if gated else 1), 1024, torch.bfloat16, family, gated, True
                )
                for even in (True, False):
                    yield _config(plan, "bf16", activation, gated, even, True, architectures)
        for architectures in ((80, 89, 90), (100,)):
            plan = select(8192, 8192, 1024, torch.bfloat16, architectures[0], gated, False)
            yield _config(plan, "bf16", activation, gated, False, False, architectures)
        everywhere = (80, 89, 90, 100)
        for aligned in (True, False):
            plan = select(8192, 8192, 1024, torch.float32, 80, gated, aligned)
            yield _config(plan, "fp32", activation, gated, False, aligned, everywhere)


def _config(
    plan: Launch,
    dtype: str,
    activation: str,
    gated: bool,
    even: bool,
    aligned: bool,
    architectures: tuple[int, ...],
) -> dict[str, Any]:
    constants = {
        "HAS_BIAS": True, "ACTIVATION": activation, "GATED": gated, "GATE_FIRST": False,
        "EVEN_K": even, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k,
    }  # fmt: skip
    names = _linear_kernel.arg_names
    signature = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    for pointer in ("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"):
        signature[pointer] = f"*{dtype}"
    tile = f"{plan.block_m}x{plan.block_n}x{plan.block_k} stages {plan.num_stages}"
    kind = f"{activation}{' gated' if gated else ''}"
    what = ("" if even else " tail") + ("" if aligned else " odd")
    known = ("K", "outer_stride", "inner_stride", "weight_stride") if aligned else ()
    return {
        "kernel": _linear_kernel, "signature": signature, "constexprs": constants,
        "options": {"num_warps": plan.num_warps, "num_stages": plan.num_stages},
        "label": f"{kind} {tile} {dtype}{what} sm_{architectures[0]}",
        "multiples_of_16": known, "architectures": architectures,
        "tensor_cores": products("bf16", architectures) if aligned and dtype == "bf16"
        and plan.block_m >= 64 else {},
    }  # fmt: skip


def products(kind: str, architectures: tuple[int, ...]) -> dict[int, str]:
    """The instruction that a tile of 64 rows or more compiles to: "bf16" or "fp8"."""
    names = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
    if kind == "fp8":
        names = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA"}
    return {arch: names[arch] for arch in architectures if arch in names}
