"""The blocks of FLUX.1 (see ``flux.py``), and the rotations of its positions.

Shapes: B images, T tokens of D features, text of L tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.layers import sinusoid
from fastdiff.models.transformer import feed_forward, modulate, self_attention, split_heads

FREQUENCIES = 256


def rotations(
    rows: int, columns: int, text: int, axes: tuple[int, int, int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [text + rows * columns, head], float32, neighbouring columns equal.

    The angle of axis a of the image's token (row, column) is its index times 10000^(-2i/a); the
    text is not rotated. float64 inside.
    """
    places = []
    for count, axis in zip((1, rows, columns), axes, strict=True):
        index = torch.arange(count, dtype=torch.float64, device=device)
        power = torch.arange(0, axis, 2, dtype=torch.float64, device=device) / axis
        places.append(index[:, None] * 10000.0**-power)
    first, row, column = places[0][None], places[1][:, None], places[2][None]
    angles = torch.cat([part.expand(rows, columns, -1) for part in (first, row, column)], dim=-1)
    angles = F.pad(angles.flatten(0, 1), (0, 0, text, 0)).repeat_interleave(2, dim=-1)
    return angles.cos().float(), angles.sin().float()


class Embedder(nn.Module):
    """Two layers with SiLU between, [..., in] to [..., D]."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_size, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))

    def times(self, t: Tensor) -> Tensor:
        """Of the sinusoids of t, whatever its shape."""
        return self(sinusoid(t, FREQUENCIES).to(self.in_layer.weight.dtype))


class Modulation(nn.Module):
    """The layer behind the condition's SiLU, [..., D] to [..., parts * D]."""

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__()
        self.lin = nn.Linear(hidden_size, parts * hidden_size)

    def forward(self, c: Tensor) -> Tensor:
        return self.lin(c)


class Scale(nn.Module):
    """The weights of an RMS norm."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))


class QKNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.query_norm = Scale(size)
        self.key_norm = Scale(size)

    def arguments(self, prefix: str = "") -> dict[str, Tensor]:
        """The weights as arguments of ``ops.attention``."""
        return {
            f"{prefix}q_weight": self.query_norm.scale,
            f"{prefix}k_weight": self.key_norm.scale,
        }


class Attention(nn.Module):
    """The layers of one stream."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split_heads(self.qkv(x), self.num_heads)


def _mlp(d: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d))


class DoubleBlock(nn.Module):
    """Attention over both streams, then a feed-forward for each."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = Modulation(d, 6), Modulation(d, 6)
        self.img_attn, self.txt_attn = Attention(d, heads), Attention(d, heads)
        self.img_mlp, self.txt_mlp = _mlp(d), _mlp(d)

    def schedule(self, c: Tensor) -> tuple[Tensor, Tensor]:
        return self.img_mod(c), self.txt_mod(c)

    def forward(
        self, image: Tensor, text: Tensor, schedule: tuple[Tensor, Tensor], tables: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """image [B, T, D], text [B, L, D]; tables: of the image's rotations."""
        rows, text_rows = (modulation.chunk(6, dim=-1) for modulation in schedule)
        q, k, v = self.img_attn.heads(modulate(image, *rows[:2]))
        text_q, text_k, text_v = self.txt_attn.heads(modulate(text, *text_rows[:2]))
        norms: dict[str, Any] = self.img_attn.norm.arguments() | self.txt_attn.norm.arguments(
            "extra_"
        )
        extra: dict[str, Any] = {"extra_q": text_q, "extra_k": text_k, "extra_v": text_v}
        out, text_out = ops.attention(q, k, v, norm="rms", **extra, **norms, **tables)
        image = ops.gate_residual(image, self.img_attn.proj(out.flatten(-2)), rows[2])
        text = ops.gate_residual(text, self.txt_attn.proj(text_out.flatten(-2)), text_rows[2])
        image = feed_forward(image, self.img_mlp, *rows[3:])
        return image, feed_forward(text, self.txt_mlp, *text_rows[3:])


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, over text and image as one sequence."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.linear1 = nn.Linear(d, 7 * d)  # q, k, v and the feed-forward's first layer
        self.linear2 = nn.Linear(5 * d, d)
        self.norm = QKNorm(d // heads)
        self.modulation = Modulation(d, 3)

    def forward(self, x: Tensor, modulation: Tensor, tables: dict[str, Any]) -> Tensor:
        """x [B, L + T, D]."""
        shift, scale, gate = modulation.chunk(3, dim=-1)
        d = x.shape[-1]
        qkv, inner = self.linear1(modulate(x, shift, scale)).split([3 * d, 4 * d], dim=-1)
        out = self_attention(qkv, self.num_heads, norm="rms", **self.norm.arguments(), **tables)
        both = torch.cat([out, F.gelu(inner, approximate="tanh")], dim=-1)
        return ops.gate_residual(x, self.linear2(both), gate)
