"""The two products of x + gate * (attention(modulate(norm(x))) W^T + b), with what surrounds them.

    x            [B, S, C], C contiguous, any other strides; fp32, fp16 or bf16
    mean, rstd   [B, S] fp32: statistics of x's rows
    scale, shift, gate  one row per image, any stride; x's dtype or fp32
    weight, bias [N, K] with contiguous rows, [N]; like x
    projection   LayerNorm(x) * (1 + scale) + shift, then W^T + b, e.g. to q, k and v: [B, S, N]
    gated        residual + gate * (y W^T + b) of y [B, S, K], and the statistics of the result for
                 the norm that follows

Passes over memory: x is read for its statistics (unless the kernel that wrote it left them) and
again by the projection, which centres, scales and rounds its tile before the tensor cores take it:
the normalised tensor is never written. Every block of columns repeats that work, 4 fp32 operations
per value and block. The attention between the two is the attention op, on views of the projection's
result. The last product adds the residual in its epilogue; each block of columns leaves mean and
centred squares of its part of a row, which `_combine_kernel` puts together in fp32 (Chan, Golub and
LeVeque, 1983, "Algorithms for computing the sample variance").

Blocks of rows do not cross images, so that one row of modulation serves a block: with S below the
64 rows of the least tile most of the products are of nothing.

adaLN-Zero: Peebles and Xie, 2022, https://arxiv.org/abs/2212.09748.

Limits: B * S and K below 2^31; N and the stride between tokens of the residual below 2^24 (offsets
inside a tile of the result are int32, all others int64).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastdiff.kernels import _linear
from fastdiff.kernels._common import arch_of, rounded
from fastdiff.kernels._linear import Launch, blocks_of, load_tile, multiply

Tensor = torch.Tensor

# --- launch policy --------------------------------------------------------------------------------

MAX_REGISTERS = 255  # named, because left alone ptxas spills to save registers
WHOLE_K = 64  # the largest block_k: a multiple of it needs no masks in the loop
STATISTICS_ROWS = 4  # a warp each, 16 values per lane at a time
STATISTICS_BLOCK = 512
COMBINE_ROWS = 16
COMBINE_BLOCKS = 32  # parts of a row at a time; 32 of 128 columns are a row of 4096


def select(M: int, N: int, K: int, dtype: torch.dtype, arch: int, aligned: bool) -> Launch:
    """The launch for a product of M rows: `_linear.select`'s, whose small tile also takes a K that
    leaves a tail. Pure: needs no GPU.

    Tiles of 128 rows go to 8 warps, whatever their width: the residual, or the tile that is being
    normalised, needs registers beside the accumulators (in 4 warps both spill on sm_90).
    """
    plan = _linear.select(M, N, K, dtype, arch, False, aligned and K % WHOLE_K == 0)
    return replace(plan, num_warps=8 if plan.block_m == 128 else 4)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit
def _statistics_kernel(
    x_ptr,  # [B, S, C]
    mean_ptr, rstd_ptr,  # [B, S]
    rows, S, C, x_batch, x_token, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows, twice, the second time from the first cache. The rounding of the mean leaves a
    rest, which counts when the mean is far above the deviation; squares that overflow are inf."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keep = row < rows
    c = tl.arange(0, BLOCK)
    offsets = (row // S).to(tl.int64) * x_batch + (row % S).to(tl.int64) * x_token
    x_ptrs = x_ptr + offsets[:, None] + c[None, :]
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, BLOCK):
        mask = keep[:, None] & (c < C - start)[None, :]
        total += tl.sum(tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32), 1)
    mean = total / C
    rest = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, C, BLOCK):
        mask = keep[:, None] & (c < C - start)[None, :]
        x = tl.load(x_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - mean[:, None], 0.0)
        rest += tl.sum(x, 1)
        squares += tl.sum(x * x, 1)
    rest, squares = rest / C, squares / C
    variance = tl.maximum(squares - tl.where(squares < 3e38, rest * rest, 0.0), 0.0)
    tl.store(mean_ptr + row, mean + rest, mask=keep)
    tl.store(rstd_ptr + row, tl.rsqrt((variance + eps).to(tl.float32)), mask=keep)


@triton.jit
def _product_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,  # out [B, S, N]
    mean_ptr, rstd_ptr, scale_ptr, shift_ptr,  # MODULATED
    residual_ptr, gate_ptr,  # GATED; residual [B, S, N]
    part_ptr,  # STATISTICS: [2, blocks of columns, B * S] fp32, means and centred squares
    B, S, N, K, x_batch, x_token, weight_stride,
    scale_batch, shift_batch, residual_batch, residual_token, gate_batch,
    HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr, GATED: tl.constexpr,
    STATISTICS: tl.constexpr,
    EVEN_K: tl.constexpr,  # BLOCK_K divides K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    per_image = tl.cdiv(S, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    block_m, block_n = blocks_of(tl.program_id(0), B * per_image, columns)
    image = (block_m // per_image).to(tl.int64)
    first = (block_m % per_image) * BLOCK_M
    s = first + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    # Rows past the end read the last one: no masks in the loop, and nothing of them is stored.
    token = tl.minimum(s, S - 1).to(tl.int64)
    column = tl.minimum(n, N - 1).to(tl.int64)
    x_ptrs = x_ptr + image * x_batch + (token * x_token)[:, None] + k[None, :]
    weight_ptrs = weight_ptr + (column * weight_stride)[None, :] + k[:, None]
    if MODULATED:
        mean = tl.load(mean_ptr + image * S + token)[:, None]
        rstd = tl.load(rstd_ptr + image * S + token)[:, None]
        scale_ptrs = scale_ptr + image * scale_batch + k
        shift_ptrs = shift_ptr + image * shift_batch + k

    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        keep = k < K - start
        x = load_tile(x_ptrs, keep[None, :], EVEN_K)
        if MODULATED:
            scale = load_tile(scale_ptrs, keep, EVEN_K).to(tl.float32)
            shift = load_tile(shift_ptrs, keep, EVEN_K).to(tl.float32)
            normed = (x.to(tl.float32) - mean) * rstd
            normed = normed * (1.0 + scale)[None, :] + shift[None, :]
            x = rounded(normed, x_ptr.dtype.element_ty)
            scale_ptrs += BLOCK_K
            shift_ptrs += BLOCK_K
        y = multiply(x, load_tile(weight_ptrs, keep[:, None], EVEN_K), y)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if HAS_BIAS:
        y += tl.load(bias_ptr + column).to(tl.float32)[None, :]
    # Offsets inside the tile are int32: the epilogue has the fewest registers to spare.
    here = tl.arange(0, BLOCK_M)[:, None]
    present = (n < N)[None, :]
    mask = (s < S)[:, None] & present
    if GATED:
        gate = tl.load(gate_ptr + image * gate_batch + column).to(tl.float32)
        residual_ptr += image * residual_batch + first.to(tl.int64) * residual_token
        residual = tl.load(
            residual_ptr + (here * residual_token + n[None, :]), mask=mask, other=0.0
        )
        y = residual.to(tl.float32) + gate[None, :] * y
    out = rounded(y, out_ptr.dtype.element_ty)
    out_ptr += (image * S + first) * N
    tl.store(out_ptr + (here * N + n[None, :]), out, mask=mask)
    if STATISTICS:
        # Of what is stored, which is what the next norm will read.
        y = tl.where(present, out.to(tl.float32), 0.0)
        mean = tl.sum(y, 1) / tl.minimum(N - block_n * BLOCK_N, BLOCK_N)
        y = tl.where(present, y - mean[:, None], 0.0)
        rows = tl.full([], B, tl.int64) * S
        part_ptrs = part_ptr + block_n * rows + image * S + s
        tl.store(part_ptrs, mean, mask=s < S)
        tl.store(part_ptrs + columns * rows, tl.sum(y * y, 1), mask=s < S)


@triton.jit
def _combine_kernel(
    part_ptr,  # [2, blocks, rows] of `_product_kernel`
    mean_ptr, rstd_ptr,  # [rows]
    rows, blocks, N, width, eps,  # width: columns of a block, of which the last may have fewer
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.arange(0, BLOCKS)
    wide = tl.full([], rows, tl.int64)
    part_ptrs = part_ptr + (block * wide)[None, :] + row[:, None]
    keep = (row < rows)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, blocks, BLOCKS):
        mask = keep & (start + block < blocks)[None, :]
        part = tl.load(part_ptrs + start * wide, mask=mask, other=0.0)
        total += tl.sum(part * tl.minimum(N - (start + block) * width, width)[None, :], 1)
    mean = total / N
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, blocks, BLOCKS):
        mask = keep & (start + block < blocks)[None, :]
        count = tl.minimum(N - (start + block) * width, width)
        away = tl.load(part_ptrs + start * wide, mask=mask, other=0.0) - mean[:, None]
        inside = tl.load(part_ptrs + (blocks + start) * wide, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, inside + count[None, :] * away * away, 0.0), 1)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    rstd = tl.rsqrt((squares / N + eps).to(tl.float32))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


# --- launchers ------------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Of rows: [B, S] fp32, contiguous."""

    mean: Tensor
    rstd: Tensor


def statistics(x: Tensor, eps: float, out: Statistics) -> None:
    """Writes `out`, the statistics of x [B, S, C], which is not empty."""
    B, S, C = x.shape
    with torch.cuda.device_of(x):
        _statistics_kernel[(triton.cdiv(B * S, STATISTICS_ROWS),)](
            x, *out, B * S, S, C, x.stride(0), x.stride(1), eps,
            ROWS=STATISTICS_ROWS, BLOCK=STATISTICS_BLOCK, num_warps=4,
        )  # fmt: skip


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    modulation: tuple[Statistics, Tensor, Tensor] | None = None,
    gated: tuple[Tensor, Tensor] | None = None,
    following: tuple[Statistics, float] | None = None,
) -> None:
    """Writes out [B, S, N] and what `following` names; x [B, S, K] is not empty.

    modulation: x's statistics, scale and shift [B, K]: x is normalised first. gated: residual
    [B, S, N] and gate [B, N]. following: where the statistics of `out` go, and their eps.
    """
    (B, S, K), N = x.shape, out.shape[-1]
    steps = (K, x.stride(0), x.stride(1), weight.stride(0))
    aligned = all(step % 16 == 0 for step in steps)
    aligned = aligned and x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    plan = select(B * S, N, K, x.dtype, arch_of(x), aligned)
    columns = triton.cdiv(N, plan.block_n)
    # An absent argument is any valid pointer; the flags keep it from being read.
    (mean, rstd), scale, shift = modulation or ((x, x), x, x)
    residual, gate = gated or (x, x)
    with torch.cuda.device_of(x):
        part = x
        if following:
            part = torch.empty((2, columns, B * S), dtype=torch.float32, device=x.device)
        _product_kernel[(B * triton.cdiv(S, plan.block_m) * columns,)](
            x, weight, x if bias is None else bias, out,
            mean, rstd, scale, shift, residual, gate, part,
            B, S, N, K, x.stride(0), x.stride(1), weight.stride(0),
            scale.stride(0), shift.stride(0), residual.stride(0), residual.stride(1),
            gate.stride(0),
            HAS_BIAS=bias is not None, MODULATED=modulation is not None,
            GATED=gated is not None, STATISTICS=following is not None,
            EVEN_K=plan.block_k == WHOLE_K, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
            BLOCK_K=plan.block_k, num_warps=plan.num_warps, num_stages=plan.num_stages,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip
        if following:
            found, eps = following
            _combine_kernel[(triton.cdiv(B * S, COMBINE_ROWS),)](
                part, *found, B * S, columns, N, plan.block_n, eps,
                ROWS=COMBINE_ROWS, BLOCKS=COMBINE_BLOCKS, num_warps=4,
            )  # fmt: skip


# --- ahead of time --------------------------------------------------------------------------------


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every tile `select` can return for both products, with all that each may have."""
    every = tuple(arch for family in _linear.FAMILIES.values() for arch in family)
    for gated in (False, True):
        for family, architectures in _linear.FAMILIES.items():
            for M, N in _linear.SHAPES:
                plan = select(M, N, 1024, torch.bfloat16, family, True)
                yield _config(plan, "bf16", gated, architectures)
        for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            plan = select(8192, 8192, 1024, dtype, 80, False)
            yield _config(plan, name, gated, every)
    row = {"ROWS": STATISTICS_ROWS, "BLOCK": STATISTICS_BLOCK}
    for name in ("bf16", "fp32"):
        yield _small_config(_statistics_kernel, f"statistics {name}", row, f"*{name}")
    row = {"ROWS": COMBINE_ROWS, "BLOCKS": COMBINE_BLOCKS}
    yield _small_config(_combine_kernel, "combine", row, "*fp32")


def _small_config(
    kernel: Any, label: str, constants: dict[str, int], source: str
) -> dict[str, Any]:
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= dict.fromkeys(("mean_ptr", "rstd_ptr"), "*fp32")
    signature |= {kernel.arg_names[0]: source, "eps": "fp32"}
    return {
        "kernel": kernel, "signature": signature, "constexprs": constants,
        "options": {"num_warps": 4}, "label": label,
    }  # fmt: skip


def _config(
    plan: Launch, dtype: str, gated: bool, architectures: tuple[int, ...]
) -> dict[str, Any]:
    even = plan.block_k == WHOLE_K
    constants = {
        "HAS_BIAS": True, "MODULATED": not gated, "GATED": gated, "STATISTICS": gated,
        "EVEN_K": even, "BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n, "BLOCK_K": plan.block_k,
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants
        else "*fp32" if name in ("mean_ptr", "rstd_ptr", "part_ptr")
        else f"*{dtype}" if name.endswith("_ptr")
        else "i32"
        for name in _product_kernel.arg_names
    }  # fmt: skip
    kind = "gated" if gated else "modulated"
    tile = f"{plan.block_m}x{plan.block_n}x{plan.block_k} stages {plan.num_stages}"
    known = [n for n in signature if n == "K" or n.endswith(("_batch", "_token", "_stride"))]
    return {
        "kernel": _product_kernel, "signature": signature, "constexprs": constants,
        "options": {"num_warps": plan.num_warps, "num_stages": plan.num_stages,
                    "maxnreg": MAX_REGISTERS},
        "label": f"{kind} {tile} {dtype}{'' if even else ' tail'} sm_{architectures[0]}",
        "multiples_of_16": tuple(known) if even else (), "architectures": architectures,
        "tensor_cores": _linear.products("bf16", architectures) if even else {},
    }  # fmt: skip
