"""out = hidden * act(gate), the two halves of each row; act = GELU, its tanh form, or SiLU.

    x    [outer, inner, 2H], contiguous rows at two strides; fp32, fp16 or bf16
    out  [outer, inner, H], contiguous, like x

Bytes: x read once, out written once. Everything in fp32, rounded once.

Limits: H and inner below 2^31; offsets of rows are widened to int64 before they are multiplied.

GLU variants: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from fastdiff.kernels._common import activate, arch_of

# --- launch policy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """The tile of a program: rows and columns of the result."""

    block_m: int
    block_h: int
    num_warps: int = 4


# 16 results per thread: 32 bytes of each half of a bf16 row in flight, 64 in all, and a program is
# small enough that the SD1.5 mid block (128 rows of 5120) still makes two programs per SM.
TILE = 2048
MAX_BLOCK_H = 1024
MAX_REGISTERS = 128  # named, because left alone ptxas spills to save registers
MIN_BLOCK_H = 32


def select(rows: int, H: int, dtype: torch.dtype, arch: int) -> Launch:
    """The launch for `rows` rows of H results. Pure: needs no GPU. arch is 80, 90, ...

    The widest block of columns that leaves at most an eighth of its lanes without work: long runs
    of memory, few addresses. Rows, dtype and arch do not change the choice: every tile holds the
    same number of results, and its registers are those of fp32.
    """
    block_h = MIN_BLOCK_H
    while block_h < MAX_BLOCK_H and triton.cdiv(H, 2 * block_h) * 2 * block_h * 7 <= H * 8:
        block_h *= 2
    return Launch(TILE // block_h, block_h)


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit
def _gated_kernel(
    x_ptr, out_ptr,
    inner, outer_stride, inner_stride, H,
    ACTIVATION: tl.constexpr, GATE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    columns = tl.cdiv(H, BLOCK_H)  # neighbours share rows of memory
    h = (pid % columns) * BLOCK_H + tl.arange(0, BLOCK_H)
    pid = pid // columns
    blocks = tl.cdiv(inner, BLOCK_M)
    n = (pid // blocks).to(tl.int64)
    m = (pid % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (m < inner)[:, None] & (h < H)[None, :]
    first_ptr = x_ptr + n * outer_stride + (m * inner_stride)[:, None] + h[None, :]
    first = tl.load(first_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(first_ptr + H, mask=mask, other=0.0).to(tl.float32)
    if GATE_FIRST:
        y = activate(first, ACTIVATION) * second
    else:
        y = first * activate(second, ACTIVATION)
    out_ptr += ((n * inner + m) * H)[:, None] + h[None, :]
    tl.store(out_ptr, y.to(out_ptr.dtype.element_ty), mask=mask)


# --- launcher -------------------------------------------------------------------------------------


def launch(
    x: torch.Tensor,
    out: torch.Tensor,
    rows: tuple[int, int, int, int],
    activation: str,
    gate_first: bool,
) -> None:
    """Writes `out`. rows: outer, inner, outer_stride, inner_stride of x; not empty."""
    outer, inner, outer_stride, inner_stride = rows
    H = out.shape[-1]
    plan = select(outer * inner, H, x.dtype, arch_of(x))
    programs = outer * triton.cdiv(inner, plan.block_m) * triton.cdiv(H, plan.block_h)
    with torch.cuda.device_of(x):
        _gated_kernel[(programs,)](
            x, out, inner, outer_stride, inner_stride, H,
            ACTIVATION=activation, GATE_FIRST=gate_first,
            BLOCK_M=plan.block_m, BLOCK_H=plan.block_h, num_warps=plan.num_warps,
            maxnreg=MAX_REGISTERS,
        )  # fmt: skip


# --- ahead of time --------------------------------------------------------------------------------


def aot_configs(activations: tuple[str, ...], gates: tuple[bool, ...]) -> Iterator[dict[str, Any]]:
    """Every tile `select` can return, in the terms of fastdiff.ops.AotConfig."""
    strides = ("outer_stride", "inner_stride", "H")
    for dtype in ("bf16", "fp32"):
        signature = {
            name: f"*{dtype}" if name.endswith("_ptr") else "i32" if name.islower() or name == "H"
            else "constexpr"
            for name in _gated_kernel.arg_names
        }  # fmt: skip
        for activation in activations:
            for gate_first in gates:
                block_h = MIN_BLOCK_H
                while block_h <= MAX_BLOCK_H:
                    for known in (strides, ()):
                        constants = {
                            "ACTIVATION": activation, "GATE_FIRST": gate_first,
                            "BLOCK_M": TILE // block_h, "BLOCK_H": block_h,
                        }  # fmt: skip
                        where = " gate first" if gate_first else ""
                        odd = "" if known else " odd"
                        yield {
                            "kernel": _gated_kernel, "signature": signature,
                            "constexprs": constants,
                            "options": {"num_warps": 4, "maxnreg": MAX_REGISTERS},
                            "label": f"{activation}{where} {block_h} {dtype}{odd}",
                            "multiples_of_16": known,
                        }  # fmt: skip
                    block_h *= 2
