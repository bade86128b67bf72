"""out = softmax(scale * q' k'^T + mask) v per image and head, in one pass over the keys.

    q', k'    = rope(norm(q)), rope(norm(k)): RMS or layer normalisation over the head dimension,
                then rotation of neighbouring pairs by a table; both optional, in fp32
    q, k, v   [B, S, H, D], D contiguous, any other stride a multiple of 8; fp16, bf16 or fp32
    extra_*   second segments of queries and of keys and values (joint attention): the softmax runs
              over the keys of both, nothing is concatenated
    out       [B, Sq, H, D] and, for the second queries, [B, extra_Sq, H, D]; contiguous
    lse       [B, H, Sq + extra_Sq] fp32, natural logarithm; -inf for a row without keys
    lengths   [B] int32 or int64: keys of a segment that count; mask [B, Sk + extra_Sk] bool

FlashAttention-2: Dao, 2023, https://arxiv.org/abs/2307.08691; split keys: Flash-Decoding, Dao et
al., 2023, https://pytorch.org/blog/flash-decoding/; rotation: Su et al., 2021,
https://arxiv.org/abs/2104.09864; QK-norm: Dehghani et al., 2023, https://arxiv.org/abs/2302.05442.

Bytes moved: q, k, v and out once each while a head's keys and values stay in L2. With norm or
rotation the keys are read and written once more (`prepare_kernel`): every block of queries would
repeat that work, and keys that pass through registers cannot be copied to shared memory in the
background. Queries are prepared as they are loaded.

Exact fit: a head dimension is two power-of-two pieces (40 = 32 + 16, of which 8 are masked; 72 and
80 = 64 + 16; 96 = 64 + 32; 160 = 128 + 32), with a product and an accumulator each, instead of the
next power of two.

fp32 scores, softmax and accumulators; probabilities are rounded to v's dtype for the second product,
as the tensor cores take them. fp32 inputs multiply as three TF32 products (tf32x3).

Limits: D from 8 to 256 in steps of 8; a row stride below 2^24 elements; S, B*H and the number of
programs below 2^31. Images, heads and first rows are int64 offsets; those inside a tile are int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from fastdiff.kernels._attention_kernels import (
    ALIGN,
    attention_kernel,
    combine_kernel,
    prepare_kernel,
)

Tensor = torch.Tensor

# --- launch policy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How one shape is launched.

    d0, d1: the pieces of the head dimension. block_m queries meet block_n keys at a time. stages:
    key blocks in flight. splits: parts of the keys, combined by a second kernel; 1 for none.
    """

    d0: int
    d1: int
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    splits: int = 1


MIN_PIECE = 16  # the tensor cores' smallest side
MAX_HEAD_DIM = 256
SMS = {80: 108, 89: 128, 90: 132, 100: 148}  # of the largest GPU of the kind
MAX_SPLITS = 32  # the combining kernel reads them one after the other
MIN_SPLIT_BLOCKS = 4  # key blocks per split: fewer cost more to combine than they win
COMBINE_BLOCK_M = 16
PREPARE_BLOCK_N = 32


def pieces(head_dim: int) -> tuple[int, int]:
    """The two power-of-two pieces of a head dimension; the second is 0 where one does as well."""
    whole = max(MIN_PIECE, triton.next_power_of_2(head_dim))
    first = whole // 2
    if head_dim <= first or first < MIN_PIECE:
        return whole, 0
    second = max(MIN_PIECE, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def _kind(arch: int) -> int:
    """The newest known architecture that is not newer than arch; 80 in the interpreter."""
    known = [kind for kind in SMS if kind <= arch]
    return max(known) if known else 80


def select(B: int, H: int, Sq: int, Sk: int, D: int, dtype: torch.dtype, arch: int) -> Launch:
    """The launch for a shape; Sq and Sk count both segments. Pure: needs no GPU.

    arch is 80, 89, 90, 100 or what lies between, which takes the one below.
    """
    arch = _kind(arch)
    d0, d1 = pieces(D)
    block_m, block_n, warps, stages = _tile(d0 + d1, Sq, dtype, arch)
    programs = B * H * triton.cdiv(Sq, block_m)
    splits = min(
        MAX_SPLITS,
        SMS[arch] // max(1, programs),
        triton.cdiv(Sk, block_n) // MIN_SPLIT_BLOCKS,
    )
    return Launch(d0, d1, block_m, block_n, warps, stages, max(1, splits))


def _tile(width: int, Sq: int, dtype: torch.dtype, arch: int) -> tuple[int, int, int, int]:
    """(block_m, block_n, warps, stages) for pieces of `width` columns together."""
    if dtype == torch.float32:
        # Three TF32 products keep both operands' halves in registers: the tile that fits.
        return (16 if Sq <= 16 else 64), (32 if width <= 128 else 16), 4, (2 if width <= 128 else 1)
    if Sq <= 16:
        # One row of tensor-core tiles: more would multiply zeros. Bound by loading the keys.
        return 16, (64 if width <= 128 else 32), 4, 2
    if arch >= 90:
        # A warpgroup multiplies 64 rows at a time; two of them share the keys in shared memory.
        if Sq <= 64:
            return 64, 64, 4, 2
        if width <= 80:
            return 128, 128, 8, 3
        return 128, 64, 8, (3 if width <= 160 else 2)
    # HMMA: accumulators, probabilities and both operands are in registers.
    if Sq <= 64:
        return 64, (64 if width <= 128 else 32), 4, 2
    if width <= 80:
        return 128, 64, 4, (3 if arch == 80 else 2)
    if width <= 160:
        return 128, (64 if width <= 128 else 32), 8, 2
    # 99 KiB of shared memory on sm_89 hold one block of 256 columns beside the queries.
    return 64, 32, 4, (2 if arch == 80 else 1)


def fit(head_dim: int) -> tuple[int, int, float]:
    """(columns computed, next power of two, share of the products saved)."""
    columns, padded = sum(pieces(head_dim)), max(MIN_PIECE, triton.next_power_of_2(head_dim))
    return columns, padded, 1 - columns / padded


# --- launcher -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """The tensors of one segment; None where there are none. Tables have a row for each position,
    weights one number per column."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    out: Tensor | None = None
    lengths: Tensor | None = None
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def queries(self) -> int:
        return 0 if self.q is None else self.q.shape[1]

    @property
    def keys(self) -> int:
        return 0 if self.k is None else self.k.shape[1]


def strides(tensor: Tensor | None) -> list[int]:
    """Batch, row and head stride in units of ALIGN; 0 where a stride is never used."""
    if tensor is None:
        return [0, 0, 0]
    return [
        stride // ALIGN if size > 1 else 0
        for stride, size in zip(tensor.stride()[:3], tensor.shape[:3], strict=True)
    ]


def _row_stride(table: Tensor | None) -> int:
    return 0 if table is None or table.shape[0] == 1 else table.stride(0) // ALIGN


def launch(
    main: Segment,
    extra: Segment,
    mask: Tensor | None,
    lse: Tensor | None,
    scale: float,
    norm: str,
    eps: float,
) -> None:
    """Writes out of both segments, and lse. The arguments were checked by fastdiff.ops.attention,
    and there is at least one query."""
    q = main.q
    assert q is not None
    arch = 0
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        arch = major * 10 + minor
    B, _, H, D = q.shape
    plan = select(B, H, main.queries + extra.queries, main.keys + extra.keys, D, q.dtype, arch)
    with torch.cuda.device_of(q):
        keys = [_prepared(segment, plan, norm, eps) for segment in (main, extra)]
        _launch(main, extra, *keys, mask, lse, scale, norm, eps, plan)


def _prepared(segment: Segment, plan: Launch, norm: str, eps: float) -> Tensor | None:
    """The keys as the products take them: themselves without norm and rotation."""
    k, weight, cos, sin = segment.k, segment.k_weight, segment.cos, segment.sin
    if k is None or (norm == "none" and cos is None):
        return k
    B, S, H, D = k.shape
    out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    prepare_kernel[(B * H * triton.cdiv(S, PREPARE_BLOCK_N),)](
        k, out, k if weight is None else weight, k if cos is None else cos,
        k if sin is None else sin, *strides(k), _row_stride(cos), _row_stride(sin),
        0 if cos is None else cos.shape[0], H, S, eps,
        NORM=norm, HAS_WEIGHT=weight is not None, ROPE=cos is not None,
        HEAD_DIM=D, D0=plan.d0, D1=plan.d1, BLOCK_N=PREPARE_BLOCK_N, num_warps=4,
    )  # fmt: skip
    return out


def _launch(
    main: Segment,
    extra: Segment,
    k: Tensor | None,
    extra_k: Tensor | None,
    mask: Tensor | None,
    lse: Tensor | None,
    scale: float,
    norm: str,
    eps: float,
    plan: Launch,
) -> None:
    q, v = main.q, main.v
    assert q is not None
    B, _, H, D = q.shape
    rows = main.queries + extra.queries
    split = plan.splits > 1
    part = part_lse = None
    if split:
        part = torch.empty((plan.splits, B, H, rows, D), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((plan.splits, B, H, rows), dtype=torch.float32, device=q.device)

    def either(*tensors: Tensor | None) -> Tensor:
        """The first that is there: an absent argument is any valid pointer of the same type."""
        return next((tensor for tensor in tensors if tensor is not None), q)

    blocks = triton.cdiv(main.queries, plan.block_m) + triton.cdiv(extra.queries, plan.block_m)
    kernel_lse = part_lse if split else lse
    tables = [(s.cos, s.sin) for s in (main, extra)]
    attention_kernel[(B * H * blocks * plan.splits,)](
        q, k, v, main.out,
        either(extra.q, q), either(extra_k, k), either(extra.v, v), either(extra.out, main.out),
        either(part), either(kernel_lse), either(main.lengths), either(extra.lengths),
        either(mask), either(main.q_weight), either(extra.q_weight, main.q_weight),
        either(main.cos, extra.cos), either(main.sin, extra.sin),
        either(extra.cos, main.cos), either(extra.sin, main.sin),
        *strides(q), *strides(k), *strides(v),
        *strides(extra.q), *strides(extra_k), *strides(extra.v),
        *(_row_stride(table) for pair in tables for table in pair),
        0 if mask is None else mask.stride(0),
        *(0 if cos is None else cos.shape[0] for cos, _ in tables),
        H, main.queries, main.keys, extra.queries, extra.keys, plan.splits, scale, eps,
        HAS_EXTRA_Q=extra.q is not None, HAS_EXTRA_K=extra_k is not None,
        HAS_LENGTHS=main.lengths is not None, HAS_EXTRA_LENGTHS=extra.lengths is not None,
        HAS_MASK=mask is not None, HAS_LSE=kernel_lse is not None, NORM=norm,
        HAS_WEIGHT=main.q_weight is not None,
        ROPE=any(cos is not None for cos, _ in tables), SPLIT=split,
        HEAD_DIM=D, D0=plan.d0, D1=plan.d1, BLOCK_M=plan.block_m, BLOCK_N=plan.block_n,
        PRECISION=precision(q.dtype, not q.is_cuda), STAGES=plan.stages, num_warps=plan.num_warps,
        num_stages=plan.stages,
    )  # fmt: skip
    if split:
        combine_kernel[(B * H * triton.cdiv(rows, COMBINE_BLOCK_M),)](
            part, part_lse, main.out, either(extra.out, main.out), either(lse, part_lse),
            H, main.queries, extra.queries, plan.splits,
            HAS_EXTRA_Q=extra.q is not None, HAS_LSE=lse is not None,
            HEAD_DIM=D, BLOCK_D=max(MIN_PIECE, triton.next_power_of_2(D)),
            BLOCK_M=COMBINE_BLOCK_M, num_warps=4,
        )  # fmt: skip


def precision(dtype: torch.dtype, interpreted: bool = False) -> str:
    """How the products take their inputs; what 16-bit inputs are, "tf32" leaves alone."""
    if interpreted:
        return "wide"
    return "tf32x3" if dtype == torch.float32 else "tf32"


# --- ahead of time --------------------------------------------------------------------------------

# Head dimensions of models; every other one has the pieces of one of them, or fewer columns.
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160, 192, 256, 16, 32, 144)
_POINTERS = {
    "part_ptr": "fp32", "lse_ptr": "fp32", "part_lse_ptr": "fp32", "lengths_ptr": "i64",
    "extra_lengths_ptr": "i64", "mask_ptr": "u8", "cos_ptr": "fp32", "sin_ptr": "fp32",
    "extra_cos_ptr": "fp32", "extra_sin_ptr": "fp32",
}  # fmt: skip
