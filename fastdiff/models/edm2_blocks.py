"""The magnitude-preserving layers and the block of EDM2 (Karras et al., arXiv 2312.02696)."""

from __future__ import annotations

import math
import operator
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.edm_blocks import Exact, attend_pixels, wide
from fastdiff.models.edm_config import EDM2Config

EPS = 1e-4  # added to a magnitude that is divided by
SILU_MAGNITUDE = 0.596  # of silu(x) for normal x (equation 81)


def normalise(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x over its magnitude along ``dims``, which becomes 1; the magnitude is at least float32."""
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide(x.dtype))
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return x / (norm * count**-0.5 + EPS).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """Equation 81."""
    return F.silu(x) * (1 / SILU_MAGNITUDE)


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b)/sqrt((1 - t)^2 + t^2), equation 88."""
    first, second = weights_of(t)
    return first * a + second * b


def weights_of(t: float) -> tuple[float, float]:
    """What ``mp_sum`` multiplies a and b with."""
    return (1 - t) / math.hypot(1 - t, t), t / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """a and b, of unequal widths, so that they weigh 1 - t and t, equation 103."""
    first, second = a.shape[1], b.shape[1]
    weights = weights_of(t)
    scales = (weights[i] * math.sqrt((first + second) / n) for i, n in enumerate((first, second)))
    return torch.cat([x * scale for x, scale in zip((a, b), scales, strict=True)], 1)


class MPFourier(Exact):
    """sqrt(2) cos(t freqs + phases), [..., E] (equation 75); its random buffers are not learned."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[..., None] * self.freqs.to(t.dtype) + self.phases.to(t.dtype)
        return angles.cos() * math.sqrt(2)


# The weights that eager calls use. Apart from the modules, whose state stays what a file holds.
_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any, Tensor]] = weakref.WeakKeyDictionary()


def _watched(tensor: Tensor) -> bool:
    """Whether a change of ``tensor`` would be seen, and no gradient is needed."""
    grad = torch.is_grad_enabled() and tensor.requires_grad
    return type(tensor) is nn.Parameter and not grad and not tensor.is_inference()


class MPConv(nn.Module):
    """A convolution, or a linear layer for ``kernel`` 0, of normalised weights (equation 47).

    factor: what the neighbours multiply with, which the weights can do for nothing.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 0, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        sides = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, *sides))

    def effective(self, dtype: torch.dtype, gain: Tensor | None = None) -> Tensor:
        """factor * gain * weight / (|weight| sqrt(fan-in)), computed in float32 or wider.

        Kept until the weight or the gain changes, unless gradients or a compiler are at work.
        """
        sources = (self.weight,) if gain is None else (self.weight, gain)
        if torch.compiler.is_compiling() or not all(map(_watched, sources)):
            return self._computed(dtype, gain)
        facts = (dtype, *((t.data_ptr(), t._version, t.dtype, t.device) for t in sources))
        kept = _KEPT.get(self)
        if kept is None or kept[1] != facts or not all(map(operator.is_, kept[0], sources)):
            with torch.inference_mode(False), torch.no_grad():
                kept = _KEPT[self] = (sources, facts, self._computed(dtype, gain))
        return kept[2]

    def _computed(self, dtype: torch.dtype, gain: Tensor | None) -> Tensor:
        weight = self.weight.to(wide(self.weight.dtype))
        dims = tuple(range(1, weight.dim()))
        weight = normalise(weight, dims) * (self.factor * weight[0].numel() ** -0.5)
        return (weight if gain is None else weight * gain.to(weight.dtype)).to(dtype)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        weight = self.effective(x.dtype, gain)
        if weight.dim() == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Block(nn.Module):
    """A block of figure 21. mode: "keep", "up" or "down"; decoder: normalises nothing, and has its
    skip's 1x1 convolution beside the branch instead of before it."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        config: EDM2Config,
        *,
        decoder: bool,
        mode: str = "keep",
        attends: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.decoder, self.mode = config, decoder, mode
        self.num_heads = outputs // config.channels_per_head if attends else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        # Two factors of SiLU, and the branches' weights in the sums.
        self.res_weights = weights_of(config.res_balance)
        self.attn_weights = weights_of(config.attn_balance)
        silu = 1 / SILU_MAGNITUDE
        self.conv_res0 = MPConv(inputs if decoder else outputs, outputs, 3, silu)
        self.emb_linear = MPConv(config.emb_channels, outputs)
        self.conv_res1 = MPConv(outputs, outputs, 3, silu * self.res_weights[1])
        self.conv_skip = MPConv(inputs, outputs, 1) if inputs != outputs else None
        if self.num_heads:
            self.attn_qkv = MPConv(outputs, 3 * outputs, 1)
            self.attn_proj = MPConv(outputs, outputs, 1, self.attn_weights[1])

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x [B, C, H, W], c [B, C]: the embedding's factors for the branch."""
        if self.mode == "down":
            x = F.avg_pool2d(x, 2)
        elif self.mode == "up":
            x = F.interpolate(x, scale_factor=2.0)
        if not self.decoder:
            x = normalise(x if self.conv_skip is None else self.conv_skip(x), (1,))
        y = self.conv_res1(F.silu(self.conv_res0(F.silu(x)) * c[:, :, None, None]))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = torch.add(y, x, alpha=self.res_weights[0])
        if self.num_heads:
            y = attend_pixels(self.attn_qkv(x), self.num_heads, lambda qkv: normalise(qkv, (2,)))
            x = torch.add(self.attn_proj(y), x, alpha=self.attn_weights[0])
        clip = self.config.clip_act
        return x.clamp(-clip, clip) if clip else x
