"""timestep_mlp: the sinusoidal embedding of t and its two-layer MLP, for every step at once.

y = W2 silu(W1 timestep_embedding(t) + b1) + b2: diffusers' Timesteps and TimestepEmbedding, DiT's
TimestepEmbedder. It depends on the schedule only, so a sampler computes it once, for all its steps.
DDPM: Ho et al., 2020, https://arxiv.org/abs/2006.11239.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fastdiff.ops._contract import AotConfig, Call, Example, Implementation, Op, register
from fastdiff.ops._strides import why_not_triton
from fastdiff.ops.linear_gate import check_layer, why_not_rows
from fastdiff.ops.timestep_embedding import check as check_embedding
from fastdiff.ops.timestep_embedding import reference as embed

Tensor = torch.Tensor


def reference(
    t: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
    final_silu: bool = False,
) -> Tensor:
    """The op in plain PyTorch: the embedding in float32 (float64 for such a t), then w1's."""
    x = embed(t, w1.shape[1], flip_sin_to_cos, downscale_freq_shift, max_period, scale)
    x = torch.nn.functional.silu(torch.nn.functional.linear(x.to(w1.dtype), w1, b1))
    x = torch.nn.functional.linear(x, w2, b2)
    return torch.nn.functional.silu(x) if final_silu else x


def check(
    t: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
    final_silu: bool = False,
) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    if w1.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise TypeError(f"w1 must be float32, float16, bfloat16 or float64, got {w1.dtype}")
    if w1.dim() != 2:
        raise ValueError(f"w1 must have shape [H, E], got {tuple(w1.shape)}")
    check_embedding(t, w1.shape[1], flip_sin_to_cos, downscale_freq_shift, max_period, scale)
    if w1.device != t.device:
        raise ValueError(f"w1 must be on {t.device} like t, got {w1.device}")
    check_layer(w1.shape[1], ("w1", w1), w1, b1, ("w1", "b1"))
    check_layer(w1.shape[0], ("w1", w1), w2, b2, ("w2", "b2"))


def _triton_supports(t: Tensor, w1, b1, w2, b2, *args, **kwargs) -> str:
    if t.dtype == torch.float64:
        return "t is torch.float64; the kernel computes float32"
    return why_not_triton(t) or why_not_rows(w1, b1) or why_not_rows(w2, b2)


def _triton(
    t: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
    final_silu: bool = False,
) -> Tensor:
    from fastdiff.kernels import timestep_mlp as kernels

    out = torch.empty((t.shape[0], w2.shape[0]), dtype=w1.dtype, device=t.device)
    if out.numel():
        convention = (flip_sin_to_cos, downscale_freq_shift, max_period, scale)
        kernels.launch(t, w1, b1, w2, b2, out, final_silu, convention)
    return out


def bytes_moved(t: Tensor, w1, b1, w2, b2, *args, **kwargs) -> int:
    """t and the weights read once, the result written once."""
    read = sum(v.numel() * v.element_size() for v in (t, w1, b1, w2, b2) if v is not None)
    return read + t.numel() * w2.shape[0] * w2.element_size()


def flops(t: Tensor, w1, b1, w2, b2, *args, **kwargs) -> int:
    """2 per product of the two matrix multiplications."""
    return 2 * t.numel() * (w1.numel() + w2.numel())


def example(
    name: str,
    steps: int,
    sizes: tuple[int, int, int],
    flip_sin_to_cos: bool = True,
    downscale_freq_shift: float = 0.0,
    bias: bool = True,
    largest: float = 999.0,
    edit: Callable[[Tensor], Tensor] | None = None,
    **kwargs: bool | float,
) -> Example:
    """A schedule of `steps` times; sizes: of the embedding, the hidden layer, the result."""

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(29)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        t = torch.linspace(largest, largest / max(steps, 1), steps).to(device, dtype)
        layers: list[Tensor | None] = []
        for inputs, results in (sizes[:2], sizes[1:]):
            layers.append((random(results, inputs) / inputs**0.5).to(device, dtype))
            layers.append(random(results).to(device, dtype) if bias else None)
        convention = (flip_sin_to_cos, downscale_freq_shift)
        return Call((edit(t) if edit else t, *layers, *convention), kwargs)

    return Example(name, make)


EXAMPLES = (
    example("DDPM CIFAR-10, 1000 steps", 1000, (128, 512, 512), False, 1.0, final_silu=True),
    example("DiT-XL/2, 50 steps", 50, (256, 1152, 1152), final_silu=True),
    example("SD1.5, 50 steps", 50, (320, 1280, 1280), final_silu=True),
    example("FLUX.1, 28 steps", 28, (256, 3072, 3072), largest=1000.0),
)

SAMPLES = (
    example("one step", 1, (8, 16, 16)),
    example("DDPM", 5, (32, 48, 40), False, 1.0),
    example("odd sizes", 3, (33, 17, 19), final_silu=True),
    example("no bias", 4, (16, 32, 8), bias=False),
    # More than one tile of steps and of columns.
    example("several tiles", 70, (32, 80, 70), final_silu=True),
    example("flow, scaled inside", 4, (16, 32, 8), largest=1.0, scale=1000.0),
    # One time for the whole batch, as pipelines expand it.
    example("expanded", 1, (16, 32, 8), edit=lambda t: t.expand(4)),
    example("every other time", 8, (16, 32, 8), edit=lambda t: t[::2]),
    example("other period", 4, (64, 32, 8), max_period=100.0),
    example("no steps", 0, (16, 32, 8)),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import timestep_mlp as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="timestep_mlp",
        schema="(Tensor t, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, bool flip_sin_to_cos, "
        "float downscale_freq_shift, float max_period=10000.0, float scale=1.0, "
        'bool final_silu=False, str impl="auto") -> Tensor',
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


def timestep_mlp(
    t: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    flip_sin_to_cos: bool,
    downscale_freq_shift: float,
    max_period: float = 10000.0,
    scale: float = 1.0,
    *,
    final_silu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """W2 silu(W1 e + b1) + b2, e = timestep_embedding(t, E, ...), for all steps in three launches.

    t: [S], any float dtype, int32 or int64, any stride. w1: [H, E], w2: [D, H], contiguous rows
    (others by the reference); b1: [H], b2: [D] or None; all of one dtype, float32, float16,
    bfloat16 (float64 by the reference). The embedding is computed in float32 and rounded to the
    weights' dtype, as models do. flip_sin_to_cos, downscale_freq_shift, max_period, scale: see
    `timestep_embedding`. final_silu: SiLU of the result, which every resnet and adaLN layer of SD,
    SDXL and DiT applies first. impl: "auto", "triton" or "reference". Returns [S, D] in the
    weights' dtype; differentiable through the reference.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.timestep_mlp(
        *(t, w1, b1, w2, b2, flip_sin_to_cos, downscale_freq_shift, max_period, scale),
        *(final_silu, impl),
    )
