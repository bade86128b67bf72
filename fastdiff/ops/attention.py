"""attention: softmax(scale * q' k'^T + mask) v per image and head, over one or two segments.

Attention: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762. Joint attention over the tokens
of image and text: Esser et al., 2024 (Stable Diffusion 3), https://arxiv.org/abs/2403.03206.
QK-norm: Dehghani et al., 2023, https://arxiv.org/abs/2302.05442. Rotary embedding: Su et al., 2021,
https://arxiv.org/abs/2104.09864, here with neighbouring columns as pairs, as FLUX has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from fastdiff._ext import DTYPE_CODES, ext, ext_status
from fastdiff.environment import interpreting
from fastdiff.ops._attention_arguments import Arguments, check, wide
from fastdiff.ops._attention_cases import EXAMPLES, SAMPLES
from fastdiff.ops._contract import AotConfig, Implementation, Op, register

Tensor = torch.Tensor
MAX_SCORES = 1 << 27  # the reference keeps as many at once: 1 GiB of float64


def _turned(x: Tensor) -> Tensor:
    """(-x[1], x[0], -x[3], x[2], ...) along the last dimension."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)


def _ready(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str, eps: float
) -> Tensor:
    """Norm and rotation in float32 or wider, rounded once to x's dtype."""
    if norm == "none" and cos is None:
        return x
    y = x.to(wide(x))
    if norm == "layer":
        y = functional.layer_norm(y, y.shape[-1:], eps=eps)
    elif norm == "rms":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if cos is not None and sin is not None:
        rows = [table[: x.shape[1], None].to(y.dtype) for table in (cos, sin)]
        y = y * rows[0] + _turned(y) * rows[1]
    return y.to(x.dtype)


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain PyTorch: (out, extra_out, lse), an empty tensor for what is not asked for.

    Scores, softmax and sums are float32 (float64 for float64 inputs); norm and rotation are
    computed in it and rounded to the dtype of q and k, whose products the scores are.
    """
    call = Arguments(*args, **kwargs)
    q, k, v = (x.to(wide(x)) for x in call.joined(_ready))
    valid, dead, hidden = call.valid_keys(), None, None
    if valid is not None:
        dead = ~valid.any(1)[:, None, None]  # images without any key: they give 0
        hidden = ~(valid[:, None, None] | dead[..., None])

    def attend(q: Tensor) -> tuple[Tensor, Tensor | None]:
        scores = q @ k.transpose(-1, -2) * call.factor
        if hidden is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        lse = scores.logsumexp(-1) if call.return_lse else None
        return torch.softmax(scores, -1) @ v, lse

    row = q.shape[0] * q.shape[1] * k.shape[2]  # scores of one query of every image and head
    if row * q.shape[2] <= MAX_SCORES:
        out, lse = attend(q)
    else:
        outs, lses = zip(*map(attend, q.split(max(1, MAX_SCORES // row), 2)), strict=True)
        out, lse = torch.cat(outs, 2), torch.cat(lses, 2) if call.return_lse else None
    if dead is not None:
        out = out.masked_fill(dead[..., None], 0.0)
        lse = None if lse is None else lse.masked_fill(dead, -math.inf)
    return call.parted(out.to(call.q.dtype), lse)


def fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors as the reference's results."""
    call = Arguments(*args, **kwargs)
    q, lse = call.q, (call.q.shape[0], call.q.shape[2], call.queries)
    return (
        q.new_empty(q.shape),
        q.new_empty((0,) if call.extra_q is None else call.extra_q.shape),
        q.new_empty(lse if call.return_lse else (0,), dtype=wide(q)),
    )


def _ready_as_written(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, norm: str, eps: float
) -> Tensor:
    if norm == "rms":
        x = functional.rms_norm(x, x.shape[-1:], weight, eps)
    elif norm == "layer":
        x = functional.layer_norm(x, x.shape[-1:], weight, eps=eps)
    if cos is not None and sin is not None:
        cos, sin = cos[: x.shape[1], None], sin[: x.shape[1], None]
        x = (x * cos + _turned(x) * sin).to(x.dtype)
    return x


def pattern(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The calls of a transformer block: norm, rotation, concatenation, SDPA."""
    call = Arguments(*args, **kwargs)
    q, k, v = call.joined(_ready_as_written)
    valid = call.valid_keys()
    mask = None if valid is None else valid[:, None, None]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.factor)
    lse = None
    if call.return_lse:
        scores = q @ k.transpose(-1, -2) * call.factor
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        lse = scores.to(wide(scores)).logsumexp(-1)
    return call.parted(out, lse)


# --- checks ---------------------------------------------------------------------------------------


# Without a mask torch's CPU kernel gives 0, not NaN, for a query that is NaN when the keys fill no
# vector register: 16 of them in float32 with AVX-512, fewer elsewhere (seen in torch 2.13).
CPU_SDPA_KEYS = 16
CPP_WIDTH = 1024  # the largest head of the C++ kernel
# It computes 16 queries at a time (8 or 4 without AVX-512), however few there are.
CPP_QUERIES = 16


def _sdpa_supports(*args: Any, **kwargs: Any) -> str:
    call = Arguments(*args, **kwargs)
    if call.return_lse:
        return "scaled_dot_product_attention gives no log-sum-exp"
    if call.q.device.type == "cpu" and call.keys < CPU_SDPA_KEYS:
        return f"there are {call.keys} keys; below {CPU_SDPA_KEYS} torch's CPU kernel hides NaN"
    return ""


def _sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """torch's scaled_dot_product_attention, whatever backend it picks, on joined segments."""
    call = Arguments(*args, **kwargs)
    q, k, v = call.joined(_ready)
    valid = call.valid_keys()
    mask = None if valid is None else valid[:, None, None]
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.factor)
    return call.parted(out, None)


def _cpp_supports(*args: Any, **kwargs: Any) -> str:
    call = Arguments(*args, **kwargs)
    q = call.q
    if q.device.type != "cpu":
        return f"it computes on the CPU, q is on {q.device}"
    if q.dtype not in DTYPE_CODES or q.dtype == torch.float64:
        return f"q is {q.dtype}; the kernel takes float32, float16 and bfloat16"
    if q.shape[-1] > CPP_WIDTH:
        return f"the head dimension is {q.shape[-1]}; the kernel takes up to {CPP_WIDTH}"
    for name in ("q", "k", "v", "extra_q", "extra_k", "extra_v"):
        tensor = getattr(call, name)
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} has stride {tensor.stride(-1)} along its last dimension, not 1"
    return ext_status()


def _cpp(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ kernel; norm and rotation come before it, in plain PyTorch."""
    call = Arguments(*args, **kwargs)
    out, extra_out, lse = fake(*args, **kwargs)
    batch, _, heads, width = call.q.shape
    valid = call.valid_keys()
    valid = None if valid is None else valid.contiguous()

    def ready(x: Tensor | None, weight: Tensor | None, extra: bool) -> Tensor | None:
        cos, sin = (call.extra_cos, call.extra_sin) if extra else (call.cos, call.sin)
        return None if x is None else _ready(x, weight, cos, sin, call.norm, call.eps)

    tensors = (
        *(ready(call.q, call.q_weight, False), ready(call.k, call.k_weight, False), call.v, out),
        *(ready(call.extra_q, call.extra_q_weight, True),),
        *(ready(call.extra_k, call.extra_k_weight, True), call.extra_v),
        None if call.extra_q is None else extra_out,
    )
    rows = [
        [0] * 4 if t is None else [t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)]
        for t in tensors
    ]
    ext().attention(  # type: ignore[union-attr]
        *(rows, call.q.shape[1], call.k.shape[1]),
        *(call.queries - call.q.shape[1], call.keys - call.k.shape[1]),
        *(0 if valid is None else valid.data_ptr(), lse.data_ptr() if call.return_lse else 0),
        *(batch, heads, width, call.factor, DTYPE_CODES[call.q.dtype], torch.get_num_threads()),
    )
    return out, extra_out, lse


def _cpp_is_faster() -> bool:
    """Whether the C++ kernel has AVX-512: measured 1.3 to 9 times as fast as SDPA in every dtype;
    with AVX2 0.7 to 1.4 times, and not measured elsewhere."""
    module = ext()
    return module is not None and module.attention_level() >= 2


def _triton_supports(*args: Any, **kwargs: Any) -> str:
    call = Arguments(*args, **kwargs)
    q = call.q
    if q.device.type != "cuda" and not interpreting():
        return f"it computes on CUDA devices, q is on {q.device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return f"it needs sm_80 or newer, {q.device} is older"
    if q.dtype == torch.float64:
        return "q is torch.float64; the kernels take float32, float16 and bfloat16"
    if q.shape[-1] % 8 or not 8 <= q.shape[-1] <= 256:
        return f"the head dimension is {q.shape[-1]}; the kernels take multiples of 8 up to 256"
    if q.dtype == torch.float32 and q.shape[-1] > 128:
        return f"the head dimension is {q.shape[-1]}; the kernels take float32 up to 128"
    return _unsupported_strides(call)


def _unsupported_strides(call: Arguments) -> str:
    for name, value in call._asdict().items():
        if not isinstance(value, Tensor) or value.numel() == 0:
            continue
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            return f"{name} has stride {value.stride(-1)} along its last dimension, not 1"
        if value.dtype in (torch.bool, torch.int32, torch.int64):
            continue
        outer = [
            stride
            for size, stride in zip(value.shape[:-1], value.stride()[:-1], strict=True)
            if size > 1
        ]
        if any(stride % 8 for stride in outer):
            return f"{name} has strides {value.stride()}, not multiples of 8"
        if outer and value.dim() == 4 and value.shape[1] > 1 and value.stride(1) >= 2**24:
            return f"{name} has stride {value.stride(1)} between rows, not below 2^24"
    return ""


def _triton(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from fastdiff.kernels import attention as kernels

    call = Arguments(*args, **kwargs)
    q = call.q
    batch, _, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    empty = q.new_zeros(0)
    extra_out = (
        empty
        if call.extra_q is None
        else torch.empty(call.extra_q.shape, dtype=q.dtype, device=q.device)
    )
    lse = q.new_zeros((batch, heads, call.queries) if call.return_lse else 0, dtype=torch.float32)
    if out.numel() + extra_out.numel():
        main = kernels.Segment(
            q, call.k, call.v, out, call.key_lengths, call.q_weight, call.k_weight,
            call.cos, call.sin,
        )  # fmt: skip
        extra = kernels.Segment(
            call.extra_q, call.extra_k, call.extra_v,
            None if call.extra_q is None else extra_out, call.extra_key_lengths,
            call.extra_q_weight, call.extra_k_weight, call.extra_cos, call.extra_sin,
        )  # fmt: skip
        mask = None if call.key_mask is None else call.key_mask.view(torch.uint8)
        kernels.launch(
            main, extra, mask, lse if call.return_lse else None, call.factor, call.norm, call.eps
        )
    return out, extra_out, lse


# --- which implementation "auto" tries first ------------------------------------------------------


class Route(NamedTuple):
    """What the choice depends on: lengths by their power of two, so that one measurement serves
    neighbouring shapes. fused: whether the call has a second segment, a norm or a rotation."""

    arch: int
    dtype: torch.dtype
    head_dim: int
    queries_log2: int
    keys_log2: int
    fused: bool


# Measured choices, implementation by route. Empty as shipped: a tuner that has timed the
# implementations on this machine writes here, and `prefer` looks here first.
MEASURED: dict[Route, str] = {}

# Head dimensions of two pieces: exact-fit tiles multiply 25 % to 37 % fewer columns than padding to
# a power of two. For the others cuDNN and FlashAttention, behind SDPA, have no padding to lose.
EXACT_FIT = frozenset({40, 48, 72, 80, 88, 96, 136, 144, 152, 160, 168, 176, 184, 192})


def prefer(*args: Any, **kwargs: Any) -> str:
    """The implementation that "auto" tries first for a call."""
    call = Arguments(*args, **kwargs)
    if call.q.device.type != "cuda":
        return "cpp" if call.queries >= CPP_QUERIES and _cpp_is_faster() else "sdpa"
    fused = call.extra_k is not None or call.norm != "none" or call.cos is not None
    if MEASURED:
        major, minor = torch.cuda.get_device_capability(call.q.device)
        lengths = (call.queries.bit_length(), call.keys.bit_length())
        route = Route(10 * major + minor, call.q.dtype, call.q.shape[-1], *lengths, fused)
        if route in MEASURED:
            return MEASURED[route]
    if fused:
        return "triton"
    # float32 is three products of tensor cores here and in SDPA: nothing to win.
    exact = call.q.shape[-1] in EXACT_FIT and call.q.dtype != torch.float32
    return "triton" if exact else "sdpa"


def bytes_moved(*args: Any, **kwargs: Any) -> int:
    """Every input read once, every result written once."""
    call = Arguments(*args, **kwargs)
    total = sum(t.numel() * t.element_size() for t in call if isinstance(t, Tensor))
    for written in (call.q, call.extra_q):
        if written is not None:
            total += written.numel() * written.element_size()
    return total + (call.q[:, 0, :, 0].numel() * call.queries * 4 if call.return_lse else 0)


def flops(*args: Any, **kwargs: Any) -> int:
    """The two products over every key, as if none were masked; softmax and norms do not count."""
    call = Arguments(*args, **kwargs)
    batch, _, heads, width = call.q.shape
    return 4 * batch * heads * call.queries * call.keys * width


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import attention as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="attention",
        schema="(Tensor q, Tensor k, Tensor v, Tensor? extra_q=None, Tensor? extra_k=None, "
        "Tensor? extra_v=None, Tensor? key_lengths=None, Tensor? extra_key_lengths=None, "
        'Tensor? key_mask=None, str norm="none", Tensor? q_weight=None, Tensor? k_weight=None, '
        "Tensor? extra_q_weight=None, Tensor? extra_k_weight=None, Tensor? cos=None, "
        "Tensor? sin=None, Tensor? extra_cos=None, Tensor? extra_sin=None, float? scale=None, "
        'float eps=1e-06, bool return_lse=False, str impl="auto") -> (Tensor, Tensor, Tensor)',
        reference=reference,
        pattern=pattern,
        check=check,
        fake=fake,
        implementations=(
            Implementation("triton", _triton_supports, _triton),
            Implementation("cpp", _cpp_supports, _cpp),
            Implementation("sdpa", _sdpa_supports, _sdpa),
        ),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
        prefer=prefer,
    )
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    extra_q: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_lengths: Tensor | None = None,
    extra_key_lengths: Tensor | None = None,
    key_mask: Tensor | None = None,
    norm: str = "none",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    extra_q_weight: Tensor | None = None,
    extra_k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    extra_cos: Tensor | None = None,
    extra_sin: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale * q' k'^T) v per image and head, q' = rope(norm(q)) and k' = rope(norm(k)).

    q: [B, Sq, H, D], k, v: [B, Sk, H, D]; float32, float16, bfloat16 (float64 by torch). Views of a
    fused projection go in as they are.
    extra_q, extra_k, extra_v: a second segment, of another length (joint attention of image and
        text). Every query sees the keys of both. extra_q may be absent.
    key_lengths, extra_key_lengths: [B] int32 or int64, the keys of a segment that count. key_mask:
        [B, Sk + extra Sk] bool, True for keys that count. An image without any key gives 0 (as
        SDPA does; torch.softmax gives NaN). Masked keys and values must be finite.
    norm: "none", "rms" or "layer", over D, without bias; weights: [D] for every tensor or for none.
    cos, sin: [S, D], row i for position i of q and k; neighbouring columns are a pair:
        x * cos + (-x[1], x[0], -x[3], x[2], ...) * sin. extra_cos, extra_sin: the same for the
        second segment; without them it is not rotated. Weights and tables: q's dtype or float32.
    scale: positive; D ** -0.5 by default.
    impl: "auto", "triton", "cpp" (CPU), "sdpa" (torch, any backend) or "reference".

    Returns out [B, Sq, H, D], or a tuple of it, extra_out [B, extra Sq, H, D] if there is extra_q,
    and, with return_lse, the log-sum-exp [B, H, Sq + extra Sq], float32 or wider (-inf for an image
    without any key). Differentiable through the reference, which holds all scores.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    out, extra_out, lse = torch.ops.fastdiff.attention(
        q, k, v, extra_q, extra_k, extra_v, key_lengths, extra_key_lengths, key_mask,
        norm, q_weight, k_weight, extra_q_weight, extra_k_weight,
        cos, sin, extra_cos, extra_sin, scale, eps, return_lse, impl,
    )  # fmt: skip
    results = [out]
    if extra_q is not None:
        results.append(extra_out)
    if return_lse:
        results.append(lse)
    return results[0] if len(results) == 1 else tuple(results)
