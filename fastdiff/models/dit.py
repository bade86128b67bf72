"""DiT: diffusion transformer with adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

Parameters are named as in the public checkpoints of the paper, so their state dicts load as they
are. Shapes: B images of C channels, patches of P x P pixels, T = (H/P)(W/P) tokens of D features.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.transformer import (
    NORM_EPS,
    AdaLN,
    FinalLayer,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    check_positive,
    check_shape,
    check_times,
    feed_forward,
    modulate,
    position_embedding,
    self_attention,
    unpatchify,
)


@dataclass(frozen=True)
class DiTConfig:
    """The size of a DiT. ``input_size`` is the side of the (latent) image in pixels.

    frequency_shift: the timestep's frequencies are 10000^(-i / (128 - shift)), 0 in the paper's
        code and 1 in diffusers', which runs the same weights with it.
    mlp_norm_eps: of the norm before the feed-forward; diffusers has 1e-5 for the public weights.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    learn_sigma: bool = True
    frequency_shift: float = 0.0
    mlp_norm_eps: float = NORM_EPS

    def __post_init__(self) -> None:
        check_positive(self, *(field.name for field in fields(self) if field.type == "int"))
        for name in ("mlp_ratio", "mlp_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if (
            not isinstance(self.frequency_shift, (int, float))
            or not 0 <= self.frequency_shift < 128
        ):
            raise ValueError(f"frequency_shift must be in 0..127, got {self.frequency_shift!r}")
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
    """Table 1 of the paper, for latents of 256 x 256 images and, with "-512", of 512 x 512 ones,
    and the model in this package."""
    trunks = {"XL": (1152, 28, 16), "L": (1024, 24, 16), "B": (768, 12, 12), "S": (384, 12, 6)}
    table = {
        f"DiT-{name}/{patch}": DiTConfig(
            patch_size=patch, hidden_size=hidden, depth=depth, num_heads=heads
        )
        for name, (hidden, depth, heads) in trunks.items()
        for patch in (2, 4, 8)
    }
    table |= {f"{name}-512": replace(config, input_size=64) for name, config in table.items()}
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


class LabelEmbedder(nn.Module):
    """Labels [B] to [B, D]; the last row, number ``num_classes``, stands for no label."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    """Self-attention [B, T, D] over a fused projection."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self_attention(self.qkv(x), self.num_heads))


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (section 3.2 and figure 3 of the paper)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.mlp_eps = config.mlp_norm_eps
        self.attn = Attention(d, config.num_heads)
        self.mlp = Mlp(d, int(d * config.mlp_ratio))
        self.adaLN_modulation = AdaLN(d, 6)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, T, D]; modulation: [B, 6 D], of ``adaLN_modulation``."""
        shift, scale, gate, *rows = modulation.chunk(6, dim=-1)
        x = ops.gate_residual(x, self.attn(modulate(x, shift, scale)), gate)
        return feed_forward(x, self.mlp, *rows, eps=self.mlp_eps)


class DiT(Denoiser):
    """The denoiser: ``model(x, t, y)``.

    x: [B, C, H, W] with H = W = ``config.input_size``; t: [B] times 0..999, integer or fractional;
    y: [B] int64 labels 0..num_classes, where num_classes means no label.
    Returns [B, C, H, W], or [B, 2C, H, W] when the variance is learned (noise first).
    Raises ValueError for another shape, and on the CPU for a label outside the table.

    Agrees with facebookresearch/DiT, whose parameter names it has. The position embedding is a
    fixed parameter, as there; it is computed where a file does not hold it.
    """

    def __init__(self, config: DiTConfig) -> None:
        if not isinstance(config, DiTConfig):
            raise TypeError(f"config must be a DiTConfig, as CONFIGS['digits'], got {config!r}")
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.grid = config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, d, config.patch_size)
        self.t_embedder = TimestepEmbedder(d, shift=config.frequency_shift)
        self.y_embedder = LabelEmbedder(config.num_classes, d)
        self.pos_embed = nn.Parameter(position_embedding(d, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch_size**2 * config.out_channels)
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
        zeroed += [cast(nn.Linear, m[1]) for m in self.modules() if isinstance(m, AdaLN)]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)  # the biases are zero already

    def prompt(self, y: Tensor) -> Tensor:
        """The labels' embedding [B, D]."""
        check_shape("y", y, ["B"])
        last = self.config.null_label
        # Reading the values would synchronise a GPU and break a graph; there the embedding checks.
        if y.device.type == "cpu" and y.numel() and not torch.compiler.is_compiling():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high > last:
                wrong = low if low < 0 else high
                raise ValueError(f"y must be in 0..{last} ({last}: no label), got {wrong}")
        return self.y_embedder(y)

    def schedule(self, t: Tensor, prompt: Tensor) -> tuple[Tensor, ...]:
        """Every block's modulation [..., 6 D], and the last norm's [..., 2 D]."""
        check_times(t, len(prompt))
        c = F.silu(self.t_embedder(t) + prompt)
        modules = (*self.blocks, self.final_layer)
        return tuple(cast(AdaLN, module.adaLN_modulation).rows(c) for module in modules)

    def step(self, x: Tensor, schedule: tuple[Tensor, ...], prompt: Tensor) -> Tensor:
        self._check_x(x)
        check_shape("x", x, [len(prompt), *x.shape[1:]])
        tokens = self.x_embedder(x)
        tokens = tokens + self.pos_embed.to(tokens.dtype)  # float32 where a file lacks it
        for block, modulation in zip(self.blocks, schedule, strict=False):
            tokens = block(tokens, modulation)
        tokens = self.final_layer(tokens, schedule[-1])
        return unpatchify(tokens, self.config.patch_size, self.grid, self.grid)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        self._check_x(x)
        for name, value in (("t", t), ("y", y)):
            check_shape(name, value, [len(x)])
        return super().forward(x, t, y)

    def _check_x(self, x: Tensor) -> None:
        size = self.config.input_size
        expected = [self.config.in_channels, size, size]
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() != 4 or list(x.shape[1:]) != expected:
            raise ValueError(f"x must have shape [B, *{expected}], got {list(x.shape)}")
