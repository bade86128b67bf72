"""layer_norm_modulate: y = (LayerNorm(x) * weight + bias) * (1 + scale) + shift over [B, ..., C].

LayerNorm: Ba et al., 2016, https://arxiv.org/abs/1607.06450. scale and shift are the adaptive norm
(adaLN) of diffusion transformers: DiT, https://arxiv.org/abs/2212.09748, and after it SD3, FLUX,
PixArt and others; with weight and bias alone it is the norm of a U-Net's transformer blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from fastdiff.ops import _rows
from fastdiff.ops._contract import AotConfig, Implementation, Op, register
from fastdiff.ops._row_examples import constant_rows, large_values, row_example

Tensor = torch.Tensor


def reference(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The op in plain PyTorch, in the widest dtype among the arguments; the result has x's."""
    dtype = _rows.widest(x, scale, shift, weight, bias)
    y = torch.layer_norm(
        x.to(dtype),
        x.shape[-1:],
        None if weight is None else weight.to(dtype),
        None if bias is None else bias.to(dtype),
        eps,
    )
    if scale is not None:
        y = y * (1 + _rows.like_rows(x, scale).to(dtype))
    if shift is not None:
        y = y + _rows.like_rows(x, shift).to(dtype)
    return y.to(x.dtype).contiguous()


def pattern(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The calls of DiT's `modulate(norm(x), shift, scale)` and diffusers' AdaLayerNormZero."""
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + _rows.like_rows(x, scale))
    if shift is not None:
        y = y + _rows.like_rows(x, shift)
    return y


def check(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    _rows.check_x(x)
    _rows.check_modulation(x, scale=scale, shift=shift)
    _rows.check_affine(x, weight, bias)
    _rows.check_eps(eps)


def _cpp_supports(x, scale=None, shift=None, weight=None, bias=None, eps=1e-6) -> str:
    return _rows.cpp_unsupported(x, scale, shift, weight, bias)


def _cpp(x, scale=None, shift=None, weight=None, bias=None, eps=1e-6) -> Tensor:
    given = {"scale": scale, "shift": shift, "weight": weight, "bias": bias}
    return _rows.run_cpp("layer", x, **given, eps=eps)[1]


def _triton_supports(x, scale=None, shift=None, weight=None, bias=None, eps=1e-6) -> str:
    return _rows.triton_unsupported(2, x, scale, shift, weight, bias)


def _triton(x, scale=None, shift=None, weight=None, bias=None, eps=1e-6) -> Tensor:
    from fastdiff.kernels import layer_norm_modulate as kernels

    out = _rows.empty_rows(x)
    if x.numel():
        sizes, strides = _rows.collapse(x, scale, shift)
        sizes, strides = _rows.pad(sizes, 2, 1), [_rows.pad(s, 2, 0) for s in strides]
        kernels.launch(x, out, weight, bias, scale, shift, sizes, strides, eps)
    return out


def bytes_moved(x: Tensor, *args, **kwargs) -> int:
    """x read once, y written once, every other argument read once."""
    return _rows.total_bytes(1, x, *args, *kwargs.values())


def flops(x: Tensor, *args, **kwargs) -> int:
    """Per element: 4 for the statistics, 2 to normalise, 2 for each multiply-add."""
    return x.numel() * 10


PARTS = {
    "x": "like x", "scale": "modulation", "shift": "modulation", "weight": "affine",
    "bias": "affine",
}  # fmt: skip
example = functools.partial(row_example, PARTS)

EXAMPLES = (
    example("DiT-XL/2 256", (2, 256, 1152)),
    example("SD3-medium text 333", (2, 333, 1536)),
    example("FLUX text 512", (1, 512, 3072), "row 1"),
    example("SD1.5 transformer 64x64", (2, 4096, 320), "", affine=True),
    example("SDXL transformer 32x32", (2, 1024, 1280), "", affine=True),
    example("SD3-medium image 64x64", (2, 4096, 1536)),
    example("FLUX image 64x64", (1, 4096, 3072), "row 1"),
)

SAMPLES = (
    example("one token", (2, 1, 64)),
    example("per token", (2, 5, 64), "token"),
    example("odd width, affine", (2, 7, 67), "row 1", affine=True),
    example("eight channels", (3, 33, 8)),
    example("one channel", (2, 3, 1), affine=True),
    example("two dimensions", (5, 48), affine=True),
    example("four dimensions", (2, 3, 4, 40), "row 1"),
    example("exact tail of a quarter", (1, 3, 320), affine=True),
    example("exact tail of an eighth", (1, 3, 1152), "token"),
    example("exact tail of a half", (1, 2, 3072), "row 1"),
    example("widest", (1, 2, 8192)),
    example("wider than the kernels take", (1, 2, 8193)),
    example("no modulation", (2, 6, 96), ""),
    example("one modulation for the batch", (3, 4, 96), "expanded"),
    example("float32 modulation", (2, 5, 96), wide="modulation"),
    example("float32 affine", (2, 5, 96), "", affine=True, wide="affine"),
    example("tokens of a longer sequence", (2, 5, 96), view="sliced"),
    example("channels are strided", (2, 5, 96), view="transposed"),
    example("columns of a wider tensor", (2, 5, 40), view="columns"),
    # E[x^2] - E[x]^2 has no digits left here in float32.
    example("mean far above the deviation", (1, 6, 320), mean=3000.0),
    example("largest float16 values", (1, 6, 320), values=large_values),
    example("small values", (1, 6, 96), magnitude=1e-4),
    example("constant rows", (1, 6, 96), values=constant_rows),
    example("no tokens", (2, 0, 96)),
    example("many rows of a program, not shared evenly", (2, 37, 64), affine=True),
    example("empty batch", (0, 4, 96)),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import layer_norm_modulate as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="layer_norm_modulate",
        schema="(Tensor x, Tensor? scale=None, Tensor? shift=None, Tensor? weight=None, "
        'Tensor? bias=None, float eps=1e-06, str impl="auto") -> Tensor',
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


def layer_norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """(LayerNorm(x) * weight + bias) * (1 + scale) + shift in one pass over x.

    x: [B, ..., C], float32, float16, bfloat16 (float64 by the reference). scale, shift: [B, C], or
    as many dimensions as x, each x's or 1, the last one C: [B, 1, C], or [B, N, C] for a modulation
    per token. weight, bias: [C]. Each is x's dtype or float32. Views with contiguous channels are
    read where they lie (chunks of one [B, 6 C] modulation, tokens of a longer sequence); where the
    channels are strided or C is above 8192 the reference computes. impl: "auto", "cpp", "triton" or
    "reference". Returns a contiguous tensor of x's shape and dtype, differentiable through the
    reference; statistics are float32 or wider.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.layer_norm_modulate(x, scale, shift, weight, bias, eps, impl)
