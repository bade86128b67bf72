"""MMDiT: the transformer of Stable Diffusion 3 and 3.5 (Esser et al., arXiv 2403.03206).

Image and text are two streams with layers of their own, joined in every block's attention.
Parameters are named as in Stability's checkpoints (github.com/Stability-AI/sd3.5, mmditx.py).
Shapes: B images of C channels, T tokens of D features, text of L tokens, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

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
    VectorEmbedder,
    check_positive,
    check_shape,
    check_times,
    feed_forward,
    modulate,
    position_embedding,
    self_attention,
    split_heads,
    unpatchify,
)


@dataclass(frozen=True)
class MMDiTConfig:
    """The size of an MMDiT.

    sample_size: the side of the latent images it is made for; positions are relative to it.
    position_size: the side of the table of positions in tokens, which bounds an image's sides.
    context_size, pooled_size: features of the text's tokens and of its pooled embedding.
    qk_norm: RMS norm of queries and keys. dual_blocks: those with a second attention of the image
    with itself (SD3.5-medium).
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 24
    num_heads: int = 24
    context_size: int = 4096
    pooled_size: int = 2048
    position_size: int = 192
    qk_norm: bool = False
    dual_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dual_blocks", tuple(self.dual_blocks))
        check_positive(self, *(field.name for field in fields(self) if field.type == "int"))
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads {self.num_heads} and of 4, "
                f"got {self.hidden_size}"
            )
        if not all(isinstance(i, int) and 0 <= i < self.depth for i in self.dual_blocks):
            raise ValueError(
                f"dual_blocks must be numbers of blocks, 0..{self.depth - 1}, "
                f"got {self.dual_blocks}"
            )


CONFIGS = {
    "SD3-medium": MMDiTConfig(),
    "SD3.5-large": MMDiTConfig(hidden_size=2432, depth=38, num_heads=38, qk_norm=True),
    "SD3.5-medium": MMDiTConfig(position_size=384, qk_norm=True, dual_blocks=tuple(range(13))),
}


class Attention(nn.Module):
    """The layers of one stream: the fused projection, QK-norm, and the result's projection."""

    def __init__(self, config: MMDiTConfig, pre_only: bool = False) -> None:
        super().__init__()
        d, self.num_heads = config.hidden_size, config.num_heads
        self.qkv = nn.Linear(d, 3 * d)
        if not pre_only:
            self.proj = nn.Linear(d, d)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.ln_q = nn.RMSNorm(d // self.num_heads, eps=NORM_EPS)
            self.ln_k = nn.RMSNorm(d // self.num_heads, eps=NORM_EPS)

    def norm(self, prefix: str = "", queries: bool = True) -> dict[str, Any]:
        """The arguments of ``ops.attention`` for QK-norm."""
        if not self.qk_norm:
            return {}
        q_weight = {f"{prefix}q_weight": self.ln_q.weight} if queries else {}
        return {"norm": "rms", "eps": NORM_EPS, f"{prefix}k_weight": self.ln_k.weight, **q_weight}

    def forward(self, x: Tensor) -> Tensor:
        """Of one stream with itself."""
        return self.proj(self_attention(self.qkv(x), self.num_heads, **self.norm()))


class StreamBlock(nn.Module):
    """One stream's half of a block. pre_only: it ends at the attention, as keys and values."""

    def __init__(self, config: MMDiTConfig, pre_only: bool = False, dual: bool = False) -> None:
        super().__init__()
        d = config.hidden_size
        self.parts = 2 if pre_only else 9 if dual else 6
        self.attn = Attention(config, pre_only)
        if dual:
            self.attn2 = Attention(config)
        if not pre_only:
            self.mlp = Mlp(d, 4 * d)
        self.adaLN_modulation = AdaLN(d, self.parts)

    def finish(self, x: Tensor, out: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """x with the attention's result out [B, T, H, D / H] and the feed-forward."""
        result = ops.gate_residual(x, self.attn.proj(out.flatten(-2)), rows[2])
        if self.parts == 9:
            shift, scale, gate = rows[6:]
            result = ops.gate_residual(result, self.attn2(modulate(x, shift, scale)), gate)
        return feed_forward(result, self.mlp, *rows[3:6])


class JointBlock(nn.Module):
    """Attention over both streams (figure 2 of the paper), then a feed-forward for each."""

    def __init__(self, config: MMDiTConfig, index: int) -> None:
        super().__init__()
        self.last = index == config.depth - 1
        self.context_block = StreamBlock(config, pre_only=self.last)
        self.x_block = StreamBlock(config, dual=index in config.dual_blocks)

    def schedule(self, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_block.adaLN_modulation.rows(c), self.context_block.adaLN_modulation.rows(c)

    def forward(
        self, x: Tensor, context: Tensor, schedule: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x [B, T, D] and context [B, L, D], which the last block leaves as it is."""
        image, text = self.x_block, self.context_block
        rows = schedule[0].chunk(image.parts, dim=-1)
        text_rows = schedule[1].chunk(text.parts, dim=-1)
        heads = image.attn.num_heads
        q, k, v = split_heads(image.attn.qkv(modulate(x, *rows[:2])), heads)
        normed, layer = modulate(context, *text_rows[:2]), text.attn.qkv
        extra: dict[str, Any] = image.attn.norm() | text.attn.norm("extra_", not self.last)
        if self.last:
            d = x.shape[-1]  # nothing asks for the text's queries
            text_k, text_v = split_heads(
                F.linear(normed, layer.weight[d:], layer.bias[d:]), heads, 2
            )
            out = ops.attention(q, k, v, extra_k=text_k, extra_v=text_v, **extra)
            return image.finish(x, cast(Tensor, out), rows), context
        text_q, text_k, text_v = split_heads(layer(normed), heads)
        out, text_out = ops.attention(
            q, k, v, extra_q=text_q, extra_k=text_k, extra_v=text_v, **extra
        )
        return image.finish(x, out, rows), text.finish(context, text_out, text_rows)


class MMDiT(Denoiser):
    """The denoiser: ``model(x, t, context, y)``; predicts the flow (noise minus image).

    x: [B, C, H, W] latents, sides multiples of the patch and at most ``position_size`` patches;
    t: [B] times 0..1000, sigma * 1000; context: [B, L, 4096], the tokens of the text encoders;
    y: [B, 2048], the pooled embeddings. Returns [B, C, H, W].
    Agrees with Stability-AI/sd3.5 and diffusers' SD3Transformer2DModel.
    """

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig) -> None:
        if not isinstance(config, MMDiTConfig):
            raise TypeError(
                f"config must be an MMDiTConfig, as CONFIGS['SD3-medium'], got {config!r}"
            )
        super().__init__()
        self.config = config
        d, patch, side = config.hidden_size, config.patch_size, config.position_size
        self.x_embedder = PatchEmbed(config.in_channels, d, patch)
        self.t_embedder = TimestepEmbedder(d)
        self.y_embedder = VectorEmbedder(config.pooled_size, d)
        self.context_embedder = nn.Linear(config.context_size, d)
        # Up to 900 MB: not computed for a model whose weights come from a file.
        table = torch.empty(1, side**2, d, device="meta")
        if self.context_embedder.weight.device.type != "meta":
            table = position_embedding(d, side, base=config.sample_size // patch)
        self.register_buffer("pos_embed", table)
        self.joint_blocks = nn.ModuleList(JointBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(d, patch**2 * config.in_channels)

    def prompt(self, context: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """context: the text's tokens [B, L, D]; pooled: its embedding [B, D]."""
        check_shape("context", context, ["B", "L", self.config.context_size])
        check_shape("y", y, [len(context), self.config.pooled_size])
        return {"context": self.context_embedder(context), "pooled": self.y_embedder(y)}

    def schedule(self, t: Tensor, prompt: dict[str, Tensor]) -> tuple[Any, ...]:
        """Every block's modulations of image and text, then the last norm's."""
        check_times(t, len(prompt["pooled"]))
        c = F.silu(self.t_embedder(t) + prompt["pooled"])
        blocks = [cast(JointBlock, block).schedule(c) for block in self.joint_blocks]
        return (*blocks, self.final_layer.adaLN_modulation.rows(c))

    def step(self, x: Tensor, schedule: tuple[Any, ...], prompt: dict[str, Tensor]) -> Tensor:
        rows, columns = self._grid(x, len(prompt["pooled"]))
        tokens = self.x_embedder(x)
        tokens = tokens + self._positions(rows, columns).to(tokens.dtype)
        context = prompt["context"]
        for block, modulations in zip(self.joint_blocks, schedule, strict=False):
            tokens, context = block(tokens, context, modulations)
        tokens = self.final_layer(tokens, schedule[-1])
        return unpatchify(tokens, self.config.patch_size, rows, columns)

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, context: Tensor, y: Tensor
    ) -> Tensor:
        return super().forward(x, t, context, y)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The middle of the table, [1, rows * columns, D]."""
        side = self.config.position_size
        table = self.pos_embed.view(side, side, -1)
        top, left = (side - rows) // 2, (side - columns) // 2
        return table[top : top + rows, left : left + columns].reshape(1, rows * columns, -1)

    def _grid(self, x: Tensor, batch: int) -> tuple[int, int]:
        """The image's rows and columns of patches."""
        check_shape("x", x, [batch, self.config.in_channels, "H", "W"])
        patch, most = self.config.patch_size, self.config.position_size
        rows, columns = (side // patch for side in x.shape[2:])
        whole = [rows * patch, columns * patch] == list(x.shape[2:])
        if not whole or not (1 <= rows <= most and 1 <= columns <= most):
            raise ValueError(
                f"x must have sides that are multiples of {patch}, up to {most * patch}, "
                f"got {list(x.shape)}"
            )
        return rows, columns
