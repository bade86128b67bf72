"""The blocks of U-Nets, named as in CompVis/latent-diffusion and openai/guided-diffusion.

Pictures are [B, C, H, W], contiguous or channels last; tokens [B, H*W, C]. What the time makes of
a block (``embed``) and the keys and values of the text (``kv``) come from outside, so that each is
computed once for a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.layers import attend, group_norm

KV = tuple[Tensor, Tensor]


def norm(channels: int, num_groups: int, eps: float = 1e-5) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=eps)


def conv(inner: int, outer: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, size, stride=stride, padding=size // 2)


class TimeEmbed(nn.Module):
    """Sinusoids [..., D] to [..., 4 D]: linear, SiLU, linear; its layers are named 0 and 2.

    guidance_dim: features of a second sinusoid that ``cond_proj`` adds to the first (LCM).
    """

    def __init__(self, dim: int, embed_dim: int, guidance_dim: int | None = None) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(dim, embed_dim))
        self.add_module("2", nn.Linear(embed_dim, embed_dim))
        if guidance_dim is not None:
            self.cond_proj = nn.Linear(guidance_dim, dim, bias=False)

    @property
    def dtype(self) -> torch.dtype:
        return cast(nn.Linear, self.get_submodule("2")).weight.dtype

    def forward(self, sinusoid: Tensor, guidance: Tensor | None = None) -> Tensor:
        """guidance: a result of ``cond_proj``."""
        sinusoid = sinusoid.to(self.dtype)
        if guidance is not None:
            sinusoid = sinusoid + guidance
        return self.get_submodule("2")(F.silu(self.get_submodule("0")(sinusoid)))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest neighbours; ``size`` is that of the skip to be joined, the double of x's or one less
    (a picture of odd size was halved upwards)."""
    return F.interpolate(x, size=(size[0], size[1]), mode="nearest")


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = conv(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return self.conv(resize(x, size))


class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + time))), or with the second norm scaled and shifted by
    the time; arXiv 2105.05233, section 3. way: "same", "down" (means of 2 x 2) or "up"."""

    def __init__(
        self,
        inner: int,
        outer: int,
        embed_dim: int,
        num_groups: int,
        *,
        scale_shift: bool = False,
        way: str = "same",
    ) -> None:
        super().__init__()
        self.scale_shift, self.way = scale_shift, way
        self.in_layers = nn.Sequential(norm(inner, num_groups), nn.SiLU(), conv(inner, outer))
        embedded = outer * (2 if scale_shift else 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, embedded))
        self.out_layers = nn.Sequential(
            norm(outer, num_groups), nn.SiLU(), nn.Identity(), conv(outer, outer)
        )
        same = inner == outer
        self.skip_connection = nn.Identity() if same else conv(inner, outer, 1)

    def embed(self, activated: Tensor) -> Tensor:
        """What the time, after its SiLU, is to this block: [..., C] or [..., 2 C]."""
        return self.emb_layers[1](activated)

    def forward(
        self, x: Tensor, embed: Tensor, skip: Tensor | None = None, size: Sequence[int] = ()
    ) -> Tensor:
        """embed: [B, C or 2 C]. skip: joined to x. size: of the result, for the way up."""
        h = group_norm(cast(nn.GroupNorm, self.in_layers[0]), x, skip=skip)
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        if self.way == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.way == "up":
            h, x = resize(h, size), resize(x, size)
        h = self.in_layers[2](h)
        second = cast(nn.GroupNorm, self.out_layers[0])
        if self.scale_shift:
            scale, shift = embed.chunk(2, dim=-1)
            h = group_norm(second, h, scale=scale, shift=shift)
        else:
            h = group_norm(second, h, add=embed)
        return self.skip_connection(x) + self.out_layers[3](h)


def tokens_of(x: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H*W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def picture_of(tokens: Tensor, like: Tensor) -> Tensor:
    """[B, H*W, C] to [B, C, H, W], channels last in memory."""
    return tokens.unflatten(1, like.shape[-2:]).permute(0, 3, 1, 2)


class AttentionBlock(nn.Module):
    """Self-attention of a picture, from one projection whose rows are in the order (head, q/k/v),
    or (q/k/v, head) with split_first."""

    def __init__(self, channels: int, num_heads: int, num_groups: int, split_first: bool) -> None:
        super().__init__()
        self.num_heads, self.split_first = num_heads, split_first
        self.norm = norm(channels, num_groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = tokens_of(group_norm(self.norm, x, activation="none"))
        qkv = F.linear(tokens, self.qkv.weight.squeeze(-1), self.qkv.bias)
        if self.split_first:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        else:
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, -1)).unbind(3)
        out = cast(Tensor, ops.attention(q, k, v)).flatten(-2)
        out = F.linear(out, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + picture_of(out, x)


class CrossAttention(nn.Module):
    """Attention of tokens to a context, or to themselves."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Identity())

    def kv(self, context: Tensor) -> KV:
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, kv: KV | None = None) -> Tensor:
        k, v = self.kv(x) if kv is None else kv
        return self.to_out(attend(self.to_q(x), k, v, self.num_heads))


class GEGLU(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        return ops.geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Attention to the picture, to the text, and a gated layer; cross_only: twice to the text."""

    def __init__(self, dim: int, num_heads: int, context_dim: int, cross_only: bool) -> None:
        super().__init__()
        self.cross_only = cross_only
        self.attn1 = CrossAttention(dim, num_heads, context_dim if cross_only else None)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, num_heads, context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def kv(self, context: Tensor) -> list[KV]:
        """Of each attention that looks at the text, in order."""
        first = [self.attn1.kv(context)] if self.cross_only else []
        return [*first, self.attn2.kv(context)]

    def forward(self, x: Tensor, kv: Iterator[KV]) -> Tensor:
        x = x + self.attn1(self.norm1(x), next(kv) if self.cross_only else None)
        x = x + self.attn2(self.norm2(x), next(kv))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a picture (arXiv 2112.10752, appendix E.2.1)."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        depth: int,
        context_dim: int,
        num_groups: int,
        *,
        linear: bool,
        cross_only: bool,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = norm(channels, num_groups, eps=1e-6)
        outer = (
            (lambda: nn.Linear(channels, channels))
            if linear
            else (lambda: conv(channels, channels, 1))
        )
        self.proj_in = outer()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, num_heads, context_dim, cross_only) for _ in range(depth)
        )
        self.proj_out = outer()

    def kv(self, context: Tensor) -> list[KV]:
        return [kv for block in self.transformer_blocks for kv in block.kv(context)]  # type: ignore[operator]

    def forward(self, x: Tensor, kv: Iterator[KV]) -> Tensor:
        h = group_norm(self.norm, x, activation="none")
        h = self.proj_in(tokens_of(h)) if self.linear else tokens_of(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, kv)
        if self.linear:
            return x + picture_of(self.proj_out(h), x)
        return x + self.proj_out(picture_of(h, x))
