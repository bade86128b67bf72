"""add_group_norm_silu: the end of a residual block and the norm that begins the next one.

    sum    = x + residual
    normed = act(GroupNorm(sum) * weight + bias)

In a U-Net or an autoencoder the sum is read by the next block's norm and again by that block's own
addition: https://arxiv.org/abs/1505.04597, https://arxiv.org/abs/2006.11239. The norm alone is
group_norm_silu; here the sum is normalised in the pass that makes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastdiff import tuning
from fastdiff._ext import ext_status
from fastdiff.ops import group_norm_silu as _norm
from fastdiff.ops._contract import AotConfig, Call, Example, Implementation, Op, Tuning, register
from fastdiff.ops._strides import why_not_triton

Tensor = torch.Tensor


def _in_layout_of(x: Tensor, total: Tensor) -> Tensor:
    out = torch.empty_like(x)
    return total if total.stride() == out.stride() else out.copy_(total)


def reference(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The sum in x's dtype, and group_norm_silu's reference of it."""
    total = _in_layout_of(x, x + residual)
    normed = _norm.reference(total, num_groups, weight, bias, eps=eps, activation=activation)
    return total, normed


def pattern(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> tuple[Tensor, Tensor]:
    """The operations of two residual blocks, one after the other."""
    total = x + residual
    return total, _norm.pattern(total, num_groups, weight, bias, eps=eps, activation=activation)


def check(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "silu",
) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    _norm.check(x, num_groups, weight, bias, eps=eps, activation=activation)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual must have shape {tuple(x.shape)} like x, got {tuple(residual.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, got {residual.device}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must be {x.dtype} like x, got {residual.dtype}")


def _cpp_supports(
    x, residual, num_groups, weight=None, bias=None, eps=1e-5, activation="silu"
) -> str:
    if x.device.type != "cpu":
        return f"it computes on the CPU, x is on {x.device}"
    return ext_status() or _norm.unsupported(x, residual, "residual", weight, bias)


def _cpp(
    x, residual, num_groups, weight=None, bias=None, eps=1e-5, activation="silu"
) -> tuple[Tensor, Tensor]:
    total, normed = torch.empty_like(x), torch.empty_like(x)
    args = (x, normed, num_groups, weight, bias, None, None, None, eps, activation)
    _norm.run_cpp(*args, residual=residual, total=total)
    return total, normed


def _triton_supports(
    x, residual, num_groups, weight=None, bias=None, eps=1e-5, activation="silu"
) -> str:
    return why_not_triton(x) or _norm.unsupported(x, residual, "residual", weight, bias)


def _triton(
    x, residual, num_groups, weight=None, bias=None, eps=1e-5, activation="silu"
) -> tuple[Tensor, Tensor]:
    from fastdiff.kernels import add_group_norm_silu as kernels

    total, normed = torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        plan = None
        if tuning.active():
            given = (x, residual, num_groups)
            plan = tuning.plan(OP.name, _tuning_key(*given), lambda: _tuning_candidates(*given))
        last = _norm.memory_layout(x, residual) == "channels_last"
        kernels.launch(
            *(x, normed, num_groups, weight, bias, None, None, None, eps, activation == "silu"),
            *(last, plan),
            residual=residual,
            total=total,
        )
    return total, normed


def _tuning_key(x: Tensor, residual: Tensor, num_groups: int, *_args, **_kwargs) -> tuning.Key:
    return _norm.tuning_key(x, residual, num_groups, x.shape[1])


def _tuning_candidates(
    x: Tensor, residual: Tensor, num_groups: int, *_args, **_kwargs
) -> Sequence[tuple[tuning.Choice, Any]]:
    return _norm.launches(x, num_groups, residual, "residual")


def bytes_moved(x: Tensor, residual: Tensor, num_groups: int, *args, **kwargs) -> int:
    """x, residual and the per-channel arguments read once, both results written once."""
    return 2 * x.numel() * x.element_size() + _norm.bytes_moved(x, num_groups, *args, **kwargs)


def flops(x: Tensor, residual: Tensor, num_groups: int, *args, **kwargs) -> int:
    """One addition per element, and the norm's."""
    activation = kwargs.get("activation", args[3] if len(args) > 3 else "silu")
    return x.numel() + _norm.flops(x, num_groups, activation=activation)


def example(name: str, shape: tuple[int, ...], groups: int = 32, **options: Any) -> Example:
    """group_norm_silu's, where the residual is drawn after everything else.

    residual: "like x", "another layout" for the other one of channels first and last, or "exact
    sums": 2048 + 16 i for small i, which every dtype holds (Triton's interpreter cuts what it
    stores to bfloat16, which costs more than rounding).
    """
    layout = options.pop("residual", "like x")
    norm = _norm.example(name, shape, groups, **options)

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        call = norm.make(device, dtype)
        x = call.args[0]
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(18))
        residual = torch.empty_like(x).copy_(numbers)
        if layout == "another layout":
            residual = residual.movedim(1, -1).contiguous().movedim(-1, 1)
        if layout == "exact sums":
            x = 2048 + 16 * (4 * x).round().clamp(0, 7)
            residual = 16 * (4 * residual).round().clamp(0, 7)
        return Call((x, residual, *call.args[1:]), call.kwargs)

    return Example(name, make)


EXAMPLES = (
    example("SD1.5 mid block 8x8", (2, 1280, 8, 8)),
    example("SD1.5 down block 16x16", (2, 1280, 16, 16), channels_last=True),
    example("SD1.5 transformer entry 32x32", (2, 640, 32, 32), activation="none"),
    example("SD1.5 output 64x64", (2, 320, 64, 64)),
    example("SDXL down block 64x64", (2, 640, 64, 64), channels_last=True),
    example("VAE decoder 512x512", (1, 128, 512, 512)),
)

SAMPLES = (
    example("one pixel", (2, 8, 1, 1), 4),
    example("a group in registers", (2, 24, 4, 4), 3),
    example("odd pixels", (2, 6, 5, 7), 3),
    example("a group per channel, 3-D", (2, 5, 19), 5, activation="none"),
    example("no weight", (2, 12, 4, 4), 3, affine=False),
    example("float32 weights", (2, 12, 4, 4), 3, extras=("param32",)),
    example("channels last, in registers", (2, 32, 4, 4), 4, channels_last=True),
    example("channels last, odd", (1, 70, 6, 11), 7, channels_last=True),
    example("split group", (1, 4, 60, 61), 2),
    example("mean far above the deviation", (1, 8, 16, 16), 2, residual="exact sums"),
    example(
        "the same, channels last", (1, 8, 40, 40), 2, channels_last=True, residual="exact sums"
    ),
    example("large values", (1, 8, 4, 4), 2, magnitude=1.5e4),
    example("layouts differ", (2, 12, 4, 5), 3, residual="another layout"),
    example("empty batch", (0, 12, 4, 5), 3),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import add_group_norm_silu as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


def _example_of_shape(
    shape: tuple[int, ...], groups: int = 32, channels_last: bool = False
) -> Example:
    return example(f"{shape}", shape, groups, channels_last=channels_last)


OP = register(
    Op(
        name="add_group_norm_silu",
        schema="(Tensor x, Tensor residual, int num_groups, Tensor? weight=None, "
        'Tensor? bias=None, float eps=1e-05, str activation="silu", str impl="auto") '
        "-> (Tensor, Tensor)",
        reference=reference,
        pattern=pattern,
        check=check,
        implementations=(
            Implementation("cpp", _cpp_supports, _cpp),
            Implementation("triton", _triton_supports, _triton),
        ),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
        tuning=Tuning(_example_of_shape, _tuning_key, _tuning_candidates),
    )
)


def add_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str = "silu",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(sum, normed): x + residual, and act(GroupNorm(sum) * weight + bias) in the same pass.

    x, residual: [N, C, ...] of one dtype, float32, float16, bfloat16 (float64 by the reference); in
    one memory layout, contiguous or channels last, they run fused, else by the reference. weight,
    bias: [C], x's dtype or float32. activation: "silu" or "none". impl: "auto", "cpp", "triton" or
    "reference". Returns two tensors of x's shape, dtype and memory format, differentiable through
    the reference. The sum has the bits of PyTorch's; the norm is group_norm_silu of it.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.add_group_norm_silu(
        x, residual, num_groups, weight, bias, eps, activation, impl
    )
