"""What the zoo's models share, over ``fastdiff.ops``; each works with gradients, too."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdiff import ops


def group_norm(norm: nn.GroupNorm, x: Tensor, *, activation: str = "silu", **more: Any) -> Tensor:
    """``ops.group_norm_silu`` with the weights of ``norm``; more: add, scale, shift, skip."""
    return ops.group_norm_silu(
        x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, activation=activation, **more
    )


def heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H*D] to [B, T, H, D], a view."""
    return x.unflatten(-1, (num_heads, -1))


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention of projections q [B, T, H*D], k, v [B, S, H*D]; returns [B, T, H*D]."""
    q, k, v = (heads(value, num_heads) for value in (q, k, v))
    out = ops.attention(q, k, v)
    assert isinstance(out, Tensor)
    return out.flatten(-2)


def sinusoid(
    t: Tensor, dim: int, *, cos_first: bool = True, shift: float = 0.0, max_period: float = 10000.0
) -> Tensor:
    """The sinusoidal embedding of times of any shape, [..., dim] in float32 (or float64).

    ``ops.timestep_embedding`` over the flattened times; shift: its ``downscale_freq_shift``.
    """
    flat = ops.timestep_embedding(t.reshape(-1), dim, cos_first, shift, max_period)
    return flat.view(*t.shape, dim)
