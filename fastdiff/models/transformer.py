"""What the zoo's diffusion transformers share, over ``fastdiff.ops``; each works with gradients.

Shapes: B images, T tokens of D features, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.layers import sinusoid

NORM_EPS = 1e-6


def modulate(x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = NORM_EPS) -> Tensor:
    """LayerNorm without parameters, then ``(1 + scale) x + shift``; x [B, ..., D], rows [B, D]."""
    return ops.layer_norm_modulate(x, scale, shift, eps=eps)


class Kept:
    """``make(*size)``, tensors of a size and a device alone, kept for the last few sizes.

    Made anew where a graph is captured: the compiler hoists them.
    """

    def __init__(self, make: Callable[..., tuple[Tensor, ...]], most: int = 4) -> None:
        self._make, self._most = make, most
        self.values: dict[tuple[Any, ...], tuple[Tensor, ...]] = {}

    def __call__(self, *size: Any) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return self._make(*size)
        if size in self.values:
            return self.values[size]
        # Kept for a training to come, too.
        with torch.inference_mode(False), torch.no_grad():
            made = self._make(*size)
        if all(type(tensor) is Tensor for tensor in made):  # no fake ones
            while len(self.values) >= self._most:
                del self.values[next(iter(self.values))]
            self.values[size] = made
        return made


def feed_forward(
    x: Tensor, mlp: nn.Module, shift: Tensor, scale: Tensor, gate: Tensor, *, eps: float = NORM_EPS
) -> Tensor:
    """``x + gate * mlp(modulate(x))``."""
    return ops.gate_residual(x, mlp(modulate(x, shift, scale, eps=eps)), gate)


def split_heads(qkv: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """A fused projection [B, T, parts * D] as views [B, T, H, D / H], one for each part."""
    return qkv.unflatten(-1, (parts, num_heads, -1)).unbind(2)


def self_attention(qkv: Tensor, num_heads: int, **norm: Any) -> Tensor:
    """Attention of a fused projection [B, T, 3 D], [B, T, D]; norm: as for ``ops.attention``."""
    out = ops.attention(*split_heads(qkv, num_heads), **norm)
    return cast(Tensor, out).flatten(-2)


def unpatchify(tokens: Tensor, patch: int, rows: int, columns: int) -> Tensor:
    """[N, rows * columns, P * P * C], row-major, to [N, C, rows * P, columns * P]."""
    x = tokens.unflatten(-1, (patch, patch, -1)).unflatten(1, (rows, columns))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, rows * patch, columns * patch)


def position_embedding(
    hidden_size: int, rows: int, columns: int | None = None, *, base: float | None = None
) -> Tensor:
    """Fixed 2-D sin-cos embedding [1, rows * columns, D], row-major: half of D for the column, half
    for the row, each [sin, cos] of coordinate * 10000^(-i/(D/4)).

    columns: default rows. base: the coordinates of either side run from 0 to it (default: one for
    each token). They are float32 as where models were trained; float64 inside, float32 out, on the
    CPU.
    """
    columns = rows if columns is None else columns
    quarter = hidden_size // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)

    def along(count: int) -> Tensor:
        place = torch.arange(count, dtype=torch.float32, device="cpu")
        angles = (place if base is None else place / (count / base))[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1).float()

    row, column = along(rows)[:, None], along(columns)[None]
    halves = [half.expand(rows, columns, -1) for half in (column, row)]
    return torch.cat(halves, dim=-1).view(1, rows * columns, -1)


class PatchEmbed(nn.Module):
    """[N, C, H, W] to contiguous tokens [N, T, D], one per patch, row-major."""

    def __init__(self, in_channels: int, hidden_size: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class Mlp(nn.Module):
    """Two layers with GELU in its tanh form between."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VectorEmbedder(nn.Module):
    """Two layers with SiLU between, [..., in] to [..., D]."""

    def __init__(self, in_size: int, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class TimestepEmbedder(VectorEmbedder):
    """Times of any shape to [..., D]; shift: of the frequencies, see ``layers.sinusoid``."""

    def __init__(self, hidden_size: int, frequencies: int = 256, shift: float = 0.0) -> None:
        super().__init__(frequencies, hidden_size)
        self.frequencies, self.shift = frequencies, shift

    def forward(self, t: Tensor) -> Tensor:
        angles = sinusoid(t, self.frequencies, shift=self.shift)
        return self.mlp(angles.to(next(self.mlp.parameters()).dtype))


class AdaLN(nn.Sequential):
    """The modulation of a norm: SiLU, then a layer to ``parts`` rows of D."""

    def __init__(self, hidden_size: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(hidden_size, parts * hidden_size))

    def rows(self, c: Tensor) -> Tensor:
        """[..., parts * D] of a condition behind its SiLU, which all norms share."""
        return self[1](c)


class FinalLayer(nn.Module):
    """Tokens to the pixels of their patches, [B, T, P * P * C]."""

    def __init__(self, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_size)
        self.adaLN_modulation = AdaLN(hidden_size, 2)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """modulation: [B, 2 D], of ``adaLN_modulation``."""
        shift, scale = modulation.chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


def check_positive(config: Any, *names: str) -> None:
    """ValueError where an entry of a configuration is no positive integer."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_shape(name: str, value: Any, expected: Sequence[int | str]) -> None:
    """TypeError for what is no tensor, ValueError for another shape; a string stands for any."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if len(value.shape) != len(expected) or any(
        mine != want
        for mine, want in zip(value.shape, expected, strict=True)
        if isinstance(want, int)
    ):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(value.shape)}")


def check_times(t: Any, batch: int) -> None:
    """The times of a schedule: [B] or [S, B]."""
    check_shape("t", t, ["S", batch] if isinstance(t, Tensor) and t.dim() == 2 else [batch])
