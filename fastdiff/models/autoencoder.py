"""AutoencoderKL: images to latents and back (Rombach et al., arXiv 2112.10752, section 3.1).

Parameters are named as in the public checkpoints (CompVis latent-diffusion; Stability's and Black
Forest Labs' files have the same names), computed over ``fastdiff.ops``; agrees with diffusers'
AutoencoderKL, tiles included. Shapes: images [B, 3, H, W] in -1..1, latents [B, C, H/f, W/f] with
f = 8 for the public models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models import latent_preview
from fastdiff.models.autoencoder_blocks import Decoder, Encoder
from fastdiff.models.tiling import apply_tiled


@dataclass(frozen=True)
class AutoencoderConfig:
    """The size of an AutoencoderKL and what its latents are.

    widths: channels of each resolution, the finest first; each but the last halves the image.
    num_res_blocks: of an encoder's resolution; the decoder has one more. mid_attention: one head
    over all pixels of the coarsest resolution. quant_conv, post_quant_conv: the 1x1 convolutions
    after the encoder and before the decoder (absent in SD3 and FLUX). scaling, shift: see
    ``AutoencoderKL.scale``. sample_size: side of the training images, and of a tile in pixels.
    force_upcast: with float16 weights everything runs in float32 (SDXL's overflows otherwise).
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_res_blocks: int = 2
    num_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling: float = 0.18215
    shift: float = 0.0
    sample_size: int = 512
    force_upcast: bool = False

    def __post_init__(self) -> None:
        names = ("in_channels", "out_channels", "latent_channels", "num_res_blocks", "num_groups")
        for name in (*names, "sample_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("mid_attention", "quant_conv", "post_quant_conv", "force_upcast"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        widths = self.widths
        if not isinstance(widths, tuple) or not widths:
            raise ValueError(f"widths must be a tuple of channels, got {widths!r}")
        for width in widths:
            if not isinstance(width, int) or width < 1 or width % self.num_groups:
                raise ValueError(
                    f"widths must be positive multiples of num_groups {self.num_groups}, "
                    f"got {widths}"
                )
        for name in ("scaling", "shift"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ValueError(f"{name} must be a number, got {value!r}")
        if not self.scaling > 0:
            raise ValueError(f"scaling must be positive, got {self.scaling}")

    @property
    def factor(self) -> int:
        """Pixels of the image, in each direction, for one of the latents."""
        return int(2 ** (len(self.widths) - 1))


_WIDE = AutoencoderConfig(
    latent_channels=16, quant_conv=False, post_quant_conv=False, sample_size=1024
)
# sd1 is SD2's, too (whose images have 768 pixels).
CONFIGS = {
    "sd1": AutoencoderConfig(),
    "sdxl": AutoencoderConfig(scaling=0.13025, sample_size=1024, force_upcast=True),
    "sd3": replace(_WIDE, scaling=1.5305, shift=0.0609),
    "flux": replace(_WIDE, scaling=0.3611, shift=0.1159),
}


@dataclass(frozen=True)
class Gaussian:
    """The distribution of latents that an encoder gives: mean and logvar [B, C, h, w]."""

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """mean + exp(logvar / 2) * noise.

        noise: like the mean; or drawn from the generator, or from one generator per image, so that
        an image has the same latents in every batch. A CPU generator serves every device.
        """
        mean = self.mean
        if noise is None:
            noise = _draw(mean, generator)
        elif generator is not None:
            raise ValueError("sample must have a generator or noise, got both")
        elif noise.shape != mean.shape:
            raise ValueError(
                f"noise must have shape {list(mean.shape)} like the mean, got {list(noise.shape)}"
            )
        return mean + torch.exp(0.5 * self.logvar) * noise.to(mean)


def _draw(like: Tensor, generator: Any) -> Tensor:
    if isinstance(generator, Sequence):
        if len(generator) != like.shape[0]:
            raise ValueError(
                f"generator must be one, or one for each of {like.shape[0]} images, "
                f"got {len(generator)}"
            )
        return torch.cat([_draw(like[i : i + 1], g) for i, g in enumerate(generator)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like)


class AutoencoderKL(nn.Module):
    """``encode(images)`` to a ``Gaussian`` of latents, ``decode(latents)`` to images; a call
    decodes.

    Both work on latents as they come out of the encoder. A denoiser works on scaled ones:
    ``scale(encode(images).sample(generator))`` goes into it, ``decode(unscale(latents))`` comes
    out.

    With ``config.force_upcast``, float16 weights are converted to float32 in every call, and so is
    the input; images and distributions are float32 then. SDXL's decoder overflows in float16.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        if not isinstance(config, AutoencoderConfig):
            raise TypeError(f"config must be an AutoencoderConfig, as CONFIGS['sd1'], got {config}")
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.post_quant_conv else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.decoder.conv_in.weight.dtype

    def scale(self, latents: Tensor) -> Tensor:
        """The encoder's latents as the denoiser wants them: (latents - shift) * scaling."""
        return (latents - self.config.shift) * self.config.scaling

    def unscale(self, latents: Tensor) -> Tensor:
        """The denoiser's latents as the decoder wants them: latents / scaling + shift."""
        return latents / self.config.scaling + self.config.shift

    def encode(self, images: Tensor, *, tiled: bool = False, sliced: bool = False) -> Gaussian:
        """images: [B, in_channels, H, W] in -1..1, H and W multiples of ``config.factor``.

        tiled: images larger than ``config.sample_size`` in tiles of that side, a quarter of which
            the next one covers again, blended: bounded memory, and not quite the same latents.
        sliced: one image after the other; the same latents.
        """
        factor = self.config.factor
        self._check("images", images, self.config.in_channels)
        if images.shape[2] % factor or images.shape[3] % factor:
            raise ValueError(
                f"images must have sides that are multiples of {factor}, "
                f"got {list(images.shape[2:])}"
            )
        run = self._chain(self.encoder, self.quant_conv)
        pixels, latents = self._tile()
        moments = apply_tiled(run, images, (pixels, latents) if tiled else None, sliced)
        mean, logvar = moments.chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor, *, tiled: bool = False, sliced: bool = False) -> Tensor:
        """latents: [B, latent_channels, h, w], unscaled; returns images around -1..1, not clamped.

        tiled, sliced: as for ``encode``.
        """
        self._check("latents", latents, self.config.latent_channels)
        run = self._chain(self.post_quant_conv, self.decoder)
        pixels, size = self._tile()
        return apply_tiled(run, latents, (size, pixels) if tiled else None, sliced)

    def forward(self, latents: Tensor) -> Tensor:
        return self.decode(latents)

    def preview(self, latents: Tensor) -> Tensor:
        """A small picture [B, 3, h, w] in -1..1, float32, of a denoiser's (scaled) latents.

        One matrix; for the latents of SD1, SD2, SDXL, SD3 and FLUX. ValueError for others.
        """
        config = self.config
        self._check("latents", latents, config.latent_channels, dtype=False)
        key = (config.latent_channels, config.scaling, config.shift)
        if key not in latent_preview.FACTORS:
            raise ValueError(
                "preview must have the latents of SD1, SD2, SDXL, SD3 or FLUX; nothing is known of "
                f"{key[0]} channels with scaling {key[1]} and shift {key[2]}"
            )
        return latent_preview.to_rgb(latents, latent_preview.FACTORS[key])

    def _tile(self) -> tuple[int, int]:
        """The side of a tile in pixels and in latents."""
        return self.config.sample_size, int(self.config.sample_size / self.config.factor)

    def _chain(self, *modules: nn.Module | None) -> Callable[[Tensor], Tensor]:
        """One module behind the other, in float32 where the configuration wants that."""
        present = [module for module in modules if module is not None]
        upcast = self.config.force_upcast and self.dtype == torch.float16
        wide = [
            {name: p.float() for name, p in m.named_parameters()} if upcast else {} for m in present
        ]

        def run(x: Tensor) -> Tensor:
            x = x.float() if upcast else x
            for module, weights in zip(present, wide, strict=True):
                x = torch.func.functional_call(module, weights, (x,)) if upcast else module(x)
            return x

        return run

    def _check(self, name: str, x: Tensor, channels: int, dtype: bool = True) -> None:
        if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(f"{name} must have shape [B, {channels}, H, W], got {list(x.shape)}")
        allowed = {self.dtype} | ({torch.float32} if self.config.force_upcast else set())
        if dtype and x.dtype not in allowed:
            raise TypeError(f"{name} must be {self.dtype} like the weights, got {x.dtype}")
