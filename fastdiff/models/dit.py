"""DiT: diffusion transformer with adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

Parameters are named as in the public checkpoints of the paper, so their state dicts load as they
are. Shapes: B images of C channels, patches of P x P pixels, T = (H/P)(W/P) tokens of D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


@dataclass(frozen=True)
class DiTConfig:
    """The size of a DiT. ``input_size`` is the side of the (latent) image in pixels."""

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.type == "int"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if not isinstance(self.mlp_ratio, (int, float)) or not self.mlp_ratio > 0:
            raise ValueError(f"mlp_ratio must be a positive number, got {self.mlp_ratio!r}")
        if self.input_size % self.patch_size:
            raise ValueError(
                f"input_size must be a multiple of patch_size {self.patch_size}, "
                f"got {self.input_size}"
            )
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {self.num_heads} and of 4, "
                f"got {self.hidden_size}"
            )

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice the input's when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def null_label(self) -> int:
        """The label that means no label: the last row of the table."""
        return self.num_classes

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2


def _sizes() -> dict[str, DiTConfig]:
    """Table 1 of the paper, for latents of 256 x 256 images, and the model in this package."""
    trunks = {"XL": (1152, 28, 16), "L": (1024, 24, 16), "B": (768, 12, 12), "S": (384, 12, 6)}
    table = {
        f"DiT-{name}/{patch}": DiTConfig(
            patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads
        )
        for name, (hidden, depth, heads) in trunks.items()
        for patch in (2, 4, 8)
    }
    table["digits"] = DiTConfig(
        input_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=128,
        depth=4,
        num_heads=4,
        num_classes=10,
        learn_sigma=False,
    )
    return table


CONFIGS = _sizes()


# What a fused operator may later stand in for; every block goes through these four.


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then ``(1 + scale) x + shift`` per image; x [B, T, D]."""
    normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """``x + gate * branch``, gate [B, D] per image."""
    return x + gate.unsqueeze(1) * branch


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Self-attention on the fused projection qkv [B, T, 3D]; returns [B, T, D]."""
    b, t, d3 = qkv.shape
    q, k, v = qkv.view(b, t, 3, num_heads, d3 // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d3 // 3)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, as the paper's model uses it."""
    return F.gelu(x, approximate="tanh")


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding [cos, sin] of the times t [B], integer or fractional; [B, dim].

    Frequencies max_period^(-i/half), i = 0 .. half-1, half = dim/2. float64 when t is,
    else float32.
    """
    half = dim // 2
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    exponent = torch.arange(half, dtype=dtype, device=t.device) * (-math.log(max_period) / half)
    angles = t.to(dtype)[:, None] * torch.exp(exponent)[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D sin-cos embedding [1, grid^2, D], row-major: first half of D the column, then row.

    Each half is [sin, cos] of the coordinate times 10000^(-i/(D/4)). float64 inside, float32 out.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    place = torch.arange(grid_size, dtype=torch.float64, device="cpu")
    row, column = torch.meshgrid(place, place, indexing="ij")
    angles = [coordinate.reshape(-1, 1) * omega for coordinate in (column, row)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)[None].float()


class PatchEmbed(nn.Module):
    """[B, C, H, W] to tokens [B, T, D], one per patch, row-major."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        patch = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Times [B] to [B, D]."""

    def __init__(self, hidden_size: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(
            nn.Linear(frequencies, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(
            timestep_embedding(t, self.frequencies).to(next(self.mlp.parameters()).dtype)
        )


class LabelEmbedder(nn.Module):
    """Labels [B] to [B, D]; the last row, number ``num_classes``, stands for no label."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attention(self.qkv(x), self.num_heads))


class Mlp(nn.Module):
    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (section 3.2 and figure 3 of the paper)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.attn = Attention(d, config.num_heads)
        self.mlp = Mlp(d, int(d * config.mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = gated_residual(x, gate_msa, self.attn(modulated_layer_norm(x, shift_msa, scale_msa)))
        return gated_residual(x, gate_mlp, self.mlp(modulated_layer_norm(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches, [B, T, P*P*C_out]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.linear = nn.Linear(d, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(d, 2 * d))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulated_layer_norm(x, shift, scale))


class DiT(nn.Module):
    """The denoiser: ``model(x, t, y)``.

    x: [B, C, H, W] with H = W = ``config.input_size``; t: [B] times 0..999, integer or fractional;
    y: [B] int64 labels 0..num_classes, where num_classes means no label.
    Returns [B, C, H, W], or [B, 2C, H, W] when the variance is learned (noise first).
    Raises ValueError for another shape, and on the CPU for a label outside the table.

    ``sampling`` (a fastdiff.models.Sampling or None) tells ``fastdiff.sample`` the schedule,
    prediction and shape the weights were trained for; ``fastdiff.load`` sets it.
    """

    sampling: Any = None

    def __init__(self, config: DiTConfig) -> None:
        if not isinstance(config, DiTConfig):
            raise TypeError(f"config must be a DiTConfig, as CONFIGS['digits'], got {config!r}")
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = LabelEmbedder(config.num_classes, d)
        grid = config.input_size // config.patch_size
        self.pos_embed = nn.Parameter(position_embedding(d, grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights of the paper: Xavier linears, and zeros where adaLN-Zero says so."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # The patch convolution is initialised as the linear map it is.
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                nn.init.zeros_(cast(Tensor, module.bias))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[index]).weight, std=0.02)
        zeroed = [self.final_layer.linear]
        for module in self.modules():
            if isinstance(module, (DiTBlock, FinalLayer)):
                zeroed.append(cast(nn.Linear, module.adaLN_modulation[1]))
        for layer in zeroed:
            nn.init.zeros_(layer.weight)  # the biases are zero already

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self._check(x, t, y)
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c))

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """[B, T, P*P*C] to [B, C, H, W]."""
        patch, channels = self.config.patch_size, self.config.out_channels
        grid = self.config.input_size // patch
        x = tokens.view(-1, grid, grid, patch, patch, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * patch, grid * patch)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        size, last = self.config.input_size, self.config.null_label
        expected = [self.config.in_channels, size, size]
        if x.dim() != 4 or list(x.shape[1:]) != expected:
            raise ValueError(f"x must have shape [B, *{expected}], got {list(x.shape)}")
        for name, value in (("t", t), ("y", y)):
            if value.dim() != 1 or value.shape[0] != x.shape[0]:
                raise ValueError(f"{name} must have shape [{x.shape[0]}], got {list(value.shape)}")
        # Reading the values would synchronise a GPU and break a graph; there the embedding checks.
        if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > last:
                wrong = low if low < 0 else high
                raise ValueError(f"y must be in 0..{last} ({last}: no label), got {wrong}")
