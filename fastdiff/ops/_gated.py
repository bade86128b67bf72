"""What geglu and swiglu share: hidden * act(gate) of the two halves of the last dimension.

GLU variants: Shazeer, 2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastdiff._ext import DTYPE_CODES, ext, ext_status
from fastdiff.ops._contract import Call, Example
from fastdiff.ops._strides import rows_of, why_not_triton

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ACTIVATIONS = ("gelu", "gelu_tanh", "silu")  # csrc/gated.h, enum class Activation


def activate(gate: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS in plain PyTorch."""
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh" if activation[4:] else "none")


def check(x: Tensor) -> None:
    """ValueError or TypeError unless x is [..., 2H] of a float dtype."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must have shape [..., 2H] with H > 0, got {tuple(x.shape)}")


def _unsupported(x: Tensor) -> str:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels take float32, float16 and bfloat16"
    if rows_of(x) is None:
        return f"x has strides {x.stride()}: rows must be contiguous and lie at two strides"
    return ""


def cpp_supports(x: Tensor) -> str:
    """Why the C++ kernel cannot take x, or ""."""
    if x.device.type != "cpu":
        return f"it computes on the CPU, x is on {x.device}"
    return ext_status() or _unsupported(x)


def triton_supports(x: Tensor) -> str:
    """Why the Triton kernel cannot take x, or ""."""
    return why_not_triton(x) or _unsupported(x)


def _empty(x: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)


def cpp(x: Tensor, activation: str, gate_first: bool) -> Tensor:
    """hidden * act(gate), in C++."""
    out, rows = _empty(x), rows_of(x)
    assert rows is not None  # `cpp_supports` came first
    if out.numel():
        ext().gated(  # type: ignore[union-attr]
            *(x.data_ptr(), out.data_ptr(), *rows, out.shape[-1], gate_first),
            *(ACTIVATIONS.index(activation), DTYPE_CODES[x.dtype], torch.get_num_threads()),
        )
    return out


def triton(x: Tensor, activation: str, gate_first: bool) -> Tensor:
    """hidden * act(gate), in Triton."""
    from fastdiff.kernels import _gated as kernels

    out, rows = _empty(x), rows_of(x)
    assert rows is not None  # `triton_supports` came first
    if out.numel():
        kernels.launch(x, out, rows, activation, gate_first)
    return out


def bytes_moved(x: Tensor, *args: Any, **kwargs: Any) -> int:
    """x read once, half as much written once."""
    return x.numel() * x.element_size() * 3 // 2


def example(
    name: str,
    shape: tuple[int, ...],
    magnitude: float = 1.0,
    edit: Callable[[Tensor], Tensor] | None = None,
    **kwargs: Any,
) -> Example:
    """A case with random numbers."""

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(11)
        x = (torch.randn(shape, generator=generator) * magnitude).to(device, dtype)
        return Call((edit(x) if edit else x,), kwargs)

    return Example(name, make)


def edges(x: Tensor) -> Tensor:
    """Every pair of: zeros, denormals, where activations saturate, the ends of the dtype."""
    largest = min(torch.finfo(x.dtype).max, 1e30)
    tiny = torch.finfo(x.dtype).smallest_normal / 4
    values = [0.0, tiny, 1e-3, 1.0, 5.0, 9.5, 10.5, 14.5, 20.0, 88.5, 104.5, 3e4, largest]
    row = torch.tensor([*values, *(-v for v in values)], dtype=torch.float64).to(x)
    return torch.cat([row.repeat(len(row)), row.repeat_interleave(len(row))])[None]


def samples(**kwargs: Any) -> tuple[Example, ...]:
    """Awkward shapes, for any activation."""
    return (
        example("two rows, 40 columns", (2, 80), **kwargs),
        example("one value", (1, 1, 2), **kwargs),
        example("one dimension", (14,), **kwargs),
        # No half is a whole number of vectors, nor starts at a multiple of 16 bytes.
        example("odd sizes", (3, 5, 2 * 67), **kwargs),
        example("more than one tile", (1, 70, 2 * 1040), **kwargs),
        example("long odd rows", (3, 2 * 2501), **kwargs),
        # The second output of a fused projection, as in FLUX.2's single-stream blocks.
        example("slice of a projection", (2, 7, 200), edit=lambda x: x[..., 56:], **kwargs),
        # The image tokens of a joint sequence: the batch has a stride of its own.
        example("tokens of a sequence", (3, 9, 96), edit=lambda x: x[:, 4:], **kwargs),
        example("expanded batch", (1, 5, 64), edit=lambda x: x.expand(3, 5, 64), **kwargs),
        # Only the reference takes it.
        example(
            "strided columns", (4, 64, 6), edit=lambda x: x.transpose(1, 2)[:, :, :48], **kwargs
        ),
        example("saturating values", (4, 256), magnitude=30.0, **kwargs),
        example("small values", (4, 256), magnitude=1e-4, **kwargs),
        example("ends of the dtype", (1,), edit=edges, **kwargs),
        example("no tokens", (2, 0, 64), **kwargs),
        example("empty batch", (0, 5, 64), **kwargs),
    )
