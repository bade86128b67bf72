"""timestep_embedding: sin and cos of t at geometrically spaced frequencies.

DDPM, Ho et al., 2020, https://arxiv.org/abs/2006.11239; the positions of Vaswani et al., 2017,
https://arxiv.org/abs/1706.03762. The arithmetic of diffusers' get_timestep_embedding.

| model                       | flip_sin_to_cos | downscale_freq_shift | t            |
|-----------------------------|-----------------|----------------------|--------------|
| DDPM                        | False           | 1                    | 0..999       |
| Stable Diffusion, SDXL, DiT | True            | 0                    | 0..999       |
| SD3, FLUX                   | True            | 0                    | 1000 t       |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from fastdiff.ops._contract import AotConfig, Call, Example, Implementation, Op, register
from fastdiff.ops._strides import why_not_triton

Tensor = torch.Tensor
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.int64, torch.int32),
)


def reference(
    t: Tensor,
    dim: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
) -> Tensor:
    """The op in plain PyTorch: the operations of diffusers, in float32 unless t is float64."""
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(0, half, dtype=dtype, device=t.device)
    exponent = exponent / (half - downscale_freq_shift)
    angle = t[:, None].to(dtype) * torch.exp(exponent)[None, :]
    angle = scale * angle
    parts = [torch.sin(angle), torch.cos(angle)]
    if flip_sin_to_cos:
        parts.reverse()
    if dim % 2:
        parts.append(torch.zeros_like(angle[:, :1]))
    return torch.cat(parts, dim=-1)


def check(
    t: Tensor,
    dim: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    if t.dtype not in DTYPES:
        raise TypeError(f"t must be a float, int32 or int64 tensor, got {t.dtype}")
    if t.dim() != 1:
        raise ValueError(f"t must have shape [S], got {tuple(t.shape)}")
    if dim < 2:
        raise ValueError(f"dim must be at least 2, got {dim}")
    if not dim // 2 > downscale_freq_shift:
        raise ValueError(
            f"downscale_freq_shift must be below dim // 2 = {dim // 2}, got {downscale_freq_shift}"
        )
    if not (max_period > 0 and math.isfinite(max_period)):
        raise ValueError(f"max_period must be positive and finite, got {max_period}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def _triton_supports(t: Tensor, *args, **kwargs) -> str:
    if reason := why_not_triton(t):
        return reason
    return "t is torch.float64; the kernel computes float32" if t.dtype == torch.float64 else ""


def _triton(
    t: Tensor,
    dim: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
) -> Tensor:
    from fastdiff.kernels import timestep_embedding as kernels

    out = torch.empty((t.shape[0], dim), dtype=torch.float32, device=t.device)
    if out.numel():
        kernels.launch(t, out, flip_sin_to_cos, downscale_freq_shift, max_period, scale)
    return out


def bytes_moved(t: Tensor, dim: int, *args, **kwargs) -> int:
    """t read once, the result written once."""
    return t.numel() * (t.element_size() + 4 * dim)


def flops(t: Tensor, dim: int, *args, **kwargs) -> int:
    """Per result: 2 products and one sine (which counts as one)."""
    return t.numel() * dim * 3


def example(
    name: str,
    steps: int,
    dim: int,
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0.0,
    largest: float = 999.0,
    edit: Callable[[Tensor], Tensor] | None = None,
    **kwargs: float,
) -> Example:
    """A schedule of `steps` times from `largest` down."""

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        t = torch.linspace(largest, largest / max(steps, 1), steps).to(device, dtype)
        return Call((edit(t) if edit else t, dim, flip_sin_to_cos, downscale_freq_shift), kwargs)

    return Example(name, make)


EXAMPLES = (
    example("DDPM CIFAR-10, one image", 1, 128, False, 1.0),
    example("SD1.5, 50 steps", 50, 320),
    example("DiT-XL/2, 50 steps", 50, 256),
    example("FLUX.1, 28 steps", 28, 256, largest=1000.0),
    example("SDXL added conditions", 12, 256, largest=1024.0),
    example("DDPM LSUN, 1000 steps", 1000, 128, False, 1.0),
)

SAMPLES = (
    example("one step", 1, 8),
    example("DDPM", 5, 32, False, 1.0),
    example("odd dim", 3, 33),
    example("odd dim, cos last", 3, 5, False, 0.5),
    example("smallest dim", 7, 2),
    example("more than one block", 9, 2 * 130),
    example("flow, scaled inside", 4, 64, largest=1.0, scale=1000.0),
    example("other period", 4, 64, max_period=100.0),
    # One time for the whole batch, as pipelines expand it.
    example("expanded", 1, 16, edit=lambda t: t.expand(4)),
    example("every other time", 8, 16, edit=lambda t: t[::2]),
    # Angles whose reduction needs more digits than float32 has.
    example("large times", 6, 16, largest=6e4),
    example("negative times", 6, 16, largest=-999.0),
    example("fractional times", 6, 16, largest=1e-3),
    example("zero", 2, 16, largest=0.0),
    example("no steps", 0, 16),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import timestep_embedding as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="timestep_embedding",
        schema="(Tensor t, int dim, bool flip_sin_to_cos, float downscale_freq_shift, "
        'float max_period=10000.0, float scale=1.0, str impl="auto") -> Tensor',
        reference=reference,
        pattern=reference,
        check=check,
        implementations=(Implementation("triton", _triton_supports, _triton),),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
    )
)


def timestep_embedding(
    t: Tensor,
    dim: int,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
    *,
    impl: str = "auto",
) -> Tensor:
    """[sin(a), cos(a)], a = scale * t * max_period^(-i / (dim // 2 - downscale_freq_shift)).

    t: [S], any float dtype, int32 or int64, any stride; computed in float32 (float64 for a float64
    t, by the reference). flip_sin_to_cos: cosines first. An odd dim ends in a column of zeros.
    scale multiplies the angles; a model that multiplies its times (FLUX: 1000 t) rounds them
    first, so give it those. impl: "auto", "triton" or "reference"; on the CPU the bits are those of
    diffusers' get_timestep_embedding. Returns [S, dim] in float32, contiguous; differentiable in t.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.timestep_embedding(
        t, dim, flip_sin_to_cos, downscale_freq_shift, max_period, scale, impl
    )
