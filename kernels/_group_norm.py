"""Group norms: the launcher and the configurations to compile, of x, of cat([x, skip], 1) and of
x + residual, which are one set of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from fastdiff.kernels._common import arch_of
from fastdiff.kernels._group_norm_first import _apply_kernel, _stats_kernel
from fastdiff.kernels._group_norm_last import (
    _apply_last_kernel,
    _finalize_last_kernel,
    _stats_last_kernel,
)
from fastdiff.kernels._group_norm_policy import (
    ALIGN,
    APPLY_PARTS,
    FINALIZE_PARTS,
    FLAGS,
    LAST_BLOCK_C,
    LAST_BLOCK_HW,
    MAX_REGISTERS,
    MAX_TILE,
    SECOND_MIN_BLOCK_C,
    SECOND_MIN_TILE,
    Launch,
    select,
    stats_warps,
    warps_of,
)
from fastdiff.kernels._group_norm_whole import _group_kernel

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
    plan: Launch | None = None,
    skip: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> None:
    """Writes `out`, and x + residual into `total`, by `plan` or what `select` gives. All tensors
    have one memory layout; the op has checked them. Not both of skip and residual."""
    N, C = out.shape[:2]
    C_X = x.shape[1]
    HW = out.numel() // (N * C)
    second = "" if residual is None else "residual"
    second = second if skip is None else "skip"
    if plan is None:
        shape = (N, C, HW, groups, x.dtype, channels_last)
        plan = select(*shape, arch_of(x), second=second, first=C_X)

    given = (add, weight, bias, scale, shift)
    flags = {f: vector is not None for f, vector in zip(FLAGS, given, strict=True)}
    # An absent argument is any valid pointer; HAS_* keeps it from being read.
    vectors = [x if vector is None else vector for vector in given]
    strides = [0 if rows is None else rows.stride(0) for rows in (add, scale, shift)]
    sources = [x, next((t for t in (skip, residual) if t is not None), x)]
    sources.append(x if total is None else total)
    # The second pass reads what the first has written.
    again = sources[:2] if total is None else [total, total]
    with torch.cuda.device_of(x):
        if plan.kind == "group":
            _group_kernel[(N * groups,)](
                *sources, *vectors, out, *strides, C, C_X, HW, groups, eps, **flags, SILU=silu,
                HAS_SKIP=second == "skip", HAS_RESIDUAL=second == "residual",
                IS_NHWC=channels_last, ALIGN=plan.align, BLOCK_C=plan.block_c,
                BLOCK_HW=plan.block_hw, num_warps=plan.num_warps, maxnreg=MAX_REGISTERS,
            )  # fmt: skip
        elif channels_last:
            parts = torch.empty((2, N, plan.splits, C), dtype=torch.float32, device=x.device)
            affine = torch.empty((3, N, C), dtype=torch.float32, device=x.device)
            columns = triton.cdiv(C_X, plan.block_c) + triton.cdiv(C - C_X, plan.block_c)
            tile: dict[str, Any] = {"BLOCK_HW": plan.block_hw, "BLOCK_C": plan.block_c}
            tile["num_warps"] = plan.num_warps
            _stats_last_kernel[(N * plan.splits * columns,)](
                *sources, *parts, C, C_X, HW, plan.splits, plan.span,
                HAS_RESIDUAL=second == "residual", **tile,
            )  # fmt: skip
            _finalize_last_kernel[(N * groups,)](
                *vectors, *parts, *affine, *strides, C, HW, groups, plan.splits, plan.span, eps,
                **flags, PARTS=FINALIZE_PARTS, BLOCK_C=plan.block_c, num_warps=4,
            )  # fmt: skip
            _apply_last_kernel[(N * triton.cdiv(HW, plan.block_hw) * columns,)](
                *again, out, *affine, C, C_X, HW, SILU=silu, **tile
            )
        else:
            block = plan.block_hw
            parts = torch.empty((2, N * C, plan.splits), dtype=torch.float32, device=x.device)
            _stats_kernel[(N * C * plan.splits,)](
                *sources, *parts, C, C_X, HW, plan.splits, plan.span,
                HAS_RESIDUAL=second == "residual", BLOCK=block, VEC=16 // x.element_size(),
                num_warps=plan.stats_warps,
            )  # fmt: skip
            _apply_kernel[(N * C * triton.cdiv(HW, block),)](
                *again, *vectors, out, *parts, *strides, C, C_X, HW, groups, plan.splits,
                plan.span, eps, **flags, SILU=silu, PARTS=APPLY_PARTS, BLOCK=block,
                num_warps=plan.num_warps, maxnreg=MAX_REGISTERS,
            )  # fmt: skip


# --- ahead of time --------------------------------------------------------------------------------

_DTYPES = (("bf16", 8), ("fp32", 4))  # and how many are 16 bytes
_SIZES = ("C", "C_X", "HW", "span")  # of which the kernels know that 16 divides them
_FLOAT_POINTERS = {
    "mean_ptr", "m2_ptr", "part_mean_ptr", "part_m2_ptr", "slope_ptr", "offset_ptr",
}  # fmt: skip


def _config(
    kernel: Any, label: str, dtype: str, warps: int, known: tuple[str, ...], **constants: Any
) -> dict[str, Any]:
    signature = {name: "fp32" if name == "eps" else "i32" for name in kernel.arg_names}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in _FLOAT_POINTERS else f"*{dtype}"
    label = f"{label} {dtype}{'' if known else ' odd'}"
    limit = {"maxnreg": MAX_REGISTERS} if kernel in (_group_kernel, _apply_kernel) else {}
    return {
        "kernel": kernel, "signature": signature, "constexprs": constants, "label": label,
        "options": {"num_warps": warps, **limit}, "multiples_of_16": known,
    }  # fmt: skip


def group_configs(second: str, present: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The tiles of a group in registers; present: which of FLAGS."""
    given = {flag: flag in present for flag in FLAGS}
    given |= {"HAS_SKIP": second == "skip", "HAS_RESIDUAL": second == "residual", "SILU": True}
    for dtype, _ in _DTYPES:
        for known in (_SIZES,) if second else (_SIZES, ()):
            for tile in (16384, 8192, 4096, 2048, 1024):
                for block_c in (128, 64, 32, 16, 8, 4):
                    if second and (tile < SECOND_MIN_TILE or block_c < SECOND_MIN_BLOCK_C):
                        continue
                    odd = 1 if known else 2
                    if tile * odd > MAX_TILE:
                        continue
                    shape = {"BLOCK_C": block_c, "BLOCK_HW": tile // block_c}
                    label = f"group{' ' + second if second else ''} {block_c}x{tile // block_c}"
                    every = {**given, **shape}
                    warps = warps_of(tile * odd, 4)
                    # A skip may have any number of channels, channels first.
                    sizes = tuple(n for n in known if n != "C_X" or second != "skip")
                    nchw = {**every, "IS_NHWC": False, "ALIGN": 1}
                    yield _config(_group_kernel, label, dtype, warps, sizes, **nchw)
                    nhwc = {**every, "IS_NHWC": True, "ALIGN": ALIGN if known else 1}
                    yield _config(_group_kernel, f"{label} last", dtype, warps, known[:2], **nhwc)


def stats_configs(second: str) -> Iterator[dict[str, Any]]:
    """The first passes of the split way."""
    residual = {"HAS_RESIDUAL": second == "residual"}
    last = {"BLOCK_HW": LAST_BLOCK_HW, "BLOCK_C": LAST_BLOCK_C, **residual}
    name = f"stats{' ' + second if second else ''}"
    for dtype, vec in _DTYPES:
        for known, odd in ((_SIZES, 1), ((), 2)):
            yield _config(_stats_last_kernel, f"{name} last", dtype, 4, known, **last)
            for block in (4096, 2048, 1024, 512)[odd - 1 :]:
                vector = {"BLOCK": block, "VEC": vec, **residual}
                warps = stats_warps(warps_of(block * odd, 1), second)
                yield _config(_stats_kernel, f"{name} {block}", dtype, warps, known, **vector)


def apply_configs() -> Iterator[dict[str, Any]]:
    """The second passes of the split way, whatever they read."""
    rows = dict.fromkeys(FLAGS, True)
    last = {"BLOCK_HW": LAST_BLOCK_HW, "BLOCK_C": LAST_BLOCK_C}
    parts = {"PARTS": FINALIZE_PARTS, "BLOCK_C": LAST_BLOCK_C}
    for dtype, _ in _DTYPES:
        for known, odd in ((_SIZES, 1), ((), 2)):
            yield _config(_apply_last_kernel, "apply last", dtype, 4, known, SILU=True, **last)
            yield _config(_finalize_last_kernel, "finalize last", dtype, 4, known, **rows, **parts)
            for block in (4096, 2048, 1024, 512)[odd - 1 :]:
                part = {"BLOCK": block, "PARTS": APPLY_PARTS, **rows}
                warps = warps_of(block * odd, 1)
                label = f"apply {block}"
                yield _config(_apply_kernel, label, dtype, warps, known, SILU=True, **part)
