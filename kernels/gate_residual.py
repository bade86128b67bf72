"""out = x + gate * y, with the bits of PyTorch's two operations.

    x, y [outer, inner, C], any strides, columns contiguous; fp32, fp16 or bf16
    gate [outer, inner, C], any strides (0: shared by all tokens); x's dtype or fp32
    out  [outer, inner, C], contiguous, x's dtype

The product is rounded to the wider dtype of gate and y, the sum to x's: no FMA contraction. Bytes:
x and y read once, out written once, the gate read once where it is shared, else once per token.

adaLN-Zero's gate: Peebles and Xie, 2022, https://arxiv.org/abs/2212.09748, section 3.2.

Limits: C up to 8192, fewer than 2^31 rows. Tiles and launch policy: kernels/_rows.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels._rows import (
    Launch,
    aot_config,
    arch_of,
    fp_fusion,
    gated_part,
    is_shared,
    plans,
    row_offsets,
    select,
    store_part,
    tile_options,
    tile_rows,
)

__all__ = ["Launch", "aot_configs", "launch", "select"]


@triton.jit
def _gate_residual_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    rows, inner, C,
    x_outer, x_inner, y_outer, y_inner, gate_outer, gate_inner,
    SHARED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program."""
    row, keep = tile_rows(rows, ROWS)
    x_offsets = row_offsets(row, inner, x_outer, x_inner)
    y_offsets = row_offsets(row, inner, y_outer, y_inner)
    out_offsets = row.to(tl.int64) * C
    a = gated_part(
        x_ptr, y_ptr, gate_ptr, x_offsets, y_offsets, row, keep, C, inner, gate_outer, gate_inner,
        SHARED, EXACT, ROWS, 0, MAIN,
    )  # fmt: skip
    store_part(out_ptr, out_offsets, keep, C, a, EXACT, 0, MAIN)
    if TAIL > 0:
        b = gated_part(
            x_ptr, y_ptr, gate_ptr, x_offsets, y_offsets, row, keep, C, inner,
            gate_outer, gate_inner, SHARED, EXACT, ROWS, MAIN, TAIL,
        )  # fmt: skip
        store_part(out_ptr, out_offsets, keep, C, b, EXACT, MAIN, TAIL)


def launch(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    out: torch.Tensor,
    sizes: list[int],
    strides: list[list[int]],
) -> None:
    """Writes `out`. sizes: (outer, inner); strides: of x, y and gate. The arguments were checked by
    fastdiff.ops.gate_residual."""
    outer, inner = sizes
    rows, C = outer * inner, x.shape[-1]
    plan = select(rows, C, x.dtype, arch_of(x))
    shared = is_shared(plan, inner, strides[2][-1:])
    with torch.cuda.device_of(x):
        _gate_residual_kernel[(triton.cdiv(rows, plan.rows),)](
            x, y, gate, out, rows, inner, C, *(step for steps in strides for step in steps),
            **tile_options(plan, shared), num_warps=plan.num_warps,
            enable_fp_fusion=fp_fusion(x, gate),
        )  # fmt: skip


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every launch `select` can return, in the terms of fastdiff.ops.AotConfig."""
    for label, plan, known in plans():
        for dtype in ("bf16", "fp32"):
            options = {"enable_fp_fusion": dtype != "fp32"}
            yield aot_config(_gate_residual_kernel, label, dtype, plan, known, options)
