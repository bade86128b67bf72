"""FLUX.1: the rectified flow transformer of Black Forest Labs (github.com/black-forest-labs/flux).

Double blocks treat image and text as two streams joined in attention (MMDiT, arXiv 2403.03206),
single blocks as one, with attention and feed-forward side by side (arXiv 2302.05442). Positions are
rotations of queries and keys (arXiv 2104.09864). Parameters are named as in the public checkpoints.
Shapes: B images of C channels, T tokens (2 x 2 pixels each) of D features, text of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser
from fastdiff.models.flux_blocks import FREQUENCIES, DoubleBlock, Embedder, SingleBlock, rotations
from fastdiff.models.transformer import FinalLayer, Kept, check_positive, check_shape, check_times

PATCH = 2
GUIDANCE_FACTOR = 1000.0  # the embedding of the guidance is that of a time


@dataclass(frozen=True)
class FluxConfig:
    """The size of a FLUX.1 transformer.

    in_channels: of the latent image and what is joined to it; out_channels: of the image.
    axes: columns of a head that rotate with an index of the image (0 here), the row, the column.
    guidance: whether it is distilled for a guidance scale, which then is an input.
    """

    in_channels: int = 16
    out_channels: int = 16
    hidden_size: int = 3072
    depth: int = 19
    single_depth: int = 38
    num_heads: int = 24
    context_size: int = 4096
    pooled_size: int = 768
    axes: tuple[int, int, int] = (16, 56, 56)
    guidance: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "axes", tuple(self.axes))
        check_positive(self, *(field.name for field in fields(self) if field.type == "int"))
        head, rest = divmod(self.hidden_size, self.num_heads)
        if rest:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {self.num_heads}, "
                f"got {self.hidden_size}"
            )
        if len(self.axes) != 3 or sum(self.axes) != head or any(a < 2 or a % 2 for a in self.axes):
            raise ValueError(
                f"axes must be three even numbers with the sum hidden_size / num_heads = {head}, "
                f"got {self.axes}"
            )
        if self.in_channels < self.out_channels:
            raise ValueError(
                f"in_channels must be at least out_channels {self.out_channels}, "
                f"got {self.in_channels}"
            )


_DEV = FluxConfig()
CONFIGS = {
    "FLUX.1-dev": _DEV,
    "FLUX.1-schnell": replace(_DEV, guidance=False),
    # Joined: the masked image's latents (16 channels) and the mask's 8 x 8 pixels for each latent.
    "FLUX.1-Fill-dev": replace(_DEV, in_channels=96),
    # Joined: the latents of the edges or of the depth.
    "FLUX.1-Canny-dev": replace(_DEV, in_channels=32),
    "FLUX.1-Depth-dev": replace(_DEV, in_channels=32),
}


class Flux(Denoiser):
    """The denoiser: ``model(x, t, context, y, guidance, joined)``; predicts noise minus image.

    x: [B, 16, H, W] latents with even sides; t: [B] times 0..1000, sigma * 1000; context:
    [B, L, 4096], T5's tokens; y: [B, 768], CLIP's pooled embedding; guidance: a number, or [B], for
    the models distilled for it (None for schnell); joined: [B, C, H, W], what fill, canny and depth
    models are given beside the image. Returns [B, 16, H, W].
    Agrees with black-forest-labs/flux and diffusers' FluxTransformer2DModel, which take images
    packed to tokens, times in 0..1 and ids of positions; all three are made here.
    """

    def __init__(self, config: FluxConfig) -> None:
        if not isinstance(config, FluxConfig):
            raise TypeError(
                f"config must be a FluxConfig, as CONFIGS['FLUX.1-dev'], got {config!r}"
            )
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.img_in = nn.Linear(PATCH**2 * config.in_channels, d)
        self.txt_in = nn.Linear(config.context_size, d)
        self.time_in = Embedder(FREQUENCIES, d)
        self.vector_in = Embedder(config.pooled_size, d)
        if config.guidance:
            self.guidance_in = Embedder(FREQUENCIES, d)
        self.double_blocks = nn.ModuleList(
            DoubleBlock(d, config.num_heads) for _ in range(config.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleBlock(d, config.num_heads) for _ in range(config.single_depth)
        )
        self.final_layer = FinalLayer(d, PATCH**2 * config.out_channels)
        self.rotations = Kept(rotations)

    def prompt(  # type: ignore[override]
        self,
        context: Tensor,
        y: Tensor,
        guidance: float | Tensor | None = None,
        joined: Tensor | None = None,
    ) -> dict[str, Any]:
        """context: the text's tokens [B, L, D]; pooled: its embedding, with the guidance's, [B, D];
        joined: as given, or None."""
        config = self.config
        check_shape("context", context, ["B", "L", config.context_size])
        check_shape("y", y, [len(context), config.pooled_size])
        more = config.in_channels - config.out_channels
        if (joined is None) != (more == 0):
            needed = f"given: the model takes {more} channels more" if more else "None: none go in"
            got = "None" if joined is None else list(joined.shape)
            raise ValueError(f"joined must be {needed}, got {got}")
        if joined is not None:
            check_shape("joined", joined, [len(context), more, "H", "W"])
        pooled = self.vector_in(y)
        if config.guidance:
            pooled = pooled + self._guidance(guidance, y)
        elif guidance is not None:
            raise ValueError(f"guidance must be None: the model does not take it, got {guidance!r}")
        return {"context": self.txt_in(context), "pooled": pooled, "joined": joined}

    def _guidance(self, guidance: float | Tensor | None, y: Tensor) -> Tensor:
        if guidance is None:
            raise ValueError("guidance must be a number or [B]: the model takes it, got None")
        if not isinstance(guidance, (int, float, Tensor)):
            raise TypeError(f"guidance must be a number or [B], got {type(guidance).__name__}")
        if not isinstance(guidance, Tensor):
            guidance = torch.tensor(float(guidance), device=y.device)
        if guidance.dim() == 0:
            guidance = guidance.expand(len(y))
        check_shape("guidance", guidance, [len(y)])
        wide = torch.promote_types(guidance.dtype, torch.float32)
        return self.guidance_in.times(guidance.to(wide) * GUIDANCE_FACTOR)

    def schedule(self, t: Tensor, prompt: dict[str, Any]) -> tuple[Any, ...]:
        """The modulations of the double blocks (image, text), single blocks and the last norm."""
        check_times(t, len(prompt["pooled"]))
        c = F.silu(self.time_in.times(t) + prompt["pooled"])
        double = [cast(DoubleBlock, block).schedule(c) for block in self.double_blocks]
        single = [cast(SingleBlock, block).modulation(c) for block in self.single_blocks]
        return (*double, *single, self.final_layer.adaLN_modulation.rows(c))

    def step(self, x: Tensor, schedule: tuple[Any, ...], prompt: dict[str, Any]) -> Tensor:
        rows, columns = self._grid(x, prompt)
        if prompt["joined"] is not None:
            x = torch.cat([x, prompt["joined"]], dim=1)
        image = self.img_in(F.pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2))
        text, length = prompt["context"], prompt["context"].shape[1]
        cos, sin = self.rotations(rows, columns, length, self.config.axes, x.device)
        depth, tables = self.config.depth, {"cos": cos[length:], "sin": sin[length:]}
        for block, modulations in zip(self.double_blocks, schedule[:depth], strict=True):
            image, text = block(image, text, modulations, tables)
        tokens, tables = torch.cat([text, image], dim=1), {"cos": cos, "sin": sin}
        for block, modulation in zip(self.single_blocks, schedule[depth:-1], strict=True):
            tokens = block(tokens, modulation, tables)
        image = self.final_layer(tokens[:, length:], schedule[-1])
        return F.pixel_shuffle(image.transpose(1, 2).unflatten(2, (rows, columns)), PATCH)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        y: Tensor,
        guidance: float | Tensor | None = None,
        joined: Tensor | None = None,
    ) -> Tensor:
        return super().forward(x, t, context, y, guidance, joined)

    def _grid(self, x: Tensor, prompt: dict[str, Any]) -> tuple[int, int]:
        """The image's rows and columns of tokens."""
        check_shape("x", x, [len(prompt["pooled"]), self.config.out_channels, "H", "W"])
        sides = list(x.shape[2:])
        if any(side % PATCH or not side for side in sides):
            raise ValueError(
                f"x must have sides that are multiples of {PATCH}, got {list(x.shape)}"
            )
        if prompt["joined"] is not None and list(prompt["joined"].shape[2:]) != sides:
            raise ValueError(
                f"joined must have the sides of x {sides}, got {list(prompt['joined'].shape)}"
            )
        return sides[0] // PATCH, sides[1] // PATCH
