"""gate_residual_norm_modulate: a sublayer's gated residual and the next one's adaptive norm.

    residual = x + gate * y
    normed   = (LayerNorm(residual) * weight + bias) * (1 + scale) + shift

What stands between attention and MLP in a block with adaLN-Zero, and between two blocks: DiT,
https://arxiv.org/abs/2212.09748; SD3, FLUX. The parts alone are gate_residual and
layer_norm_modulate; here the residual is not read again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from fastdiff.ops import _rows
from fastdiff.ops._contract import AotConfig, Implementation, Op, register
from fastdiff.ops._row_examples import constant_rows, row_example
from fastdiff.ops.gate_residual import flops as gate_flops
from fastdiff.ops.gate_residual import pattern as gate_pattern
from fastdiff.ops.gate_residual import reference as gate_reference
from fastdiff.ops.layer_norm_modulate import flops as norm_flops
from fastdiff.ops.layer_norm_modulate import pattern as norm_pattern
from fastdiff.ops.layer_norm_modulate import reference as norm_reference

Tensor = torch.Tensor


def reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The references of the two parts, one after the other."""
    residual = gate_reference(x, y, gate)
    return residual, norm_reference(residual, scale, shift, weight, bias, eps)


def pattern(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """The operations of a DiT block."""
    residual = gate_pattern(x, y, gate)
    return residual, norm_pattern(residual, scale, shift, weight, bias, eps)


def check(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    _rows.check_x(x)
    _rows.check_like_x(x, "y", y)
    _rows.check_modulation(x, gate=gate, scale=scale, shift=shift)
    _rows.check_affine(x, weight, bias)
    _rows.check_eps(eps)


def _cpp_supports(x, y, gate, scale, shift, weight=None, bias=None, eps=1e-6) -> str:
    return _rows.cpp_unsupported(x, y, gate, scale, shift, weight, bias)


def _cpp(x, y, gate, scale, shift, weight=None, bias=None, eps=1e-6) -> tuple[Tensor, Tensor]:
    given = {"y": y, "gate": gate, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
    return _rows.run_cpp("layer", x, **given, eps=eps)


def _triton_supports(x, y, gate, scale, shift, weight=None, bias=None, eps=1e-6) -> str:
    return _rows.triton_unsupported(2, x, y, gate, scale, shift, weight, bias)


def _triton(x, y, gate, scale, shift, weight=None, bias=None, eps=1e-6) -> tuple[Tensor, Tensor]:
    from fastdiff.kernels import gate_residual_norm_modulate as kernels

    residual, normed = _rows.empty_rows(x), _rows.empty_rows(x)
    if x.numel():
        sizes, strides = _rows.collapse(x, y, gate, scale, shift)
        sizes, strides = _rows.pad(sizes, 2, 1), [_rows.pad(s, 2, 0) for s in strides]
        vectors = (gate, scale, shift, weight, bias)
        kernels.launch(x, y, *vectors, residual, normed, sizes, strides, eps)
    return residual, normed


def bytes_moved(x: Tensor, *args, **kwargs) -> int:
    """x, y and every other argument read once, both results written once."""
    return _rows.total_bytes(2, x, *args, *kwargs.values())


def flops(x: Tensor, *args, **kwargs) -> int:
    """Those of the two parts."""
    return gate_flops(x) + norm_flops(x)


PARTS = {
    "x": "like x", "y": "like x", "gate": "modulation", "scale": "modulation",
    "shift": "modulation", "weight": "affine", "bias": "affine",
}  # fmt: skip
example = functools.partial(row_example, PARTS)

EXAMPLES = (
    example("DiT-XL/2 256", (2, 256, 1152)),
    example("SD3-medium text 333", (2, 333, 1536)),
    example("FLUX text 512", (1, 512, 3072), "row 1"),
    example("SD3-medium image 64x64", (2, 4096, 1536)),
    example("FLUX image 64x64", (1, 4096, 3072), "row 1"),
)

SAMPLES = (
    example("one token", (2, 1, 64)),
    example("per token", (2, 5, 64), "token"),
    example("odd width, affine", (2, 7, 67), "row 1", affine=True),
    example("eight channels", (3, 33, 8)),
    example("two dimensions", (5, 48), affine=True),
    example("four dimensions", (2, 3, 4, 40), "row 1"),
    example("exact tail of an eighth", (1, 3, 1152), "token"),
    example("exact tail of a half", (1, 2, 3072), "row 1"),
    example("widest", (1, 2, 8192)),
    example("wider than the kernels take", (1, 2, 8193)),
    example("one modulation for the batch", (3, 4, 96), "expanded"),
    example("float32 modulation", (2, 5, 96), wide="modulation"),
    example("float32 affine", (2, 5, 96), affine=True, wide="affine"),
    example("tokens of a longer sequence", (2, 5, 96), view="sliced"),
    example("channels are strided", (2, 5, 96), view="transposed"),
    example("columns of a wider tensor", (2, 5, 40), view="columns"),
    example("mean above the deviation", (1, 6, 320), mean=30.0),
    example("small values", (1, 6, 96), magnitude=1e-4),
    example("constant rows", (1, 6, 96), values=constant_rows),
    example("no tokens", (2, 0, 96)),
    example("many rows of a program, not shared evenly", (2, 37, 64), affine=True),
    example("empty batch", (0, 4, 96)),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import gate_residual_norm_modulate as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="gate_residual_norm_modulate",
        schema="(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, "
        "Tensor? weight=None, Tensor? bias=None, float eps=1e-06, "
        'str impl="auto") -> (Tensor, Tensor)',
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


def gate_residual_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(residual, normed): x + gate * y, and its layer norm with modulation, in one pass.

    x, y: [B, ..., C] of one dtype, float32, float16, bfloat16 (float64 by the reference). gate,
    scale, shift: [B, C], or as many dimensions as x, each x's or 1, the last one C; one dtype, x's
    or float32. weight, bias: [C], x's dtype or float32. Views with contiguous channels are read
    where they lie; where the channels are strided or C is above 8192 the reference computes. impl:
    "auto", "cpp", "triton" or "reference". Returns two contiguous tensors of x's shape and dtype,
    differentiable through the reference. The residual has the bits of gate_residual; the norm is
    layer_norm_modulate of it.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.gate_residual_norm_modulate(
        x, y, gate, scale, shift, weight, bias, eps, impl
    )
