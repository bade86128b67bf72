"""The blocks of AutoencoderKL, named as in latent-diffusion's checkpoints.

x is [B, C, H, W] everywhere; GroupNorm has eps 1e-6 throughout.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.layers import attend, group_norm

if TYPE_CHECKING:
    from fastdiff.models.autoencoder import AutoencoderConfig


class ResnetBlock(nn.Module):
    """[B, C, H, W] to [B, C', H, W]."""

    def __init__(self, width: int, out_width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv1 = nn.Conv2d(width, out_width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_width, eps=1e-6)
        self.conv2 = nn.Conv2d(out_width, out_width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out_width, 1) if width != out_width else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(group_norm(self.norm1, x))
        h = self.conv2(group_norm(self.norm2, h))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """One head over all pixels; the projections are 1x1 convolutions by name and shape."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = group_norm(self.norm, x, activation="none").flatten(2).transpose(1, 2)
        q, k, v = (F.linear(h, p.weight.flatten(1), p.bias) for p in (self.q, self.k, self.v))
        h = F.linear(attend(q, k, v, 1), self.proj_out.weight.flatten(1), self.proj_out.bias)
        return x + h.transpose(1, 2).reshape(x.shape)


class Mid(nn.Module):
    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width, groups = config.widths[-1], config.num_groups
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups) if config.mid_attention else None
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block_1(x)
        return self.block_2(x if self.attn_1 is None else self.attn_1(x))


class Downsample(nn.Module):
    """Half the pixels; the padding is on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next."""

    def __init__(self, widths: Sequence[int], groups: int, **change: nn.Module) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.block = nn.ModuleList(ResnetBlock(a, b, groups) for a, b in pairs)
        for name, module in change.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for name in ("downsample", "upsample"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


class Encoder(nn.Module):
    """Images to [B, 2C, h, w], mean and logvar before the quant_conv."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups, depth = config.widths, config.num_groups, config.num_res_blocks
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            change: dict[str, nn.Module] = {} if last else {"downsample": Downsample(width)}
            self.down.append(Level((widths[max(i - 1, 0)], *[width] * depth), groups, **change))
        self.mid = Mid(config)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(group_norm(self.norm_out, self.mid(x)))


class Decoder(nn.Module):
    """Latents after the post_quant_conv to images; ``up`` counts from the finest resolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths, groups, depth = config.widths, config.num_groups, config.num_res_blocks + 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Mid(config)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            coarser = widths[min(i + 1, len(widths) - 1)]
            change: dict[str, nn.Module] = {"upsample": Upsample(width)} if i else {}
            self.up.append(Level((coarser, *[width] * depth), groups, **change))
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(group_norm(self.norm_out, x))
