"""The U-Net of DDPM, ADM, LDM, Stable Diffusion 1, 2, XL and LCM.

One network: Ronneberger's U with residual blocks (arXiv 2006.11239, 2102.09672), attention at some
levels (AttentionBlocks, arXiv 2105.05233, or transformers that look at a text, arXiv 2112.10752),
and a time, label, vector and guidance scale that are added up. Parameters are named as in the
public checkpoints of openai/guided-diffusion and CompVis/latent-diffusion; the outputs agree with
those and with diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser, Values
from fastdiff.models.layers import group_norm, sinusoid
from fastdiff.models.unet_blocks import (
    AttentionBlock,
    Downsample,
    ResBlock,
    SpatialTransformer,
    TimeEmbed,
    Upsample,
    conv,
    norm,
)
from fastdiff.models.unet_configs import CONFIGS, EncoderConfig, UNetConfig

__all__ = ["CONFIGS", "Encoder", "UNet", "UNetConfig"]


class Encoder(Denoiser):
    """The way down and the middle, with the embeddings; a U-Net and a ControlNet go on from it."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        embed = config.embed_dim
        self.time_embed = TimeEmbed(config.time_channels, embed, config.guidance_dim)
        if config.num_classes is not None:
            self.label_emb: nn.Module = nn.Embedding(config.num_classes, embed)
        elif config.vector_dim is not None:
            mlp = nn.Linear(config.vector_dim, embed), nn.SiLU(), nn.Linear(embed, embed)
            self.label_emb = nn.Sequential(nn.Sequential(*mlp))
        width = config.channels[0]
        self.input_blocks = nn.ModuleList([nn.Sequential(conv(config.in_channels, width))])
        self.skip_channels = [width]
        for level, channels in enumerate(config.channels):
            for _ in range(config.num_res_blocks):
                layers = [self._resblock(width, channels), *self._attention(level)]
                self.input_blocks.append(nn.Sequential(*layers))
                width = channels
                self.skip_channels.append(width)
            if level < len(config.channels) - 1:
                resblock = config.resblock_updown
                down = self._resblock(width, width, "down") if resblock else Downsample(width)
                self.input_blocks.append(nn.Sequential(down))
                self.skip_channels.append(width)
        middle = [self._resblock(width, width)]
        if config.middle_depth:
            middle += [*self._attention(None), self._resblock(width, width)]
        self.middle_block = nn.Sequential(*middle)

    def _resblock(self, inner: int, outer: int, way: str = "same") -> nn.Module:
        config = self.config
        kind = {"scale_shift": config.scale_shift, "way": way}
        return ResBlock(inner, outer, config.embed_dim, config.num_groups, **kind)  # type: ignore[arg-type]

    def _attention(self, level: int | None) -> list[nn.Module]:
        """What follows a resblock of a level; None: the middle."""
        config = self.config
        depth = config.middle_depth if level is None else config.depths[level]
        place = -1 if level is None else level
        channels, heads = config.channels[place], config.num_heads[place]
        if not depth:
            return []
        if config.context_dim is None:
            return [AttentionBlock(channels, heads, config.num_groups, config.split_first)]
        return [
            SpatialTransformer(
                *(channels, heads, depth, config.context_dim, config.num_groups),
                linear=config.linear_projections,
                cross_only=level in config.cross_only,
            )
        ]

    # In the order in which a step meets them, which is that of the modules.
    def _all(self, kind: type[nn.Module]) -> list[Any]:
        return [module for module in self.modules() if isinstance(module, kind)]

    def vector(self, pooled: Tensor, sizes: Tensor) -> Tensor:
        """The ``y`` of SDXL: pooled text [B, P] and the numbers [B, N] that go with it, [B, P+N*D].

        Base: height, width, top, left, target height, target width; refiner: the first four and
        the aesthetic score. D is ``config.size_dim``.
        """
        config = self.config
        expected = (config.vector_dim or 0) - sizes.shape[-1] * config.size_dim
        if pooled.dim() != 2 or sizes.dim() != 2 or pooled.shape[1] != expected:
            raise ValueError(
                f"pooled [B, P] and sizes [B, N] must have P + {config.size_dim} N = "
                f"{config.vector_dim}, got {list(pooled.shape)} and {list(sizes.shape)}"
            )
        wave = sinusoid(sizes, config.size_dim).flatten(1)
        return torch.cat([pooled, wave.to(pooled.dtype)], dim=1)

    def prompt(
        self, context: Tensor | None = None, y: Tensor | None = None, guidance: Tensor | None = None
    ) -> Values:
        """See the class; keys and values of the text, the embedded label, the guidance's."""
        self._check_condition(context, y, guidance)
        kv = []
        if context is not None:
            context = context.to(self.time_embed.dtype)
            kv = [pair for layer in self._all(SpatialTransformer) for pair in layer.kv(context)]
        label = scale = None
        if y is not None:
            label = self.label_emb(y if self.config.num_classes else y.to(self.time_embed.dtype))
        if guidance is not None:
            dim = cast(int, self.config.guidance_dim)
            scale = self.time_embed.cond_proj(
                guidance_wave(guidance, dim).to(self.time_embed.dtype)
            )
        return {"kv": kv, "label": label, "guidance": scale}

    def schedule(self, t: Tensor, prompt: Values) -> Values:
        """What the time is to each resblock, in order: tensors [*t.shape, C or 2 C]."""
        if t.dim() not in (1, 2):
            raise ValueError(f"t must have shape [B] or [S, B], got {list(t.shape)}")
        given = (prompt["label"], prompt["guidance"], *(pair[0] for pair in prompt["kv"][:1]))
        for batch in (value.shape[0] for value in given if value is not None):
            if batch != t.shape[-1]:
                raise ValueError(f"t must have the condition's batch {batch}, got {t.shape[-1]}")
        wave = sinusoid(t, self.config.time_channels)
        embedded = self.time_embed(wave, prompt["guidance"])
        if prompt["label"] is not None:
            embedded = embedded + prompt["label"]
        activated = F.silu(embedded)
        return [block.embed(activated) for block in self._all(ResBlock)]

    def encode(
        self, x: Tensor, embeds: Iterator[Tensor], kv: Iterator[Any], hint: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The middle's result, and the skips from the first on; hint: added to the first."""
        skips: list[Tensor] = []
        for block in self.input_blocks:
            x = run(cast(nn.Sequential, block), x, embeds, kv)
            if not skips and hint is not None:
                x = x + hint
            skips.append(x)
        return run(self.middle_block, x, embeds, kv), skips

    def _check_state(self, x: Tensor, schedule: Values) -> None:
        channels = self.config.in_channels
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(f"x must have shape [B, {channels}, H, W], got {list(x.shape)}")
        multiple = 2 ** (len(self.config.channels) - 1) if self.config.resblock_updown else 1
        if any(side % multiple for side in x.shape[2:]):
            raise ValueError(f"x must have sides of a multiple of {multiple}, got {list(x.shape)}")
        if (batch := schedule[0].shape[0]) != x.shape[0]:
            raise ValueError(f"t must have x's batch {x.shape[0]}, got {batch}")

    def _check_condition(
        self, context: Tensor | None, y: Tensor | None, guidance: Tensor | None
    ) -> None:
        config = self.config
        labels = "integers [B]" if config.num_classes else f"[B, {config.vector_dim}]"
        expected = {
            "context": (context, config.context_dim, f"[B, S, {config.context_dim}]", 3),
            "y": (
                y,
                config.num_classes or config.vector_dim,
                labels,
                1 if config.num_classes else 2,
            ),
            "guidance": (guidance, config.guidance_dim, "[B]", 1),
        }
        batch = None
        for name, (value, size, shape, dims) in expected.items():
            if value is None and size is None:
                continue
            if size is None:
                raise ValueError(f"{name} must be None for this model, got a tensor")
            if value is None:
                raise ValueError(f"{name} must be given, {shape}, for this model, got None")
            if value.dim() != dims or (dims > 1 and value.shape[-1] != size):
                raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
            if batch is not None and value.shape[0] != batch:
                raise ValueError(f"{name} must have the batch of {batch}, got {value.shape[0]}")
            batch = value.shape[0]
        if config.num_classes and y is not None and (y.is_floating_point() or y.is_complex()):
            raise TypeError(f"y must be integers, got {y.dtype}")


def guidance_wave(guidance: Tensor, dim: int) -> Tensor:
    """[sin, cos] of 1000 (guidance - 1) [B] times 10000^(-i/(dim/2 - 1)), [B, dim] in float32.

    The angles go to thousands, where a float32 has three decimals left: in the order of operations
    of diffusers' get_guidance_scale_embedding, which is that of the training.
    """
    rate = math.log(10000.0) / (dim // 2 - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32, device=guidance.device)
    angles = ((guidance.float() - 1) * 1000.0)[:, None] * torch.exp(steps * -rate)[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def run(
    block: nn.Sequential,
    x: Tensor,
    embeds: Iterator[Tensor],
    kv: Iterator[Any],
    skip: Tensor | None = None,
    size: Sequence[int] = (),
) -> Tensor:
    """The layers of one block. skip: joined before the first. size: of the block's result."""
    for layer in block:
        if isinstance(layer, ResBlock):
            x, skip = layer(x, next(embeds), skip, size), None
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, kv)
        elif isinstance(layer, Upsample):
            x = layer(x, size)
        else:
            x = layer(x)
    return x


class UNet(Encoder):
    """The denoiser: ``model(x, t, context=None, y=None, guidance=None)``.

    x: [B, in_channels, H, W]: the state, and what is concatenated to it (the mask and masked
        latents of an inpainting model, the enlarged picture of an upsampler). t: [B], 0..999.
    context: [B, S, context_dim], the text of a model with transformers.
    y: [B] labels 0..num_classes-1, or [B, vector_dim] (SDXL; see ``vector``).
    guidance: [B] guidance scales, of a distilled model (LCM; arXiv 2310.04378; w + 1 there).
    Returns [B, out_channels, H, W]. ValueError or TypeError for a condition that is missing or too
    much, and for another shape.
    """

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        if not isinstance(config, UNetConfig):
            raise TypeError(f"config must be a UNetConfig, as CONFIGS['sd1'], got {config!r}")
        super().__init__(config)
        width, waiting = config.channels[-1], list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for level, channels in reversed(list(enumerate(config.channels))):
            for number in range(config.num_res_blocks + 1):
                layers = [self._resblock(width + waiting.pop(), channels), *self._attention(level)]
                if level and number == config.num_res_blocks:
                    resblock = config.resblock_updown
                    up = self._resblock(channels, channels, "up") if resblock else None
                    layers.append(up or Upsample(channels))
                width = channels
                self.output_blocks.append(nn.Sequential(*layers))
        self.out = nn.Sequential(
            norm(width, config.num_groups), nn.SiLU(), conv(width, config.out_channels)
        )

    def step(
        self,
        x: Tensor,
        schedule: Values,
        prompt: Values,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """residuals: of ControlNets, one for each skip from the first on, and the middle's."""
        self._check_state(x, schedule)
        embeds, kv = iter(schedule), iter(prompt["kv"])
        h, skips = self.encode(x, embeds, kv)
        if residuals is not None:
            if len(residuals) != len(skips) + 1:
                raise ValueError(
                    f"residuals must be {len(skips) + 1} tensors, got {len(residuals)}"
                )
            skips = [skip + more for skip, more in zip(skips, residuals[:-1], strict=True)]
            h = h + residuals[-1]
        for block in self.output_blocks:
            skip = skips.pop()
            size = skips[-1].shape[-2:] if skips else ()
            h = run(cast(nn.Sequential, block), h, embeds, kv, skip, size)
        return self.out[2](group_norm(cast(nn.GroupNorm, self.out[0]), h))
