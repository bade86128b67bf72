"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467. Diffusion transformers apply it to the
queries and keys of every head (SD3.5, FLUX: https://arxiv.org/abs/2403.03206, QK-normalisation).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from fastdiff.ops import _rows
from fastdiff.ops._contract import AotConfig, Implementation, Op, register
from fastdiff.ops._row_examples import constant_rows, large_values, row_example

Tensor = torch.Tensor


def reference(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The op in plain PyTorch, in the widest dtype among the arguments; the result has x's."""
    dtype = _rows.widest(x, weight)
    vector = None if weight is None else weight.to(dtype)
    y = torch.rms_norm(x.to(dtype), x.shape[-1:], vector, eps)
    return y.to(x.dtype).contiguous()


def pattern(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """The call of torch.nn.RMSNorm."""
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def check(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    _rows.check_x(x, least=1)
    _rows.check_affine(x, weight)
    _rows.check_eps(eps)


def _cpp_supports(x, weight=None, eps=1e-6) -> str:
    return _rows.cpp_unsupported(x, weight)


def _cpp(x, weight=None, eps=1e-6) -> Tensor:
    return _rows.run_cpp("rms", x, weight=weight, eps=eps)[1]


def _triton_supports(x, weight=None, eps=1e-6) -> str:
    return _rows.triton_unsupported(3, x, weight)


def _triton(x, weight=None, eps=1e-6) -> Tensor:
    from fastdiff.kernels import rms_norm as kernels

    out = _rows.empty_rows(x)
    if x.numel():
        sizes, (strides,) = _rows.collapse(x)
        kernels.launch(x, out, weight, _rows.pad(sizes, 3, 1), _rows.pad(strides, 3, 0), eps)
    return out


def bytes_moved(x: Tensor, *args, **kwargs) -> int:
    """x read once, y written once, the weight read once."""
    return _rows.total_bytes(1, x, *args, *kwargs.values())


def flops(x: Tensor, *args, **kwargs) -> int:
    """Per element: 2 for the mean square, 2 to scale."""
    return x.numel() * 4


example = functools.partial(row_example, {"x": "like x", "weight": "affine"}, affine=True)

EXAMPLES = (
    example("FLUX text QK-norm", (1, 512, 24, 128), view="fused"),
    example("SD3.5-medium QK-norm 64x64", (2, 4096, 24, 64), view="fused"),
    example("SD3.5-medium QK-norm 64x64, heads first", (2, 24, 4096, 64), view="heads"),
    example("FLUX image QK-norm 64x64", (1, 4096, 24, 128), view="fused"),
    example("wide rows", (2, 4096, 1536)),
)

SAMPLES = (
    example("one head", (2, 5, 1, 64), view="fused"),
    example("one dimension", (64,)),
    example("heads of a fused QKV", (2, 7, 3, 64), view="fused"),
    example("the same, heads first", (2, 3, 7, 128), view="heads"),
    example("no weight", (2, 7, 96), affine=False),
    example("float32 weight", (2, 7, 96), wide="affine"),
    example("one channel", (5, 1)),
    example("odd width", (3, 5, 67)),
    example("exact tail of an eighth", (3, 1152)),
    example("exact tail of a half", (2, 3072)),
    example("widest", (2, 8192)),
    example("wider than the kernels take", (2, 8193)),
    example("tokens of a longer sequence", (2, 5, 96), view="sliced"),
    example("channels are strided", (2, 5, 96), view="transposed"),
    example("columns of a wider tensor", (2, 5, 40), view="columns"),
    example("large mean", (6, 320), mean=3000.0),
    example("largest float16 values", (6, 320), values=large_values),
    example("small values", (6, 96), magnitude=1e-4),
    example("constant rows", (1, 6, 96), values=constant_rows),
    example("no tokens", (2, 0, 96)),
    example("more rows than a program takes", (2, 37, 3, 64)),
    example("empty batch", (0, 4, 96)),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import rms_norm as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="rms_norm",
        schema='(Tensor x, Tensor? weight=None, float eps=1e-06, str impl="auto") -> Tensor',
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
    )
)


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, impl: str = "auto"
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in one pass over x.

    x: [..., C], float32, float16, bfloat16 (float64 by the reference). weight: [C], x's dtype or
    float32. Views with contiguous channels whose rows need at most three strides are read where
    they lie: [B, N, H, D] of a fused QKV and its transpose [B, H, N, D]; others, and C above 8192,
    the reference computes. impl: "auto", "cpp", "triton" or "reference". Returns a contiguous
    tensor of x's shape and dtype, differentiable through the reference; the mean is float32 or
    wider.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.rms_norm(x, weight, eps, impl)
