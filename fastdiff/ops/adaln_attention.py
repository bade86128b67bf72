"""adaln_attention: x + gate * (attention(modulate(norm(x))) W^T + b), a DiT block's first half.

adaLN-Zero: Peebles and Xie, 2022 (DiT), https://arxiv.org/abs/2212.09748. Over two streams, image
and text, with modulations and projections of their own: Esser et al., 2024 (MMDiT, Stable
Diffusion 3), https://arxiv.org/abs/2403.03206; with QK-norm and rotation it is FLUX's double block.

The pieces are ops of their own: layer_norm_modulate, attention, gate_residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from fastdiff.ops import _rows
from fastdiff.ops._adaln_cases import EXAMPLES, SAMPLES
from fastdiff.ops._contract import AotConfig, Implementation, Op, register
from fastdiff.ops._strides import why_not_triton
from fastdiff.ops.attention import OP as ATTENTION
from fastdiff.ops.gate_residual import OP as GATE_RESIDUAL
from fastdiff.ops.layer_norm_modulate import OP as LAYER_NORM_MODULATE
from fastdiff.ops.linear_gate import check_layer, why_not_rows

Tensor = torch.Tensor


class Stream(NamedTuple):
    """One of the streams of tokens, with what belongs to it."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor | None
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor | None
    out_bias: Tensor | None
    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None

    def projection(self) -> tuple[int, Tensor, Tensor | None]:
        """How many of q, k, v are needed, and the layer: without a result, no queries."""
        if self.out_weight is not None:
            return 3, self.qkv_weight, self.qkv_bias
        first = self.qkv_weight.shape[0] // 3
        return 2, self.qkv_weight[first:], None if self.qkv_bias is None else self.qkv_bias[first:]


class Arguments(NamedTuple):
    """The arguments of one call, in the order and with the defaults of the schema."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    num_heads: int
    norm: str = "none"
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    mean: Tensor | None = None
    rstd: Tensor | None = None
    extra_x: Tensor | None = None
    extra_shift: Tensor | None = None
    extra_scale: Tensor | None = None
    extra_gate: Tensor | None = None
    extra_qkv_weight: Tensor | None = None
    extra_qkv_bias: Tensor | None = None
    extra_out_weight: Tensor | None = None
    extra_out_bias: Tensor | None = None
    extra_q_weight: Tensor | None = None
    extra_k_weight: Tensor | None = None
    extra_cos: Tensor | None = None
    extra_sin: Tensor | None = None
    extra_mean: Tensor | None = None
    extra_rstd: Tensor | None = None
    eps: float = 1e-6
    qk_eps: float = 1e-6
    return_statistics: bool = False

    def streams(self) -> list[Stream]:
        """The stream of x and, if there is one, that of extra_x."""
        prefixes = ("", "extra_") if self.extra_x is not None else ("",)
        return [Stream(*(getattr(self, p + name) for name in Stream._fields)) for p in prefixes]

    def inner(self) -> int:
        """Columns of q, of k and of v."""
        return self.qkv_weight.shape[0] // 3

    def attention(self, projected: list[Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """The attention op's arguments, from what `Stream.projection` gave: [B, S, 2 or 3 inner].
        They are views."""
        given: dict[str, Any] = {"norm": self.norm, "eps": self.qk_eps}
        for name in ("q_weight", "k_weight", "cos", "sin"):
            given |= {name: getattr(self, name), f"extra_{name}": getattr(self, f"extra_{name}")}
        width = self.inner() // self.num_heads
        first, *others = (y.unflatten(-1, (-1, self.num_heads, width)) for y in projected)
        for extra in others:
            *q, given["extra_k"], given["extra_v"] = extra.unbind(2)
            given["extra_q"] = q[0] if q else None
        return first.unbind(2), given


Project = Callable[[Stream, float], Tensor]
Attend = Callable[..., tuple[Tensor, ...]]
Finish = Callable[[Stream, Tensor, float | None], Iterable[Tensor | None]]
RESULTS = 3  # of a stream: x', and the mean and rstd of its rows


def _compose(
    call: Arguments, project: Project, attend: Attend, finish: Finish
) -> list[Tensor | None]:
    """The op from its three parts: RESULTS of x, then of extra_x, None where not asked for.

    project(stream, eps): the projection to q, k and v. attend: of the attention op's arguments.
    finish(stream, y, eps): RESULTS, without statistics where eps is None.
    """
    streams = call.streams()
    q_k_v, given = call.attention([project(stream, call.eps) for stream in streams])
    attended = attend(*q_k_v, **given)
    results: list[Tensor | None] = []
    for stream, y in zip(streams, attended, strict=False):
        if stream.out_weight is not None:
            eps = call.eps if call.return_statistics else None
            results += finish(stream, y.flatten(2), eps)
    return results + [None] * (2 * RESULTS - len(results))


def _wide(x: Tensor) -> torch.dtype:
    """The dtype of statistics: float32, or wider."""
    return torch.promote_types(x.dtype, torch.float32)


# --- plain PyTorch --------------------------------------------------------------------------------


def _normalised(stream: Stream, eps: float, norm: Callable[..., Tensor]) -> Tensor:
    """modulate(norm(x)), by `norm` unless the statistics are given."""
    x, scale, shift = stream.x, stream.scale, stream.shift
    if stream.mean is None or stream.rstd is None:
        return norm(x, scale, shift, eps=eps)
    y = (x.to(_wide(x)) - stream.mean[..., None]) * stream.rstd[..., None]
    y = y * (1 + _rows.like_rows(x, scale)) + _rows.like_rows(x, shift)
    return y.to(x.dtype)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of x's rows, [B, S]."""
    x = x.to(_wide(x))
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1)
    return mean.squeeze(-1), torch.rsqrt(variance + eps)


def _eager(
    call: Arguments,
    norm: Callable[..., Tensor],
    attend: Attend,
    add: Callable[..., Tensor],
    statistics: Callable[[Tensor, float], tuple[Tensor, Tensor]] = _statistics,
) -> list[Tensor | None]:
    """The op from three others and torch's linear layers."""

    def project(stream: Stream, eps: float) -> Tensor:
        _, weight, bias = stream.projection()
        return functional.linear(_normalised(stream, eps, norm), weight, bias)

    def finish(stream: Stream, y: Tensor, eps: float | None) -> tuple[Tensor | None, ...]:
        assert stream.out_weight is not None  # `_compose` looked
        x = add(stream.x, functional.linear(y, stream.out_weight, stream.out_bias), stream.gate)
        return x, *((None, None) if eps is None else statistics(x, eps))

    return _compose(call, project, attend, finish)


def _differentiable(call: Arguments, results: list[Tensor | None]) -> tuple[Tensor, ...]:
    """The results with an empty tensor for None, which depends on x, as autograd wants it."""
    nothing = call.x[:0]
    dtypes = (nothing.dtype, _wide(nothing), _wide(nothing)) * 2
    return tuple(
        nothing.sum((1, 2), dtype=dtype) if result is None else result
        for result, dtype in zip(results, dtypes, strict=True)
    )


def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The references of the three ops, and torch's linear layers, one after the other."""
    call = Arguments(*args, **kwargs)
    parts = (LAYER_NORM_MODULATE.reference, ATTENTION.reference, GATE_RESIDUAL.reference)
    return _differentiable(call, _eager(call, *parts))  # type: ignore[arg-type]


def pattern(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The calls of a DiT block: modulate(norm1(x)), qkv, attention, proj, gate."""
    call = Arguments(*args, **kwargs)
    parts = (LAYER_NORM_MODULATE.pattern, ATTENTION.pattern, GATE_RESIDUAL.pattern)
    return _differentiable(call, _eager(call, *parts))  # type: ignore[arg-type]


# --- checks ---------------------------------------------------------------------------------------


def check(*args: Any, **kwargs: Any) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    call = Arguments(*args, **kwargs)
    _rows.check_x(call.x)
    _check_given(call)
    if call.num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {call.num_heads}")
    for prefix, stream in zip(("", "extra_"), call.streams(), strict=False):
        _check_stream(call, prefix, stream)
    _rows.check_eps(call.eps)
    if not 0 < call.qk_eps < math.inf:
        raise ValueError(f"qk_eps must be positive and finite, got {call.qk_eps}")
    # Norm, weights and tables are the attention op's: it looks at q, k and v of the right shape.
    inner = call.inner()
    rows = [
        stream.x[..., :1].expand(*stream.x.shape[:2], stream.projection()[0] * inner)
        for stream in call.streams()
    ]
    q_k_v, given = call.attention(rows)
    ATTENTION.check(*q_k_v, **given)


def _check_given(call: Arguments) -> None:
    """What must come together."""
    given = {name for name, value in call._asdict().items() if value is not None}
    for name in Stream._fields:
        if f"extra_{name}" in given and call.extra_x is None:
            raise ValueError(f"extra_{name} must come with extra_x, got extra_x=None")
    if call.extra_x is not None:
        for name in ("extra_shift", "extra_scale", "extra_qkv_weight"):
            if name not in given:
                raise ValueError(f"{name} must come with extra_x, got None")
    for first, second in (
        ("extra_gate", "extra_out_weight"), ("mean", "rstd"), ("extra_mean", "extra_rstd")
    ):  # fmt: skip
        if (first in given) != (second in given):
            raise ValueError(f"{first} and {second} must come together, got one of them")
    for name, other in (
        ("extra_out_bias", "extra_out_weight"), ("extra_q_weight", "extra_out_weight")
    ):  # fmt: skip
        if name in given and other not in given:
            raise ValueError(f"{name} must come with {other}, got {other}=None")


def _check_stream(call: Arguments, prefix: str, stream: Stream) -> None:
    """Shapes, dtypes and devices of what belongs to one stream."""
    x, name = stream.x, f"{prefix}x"
    batch = call.x.shape[0]
    if x.dim() != 3 or x.shape[0] != batch or 0 in x.shape[1:]:
        raise ValueError(f"{name} must have shape [{batch}, S >= 1, C >= 1], got {tuple(x.shape)}")
    if x.dtype != call.x.dtype:
        raise TypeError(f"{name} must be {call.x.dtype} like x, got {x.dtype}")
    if x.device != call.x.device:
        raise ValueError(f"{name} must be on {call.x.device} like x, got {x.device}")
    given = {"shift": stream.shift, "scale": stream.scale, "gate": stream.gate}
    _rows.check_modulation(x, **{f"{prefix}{of}": tensor for of, tensor in given.items()})
    names = (f"{prefix}qkv_weight", f"{prefix}qkv_bias")
    check_layer(x.shape[-1], ("x", x), stream.qkv_weight, stream.qkv_bias, names)
    rows, inner = stream.qkv_weight.shape[0], call.inner()
    if prefix and rows != 3 * inner:
        raise ValueError(f"{names[0]} must have {3 * inner} rows like qkv_weight, got {rows}")
    if rows % (3 * call.num_heads):
        raise ValueError(
            f"{names[0]} must have 3 * {call.num_heads} * D rows for num_heads={call.num_heads}, "
            f"got {rows}"
        )
    if stream.out_weight is not None:
        names = (f"{prefix}out_weight", f"{prefix}out_bias")
        check_layer(inner, ("x", x), stream.out_weight, stream.out_bias, names)
        if stream.out_weight.shape[0] != x.shape[-1]:
            raise ValueError(
                f"{names[0]} must have shape {(x.shape[-1], inner)}, "
                f"got {tuple(stream.out_weight.shape)}"
            )
    for name, tensor in ((f"{prefix}mean", stream.mean), (f"{prefix}rstd", stream.rstd)):
        if tensor is None:
            continue
        if tensor.shape != x.shape[:2]:
            raise ValueError(
                f"{name} must have shape {tuple(x.shape[:2])}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype != _wide(x):
            raise TypeError(f"{name} must be {_wide(x)}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")


# --- implementations ------------------------------------------------------------------------------


def _filled(call: Arguments, results: list[Tensor | None]) -> tuple[Tensor, ...]:
    dtypes = (call.x.dtype, _wide(call.x), _wide(call.x)) * 2
    return tuple(
        call.x.new_empty(0, dtype=dtype) if result is None else result
        for result, dtype in zip(results, dtypes, strict=True)
    )


def _best(op: Op) -> Callable[..., Any]:
    """The op by the implementation that "auto" takes for a call, without the dispatcher."""
    return lambda *args, **kwargs: op.choose("auto", *args, **kwargs)(*args, **kwargs)


def _layer_norm_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `_statistics`, by torch's layer norm, which is one pass but has no gradient of them."""
    _, mean, rstd = torch.native_layer_norm(x.to(_wide(x)), x.shape[-1:], None, None, eps)
    return mean.squeeze(-1), rstd.squeeze(-1)


def _composed(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """The three ops, each as fast as there is one, and torch's linear layers."""
    call = Arguments(*args, **kwargs)
    parts = (_best(LAYER_NORM_MODULATE), _best(ATTENTION), _best(GATE_RESIDUAL))
    return _filled(call, _eager(call, *parts, _layer_norm_statistics))


def _triton_supports(*args: Any, **kwargs: Any) -> str:
    call = Arguments(*args, **kwargs)
    if reason := why_not_triton(call.x):
        return reason
    for prefix, stream in zip(("", "extra_"), call.streams(), strict=False):
        if reason := _unsupported(prefix, stream):
            return reason
    return ""


def _unsupported(prefix: str, stream: Stream) -> str:
    x = stream.x
    for weight, bias in (
        (stream.qkv_weight, stream.qkv_bias),
        (stream.out_weight, stream.out_bias),
    ):
        if weight is not None and (reason := why_not_rows(weight, bias)):
            return reason
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return f"{prefix}x has stride {x.stride(-1)} along its channels, not 1"
    if max(x.shape[-1], x.stride(1) if x.shape[1] > 1 else 0) >= 2**24:
        return f"{prefix}x has stride {x.stride(1)} between tokens, not below 2^24"
    for name in ("shift", "scale", "gate"):
        tensor = getattr(stream, name)
        if tensor is None:
            continue
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{prefix}{name} has strided channels"
        if x.shape[1] > 1 and _rows.like_rows(x, tensor).expand(x.shape).stride(1):
            return f"{prefix}{name} differs between tokens; the kernel takes one row per image"
    for name in ("mean", "rstd"):
        tensor = getattr(stream, name)
        if tensor is not None and not tensor.is_contiguous():
            return f"{prefix}{name} has strides {tensor.stride()}: it must be contiguous"
    return ""


def _per_image(x: Tensor, modulation: Tensor) -> Tensor:
    """[B, C], a view."""
    return _rows.like_rows(x, modulation).expand(x.shape)[:, 0]


def _triton(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    from fastdiff.kernels import adaln_attention as kernels

    def empty(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=x.dtype if dtype is None else dtype, device=x.device)

    def statistics(x: Tensor) -> kernels.Statistics:
        return kernels.Statistics(*(empty(x, *x.shape[:2], dtype=torch.float32) for _ in "12"))

    def project(stream: Stream, eps: float) -> Tensor:
        x = stream.x
        _, weight, bias = stream.projection()
        out = empty(x, *x.shape[:2], weight.shape[0])
        if x.numel() == 0:
            return out
        if stream.mean is None or stream.rstd is None:
            found = statistics(x)
            kernels.statistics(x, eps, found)
        else:
            found = kernels.Statistics(stream.mean, stream.rstd)
        scale, shift = _per_image(x, stream.scale), _per_image(x, stream.shift)
        kernels.launch(x, weight, bias, out, modulation=(found, scale, shift))
        return out

    def finish(stream: Stream, y: Tensor, eps: float | None) -> tuple[Tensor | None, ...]:
        x, gate = stream.x, stream.gate
        assert stream.out_weight is not None  # `_compose` looked
        assert gate is not None
        out, found = empty(x, *x.shape), None if eps is None else statistics(x)
        if x.numel():
            following = None if found is None or eps is None else (found, eps)
            gated = (x, _per_image(x, gate))
            kernels.launch(
                y, stream.out_weight, stream.out_bias, out, gated=gated, following=following
            )
        return (out, *found) if found else (out, None, None)

    call = Arguments(*args, **kwargs)
    return _filled(call, _compose(call, project, _best(ATTENTION), finish))


# What decides on a GPU; neither was measured. Not writing the normalised tensor and the product
# before the gate saves four transfers of x: against the products' 8 C^2 operations per token that
# is C operations per byte (16 bits), where an A100 does about 150 and an H100 300 in the time of
# one byte. Beyond this width it saves less than a fifth of the products' time (H100), which
# cuBLAS's own advantage over products in Triton may be. float32 products are a fallback here: they
# run without tensor cores, in small tiles.
MAX_FUSED_WIDTH = 1536
MIN_FUSED_TOKENS = 64  # the least block of rows, which does not cross images


def prefer(*args: Any, **kwargs: Any) -> str:
    """The implementation that "auto" tries first for a call."""
    call = Arguments(*args, **kwargs)
    fused = call.x.shape[-1] <= MAX_FUSED_WIDTH and call.x.shape[1] >= MIN_FUSED_TOKENS
    fused = fused and call.x.device.type == "cuda" and call.x.dtype != torch.float32
    return "triton" if fused else "composed"


def bytes_moved(*args: Any, **kwargs: Any) -> int:
    """Every input read once, every result written once."""
    call = Arguments(*args, **kwargs)
    total = sum(t.numel() * t.element_size() for t in call if isinstance(t, Tensor))
    for stream in call.streams():
        if stream.out_weight is not None:
            total += stream.x.numel() * stream.x.element_size()
            if call.return_statistics:
                total += 2 * stream.x[..., 0].numel() * _wide(stream.x).itemsize
    return total


def flops(*args: Any, **kwargs: Any) -> int:
    """The projections' products and the attention's; what comes beside them is not counted."""
    call = Arguments(*args, **kwargs)
    total = queries = keys = 0
    for stream in call.streams():
        weights = [stream.projection()[1], stream.out_weight]
        tokens = stream.x[..., 0].numel()
        total += sum(2 * tokens * weight.numel() for weight in weights if weight is not None)
        keys += stream.x.shape[1]
        queries += 0 if stream.out_weight is None else stream.x.shape[1]
    return total + 4 * call.x.shape[0] * queries * keys * call.inner()


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import adaln_attention as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="adaln_attention",
        schema="(Tensor x, Tensor shift, Tensor scale, Tensor gate, Tensor qkv_weight, "
        "Tensor? qkv_bias, Tensor out_weight, Tensor? out_bias, int num_heads, "
        'str norm="none", Tensor? q_weight=None, Tensor? k_weight=None, Tensor? cos=None, '
        "Tensor? sin=None, Tensor? mean=None, Tensor? rstd=None, Tensor? extra_x=None, "
        "Tensor? extra_shift=None, Tensor? extra_scale=None, Tensor? extra_gate=None, "
        "Tensor? extra_qkv_weight=None, Tensor? extra_qkv_bias=None, "
        "Tensor? extra_out_weight=None, Tensor? extra_out_bias=None, "
        "Tensor? extra_q_weight=None, Tensor? extra_k_weight=None, Tensor? extra_cos=None, "
        "Tensor? extra_sin=None, Tensor? extra_mean=None, Tensor? extra_rstd=None, "
        "float eps=1e-06, float qk_eps=1e-06, bool return_statistics=False, "
        'str impl="auto") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)',
        reference=reference,
        pattern=pattern,
        check=check,
        implementations=(
            Implementation("triton", _triton_supports, _triton),
            Implementation("composed", lambda *args, **kwargs: "", _composed),
        ),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
        prefer=prefer,
    )
)


def adaln_attention(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    gate: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    *,
    norm: str = "none",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    extra_x: Tensor | None = None,
    extra_shift: Tensor | None = None,
    extra_scale: Tensor | None = None,
    extra_gate: Tensor | None = None,
    extra_qkv_weight: Tensor | None = None,
    extra_qkv_bias: Tensor | None = None,
    extra_out_weight: Tensor | None = None,
    extra_out_bias: Tensor | None = None,
    extra_q_weight: Tensor | None = None,
    extra_k_weight: Tensor | None = None,
    extra_cos: Tensor | None = None,
    extra_sin: Tensor | None = None,
    extra_mean: Tensor | None = None,
    extra_rstd: Tensor | None = None,
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
    return_statistics: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """x + gate * proj(attention(modulate(LayerNorm(x), shift, scale))): a DiT block's first half.

    x: [B, S, C], float32, float16, bfloat16 (float64 by torch). shift, scale, gate: [B, C], or
        three dimensions, each x's or 1; x's dtype or float32.
    qkv_weight: [3 H D, C], rows of q, of k, of v, each head by head; qkv_bias: [3 H D] or None;
        out_weight: [C, H D]; out_bias: [C] or None. All like x. num_heads: H.
    norm, q_weight, k_weight, cos, sin: QK-norm ("none", "rms" or "layer", with qk_eps) and
        rotation, as in `attention`.
    mean, rstd: [B, S] float32, of x's rows (rstd = 1 / sqrt(variance + eps)), where they are known:
        then x is not read for them.
    extra_*: a second stream (the text of an MMDiT block) with its own modulation, layers, weights
        and tables; queries of both see the keys of both. Without extra_gate and extra_out_weight
        the stream gives keys and values only.
    return_statistics: also the mean and rstd [B, S] float32 of each result's rows, for the norm
        that follows.
    impl: "auto"; "triton": norm and modulation in the first product's prologue, the gated residual
        and the statistics in the second one's epilogue; "composed": the ops of the pieces around
        torch's linear layers; or "reference".

    Returns the new x, or a tuple: x', mean, rstd, extra_x', extra mean, extra rstd, of these what
    was asked for. All are contiguous; differentiable through the reference, which holds all scores.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    found = torch.ops.fastdiff.adaln_attention(
        x, shift, scale, gate, qkv_weight, qkv_bias, out_weight, out_bias, num_heads,
        norm, q_weight, k_weight, cos, sin, mean, rstd,
        extra_x, extra_shift, extra_scale, extra_gate, extra_qkv_weight, extra_qkv_bias,
        extra_out_weight, extra_out_bias, extra_q_weight, extra_k_weight, extra_cos, extra_sin,
        extra_mean, extra_rstd, eps, qk_eps, return_statistics, impl,
    )  # fmt: skip
    streams = 1 if extra_out_weight is None else 2
    kept = RESULTS if return_statistics else 1
    results = [found[RESULTS * stream + i] for stream in range(streams) for i in range(kept)]
    return results[0] if len(results) == 1 else tuple(results)
