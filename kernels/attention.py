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

fp32 scores, softmax and accumulators; probabilities are rounded to v's dtype for the second
product, as the tensor cores take them. fp32 inputs multiply as three TF32 products (tf32x3),
in one piece.

Limits: D from 8 to 256 in steps of 8, in fp32 to 128 (wider spills at the smallest tile); a row
stride below 2^24 elements; S, B * H and the number of programs below 2^31. Offsets of images, heads
and first rows are int64; those inside a tile are int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    key blocks in flight. prepare_q: whether norm and rotation of the queries have a pass of their
    own, like those of the keys. splits: parts of the keys, combined by a second kernel; 1 for none.
    """

    d0: int
    d1: int
    block_m: int
    block_n: int
    num_warps: int
    stages: int
    prepare_q: bool
    splits: int = 1


MIN_PIECE = 16  # the tensor cores' smallest side
SMS = {80: 108, 89: 128, 90: 132, 100: 148}  # of the largest GPU of the kind
MAX_SPLITS = 32  # the combining kernel reads them one after the other
MIN_SPLIT_BLOCKS = 4  # key blocks per split: fewer cost more to combine than they win
MAX_READY_WIDTH = 128  # wider queries, in fp32 beside their tables, do not fit the registers
MAX_REGISTERS = 255  # named, because left alone ptxas spills to save registers
MAX_FP32_HEAD_DIM = 128
FEW = 16  # queries that fill one row of tensor-core tiles
COMBINE_BLOCK_M = 16
PREPARE_BLOCK_N = 32


def pieces(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[int, int]:
    """The two power-of-two pieces of a head dimension; the second is 0 where one does as well, and
    for fp32, whose three products each spill when there are two of them."""
    whole = max(MIN_PIECE, triton.next_power_of_2(head_dim))
    first = whole // 2
    if dtype == torch.float32 or head_dim <= first or first < MIN_PIECE:
        return whole, 0
    second = max(MIN_PIECE, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole else (whole, 0)


def select(B: int, H: int, Sq: int, Sk: int, D: int, dtype: torch.dtype, arch: int) -> Launch:
    """The launch for a shape; Sq and Sk count both segments. Pure: needs no GPU.

    arch is 80, 89, 90, 100 or what lies between, which takes the one below; 0 for the interpreter.
    """
    arch = max((kind for kind in SMS if kind <= arch), default=80)
    d0, d1 = pieces(D, dtype)
    wide = B * H * triton.cdiv(Sq, 128) >= SMS[arch]  # 128 queries a program fill the GPU
    rows = FEW if Sq <= FEW else (128 if wide and Sq > 64 else 64)
    block_m, block_n, warps, stages = tile(d0 + d1, rows, dtype, arch)
    programs = max(1, B * H * triton.cdiv(Sq, block_m))
    most = triton.cdiv(Sk, block_n) // MIN_SPLIT_BLOCKS
    splits = max(1, min(MAX_SPLITS, SMS[arch] // programs, most))
    prepare_q = d0 + d1 > MAX_READY_WIDTH or dtype == torch.float32
    return Launch(d0, d1, block_m, block_n, warps, stages, prepare_q, splits)


def tile(width: int, rows: int, dtype: torch.dtype, arch: int) -> tuple[int, int, int, int]:
    """(block_m, block_n, warps, stages) for about `rows` (16, 64 or 128) queries and pieces of
    `width` columns together: the largest that spill no register (`python -m fastdiff.aot`)."""
    if dtype == torch.float32:
        return _tile_fp32(width, rows)
    if rows == FEW:  # more rows would multiply zeros; bound by loading the keys
        return FEW, (32 if width <= 128 else 16), 4, (3 if width <= 128 else 2)
    if arch >= 90:
        # A warpgroup multiplies 64 rows at a time; with 128, two of them share each key block.
        if rows == 64 or (width > 192 and arch >= 100):
            return 64, (64 if width <= 128 else 32), (4 if width <= 192 else 8), 2
        if width <= 64:
            return 128, 128, 8, 3
        # 227 KiB of shared memory: three blocks in flight to 160 columns, then two.
        widest = 160 if arch >= 100 else 192
        return 128, (64 if width <= widest else 32), 8, (3 if width <= 160 else 2)
    # HMMA keeps accumulators, scores and both operands in registers; sm_89 has 99 KiB of shared
    # memory where sm_80 has 163.
    stages = 3 if arch == 80 and width <= 128 else 2
    if rows == 64 and width <= 96:
        return 64, 64, 4, 2
    if width <= 96:
        return 128, 64, (4 if width <= 32 else 8), stages
    if width <= 160:
        return (128 if rows == 128 else 64), 32, (8 if rows == 128 else 4), stages
    if width <= 192:  # two accumulators of unlike widths: 64 rows spill
        return 32, 32, 8, 2
    return 64, 32, 8, (2 if arch == 80 else 1)


def _tile_fp32(width: int, rows: int) -> tuple[int, int, int, int]:
    """Three TF32 products keep both halves of both operands in registers."""
    if rows == FEW or width > 64:
        return FEW, 32, 4, 1
    return (64 if width <= 32 else 32), 32, 4, 2


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
        main, extra = (_ready(segment, plan, norm, eps) for segment in (main, extra))
        norm = "none" if plan.prepare_q else norm
        _launch(main, extra, mask, lse, scale, norm, eps, plan)


def _ready(segment: Segment, plan: Launch, norm: str, eps: float) -> Segment:
    """The segment with its keys, and with prepare_q its queries, normalised and rotated."""
    if norm == "none" and segment.cos is None:
        return segment
    k = _prepared(segment.k, segment.k_weight, segment, plan, norm, eps)
    if not plan.prepare_q:
        return replace(segment, k=k)
    q = _prepared(segment.q, segment.q_weight, segment, plan, norm, eps)
    return replace(segment, q=q, k=k, q_weight=None, cos=None, sin=None)


def _prepared(
    x: Tensor | None, weight: Tensor | None, segment: Segment, plan: Launch, norm: str, eps: float
) -> Tensor | None:
    if x is None or x.numel() == 0:
        return x
    B, S, H, D = x.shape
    cos, sin = segment.cos, segment.sin
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    prepare_kernel[(B * H * triton.cdiv(S, PREPARE_BLOCK_N),)](
        x, out, x if weight is None else weight, x if cos is None else cos,
        x if sin is None else sin, *strides(x), _row_stride(cos), _row_stride(sin),
        0 if cos is None else cos.shape[0], H, S, eps,
        NORM=norm, HAS_WEIGHT=weight is not None, ROPE=cos is not None,
        HEAD_DIM=D, D0=plan.d0, D1=plan.d1, BLOCK_N=PREPARE_BLOCK_N,
        PRECISION=precision(x.dtype, not x.is_cuda), num_warps=4,
    )  # fmt: skip
    return out


def _launch(
    main: Segment,
    extra: Segment,
    mask: Tensor | None,
    lse: Tensor | None,
    scale: float,
    norm: str,
    eps: float,
    plan: Launch,
) -> None:
    q, k, v, extra_k = main.q, main.k, main.v, extra.k
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
        num_stages=plan.stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    if split:
        combine_kernel[(B * H * triton.cdiv(rows, COMBINE_BLOCK_M),)](
            part, part_lse, main.out, either(extra.out, main.out), either(lse, part_lse),
            H, main.queries, extra.queries, plan.splits,
            HAS_EXTRA_Q=extra.q is not None, HAS_LSE=lse is not None,
            HEAD_DIM=D, BLOCK_D=max(MIN_PIECE, triton.next_power_of_2(D)),
            BLOCK_M=COMBINE_BLOCK_M, PRECISION=precision(q.dtype, not q.is_cuda), num_warps=4,
        )  # fmt: skip


def precision(dtype: torch.dtype, interpreted: bool = False) -> str:
    """How the products take their inputs; what 16-bit inputs are, "tf32" leaves alone."""
    if interpreted:
        return "interpret"
    return "tf32x3" if dtype == torch.float32 else "tf32"


# --- ahead of time --------------------------------------------------------------------------------

# One head dimension of every pair of pieces, the one that masks most columns; in fp32, where every
# one is one piece, the ones of ONE_PIECE are like 40 and 72.
HEAD_DIMS = (40, 8, 24, 64, 72, 88, 128, 136, 152, 184, 256)
ONE_PIECE = (64, 88, 128)
_POINTERS = {
    "part_ptr": "fp32", "lse_ptr": "fp32", "part_lse_ptr": "fp32", "lengths_ptr": "i64",
    "extra_lengths_ptr": "i64", "mask_ptr": "u8", "cos_ptr": "fp32", "sin_ptr": "fp32",
    "extra_cos_ptr": "fp32", "extra_sin_ptr": "fp32",
}  # fmt: skip
_FLAGS = (
    "HAS_EXTRA_Q", "HAS_EXTRA_K", "HAS_LENGTHS", "HAS_EXTRA_LENGTHS", "HAS_LSE", "SPLIT",
    "HAS_MASK", "HAS_WEIGHT", "ROPE",
)  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def opcode(arch: int, block_m: int, dtype: torch.dtype) -> str:
    """The tensor-core instruction that the products must compile to; "" where Triton may take
    either: a warpgroup's TF32 product cannot read the values as they lie."""
    if block_m < 64 or arch < 90:
        return "HMMA"
    if dtype == torch.float32:
        return ""
    return "HGMMA" if arch < 100 else "UTCHMMA"


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every tile `select` can return, in the terms of fastdiff.ops.AotConfig: the large ones plain,
    with everything but a mask, and with everything; the others with everything but a mask, which
    has the most code."""
    for dtype in DTYPES:
        for D in HEAD_DIMS:
            if dtype == "fp32" and (D > MAX_FP32_HEAD_DIM or D in ONE_PIECE):
                continue
            # Keyed by label: small and large tiles are the same for some widths.
            found = {}
            for arch in SMS:
                for rows in (64, FEW) if dtype == "fp32" else (128, 64, FEW):
                    for kind in ("plain", "joint", "masked") if rows == 128 else ("joint",):
                        config = _attention_config(D, rows, dtype, arch, kind)
                        found[config["label"]] = config
            yield from found.values()
            yield from _other_configs(D, dtype)


def _signature(kernel: Any, constants: dict[str, Any], dtype: str) -> dict[str, str]:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + _POINTERS.get(name, dtype)
        else:
            signature[name] = "fp32" if name in ("scale", "eps") else "i32"
    return signature


def _attention_config(D: int, rows: int, dtype: str, arch: int, kind: str) -> dict[str, Any]:
    d0, d1 = pieces(D, DTYPES[dtype])
    block_m, block_n, warps, stages = tile(d0 + d1, rows, DTYPES[dtype], arch)
    product = opcode(arch, block_m, DTYPES[dtype])
    prepared = select(1, 1, 1, 1, D, DTYPES[dtype], arch).prepare_q
    flags = dict.fromkeys(_FLAGS, kind != "plain")
    flags["HAS_MASK"] = kind == "masked"
    ready = {"NORM": "layer" if kind != "plain" and not prepared else "none"}
    if prepared:
        flags.update(HAS_WEIGHT=False, ROPE=False)
    constants = {
        **flags, **ready, "HEAD_DIM": D, "D0": d0, "D1": d1, "BLOCK_M": block_m,
        "BLOCK_N": block_n, "PRECISION": precision(DTYPES[dtype]), "STAGES": stages,
    }  # fmt: skip
    return {
        "kernel": attention_kernel,
        "signature": _signature(attention_kernel, constants, dtype),
        "constexprs": constants,
        "options": {"num_warps": warps, "num_stages": stages, "maxnreg": MAX_REGISTERS},
        "label": f"{D} {block_m}x{block_n} {kind} {dtype} sm_{arch}",
        "architectures": (arch,),
        "tensor_cores": {arch: product} if product else {},
    }


def _other_configs(D: int, dtype: str) -> Iterator[dict[str, Any]]:
    """prepare_kernel and combine_kernel, the same on every architecture."""
    d0, d1 = pieces(D, DTYPES[dtype])
    PRECISION = precision(DTYPES[dtype])
    prepare = {
        "NORM": "layer", "HAS_WEIGHT": True, "ROPE": True, "HEAD_DIM": D, "D0": d0, "D1": d1,
        "BLOCK_N": PREPARE_BLOCK_N, "PRECISION": PRECISION,
    }  # fmt: skip
    combine = {
        "HAS_EXTRA_Q": True, "HAS_LSE": True, "HEAD_DIM": D, "BLOCK_M": COMBINE_BLOCK_M,
        "BLOCK_D": max(MIN_PIECE, triton.next_power_of_2(D)), "PRECISION": PRECISION,
    }  # fmt: skip
    for kernel, constants in ((prepare_kernel, prepare), (combine_kernel, combine)):
        name = "prepare" if kernel is prepare_kernel else "combine"
        yield {
            "kernel": kernel, "signature": _signature(kernel, constants, dtype),
            "constexprs": constants, "options": {"num_warps": 4}, "label": f"{name} {D} {dtype}",
        }  # fmt: skip
