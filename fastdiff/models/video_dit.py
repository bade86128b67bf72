"""A latent video DiT with factorised attention: Latte (Ma et al., arXiv 2401.03048, variant 1).

Blocks over the tokens of one frame (with attention to the text) take turns with blocks over the
frames of one place. The time's modulation is one for all blocks, plus a table of each
(adaLN-single, arXiv 2310.00426). Parameters are named as in the public folder, diffusers'.
Shapes: B videos of C channels and F frames, T tokens of D features in a frame, text of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.layers import attend, sinusoid
from fastdiff.models.transformer import (
    NORM_EPS,
    Kept,
    PatchEmbed,
    check_positive,
    check_shape,
    check_times,
    feed_forward,
    modulate,
    position_embedding,
    unpatchify,
)

FREQUENCIES = 256


@dataclass(frozen=True)
class VideoDiTConfig:
    """The size of a video DiT.

    sample_size: the side of the latent frames it is made for; positions are relative to it.
    frames: the most it takes. depth: pairs of a spatial and a temporal block. context_size:
    features of the text's tokens. out_channels: twice the input's when the variance is learned.
    """

    sample_size: int = 64
    patch_size: int = 2
    in_channels: int = 4
    out_channels: int = 8
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    context_size: int = 4096
    frames: int = 16
    norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        check_positive(self, *(field.name for field in fields(self) if field.type == "int"))
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.sample_size}"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {self.num_heads} and of 4, "
                f"got {self.hidden_size}"
            )
        if not isinstance(self.norm_eps, (int, float)) or not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be a positive number, got {self.norm_eps!r}")


CONFIGS = {"Latte-1": VideoDiTConfig()}


def frame_positions(hidden_size: int, frames: int, device: torch.device) -> tuple[Tensor]:
    """One tensor [1, frames, 1, D]: sines, then cosines of the frame's number.

    float64 inside, float32 out.
    """
    half = hidden_size // 2
    omega = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
    angles = torch.arange(frames, dtype=torch.float64, device=device)[:, None] * omega
    return (torch.cat([angles.sin(), angles.cos()], dim=1).float()[None, :, None],)


def token_positions(
    hidden_size: int, rows: int, columns: int, base: float, device: torch.device
) -> tuple[Tensor]:
    """One tensor [1, rows * columns, D], see `position_embedding`."""
    return (position_embedding(hidden_size, rows, columns, base=base).to(device),)


class TwoLayers(nn.Module):
    """Two layers, [..., in] to [..., D]."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)


class AdaLNSingle(nn.Module):
    """The time's embedding, and the modulation of all blocks."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        embedder = TwoLayers(FREQUENCIES, hidden_size)
        self.emb = nn.ModuleDict({"timestep_embedder": embedder})
        self.linear = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of times of any shape: [..., 6 D] and the embedding [..., D]."""
        layers = cast(TwoLayers, self.emb["timestep_embedder"])
        angles = sinusoid(t, FREQUENCIES).to(self.linear.weight.dtype)
        c = layers.linear_2(F.silu(layers.linear_1(angles)))
        return self.linear(F.silu(c)), c


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size)])

    def forward(self, x: Tensor, groups: int) -> Tensor:
        """Within each of the ``groups`` equal runs of tokens of x [B, N, D]."""
        runs = x.unflatten(1, (groups, -1)).flatten(0, 1)
        out = attend(self.to_q(runs), self.to_k(runs), self.to_v(runs), self.num_heads)
        return self.to_out[0](out.view(x.shape))

    def cross(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """To keys and values [B, L, D]; every token asks for itself, whatever its frame."""
        return self.to_out[0](attend(self.to_q(x), k, v, self.num_heads))


class FeedForward(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(hidden_size, 4 * hidden_size)})
        self.net = nn.ModuleDict({"0": first, "2": nn.Linear(4 * hidden_size, hidden_size)})

    def forward(self, x: Tensor) -> Tensor:
        first = cast(nn.ModuleDict, self.net["0"])["proj"]
        return self.net["2"](F.gelu(first(x), approximate="tanh"))


class Block(nn.Module):
    """Attention within groups of tokens, to the text where there is one, and the feed-forward."""

    def __init__(self, config: VideoDiTConfig, text: bool) -> None:
        super().__init__()
        d, self.eps = config.hidden_size, config.norm_eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, d) / d**0.5)
        self.attn1 = Attention(d, config.num_heads)
        if text:
            self.attn2 = Attention(d, config.num_heads)
        self.ff = FeedForward(d)

    def forward(
        self, x: Tensor, modulation: Tensor, groups: int, text: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [B, groups * N, D]; modulation [B, 6 D]; text: keys and values [B, L, D]."""
        shift, scale, gate, *rows = modulation.chunk(6, dim=-1)
        out = self.attn1(modulate(x, shift, scale, eps=self.eps), groups)
        x = ops.gate_residual(x, out, gate)
        if text is not None:
            x = x + self.attn2.cross(x, *text)  # without a norm, as PixArt has it
        return feed_forward(x, self.ff, *rows, eps=self.eps)


class VideoDiT(Denoiser):
    """The denoiser: ``model(x, t, context)``.

    x: [B, C, F, H, W] latents, 1..``frames`` frames with sides that are multiples of the patch;
    t: [B] times 0..999; context: [B, L, 4096], T5's tokens. Returns [B, C, F, H, W], or
    [B, 2C, F, H, W] when the variance is learned (noise first).
    Agrees with diffusers' LatteTransformer3DModel.
    """

    def __init__(self, config: VideoDiTConfig) -> None:
        if not isinstance(config, VideoDiTConfig):
            raise TypeError(
                f"config must be a VideoDiTConfig, as CONFIGS['Latte-1'], got {config!r}"
            )
        super().__init__()
        self.config = config
        d, depth = config.hidden_size, range(config.depth)
        self.pos_embed = PatchEmbed(config.in_channels, d, config.patch_size)
        self.transformer_blocks = nn.ModuleList(Block(config, text=True) for _ in depth)
        self.temporal_transformer_blocks = nn.ModuleList(Block(config, text=False) for _ in depth)
        self.scale_shift_table = nn.Parameter(torch.randn(2, d) / d**0.5)
        self.proj_out = nn.Linear(d, config.patch_size**2 * config.out_channels)
        self.adaln_single = AdaLNSingle(d)
        self.caption_projection = TwoLayers(config.context_size, d)
        side = config.sample_size
        self._base = (side // config.patch_size) / max(1, side // 64)
        self.places, self.moments = Kept(token_positions), Kept(frame_positions)

    def prompt(self, context: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Keys and values [B, L, D] of the text for each spatial block."""
        check_shape("context", context, ["B", "L", self.config.context_size])
        layers = self.caption_projection
        text = layers.linear_2(F.gelu(layers.linear_1(context), approximate="tanh"))
        attentions = [cast(Block, block).attn2 for block in self.transformer_blocks]
        return tuple((layer.to_k(text), layer.to_v(text)) for layer in attentions)

    def schedule(self, t: Tensor, prompt: tuple[Any, ...]) -> tuple[Any, ...]:
        """The modulations of each pair of blocks, [..., 6 D], and the last norm's, [..., 2 D]."""
        check_times(t, len(prompt[0][0]))
        shared, c = self.adaln_single(t)

        def rows(block: nn.Module) -> Tensor:
            return shared + cast(Tensor, block.scale_shift_table).flatten()

        pairs = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        last = (self.scale_shift_table + c[..., None, :]).flatten(-2)
        return (*((rows(space), rows(time)) for space, time in pairs), last)

    def step(self, x: Tensor, schedule: tuple[Any, ...], prompt: tuple[Any, ...]) -> Tensor:
        frames, rows, columns = self._grid(x, len(prompt[0][0]))
        count, d = rows * columns, self.config.hidden_size
        tokens = self.pos_embed(x.transpose(1, 2).flatten(0, 1))
        (places,) = self.places(d, rows, columns, self._base, x.device)
        tokens = tokens + places.to(x.dtype)
        tokens = tokens.view(len(x), frames * count, d)
        blocks = zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        for i, (space, time) in enumerate(blocks):
            tokens = space(tokens, schedule[i][0], frames, prompt[i])
            if i == 0 and frames > 1:
                (moments,) = self.moments(d, frames, x.device)
                tokens = tokens.unflatten(1, (frames, count)) + moments.to(x.dtype)
                tokens = tokens.flatten(1, 2)
            tokens = time(_turned(tokens, frames), schedule[i][1], count)
            tokens = _turned(tokens, count)
        shift, scale = schedule[-1].chunk(2, dim=-1)
        tokens = self.proj_out(modulate(tokens, shift, scale)).unflatten(1, (frames, count))
        out = unpatchify(tokens.flatten(0, 1), self.config.patch_size, rows, columns)
        return out.unflatten(0, (-1, frames)).transpose(1, 2)

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, context: Tensor
    ) -> Tensor:
        return super().forward(x, t, context)

    def _grid(self, x: Tensor, batch: int) -> tuple[int, int, int]:
        """Frames, and rows and columns of tokens."""
        check_shape("x", x, [batch, self.config.in_channels, "F", "H", "W"])
        frames, *sides = x.shape[2:]
        if not 1 <= frames <= self.config.frames:
            raise ValueError(f"x must have 1..{self.config.frames} frames, got {frames}")
        patch = self.config.patch_size
        if any(side % patch or not side for side in sides):
            raise ValueError(
                f"x must have sides that are multiples of {patch}, got {list(x.shape)}"
            )
        return frames, sides[0] // patch, sides[1] // patch


def _turned(tokens: Tensor, groups: int) -> Tensor:
    """[B, groups * N, D] with the tokens of all groups at one place next to each other."""
    return tokens.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
