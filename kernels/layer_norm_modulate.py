"""y = (LayerNorm(x) * weight + bias) * (1 + scale) + shift, statistics over the last dimension.

    x            [outer, inner, C], any strides, columns contiguous; fp32, fp16 or bf16
    out          [outer, inner, C], contiguous, x's dtype
    weight, bias [C]; each may be absent
    scale, shift [outer, inner, C], any strides (0: shared by all tokens); each may be absent
    mean, rstd   per row, fp32, in registers

Bytes: x read once, out written once, modulation read once where it is shared (afterwards it is in
L2), else once per token. The variance is centred, never E[x^2] - E[x]^2.

Layer normalisation: Ba et al., 2016, https://arxiv.org/abs/1607.06450. With scale and shift it is
the adaptive norm of diffusion transformers: Peebles and Xie, 2022, https://arxiv.org/abs/2212.09748.

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
    is_shared,
    load_part,
    modulate_part,
    plans,
    row_offsets,
    select,
    tile_options,
    tile_rows,
)

__all__ = ["Launch", "aot_configs", "launch", "select"]


@triton.jit
def _layer_norm_modulate_kernel(
    x_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, out_ptr,
    rows, inner, C,
    x_outer, x_inner, scale_outer, scale_inner, shift_outer, shift_inner,
    eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    SHARED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """ROWS rows per program, in registers."""
    row, keep = tile_rows(rows, ROWS)
    offsets = row_offsets(row, inner, x_outer, x_inner)
    a = load_part(x_ptr, offsets, keep, C, EXACT, 0, MAIN).to(tl.float32)
    b = a
    if TAIL > 0:
        b = load_part(x_ptr, offsets, keep, C, EXACT, MAIN, TAIL).to(tl.float32)
    a, b, rstd = centre(a, b, C, eps, EXACT, ROWS, MAIN, TAIL)
    modulate_part(
        out_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, a, rstd, row, keep, C, inner,
        scale_outer, scale_inner, shift_outer, shift_inner,
        HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, SHARED, EXACT, ROWS, 0, MAIN,
    )  # fmt: skip
    if TAIL > 0:
        modulate_part(
            out_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, b, rstd, row, keep, C, inner,
            scale_outer, scale_inner, shift_outer, shift_inner,
            HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, SHARED, EXACT, ROWS, MAIN, TAIL,
        )  # fmt: skip


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    sizes: list[int],
    strides: list[list[int]],
    eps: float,
) -> None:
    """Writes `out`. sizes: (outer, inner); strides: of x, scale and shift, 0 where absent. The
    arguments were checked by fastdiff.ops.layer_norm_modulate."""
    outer, inner = sizes
    rows, C = outer * inner, x.shape[-1]
    plan = select(rows, C, x.dtype, arch_of(x))
    shared = is_shared(plan, inner, (steps[-1] for steps in strides[1:]))
    given = (weight, bias, scale, shift)
    # An absent argument is any valid pointer; HAS_* keeps it from being read.
    pointers = [x if tensor is None else tensor for tensor in given]
    present = [tensor is not None for tensor in given]
    with torch.cuda.device_of(x):
        _layer_norm_modulate_kernel[(triton.cdiv(rows, plan.rows),)](
            x, *pointers, out, rows, inner, C, *(step for steps in strides for step in steps),
            eps, *present, **tile_options(plan, shared), num_warps=plan.num_warps,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every launch `select` can return, in the terms of fastdiff.ops.AotConfig."""
    flags = dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "HAS_SCALE", "HAS_SHIFT"), True)
    options = {"maxnreg": MAX_REGISTERS}
    for label, plan, known in plans():
        for dtype in ("bf16", "fp32"):
            yield aot_config(
                _layer_norm_modulate_kernel, label, dtype, plan, known, options, **flags
            )
