"""The arguments of ``attention``, and what they must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

Tensor = torch.Tensor
NORMS = ("none", "rms", "layer")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def compact(x: Tensor) -> Tensor:
    """A tensor of its own: two results of an op may not share their memory."""
    return x.clone(memory_format=torch.contiguous_format)


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
            out.flatten().view(out.shape) if self.extra_q is None else compact(out[:, :first]),
            nothing.sum((1, 2, 3)) if self.extra_q is None else compact(out[:, first:]),
            nothing.sum((1, 2, 3), dtype=wide(nothing)) if lse is None else lse,
        )


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
