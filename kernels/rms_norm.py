"""y = x / sqrt(mean(x^2) + eps) * weight, the mean over the last dimension.

    x      [outer, middle, inner, C], any strides, columns contiguous; fp32, fp16 or bf16
    out    [outer, middle, inner, C], contiguous, x's dtype
    weight [C], may be absent
    rstd   per row, fp32, in registers

Three dimensions of rows are what heads of a fused QKV need: [B, N, H, D] and its transpose
[B, H, N, D] are read where they lie. Bytes: x read once, out written once.

Root mean square normalisation: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467.

Limits: C up to 8192, fewer than 2^31 rows. Tiles and launch policy: kernels/_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels._rows import (
    MAX_REGISTERS,
    Launch,
    aot_config,
    arch_of,
    load_part,
    load_vector,
    plans,
    row_offsets,
    row_sums,
    select,
    store_part,
    tile_options,
    tile_rows,
)

__all__ = ["Launch", "aot_configs", "launch", "select"]


@triton.jit
def _scaled_part(
    out_ptr, weight_ptr, x, rstd, row, keep, C,
    HAS_WEIGHT: tl.constexpr, EXACT: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y = y * load_vector(weight_ptr, C, EXACT, START, WIDTH)
    store_part(out_ptr, row.to(tl.int64) * C, keep, C, y, EXACT, START, WIDTH)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr,
    rows, middle, inner, C,
    x_outer, x_middle, x_inner,
    eps,
    HAS_WEIGHT: tl.constexpr, SHARED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program, in registers. SHARED is the other row kernels'."""
    row, keep = tile_rows(rows, ROWS)
    above = row // inner
    offsets = row_offsets(above, middle, x_outer, x_middle) + (row % inner).to(tl.int64) * x_inner
    a = load_part(x_ptr, offsets, keep, C, EXACT, 0, MAIN).to(tl.float32)
    squares = row_sums(a * a, ROWS)
    if TAIL > 0:
        b = load_part(x_ptr, offsets, keep, C, EXACT, MAIN, TAIL).to(tl.float32)
        squares += row_sums(b * b, ROWS)
    rstd = tl.rsqrt((squares / C + eps).to(tl.float32))
    _scaled_part(out_ptr, weight_ptr, a, rstd, row, keep, C, HAS_WEIGHT, EXACT, 0, MAIN)
    if TAIL > 0:
        _scaled_part(out_ptr, weight_ptr, b, rstd, row, keep, C, HAS_WEIGHT, EXACT, MAIN, TAIL)


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor | None,
    sizes: list[int],
    strides: list[int],
    eps: float,
) -> None:
    """Writes `out`. sizes: (outer, middle, inner); strides: of x. The arguments were checked by
    fastdiff.ops.rms_norm."""
    outer, middle, inner = sizes
    rows, C = outer * middle * inner, x.shape[-1]
    plan = select(rows, C, x.dtype, arch_of(x))
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(rows, plan.rows),)](
            x, x if weight is None else weight, out, rows, middle, inner, C, *strides, eps,
            HAS_WEIGHT=weight is not None, **tile_options(plan, True), num_warps=plan.num_warps,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every launch `select` can return, in the terms of fastdiff.ops.AotConfig."""
    options = {"maxnreg": MAX_REGISTERS}
    for label, plan, known in plans():
        for dtype in ("bf16", "fp32"):
            yield aot_config(_rms_norm_kernel, label, dtype, plan, known, options, HAS_WEIGHT=True)
