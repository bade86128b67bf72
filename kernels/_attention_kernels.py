"""Device code of the attention op; formula, layouts and limits are in attention.py.

A head dimension is two pieces, D0 and D1 columns (D1 = 0: one piece), both powers of two. Strides
count units of ALIGN elements, so that the compiler sees aligned rows for every number of heads;
sizes are not specialised: one binary serves every length.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastdiff.kernels._common import rounded

ALIGN = 8  # elements: 16 bytes of fp16 or bf16, one load
_ALIGN = tl.constexpr(ALIGN)
_LOG2E = tl.constexpr(1.4426950408889634)

# Every run-time integer: specialising on 1 or on multiples of 16 would only add binaries.
_SIZES = [
    "q_stride_b", "q_stride_s", "q_stride_h", "k_stride_b", "k_stride_s", "k_stride_h",
    "v_stride_b", "v_stride_s", "v_stride_h", "extra_q_stride_b", "extra_q_stride_s",
    "extra_q_stride_h", "extra_k_stride_b", "extra_k_stride_s", "extra_k_stride_h",
    "extra_v_stride_b", "extra_v_stride_s", "extra_v_stride_h", "cos_stride", "sin_stride",
    "extra_cos_stride", "extra_sin_stride", "mask_stride", "rope_rows", "extra_rope_rows",
    "H", "Sq", "Sk", "extra_Sq", "extra_Sk", "splits",
]  # fmt: skip


# --- device helpers -------------------------------------------------------------------------------


@triton.jit
def _load_piece(
    pointer, row, count, stride, other: tl.constexpr,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Columns FIRST..FIRST + WIDTH of rows `row`; `other` past HEAD_DIM and, with CHECK, past
    `count` rows."""
    column = FIRST + tl.arange(0, WIDTH)
    offsets = row[:, None] * stride + column[None, :]
    if CHECK and FIRST + WIDTH > HEAD_DIM:
        mask = (row < count)[:, None] & (column < HEAD_DIM)[None, :]
        return tl.load(pointer + offsets, mask=mask, other=other)
    elif CHECK:
        return tl.load(pointer + offsets, mask=(row < count)[:, None], other=other)
    elif FIRST + WIDTH > HEAD_DIM:
        return tl.load(pointer + offsets, mask=(column < HEAD_DIM)[None, :], other=other)
    else:
        return tl.load(pointer + offsets)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; the interpreter, which multiplies bf16 as integers, gets fp32."""
    if PRECISION == "interpret":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _store_piece(
    pointer, value, row, count, stride,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = FIRST + tl.arange(0, WIDTH)
    mask = (row < count)[:, None] & (column < HEAD_DIM)[None, :]
    offsets = row[:, None] * stride + column[None, :]
    tl.store(pointer + offsets, value, mask=mask)


@triton.jit
def _weigh(x, weight_ptr, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    weight = tl.load(weight_ptr + column, mask=column < HEAD_DIM, other=0.0)
    return x * weight.to(tl.float32)[None, :]


@triton.jit
def _centre(x, mean, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)
    return tl.where((column < HEAD_DIM)[None, :], x - mean[:, None], 0.0)


@triton.jit
def _rotate(
    x, cos_ptr, sin_ptr, cos_stride, sin_stride, row, rope_rows,
    HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """x * cos + (-x[1], x[0], -x[3], x[2], ...) * sin; rows from rope_rows on stay as they are."""
    cos = _load_piece(cos_ptr, row, rope_rows, cos_stride, 1.0, HEAD_DIM, FIRST, WIDTH, True)
    sin = _load_piece(sin_ptr, row, rope_rows, sin_stride, 0.0, HEAD_DIM, FIRST, WIDTH, True)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], WIDTH // 2, 2)))
    turned = tl.reshape(tl.join(-odd, even), (x.shape[0], WIDTH))
    return x * cos.to(tl.float32) + turned * sin.to(tl.float32)


@triton.jit
def _ready(
    pointer, weight_ptr, cos_ptr, sin_ptr,  # at the first of the rows
    row, count, stride, cos_stride, sin_stride, rope_rows,
    eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The two pieces of rows of q or k, normalised and rotated in fp32, in the tensor's dtype."""
    x0 = _load_piece(pointer, row, count, stride, 0.0, HEAD_DIM, 0, D0, True)
    x1 = x0
    if D1 > 0:
        x1 = _load_piece(pointer, row, count, stride, 0.0, HEAD_DIM, D0, D1, True)
    if NORM != "none" or ROPE:
        x0 = x0.to(tl.float32)
        x1 = x1.to(tl.float32)
        if NORM == "layer":
            total = tl.sum(x0, 1)
            if D1 > 0:
                total += tl.sum(x1, 1)
            mean = total / HEAD_DIM
            x0 = _centre(x0, mean, HEAD_DIM, 0, D0)
            if D1 > 0:
                x1 = _centre(x1, mean, HEAD_DIM, D0, D1)
        if NORM != "none":
            squares = tl.sum(x0 * x0, 1)
            if D1 > 0:
                squares += tl.sum(x1 * x1, 1)
            rstd = tl.rsqrt((squares / HEAD_DIM + eps).to(tl.float32))[:, None]
            x0 *= rstd
            if D1 > 0:
                x1 *= rstd
            if HAS_WEIGHT:
                x0 = _weigh(x0, weight_ptr, HEAD_DIM, 0, D0)
                if D1 > 0:
                    x1 = _weigh(x1, weight_ptr, HEAD_DIM, D0, D1)
        if ROPE:
            x0 = _rotate(
                x0, cos_ptr, sin_ptr, cos_stride, sin_stride, row, rope_rows, HEAD_DIM, 0, D0
            )
            if D1 > 0:
                x1 = _rotate(
                    x1, cos_ptr, sin_ptr, cos_stride, sin_stride, row, rope_rows, HEAD_DIM, D0, D1
                )
        x0 = rounded(x0, pointer.dtype.element_ty)
        x1 = rounded(x1, pointer.dtype.element_ty)
    return x0, x1


@triton.jit
def _key_block(
    acc0, acc1, m, total, q0, q1,
    k_ptr, v_ptr, mask_ptr,  # of one image and head
    k_stride, v_stride, n, stop, factor,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: BLOCK_N keys from n on, with CHECK those below `stop`."""
    row = tl.arange(0, BLOCK_N)
    start = tl.zeros([], tl.int64) + n
    k_ptr += start * k_stride
    v_ptr += start * v_stride
    count = stop - n
    k0 = _load_piece(k_ptr, row, count, k_stride, 0.0, HEAD_DIM, 0, D0, CHECK)
    s = tl.zeros([q0.shape[0], BLOCK_N], tl.float32)
    s = _dot(q0, tl.trans(k0), s, PRECISION)
    if D1 > 0:
        k1 = _load_piece(k_ptr, row, count, k_stride, 0.0, HEAD_DIM, D0, D1, CHECK)
        s = _dot(q1, tl.trans(k1), s, PRECISION)
    if CHECK:
        keep = row < count
        if HAS_MASK:
            keep = keep & (tl.load(mask_ptr + n + row, mask=keep, other=0) != 0)
        s = tl.where(keep[None, :], s, float("-inf"))
    highest = tl.maximum(m, tl.max(s, 1))
    base = highest
    if CHECK:  # a row without any key so far
        base = tl.where(highest == float("-inf"), 0.0, highest)
    # Subtracted before it is scaled: exact near the maximum, so that large logits lose nothing. The
    # usual s * factor - base * factor, one FMA, is off by the rounding of base * factor: exp2 of
    # thousands where logits reach 1e10.
    shrink = tl.exp2((m - base) * factor)
    p = tl.exp2((s - base[:, None]) * factor)
    total = total * shrink + tl.sum(p, 1)
    v0 = _load_piece(v_ptr, row, count, v_stride, 0.0, HEAD_DIM, 0, D0, CHECK)
    p = rounded(p, v0.dtype)
    acc0 = _dot(p, v0, acc0 * shrink[:, None], PRECISION)
    if D1 > 0:
        v1 = _load_piece(v_ptr, row, count, v_stride, 0.0, HEAD_DIM, D0, D1, CHECK)
        acc1 = _dot(p, v1, acc1 * shrink[:, None], PRECISION)
    return acc0, acc1, highest, total


@triton.jit
def _key_segment(
    acc0, acc1, m, total, q0, q1,
    k_ptr, v_ptr, mask_ptr,  # of one image and head
    k_stride, v_stride, first, stop, factor,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys first..stop of one segment: whole blocks without any check, then the rest."""
    stop = tl.maximum(first, stop)
    if HAS_MASK:
        for n in tl.range(first, stop, BLOCK_N, num_stages=STAGES):
            acc0, acc1, m, total = _key_block(
                acc0, acc1, m, total, q0, q1, k_ptr, v_ptr, mask_ptr, k_stride, v_stride, n, stop,
                factor, HEAD_DIM, D0, D1, BLOCK_N, True, True, PRECISION,
            )  # fmt: skip
    else:
        whole = first + (stop - first) // BLOCK_N * BLOCK_N
        for n in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
            acc0, acc1, m, total = _key_block(
                acc0, acc1, m, total, q0, q1, k_ptr, v_ptr, mask_ptr, k_stride, v_stride, n, stop,
                factor, HEAD_DIM, D0, D1, BLOCK_N, False, False, PRECISION,
            )  # fmt: skip
        for n in tl.range(whole, stop, BLOCK_N, num_stages=1):
            acc0, acc1, m, total = _key_block(
                acc0, acc1, m, total, q0, q1, k_ptr, v_ptr, mask_ptr, k_stride, v_stride, n, stop,
                factor, HEAD_DIM, D0, D1, BLOCK_N, True, False, PRECISION,
            )  # fmt: skip
    return acc0, acc1, m, total


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr,  # [B, S, H, HEAD_DIM]; out is contiguous
    extra_q_ptr, extra_k_ptr, extra_v_ptr, extra_out_ptr,
    part_ptr,  # [splits, B, H, Sq + extra_Sq, HEAD_DIM] fp32
    lse_ptr,  # [splits, B, H, Sq + extra_Sq] fp32
    lengths_ptr, extra_lengths_ptr,  # [B]
    mask_ptr,  # [B, Sk + extra_Sk] of bytes
    weight_ptr, extra_weight_ptr,  # [HEAD_DIM], of the norm of q
    cos_ptr, sin_ptr, extra_cos_ptr, extra_sin_ptr,  # [>= Sq, HEAD_DIM]
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, extra_q_stride_b, extra_q_stride_s, extra_q_stride_h,
    extra_k_stride_b, extra_k_stride_s, extra_k_stride_h,
    extra_v_stride_b, extra_v_stride_s, extra_v_stride_h,
    cos_stride, sin_stride, extra_cos_stride, extra_sin_stride,
    mask_stride, rope_rows, extra_rope_rows,
    H, Sq, Sk, extra_Sq, extra_Sk, splits,
    scale, eps,
    HAS_EXTRA_Q: tl.constexpr, HAS_EXTRA_K: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    HAS_EXTRA_LENGTHS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_LSE: tl.constexpr,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROPE: tl.constexpr, SPLIT: tl.constexpr,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one image and head, of one segment, over all keys or one split of them.

    Neighbouring programs share keys and values, which stay in L2.
    """
    pid = tl.program_id(0)
    q_blocks = (Sq + BLOCK_M - 1) // BLOCK_M
    blocks = q_blocks
    if HAS_EXTRA_Q:
        blocks += (extra_Sq + BLOCK_M - 1) // BLOCK_M
    block = pid % blocks
    split = pid // blocks % splits
    bh = pid // blocks // splits
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)

    first = block * BLOCK_M
    rows = Sq
    offset = first  # of the first row among Sq + extra_Sq
    rotated = rope_rows
    q_start = b * q_stride_b + h * q_stride_h
    q_stride = q_stride_s
    if HAS_EXTRA_Q:
        if block >= q_blocks:
            first = (block - q_blocks) * BLOCK_M
            rows = extra_Sq
            offset = Sq + first
            rotated = extra_rope_rows
            q_ptr = extra_q_ptr
            out_ptr = extra_out_ptr
            weight_ptr = extra_weight_ptr
            cos_ptr = extra_cos_ptr
            sin_ptr = extra_sin_ptr
            cos_stride = extra_cos_stride
            sin_stride = extra_sin_stride
            q_start = b * extra_q_stride_b + h * extra_q_stride_h
            q_stride = extra_q_stride_s
    row = tl.arange(0, BLOCK_M)
    count = rows - first
    start = first.to(tl.int64)
    q0, q1 = _ready(
        q_ptr + (q_start + start * q_stride) * _ALIGN, weight_ptr,
        cos_ptr + start * cos_stride * _ALIGN, sin_ptr + start * sin_stride * _ALIGN,
        row, count, q_stride * _ALIGN, cos_stride * _ALIGN, sin_stride * _ALIGN, rotated - first,
        eps, NORM, HAS_WEIGHT, ROPE, HEAD_DIM, D0, D1, PRECISION,
    )  # fmt: skip

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = acc0
    if D1 > 0:
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    scale = (tl.zeros([], tl.float32) + scale).to(tl.float32)
    factor = scale * _LOG2E

    keys = Sk
    if HAS_LENGTHS:
        keys = tl.minimum(tl.load(lengths_ptr + b), Sk).to(tl.int32)
    extra_keys = extra_Sk
    if HAS_EXTRA_LENGTHS:
        extra_keys = tl.minimum(tl.load(extra_lengths_ptr + b), extra_Sk).to(tl.int32)
    key_first = keys * 0
    key_stop = keys
    extra_first = key_first
    extra_stop = extra_keys
    if SPLIT:
        key_blocks = (tl.maximum(keys, 0) + BLOCK_N - 1) // BLOCK_N
        all_blocks = key_blocks
        if HAS_EXTRA_K:
            all_blocks += (tl.maximum(extra_keys, 0) + BLOCK_N - 1) // BLOCK_N
        share = (all_blocks + splits - 1) // splits
        from_block = split * share
        to_block = from_block + share
        key_first = tl.minimum(from_block, key_blocks) * BLOCK_N
        key_stop = tl.minimum(to_block * BLOCK_N, keys)
        extra_first = tl.maximum(from_block - key_blocks, 0) * BLOCK_N
        extra_stop = tl.minimum((to_block - key_blocks) * BLOCK_N, extra_keys)
    mask_ptr += b * mask_stride
    acc0, acc1, m, total = _key_segment(
        acc0, acc1, m, total, q0, q1,
        k_ptr + (b * k_stride_b + h * k_stride_h) * _ALIGN,
        v_ptr + (b * v_stride_b + h * v_stride_h) * _ALIGN,
        mask_ptr, k_stride_s * _ALIGN, v_stride_s * _ALIGN, key_first, key_stop, factor,
        HEAD_DIM, D0, D1, BLOCK_N, HAS_MASK, PRECISION, STAGES,
    )  # fmt: skip
    if HAS_EXTRA_K:
        acc0, acc1, m, total = _key_segment(
            acc0, acc1, m, total, q0, q1,
            extra_k_ptr + (b * extra_k_stride_b + h * extra_k_stride_h) * _ALIGN,
            extra_v_ptr + (b * extra_v_stride_b + h * extra_v_stride_h) * _ALIGN,
            mask_ptr + Sk, extra_k_stride_s * _ALIGN, extra_v_stride_s * _ALIGN,
            extra_first, extra_stop, factor,
            HEAD_DIM, D0, D1, BLOCK_N, HAS_MASK, PRECISION, STAGES,
        )  # fmt: skip

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)  # a row without keys gives 0
    acc0 *= inverse[:, None]
    if D1 > 0:
        acc1 *= inverse[:, None]
    at = ((split * (tl.num_programs(0) // blocks // splits) + bh).to(tl.int64)) * (Sq + extra_Sq)
    if HAS_LSE:
        lse = tl.where(total == 0.0, float("-inf"), m * scale + tl.log(total))
        tl.store(lse_ptr + at + offset + row, lse, mask=row < count)
    if SPLIT:
        out_ptr = part_ptr + (at + offset) * HEAD_DIM
        out_stride = HEAD_DIM
    else:
        out_stride = H * HEAD_DIM
        out_ptr += ((b * rows + first) * H + h) * HEAD_DIM
    if not SPLIT:
        acc0 = rounded(acc0, q_ptr.dtype.element_ty)
        acc1 = rounded(acc1, q_ptr.dtype.element_ty)
    _store_piece(out_ptr, acc0, row, count, out_stride, HEAD_DIM, 0, D0)
    if D1 > 0:
        _store_piece(out_ptr, acc1, row, count, out_stride, HEAD_DIM, D0, D1)


@triton.jit(do_not_specialize=["H", "Sq", "extra_Sq", "splits"])
def combine_kernel(
    part_ptr,  # [splits, B, H, Sq + extra_Sq, HEAD_DIM] fp32, each normalised on its own
    part_lse_ptr,  # [splits, B, H, Sq + extra_Sq] fp32
    out_ptr, extra_out_ptr,  # [B, Sq, H, HEAD_DIM], [B, extra_Sq, H, HEAD_DIM]
    lse_ptr,  # [B, H, Sq + extra_Sq] fp32
    H, Sq, extra_Sq, splits,
    HAS_EXTRA_Q: tl.constexpr, HAS_LSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The splits of BLOCK_M queries of one image and head, weighed by their log-sum-exp."""
    pid = tl.program_id(0)
    rows = Sq + extra_Sq
    blocks = (rows + BLOCK_M - 1) // BLOCK_M
    bh = pid // blocks
    images_heads = tl.num_programs(0) // blocks
    b = (bh // H).to(tl.int64)
    h = bh % H
    row = pid % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    present = row < rows
    mask = present[:, None] & (column < HEAD_DIM)[None, :]
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(splits):
        at = (tl.full([], split, tl.int64) * images_heads + bh) * rows
        lse = tl.load(part_lse_ptr + at + row, mask=present, other=float("-inf"))
        offsets = row[:, None] * HEAD_DIM + column[None, :]
        part = tl.load(part_ptr + at * HEAD_DIM + offsets, mask=mask, other=0.0)
        highest = tl.maximum(m, lse)
        base = tl.where(highest == float("-inf"), 0.0, highest)
        shrink = tl.exp(m - base)
        weight = tl.exp(lse - base)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        m = highest
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if HAS_LSE:
        lse = tl.where(total == 0.0, float("-inf"), m + tl.log(total))
        tl.store(lse_ptr + bh.to(tl.int64) * rows + row, lse, mask=present)
    wide = row.to(tl.int64)
    value = rounded(acc, out_ptr.dtype.element_ty)
    offsets = ((b * Sq + wide) * H + h)[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_ptr + offsets, value, mask=mask & (row < Sq)[:, None])
    if HAS_EXTRA_Q:
        offsets = ((b * extra_Sq + wide - Sq) * H + h)[:, None] * HEAD_DIM + column[None, :]
        tl.store(extra_out_ptr + offsets, value, mask=mask & (row >= Sq)[:, None])


@triton.jit(
    do_not_specialize=[
        "k_stride_b", "k_stride_s", "k_stride_h", "cos_stride", "sin_stride", "rope_rows", "H", "Sk"
    ]
)  # fmt: skip
def prepare_kernel(
    k_ptr, out_ptr,  # [B, Sk, H, HEAD_DIM]; out is contiguous
    weight_ptr,  # [HEAD_DIM]
    cos_ptr, sin_ptr,  # [>= Sk, HEAD_DIM]
    k_stride_b, k_stride_s, k_stride_h, cos_stride, sin_stride, rope_rows, H, Sk,
    eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, ROPE: tl.constexpr,
    HEAD_DIM: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one image and head, normalised and rotated."""
    pid = tl.program_id(0)
    h = (pid % H).to(tl.int64)  # neighbours share rows of memory and of the tables
    blocks = (Sk + BLOCK_N - 1) // BLOCK_N
    first = pid // H % blocks * BLOCK_N
    b = (pid // H // blocks).to(tl.int64)
    start = first.to(tl.int64)
    row = tl.arange(0, BLOCK_N)
    k0, k1 = _ready(
        k_ptr + (b * k_stride_b + h * k_stride_h + start * k_stride_s) * _ALIGN, weight_ptr,
        cos_ptr + start * cos_stride * _ALIGN, sin_ptr + start * sin_stride * _ALIGN,
        row, Sk - first, k_stride_s * _ALIGN, cos_stride * _ALIGN, sin_stride * _ALIGN,
        rope_rows - first, eps, NORM, HAS_WEIGHT, ROPE, HEAD_DIM, D0, D1, PRECISION,
    )  # fmt: skip
    out_ptr += ((b * Sk + start) * H + h) * HEAD_DIM
    _store_piece(out_ptr, k0, row, Sk - first, H * HEAD_DIM, HEAD_DIM, 0, D0)
    if D1 > 0:
        _store_piece(out_ptr, k1, row, Sk - first, H * HEAD_DIM, HEAD_DIM, D0, D1)
