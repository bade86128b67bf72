"""Row-wise kernels: the launch policy and the device helpers they share.

A program holds ROWS whole rows of C elements in registers, as a main tile and a tail: widths such
as 320, 1152 or 3072 are a power of two and a half, a quarter or an eighth of it, so that no lane is
idle. Other widths are one masked tile of the next power of two, TAIL = 0.

Rows lie in up to three dimensions (outer, middle, inner), each tensor with strides of its own;
modulation that is shared by all rows of a program (SHARED) is read once. Row numbers are widened to
int64 before they are multiplied; offsets inside a row stay int32.

Limits: C up to 8192, fewer than 2^31 rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# --- launch policy --------------------------------------------------------------------------------

MAX_WIDTH = 8192
MIN_MAIN = 64
MIN_SPLIT = 256  # the main tile of the narrowest row that has a tail: 16 bytes of bf16 per lane
VECTOR = 16  # Triton loads 16 bytes at once where strides are known to be multiples of 16
# One warp reduces a row of up to 1024 + 512 elements with shuffles alone, and 32 to 48 fp32 values
# per lane leave room for the modulation. The 16 such warps or more that the registers of an SM hold
# keep 32 KB of bf16 in flight.
MANY = 32
# Where that would leave most of the GPU idle, rows are spread over more warps: a quarter of the
# elements per lane, a quarter of the instructions between the load and the store.
FEW = 8
# Sixteen warps on each of 132 SMs.
FILLED = 2048
MAX_WARPS = 16
MAX_REGISTERS = 128  # what 16 warps have; named, because left alone ptxas spills to save registers


@dataclass(frozen=True)
class Launch:
    """rows: of a program. main, tail: columns of its two tiles. exact: they are the row."""

    rows: int
    main: int
    tail: int
    exact: bool
    num_warps: int


def _tiles(C: int) -> tuple[int, int, bool]:
    """(main, tail, exact) for rows of C elements."""
    main = max(MIN_MAIN, triton.next_power_of_2(C))
    if main == C:
        return main, 0, True
    half = main // 2
    rest = C - half
    if (
        C % VECTOR == 0
        and rest > 0
        and half >= MIN_SPLIT
        and rest in (half // 2, half // 4, half // 8)
    ):
        return half, rest, True
    return main, 0, False


def _plan(main: int, tail: int, exact: bool, per_lane: int) -> Launch:
    """Half as many elements per lane for odd widths, which take an address for every element, and
    for several rows, whose modulation may differ: in fp32 there would be too few registers; the
    same for more than 4096 elements with a tail (a spill on sm_100). With a tail it is one row: two
    tiles of several rows would be laid out differently, and pass through shared memory to meet."""
    tile = 32 * per_lane
    if not exact or (per_lane > FEW and (main < tile or (tail and main == 4096))):
        tile //= 2
    rows = 1 if tail else max(1, tile // main)
    return Launch(rows, main, tail, exact, min(MAX_WARPS, max(1, main // tile)))


def select(rows: int, C: int, dtype: torch.dtype, arch: int) -> Launch:
    """The launch for `rows` rows of C elements. Pure: needs no GPU. arch is 80, 90, ...

    dtype and arch do not change the choice: the arithmetic is fp32 everywhere, and registers per SM
    are the same from sm_80 on.
    """
    if not 1 <= C <= MAX_WIDTH:
        raise ValueError(f"C must be in 1..{MAX_WIDTH}, got {C}")
    main, tail, exact = _tiles(C)
    filled = rows * main >= FILLED * 32 * MANY
    return _plan(main, tail, exact, MANY if filled else FEW)


def arch_of(x: torch.Tensor) -> int:
    """90 for sm_90, and so on; 0 on the CPU."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


def tile_options(plan: Launch, shared: bool) -> dict[str, Any]:
    """The launch's constants, by the names every kernel gives them."""
    return {
        "SHARED": shared or plan.rows == 1, "EXACT": plan.exact, "ROWS": plan.rows,
        "MAIN": plan.main, "TAIL": plan.tail,
    }  # fmt: skip


def is_shared(plan: Launch, inner: int, strides: Iterable[int]) -> bool:
    """Whether all rows of a program have the same modulation; strides: of the inner dimension."""
    return plan.rows == 1 or (inner % plan.rows == 0 and not any(strides))


# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def tile_rows(rows, ROWS: tl.constexpr):
    """(row, keep): the numbers of the program's rows, and which of them there are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    return row, row < rows


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride):
    """Where rows start in a tensor with strides of its own."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _mask(keep, c, C, EXACT: tl.constexpr):
    mask = keep[:, None]
    if not EXACT:
        mask = mask & (c < C)
    return mask


@triton.jit
def load_part(
    pointer, offsets, keep, C, EXACT: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr
):
    """Columns START to START + WIDTH of some rows, in the tensor's dtype; zeros beyond."""
    c = START + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointer + offsets[:, None] + c, mask=_mask(keep, c, C, EXACT), other=0.0)


@triton.jit
def store_part(
    pointer, offsets, keep, C, value,
    EXACT: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    c = START + tl.arange(0, WIDTH)[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + offsets[:, None] + c, value, mask=_mask(keep, c, C, EXACT))


@triton.jit
def load_modulation(
    pointer, row, keep, inner, outer_stride, inner_stride, C,
    SHARED: tl.constexpr, EXACT: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Modulation of the program's rows: [1, WIDTH] where they share it, else [ROWS, WIDTH]."""
    if SHARED:
        first = tl.program_id(0) * ROWS
        c = START + tl.arange(0, WIDTH)[None, :]
        pointer += row_offsets(first, inner, outer_stride, inner_stride)
        if EXACT:
            value = tl.load(pointer + c)
        else:
            value = tl.load(pointer + c, mask=c < C, other=0.0)
    else:
        offsets = row_offsets(row, inner, outer_stride, inner_stride)
        value = load_part(pointer, offsets, keep, C, EXACT, START, WIDTH)
    return value


@triton.jit
def load_vector(pointer, C, EXACT: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of a weight or bias, [1, WIDTH], in fp32."""
    c = START + tl.arange(0, WIDTH)[None, :]
    if EXACT:
        value = tl.load(pointer + c)
    else:
        value = tl.load(pointer + c, mask=c < C, other=0.0)
    return value.to(tl.float32)


@triton.jit
def row_sums(tile, ROWS: tl.constexpr):
    """[ROWS]. A scalar in between for one row: its layout fits main tile and tail alike."""
    if ROWS == 1:
        total = tl.zeros([1], tl.float32) + tl.sum(tile)
    else:
        total = tl.sum(tile, 1)
    return total


@triton.jit
def centre(
    a, b, C, eps, EXACT: tl.constexpr, ROWS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr
):
    """(a - mean, b - mean, rstd) of rows whose two tiles are a and b, in fp32; b only if TAIL.

    The rounding of the mean leaves a rest, which counts when the mean is far above the deviation;
    it goes into the second pass. Where squares overflow, the deviation is infinite, the result 0.
    """
    total = row_sums(a, ROWS)
    if TAIL > 0:
        total += row_sums(b, ROWS)
    mean = total / C
    a = a - mean[:, None]
    if not EXACT:
        a = tl.where(tl.arange(0, MAIN)[None, :] < C, a, 0.0)
    rest, squares = row_sums(a, ROWS), row_sums(a * a, ROWS)
    if TAIL > 0:
        b = b - mean[:, None]
        rest += row_sums(b, ROWS)
        squares += row_sums(b * b, ROWS)
    rest = rest / C
    squares = squares / C
    variance = tl.maximum(squares - tl.where(squares < 3e38, rest * rest, 0.0), 0.0)
    rstd = tl.rsqrt((variance + eps).to(tl.float32))
    a = a - rest[:, None]
    if TAIL > 0:
        b = b - rest[:, None]
    return a, b, rstd


@triton.jit
def modulate_part(
    out_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr,
    centred, rstd, row, keep, C, inner,
    scale_outer, scale_inner, shift_outer, shift_inner,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    SHARED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
    START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Stores (centred * rstd * weight + bias) * (1 + scale) + shift."""
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y = y * load_vector(weight_ptr, C, EXACT, START, WIDTH)
    if HAS_BIAS:
        y = y + load_vector(bias_ptr, C, EXACT, START, WIDTH)
    if HAS_SCALE:
        scale = load_modulation(
            scale_ptr, row, keep, inner, scale_outer, scale_inner, C,
            SHARED, EXACT, START, WIDTH, ROWS,
        )  # fmt: skip
        y = y * (1.0 + scale.to(tl.float32))
    if HAS_SHIFT:
        shift = load_modulation(
            shift_ptr, row, keep, inner, shift_outer, shift_inner, C,
            SHARED, EXACT, START, WIDTH, ROWS,
        )  # fmt: skip
        y = y + shift.to(tl.float32)
    store_part(out_ptr, row.to(tl.int64) * C, keep, C, y, EXACT, START, WIDTH)


@triton.jit
def gated_part(
    x_ptr, y_ptr, gate_ptr,
    x_offsets, y_offsets, row, keep, C, inner, gate_outer, gate_inner,
    SHARED: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr,
    START: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """x + gate * y in x's dtype, with PyTorch's roundings: the product is rounded to the wider
    dtype of gate and y before it is added. Launched without FMA contraction where that is fp32."""
    x = load_part(x_ptr, x_offsets, keep, C, EXACT, START, WIDTH)
    y = load_part(y_ptr, y_offsets, keep, C, EXACT, START, WIDTH)
    gate = load_modulation(
        gate_ptr, row, keep, inner, gate_outer, gate_inner, C,
        SHARED, EXACT, START, WIDTH, ROWS,
    )  # fmt: skip
    product = gate.to(tl.float32) * y.to(tl.float32)
    product = product.to(gate.dtype).to(tl.float32)
    return (x.to(tl.float32) + product).to(x.dtype)


def fp_fusion(x: torch.Tensor, gate: torch.Tensor) -> bool:
    """Whether a kernel with `gated_part` may contract: a product rounded to 16 bits cannot be."""
    return torch.float32 not in (x.dtype, gate.dtype)


# --- ahead of time --------------------------------------------------------------------------------


def plans() -> Iterator[tuple[str, Launch, bool]]:
    """(label, launch, whether the widths are multiples of 16): all that `select` returns."""
    mains = [MIN_MAIN << i for i in range((MAX_WIDTH // MIN_MAIN).bit_length())]
    seen = set()
    for main in mains:
        tails = [main // 2, main // 4, main // 8] if MIN_SPLIT <= main < MAX_WIDTH else []
        for per_lane in (MANY, FEW):
            exact = [_plan(main, tail, True, per_lane) for tail in (0, *tails)]
            for plan in (*exact, _plan(main, 0, False, per_lane)):
                if plan not in seen:
                    seen.add(plan)
                    tiles = f"{plan.main}+{plan.tail}" if plan.exact else f"{plan.main} odd"
                    yield f"{plan.rows}x({tiles}) {plan.num_warps}w", plan, plan.exact


def aot_config(
    kernel: Any, label: str, dtype: str, plan: Launch, known: bool, options: dict[str, Any],
    **flags: bool,
) -> dict[str, Any]:  # fmt: skip
    """One configuration in the terms of fastdiff.ops.AotConfig, with every optional argument and
    modulation per token (what needs most registers)."""
    constants: dict[str, Any] = {**flags, **tile_options(plan, False)}
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {
        name: "constexpr" if name in constants
        else f"*{dtype}" if name.endswith("_ptr")
        else "fp32" if name == "eps"
        else "i32"
        for name in kernel.arg_names
    }  # fmt: skip
    strides = [n for n in kernel.arg_names if n.endswith(("_outer", "_middle", "_inner"))]
    return {
        "kernel": kernel, "signature": signature, "constexprs": constants,
        "options": {"num_warps": plan.num_warps, **options},
        "label": f"{label} {dtype}", "multiples_of_16": ("C", *strides) if known else (),
    }  # fmt: skip
