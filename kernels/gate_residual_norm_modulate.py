"""residual = x + gate * y; normed = (LayerNorm(residual) * weight + bias) * (1 + scale) + shift.

    x, y               [outer, inner, C], any strides, columns contiguous; fp32, fp16 or bf16
    gate, scale, shift [outer, inner, C], any strides (0: shared by all tokens)
    weight, bias       [C]; each may be absent
    residual, normed   [outer, inner, C], contiguous, x's dtype
    mean, rstd         per row, fp32, in registers

What stands between two sublayers of a diffusion transformer (Peebles and Xie, 2022,
https://arxiv.org/abs/2212.09748), in one pass: x and y are read once, both results written once,
one read and one launch less than gate_residual and layer_norm_modulate. The residual has the bits
of PyTorch's two operations, and the statistics are those of the rounded residual.

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
    centre,
    fp_fusion,
    gated_part,
    is_shared,
    modulate_part,
    plans,
    row_offsets,
    select,
    store_part,
    tile_options,
    tile_rows,
)

__all__ = ["Launch", "aot_configs", "launch", "select"]


@triton.jit
def _gate_residual_norm_modulate_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, weight_ptr, bias_ptr, residual_ptr, normed_ptr,
    rows, inner, C,
    x_outer, x_inner, y_outer, y_inner,
    gate_outer, gate_inner, scale_outer, scale_inner, shift_outer, shift_inner,
    eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHARED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program, in registers."""
    row, keep = tile_rows(rows, ROWS)
    x_offsets = row_offsets(row, inner, x_outer, x_inner)
    y_offsets = row_offsets(row, inner, y_outer, y_inner)
    out_offsets = row.to(tl.int64) * C
    a = gated_part(
        x_ptr, y_ptr, gate_ptr, x_offsets, y_offsets, row, keep, C, inner, gate_outer, gate_inner,
        SHARED, EXACT, ROWS, 0, MAIN,
    )  # fmt: skip
    store_part(residual_ptr, out_offsets, keep, C, a, EXACT, 0, MAIN)
    a = a.to(tl.float32)
    b = a
    if TAIL > 0:
        b = gated_part(
            x_ptr, y_ptr, gate_ptr, x_offsets, y_offsets, row, keep, C, inner,
            gate_outer, gate_inner, SHARED, EXACT, ROWS, MAIN, TAIL,
        )  # fmt: skip
        store_part(residual_ptr, out_offsets, keep, C, b, EXACT, MAIN, TAIL)
        b = b.to(tl.float32)
    a, b, rstd = centre(a, b, C, eps, EXACT, ROWS, MAIN, TAIL)
    modulate_part(
        normed_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, a, rstd, row, keep, C, inner,
        scale_outer, scale_inner, shift_outer, shift_inner,
        HAS_WEIGHT, HAS_BIAS, True, True, SHARED, EXACT, ROWS, 0, MAIN,
    )  # fmt: skip
    if TAIL > 0:
        modulate_part(
            normed_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, rstd, row, keep, C, inner,
            scale_outer, scale_inner, shift_outer, shift_inner,
            HAS_WEIGHT, HAS_BIAS, True, True, SHARED, EXACT, ROWS, MAIN, TAIL,
        )  # fmt: skip


def launch(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    normed: torch.Tensor,
    sizes: list[int],
    strides: list[list[int]],
    eps: float,
) -> None:
    """Writes `residual` and `normed`. sizes: (outer, inner); strides: of x, y, gate, scale, shift.
    The arguments were checked by fastdiff.ops.gate_residual_norm_modulate."""
    outer, inner = sizes
    rows, C = outer * inner, x.shape[-1]
    plan = select(rows, C, x.dtype, arch_of(x))
    shared = is_shared(plan, inner, (steps[-1] for steps in strides[2:]))
    # An absent argument is any valid pointer; HAS_* keeps it from being read.
    affine = [x if tensor is None else tensor for tensor in (weight, bias)]
    with torch.cuda.device_of(x):
        _gate_residual_norm_modulate_kernel[(triton.cdiv(rows, plan.rows),)](
            x, y, gate, scale, shift, *affine, residual, normed, rows, inner, C,
            *(step for steps in strides for step in steps), eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            **tile_options(plan, shared), num_warps=plan.num_warps,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=fp_fusion(x, gate),
        )  # fmt: skip


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every launch `select` can return, in the terms of fastdiff.ops.AotConfig."""
    kernel, flags = _gate_residual_norm_modulate_kernel, {"HAS_WEIGHT": True, "HAS_BIAS": True}
    for label, plan, known in plans():
        for dtype in ("bf16", "fp32"):
            options = {"enable_fp_fusion": dtype != "fp32", "maxnreg": MAX_REGISTERS}
            yield aot_config(kernel, label, dtype, plan, known, options, **flags)
