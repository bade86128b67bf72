"""The blocks of EDM's networks (Karras et al., arXiv 2206.00364, appendix F.1, table 7).

They are those of DDPM++ and NCSN++ (Song et al., arXiv 2011.13456, appendix H) and of ADM (Dhariwal
and Nichol, arXiv 2105.05233), with the parameter names of the NVlabs/edm checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.layers import group_norm


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def wide_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer`` in x's dtype, whatever its weights': embeddings are made in float32."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


class Exact(nn.Module):
    """A module whose buffers stay float32 or wider when the model becomes half precision.

    They hold frequencies and noise levels, not weights.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Exact:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if wide(buffer.dtype) != buffer.dtype:
                exact = before[name].to(buffer.device, wide(before[name].dtype))
                setattr(self, name, exact)
        return self


def complete(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """A pre-hook of ``load_state_dict``: gives ``state`` the buffers that ``module.computed()``
    returns and the file left out, on the device of the module's other tensors there."""
    for name, value in module.computed().items():
        if prefix + name not in state:
            others = [t.device for t in state.values() if not t.is_meta]
            state[prefix + name] = value.to(others[0] if others else "cpu")


class Filter(nn.Module):
    """Resampling by 2 with the outer product of ``taps``, zeros beyond the border.

    mode: "up" or "down". The buffer has the checkpoint's name; files may leave it out.
    """

    resample_filter: Tensor

    def __init__(self, taps: tuple[int, ...], mode: str) -> None:
        super().__init__()
        self.taps, self.mode = taps, mode
        self.register_buffer("resample_filter", self.computed()["resample_filter"])
        self.register_load_state_dict_pre_hook(complete)

    def computed(self) -> dict[str, Tensor]:
        row = torch.tensor(self.taps, dtype=torch.float32)
        return {"resample_filter": torch.outer(row, row)[None, None] / row.sum().square()}

    def forward(self, x: Tensor, padded: bool = True) -> Tensor:
        """[B, C, H, W] at twice or half the size. padded: False for an x that has its border."""
        if self.taps == (1, 1):
            down = self.mode == "down"
            return F.avg_pool2d(x, 2) if down else F.interpolate(x, scale_factor=2.0)
        channels = x.shape[1]
        weight = self.resample_filter.to(x.device, x.dtype).expand(channels, -1, -1, -1)
        pad = (len(self.taps) - 1) // 2 if padded else 0
        if self.mode == "down":
            return F.conv2d(x, weight, stride=2, padding=pad, groups=channels)
        return F.conv_transpose2d(x, 4 * weight, stride=2, padding=pad, groups=channels)


class Conv2d(Filter):
    """A convolution, after up- or downsampling where ``mode`` says so.

    fused: the convolution comes before the downsampling, and one border of zeros serves both.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        mode: str = "keep",
        taps: tuple[int, ...] = (1, 1),
        fused: bool = False,
    ) -> None:
        if mode == "keep":
            nn.Module.__init__(self)
        else:
            super().__init__(taps, mode)
        self.mode, self.fused = mode, fused
        made = nn.Conv2d(inputs, outputs, kernel)  # for its initial weights
        self.weight, self.bias = made.weight, made.bias

    def forward(self, x: Tensor, padded: bool = True) -> Tensor:
        pad = self.weight.shape[-1] // 2
        if self.fused:
            pad += (len(self.taps) - 1) // 2
            return super().forward(F.conv2d(x, self.weight, self.bias, padding=pad), padded=False)
        if self.mode != "keep":
            x = super().forward(x)
        return F.conv2d(x, self.weight, self.bias, padding=pad)


def make_norm(channels: int, eps: float) -> nn.GroupNorm:
    """GroupNorm with 32 groups, or fewer so that each has four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=eps)


class UNetBlock(nn.Module):
    """A residual block, and self-attention where ``num_heads`` is not 0.

    adaptive: the embedding is scale and shift of the second norm (ADM), else added before it.
    project: a skip that resamples has a 1x1 convolution even for equal channels.
    skip_scale: factor on both sums.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        mode: str = "keep",
        taps: tuple[int, ...] = (1, 1),
        num_heads: int = 0,
        adaptive: bool = False,
        project: bool = False,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.adaptive, self.skip_scale, self.num_heads = adaptive, skip_scale, num_heads
        self.norm0 = make_norm(inputs, eps)
        self.conv0 = Conv2d(inputs, outputs, 3, mode, taps)
        self.affine = nn.Linear(embedding, outputs * (2 if adaptive else 1))
        self.norm1 = make_norm(outputs, eps)
        self.conv1 = Conv2d(outputs, outputs, 3)
        self.skip: nn.Module | None = None
        if outputs != inputs or (project and mode != "keep"):
            self.skip = Conv2d(inputs, outputs, 1, mode, taps)
        elif mode != "keep":
            self.skip = Filter(taps, mode)
        if num_heads:
            self.norm2 = make_norm(outputs, eps)
            self.qkv = Conv2d(outputs, 3 * outputs, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, C, H, W], c [B, E]: this block's ``affine`` of the embedding."""
        h = self.conv0(group_norm(self.norm0, x))
        if self.adaptive:
            scale, shift = c.chunk(2, -1)
            h = group_norm(self.norm1, h, scale=scale, shift=shift)
        else:
            h = group_norm(self.norm1, h, add=c)
        x = self._sum(self.conv1(h), x if self.skip is None else self.skip(x))
        if self.num_heads:
            h = self.qkv(group_norm(self.norm2, x, activation="none"))
            x = self._sum(self.proj(attend_pixels(h, self.num_heads)), x)
        return x

    def _sum(self, branch: Tensor, x: Tensor) -> Tensor:
        return branch + x if self.skip_scale == 1 else (branch + x) * self.skip_scale


def attend_pixels(
    qkv: Tensor, num_heads: int, ready: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Self-attention over the pixels of qkv [B, 3C, H, W]; returns [B, C, H, W].

    Channels are in the order (head, feature, q or k or v). ready: applied to [B, heads, C/heads,
    3, H W] first.
    """
    parts = qkv.unflatten(1, (num_heads, -1, 3)).flatten(4)
    q, k, v = (parts if ready is None else ready(parts)).permute(3, 0, 4, 1, 2).unbind(0)
    out = ops.attention(q, k, v)
    assert isinstance(out, Tensor)
    return out.permute(0, 2, 3, 1).reshape(qkv.shape[0], -1, *qkv.shape[2:])


class FourierEmbedding(Exact):
    """Random frequencies of NCSN++, a buffer: deviation 16; [..., 2F] = [sin, cos] of 2 pi f t."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * 16)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[..., None] * (2 * torch.pi * self.freqs.to(t.dtype))
        return torch.cat([angles.sin(), angles.cos()], -1)
