"""gate_residual: x + gate * y over [B, ..., C], with the bits of PyTorch's two operations.

The gated residual of adaLN-Zero: DiT, https://arxiv.org/abs/2212.09748, section 3.2; SD3, FLUX.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from fastdiff.ops import _rows
from fastdiff.ops._contract import AotConfig, Implementation, Op, register
from fastdiff.ops._row_examples import constant_rows, large_values, row_example

Tensor = torch.Tensor


def reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The op in plain PyTorch: type promotion decides the roundings; the result has x's dtype."""
    return (x + _rows.like_rows(x, gate) * y).to(x.dtype).contiguous()


def pattern(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """The operations of a DiT block."""
    return x + _rows.like_rows(x, gate) * y


def check(x: Tensor, y: Tensor, gate: Tensor) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    _rows.check_x(x)
    _rows.check_like_x(x, "y", y)
    _rows.check_modulation(x, gate=gate)


def _cpp_supports(x, y, gate) -> str:
    return _rows.cpp_unsupported(x, y, gate)


def _cpp(x, y, gate) -> Tensor:
    return _rows.run_cpp("none", x, y=y, gate=gate)[0]


def _triton_supports(x, y, gate) -> str:
    return _rows.triton_unsupported(2, x, y, gate)


def _triton(x, y, gate) -> Tensor:
    from fastdiff.kernels import gate_residual as kernels

    out = _rows.empty_rows(x)
    if x.numel():
        sizes, strides = _rows.collapse(x, y, gate)
        sizes, strides = _rows.pad(sizes, 2, 1), [_rows.pad(s, 2, 0) for s in strides]
        kernels.launch(x, y, gate, out, sizes, strides)
    return out


def bytes_moved(x: Tensor, *args, **kwargs) -> int:
    """x, y and the gate read once, the result written once."""
    return _rows.total_bytes(1, x, *args, *kwargs.values())


def flops(x: Tensor, *args, **kwargs) -> int:
    """A multiply and an add per element."""
    return x.numel() * 2


PARTS = {"x": "like x", "y": "like x", "gate": "modulation"}
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
    example("odd width", (2, 7, 67), "row 1"),
    example("eight channels", (3, 33, 8)),
    example("one channel", (2, 3, 1)),
    example("two dimensions", (5, 48)),
    example("four dimensions", (2, 3, 4, 40), "row 1"),
    example("exact tail of an eighth", (1, 3, 1152), "token"),
    example("exact tail of a half", (1, 2, 3072), "row 1"),
    example("widest", (1, 2, 8192)),
    example("wider than the kernels take", (1, 2, 8193)),
    example("one gate for the batch", (3, 4, 96), "expanded"),
    # The product is not rounded before the addition.
    example("float32 gate", (2, 5, 96), wide="modulation"),
    example("tokens of a longer sequence", (2, 5, 96), view="sliced"),
    example("channels are strided", (2, 5, 96), view="transposed"),
    example("columns of a wider tensor", (2, 5, 40), view="columns"),
    # Sums beyond the largest float16 are infinite, here as in PyTorch.
    example("largest float16 values", (1, 6, 320), values=large_values),
    example("small values", (1, 6, 96), magnitude=1e-4),
    example("constant rows", (1, 6, 96), values=constant_rows),
    example("no tokens", (2, 0, 96)),
    example("many rows of a program, not shared evenly", (2, 37, 64)),
    example("empty batch", (0, 4, 96)),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import gate_residual as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="gate_residual",
        schema='(Tensor x, Tensor y, Tensor gate, str impl="auto") -> Tensor',
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
        numerics="exact",
    )
)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, impl: str = "auto") -> Tensor:
    """x + gate * y in one pass, with the bits of PyTorch's two operations.

    x, y: [B, ..., C] of one dtype, float32, float16, bfloat16 (float64 by the reference). gate:
    [B, C], or as many dimensions as x, each x's or 1, the last one C; x's dtype or float32. Views
    with contiguous channels are read where they lie; where the channels are strided or C is above
    8192 the reference computes. The product is rounded to the wider dtype of gate and y, the sum to
    x's. impl: "auto", "cpp", "triton" or "reference". Returns a contiguous tensor of x's shape and
    dtype, differentiable through the reference.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.gate_residual(x, y, gate, impl)
