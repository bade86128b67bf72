"""attention: softmax(scale * q' k'^T + mask) v per image and head, over one or two segments.

Attention: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762. Joint attention over the tokens
of image and text: Esser et al., 2024 (Stable Diffusion 3), https://arxiv.org/abs/2403.03206.
QK-norm: Dehghani et al., 2023, https://arxiv.org/abs/2302.05442. Rotary embedding: Su et al., 2021,
https://arxiv.org/abs/2104.09864, here with neighbouring columns as pairs, as FLUX has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from fastdiff.environment import interpreting
from fastdiff.ops._attention_cases import EXAMPLES, SAMPLES
from fastdiff.ops._contract import AotConfig, Implementation, Op, register

Tensor = torch.Tensor
NORMS = ("none", "rms", "layer")
MAX_SCORES = 1 << 27  # the reference keeps as many at once: 1 GiB of float64
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Arguments(NamedTuple):
    """The arguments of one call, in the order and with the defaults of the schema."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_q: Tensor | None = None
    extra_k: Tensor | None = None
    extra_v: Tensor | None = None
    key_lengths: Tensor | None = None
    extra_key_lengths: Tensor | None = None
    key_mask: Tensor | None = None
    norm: str = "none"
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    extra_q_weight: Tensor | None = None
    extra_k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    extra_cos: Tensor | None = None
    extra_sin: Tensor | None = None
    scale: float | None = None
    eps: float = 1e-6
    return_lse: bool = False

    @property
    def factor(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    @property
    def keys(self) -> int:
        """Of both segments."""
        return self.k.shape[1] + (0 if self.extra_k is None else self.extra_k.shape[1])

    @property
    def queries(self) -> int:
        return self.q.shape[1] + (0 if self.extra_q is None else self.extra_q.shape[1])

    def valid_keys(self) -> Tensor | None:
        """[B, keys] bool, or None when every key counts."""
        valid = self.key_mask
        for lengths, first, count in (
            (self.key_lengths, 0, self.k.shape[1]),
            (self.extra_key_lengths, self.k.shape[1], self.keys - self.k.shape[1]),
        ):
            if lengths is not None:
                at = torch.arange(self.keys, device=self.q.device)
                counts = (at < first + lengths[:, None]) | (at < first) | (at >= first + count)
                valid = counts if valid is None else valid & counts
        return valid

    def joined(self, ready: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, S, D] of both segments one after the other, q and k made ready by
        ready(x, weight, cos, sin, norm, eps)."""

        def join(first: Tensor, second: Tensor | None) -> Tensor:
            both = first if second is None else torch.cat([first, second], 1)
            return both.transpose(1, 2)

        def one(x: Tensor | None, weight: Tensor | None, extra: bool) -> Any:
            cos, sin = (self.extra_cos, self.extra_sin) if extra else (self.cos, self.sin)
            return None if x is None else ready(x, weight, cos, sin, self.norm, self.eps)

        return (
            join(one(self.q, self.q_weight, False), one(self.extra_q, self.extra_q_weight, True)),
            join(one(self.k, self.k_weight, False), one(self.extra_k, self.extra_k_weight, True)),
            join(self.v, self.extra_v),
        )

    def parted(self, out: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The op's results from out [B, H, S, D] of both segments; what is not asked for is empty
        (and, to autograd, depends on q)."""
        out = out.transpose(1, 2)
        first = self.q.shape[1]
        nothing = self.q[:0]
        return (
            # A copy only where the layout is another: flattened, so that strides of ones agree too.
            out.flatten().view(out.shape) if self.extra_q is None else _contiguous(out[:, :first]),
            nothing.sum((1, 2, 3)) if self.extra_q is None else _contiguous(out[:, first:]),
            nothing.sum((1, 2, 3), dtype=_wide(nothing)) if lse is None else lse,
        )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _contiguous(x: Tensor) -> Tensor:
    """A tensor of its own: two results of an op may not share their memory."""
    return x.clone(memory_format=torch.contiguous_format)


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
    y = x.to(_wide(x))
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
    q, k, v = (x.to(_wide(x)) for x in call.joined(_ready))
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
        q.new_empty(lse if call.return_lse else (0,), dtype=_wide(q)),
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
        lse = scores.to(_wide(scores)).logsumexp(-1)
    return call.parted(out, lse)


# --- checks ---------------------------------------------------------------------------------------


def check(*args: Any, **kwargs: Any) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    call = Arguments(*args, **kwargs)
    q = call.q
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, float16, bfloat16 or float64, got {q.dtype}")
    if q.dim() != 4:
        raise ValueError(f"q must have shape [B, S, H, D], got {tuple(q.shape)}")
    if call.k.dim() != 4 or call.k.shape[1] < 1:
        raise ValueError(f"k must have shape [B, S >= 1, H, D], got {tuple(call.k.shape)}")
    if (call.extra_k is None) != (call.extra_v is None):
        raise ValueError("extra_k and extra_v must come together, got one of them")
    if call.extra_q is not None and call.extra_k is None:
        raise ValueError("extra_q must come with extra_k and extra_v, got extra_k=None")
    _check_tensors(call)
    _check_keys(call)
    _check_norm(call)
    _check_tables(call)
    if not (call.factor > 0 and math.isfinite(call.factor)):
        raise ValueError(f"scale must be positive and finite, got {call.scale}")
    if not (call.eps > 0 and math.isfinite(call.eps)):
        raise ValueError(f"eps must be positive and finite, got {call.eps}")


def _check_tensors(call: Arguments) -> None:
    """Shapes and dtypes of the segments; every tensor on one device."""
    batch, _, heads, width = call.q.shape
    if heads < 1 or width < 1:
        raise ValueError(f"q must have at least one head and column, got {tuple(call.q.shape)}")
    for name in ("k", "v", "extra_q", "extra_k", "extra_v"):
        tensor = getattr(call, name)
        if tensor is None:
            continue
        length: Any = "S"
        if name.endswith("v"):
            length = getattr(call, name[:-1] + "k").shape[1]
        elif tensor.dim() == 4:
            length = tensor.shape[1]
        if tuple(tensor.shape) != (batch, length, heads, width):
            raise ValueError(
                f"{name} must have shape [{batch}, {length}, {heads}, {width}], "
                f"got {tuple(tensor.shape)}"
            )
        if tensor.dtype != call.q.dtype:
            raise TypeError(f"{name} must be {call.q.dtype} like q, got {tensor.dtype}")
    for name, value in call._asdict().items():
        if isinstance(value, Tensor) and value.device != call.q.device:
            raise ValueError(f"{name} must be on {call.q.device} like q, got {value.device}")


def _check_keys(call: Arguments) -> None:
    batch = call.q.shape[0]
    if call.extra_key_lengths is not None and call.extra_k is None:
        raise ValueError("extra_key_lengths must come with extra_k, got extra_k=None")
    for name in ("key_lengths", "extra_key_lengths"):
        lengths = getattr(call, name)
        if lengths is None:
            continue
        if tuple(lengths.shape) != (batch,):
            raise ValueError(f"{name} must have shape ({batch},), got {tuple(lengths.shape)}")
        if lengths.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} must be int32 or int64, got {lengths.dtype}")
    if call.key_mask is not None:
        if tuple(call.key_mask.shape) != (batch, call.keys):
            raise ValueError(
                f"key_mask must have shape {(batch, call.keys)}, got {tuple(call.key_mask.shape)}"
            )
        if call.key_mask.dtype != torch.bool:
            raise TypeError(f"key_mask must be bool, got {call.key_mask.dtype}")


def _check_same(call: Arguments, names: Iterable[str]) -> None:
    """One dtype for those that are there: q's, or float32."""
    first, dtype = "", call.q.dtype
    for name in names:
        tensor = getattr(call, name)
        if tensor is None:
            continue
        if tensor.dtype not in (call.q.dtype, torch.float32):
            raise TypeError(f"{name} must be {call.q.dtype} like q or float32, got {tensor.dtype}")
        if first and tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype} like {first}, got {tensor.dtype}")
        first, dtype = first or name, tensor.dtype


def _check_norm(call: Arguments) -> None:
    if call.norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {call.norm!r}")
    names = ["q_weight", "k_weight", "extra_q_weight", "extra_k_weight"]
    given = [name for name in names if getattr(call, name) is not None]
    if given and call.norm == "none":
        raise ValueError(f"{given[0]} must come with norm='rms' or 'layer', got norm='none'")
    of = dict(zip(names, (call.q, call.k, call.extra_q, call.extra_k), strict=True))
    for name in names if given else ():
        weight = getattr(call, name)
        if (weight is None) != (of[name] is None):
            needed = "given, as others are" if weight is None else "None without its tensor"
            raise ValueError(f"{name} must be {needed}, got {given}")
        if weight is not None and tuple(weight.shape) != (call.q.shape[-1],):
            raise ValueError(
                f"{name} must have shape ({call.q.shape[-1]},), got {tuple(weight.shape)}"
            )
    _check_same(call, names)


def _check_tables(call: Arguments) -> None:
    segments = (
        ("cos", "sin", call.q, call.k),
        ("extra_cos", "extra_sin", call.extra_q, call.extra_k),
    )
    for *names, q, k in segments:
        tables = [getattr(call, name) for name in names]
        if (tables[0] is None) != (tables[1] is None):
            raise ValueError(f"{names[0]} and {names[1]} must come together, got one of them")
        if tables[0] is None:
            continue
        if k is None:
            raise ValueError(f"{names[0]} must come with extra_k, got extra_k=None")
        if call.q.shape[-1] % 2:
            raise ValueError(
                f"{names[0]} must come with an even head dimension, got {call.q.shape[-1]}"
            )
        rows = max(k.shape[1], 0 if q is None else q.shape[1])
        for name, table in zip(names, tables, strict=True):
            if table.dim() != 2 or table.shape[0] < rows or table.shape[1] != call.q.shape[-1]:
                raise ValueError(
                    f"{name} must have shape [>= {rows}, {call.q.shape[-1]}], "
                    f"got {tuple(table.shape)}"
                )
        if tables[0].shape != tables[1].shape:
            raise ValueError(
                f"{names[1]} must have shape {tuple(tables[0].shape)} like {names[0]}, "
                f"got {tuple(tables[1].shape)}"
            )
    _check_same(call, ("cos", "sin", "extra_cos", "extra_sin"))


# --- implementations ------------------------------------------------------------------------------


# Without a mask torch's CPU kernel gives 0, not NaN, for a query that is NaN when the keys fill no
# vector register: 16 of them in float32 with AVX-512, fewer elsewhere (seen in torch 2.13).
CPU_SDPA_KEYS = 16


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
        return "sdpa"
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
    impl: "auto", "triton", "sdpa" (torch, any backend) or "reference".

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
