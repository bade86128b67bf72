"""What the row-wise ops share: argument checks, memory layouts, and the call into C++.

A row is the last dimension of x. Modulation (scale, shift, gate) comes as [B, C], or with as many
dimensions as x, each of them x's or 1, and the last one C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastdiff._ext import DTYPE_CODES, ext, ext_status
from fastdiff.ops._strides import why_not_triton

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_WIDTH = 8192  # a row is kept in registers (Triton) or in the first cache (C++)
NORMS = {"none": 0, "layer": 1, "rms": 2}  # csrc/rows.h, enum class Norm


def check_x(x: Tensor, least: int = 2) -> None:
    """x must be [..., C] of a float dtype with at least `least` dimensions and one channel."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() < least or x.shape[-1] < 1:
        shape = "[..., C]" if least == 1 else "[B, ..., C]"
        raise ValueError(f"x must have shape {shape} with C >= 1, got {tuple(x.shape)}")


def check_eps(eps: float) -> None:
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be positive and finite, got {eps}")


def check_like_x(x: Tensor, name: str, tensor: Tensor) -> None:
    """Same shape, dtype and device as x."""
    if tensor.shape != x.shape:
        raise ValueError(
            f"{name} must have shape {tuple(x.shape)} like x, got {tuple(tensor.shape)}"
        )
    if tensor.dtype != x.dtype:
        raise TypeError(f"{name} must be {x.dtype} like x, got {tensor.dtype}")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")


def _check_group(x: Tensor, tensors: dict[str, Tensor | None]) -> None:
    """Each on x's device, of x's dtype or float32, all of one dtype."""
    first = ""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")
        if tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name} must be {x.dtype} like x or float32, got {tensor.dtype}")
        expected = tensors[first].dtype if first else tensor.dtype  # type: ignore[union-attr]
        if tensor.dtype != expected:
            raise TypeError(f"{name} must be {expected} like {first}, got {tensor.dtype}")
        first = first or name


def check_affine(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> None:
    """weight and bias: [C]."""
    if bias is not None and weight is None:
        raise ValueError("bias must come with weight, got weight=None")
    given = {"weight": weight, "bias": bias}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != x.shape[-1:]:
            raise ValueError(
                f"{name} must have shape {tuple(x.shape[-1:])}, got {tuple(tensor.shape)}"
            )
    _check_group(x, given)


def check_modulation(x: Tensor, **given: Tensor | None) -> None:
    """scale, shift, gate: [B, C], or broadcast to x with the last dimension C."""
    for name, tensor in given.items():
        if tensor is None:
            continue
        rows = tensor.dim() == 2 and tensor.shape == (x.shape[0], x.shape[-1])
        fits = tensor.dim() == x.dim() and all(
            mine in (1, whole) for mine, whole in zip(tensor.shape, x.shape, strict=True)
        )
        if not rows and not (fits and tensor.shape[-1] == x.shape[-1]):
            raise ValueError(
                f"{name} must have shape {(x.shape[0], x.shape[-1])}, or the {x.dim()} dimensions "
                f"of x {tuple(x.shape)}, 1 where it is shared, got {tuple(tensor.shape)}"
            )
    _check_group(x, given)


def like_rows(x: Tensor, modulation: Tensor) -> Tensor:
    """Modulation as a view that broadcasts to x."""
    if modulation.dim() == x.dim():
        return modulation
    return modulation[(slice(None), *[None] * (x.dim() - 2))]


def widest(x: Tensor, *tensors: Tensor | None) -> torch.dtype:
    """The dtype the references compute in: the widest among the arguments."""
    dtype = x.dtype
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def collapse(x: Tensor, *tensors: Tensor | None) -> tuple[list[int], list[list[int]]]:
    """(sizes, strides per tensor) of the dimensions before the last, the fewest that do.

    Tensors broadcast to x; an absent one has stride 0. Neighbours become one where the strides of
    every tensor allow it.
    """
    views = [None if t is None else like_rows(x, t).expand(x.shape) for t in (x, *tensors)]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in views]
    for dim, size in enumerate(x.shape[:-1]):
        if size == 1:
            continue
        steps = [0 if view is None else view.stride(dim) for view in views]
        if sizes and all(s[-1] == step * size for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for of, step in zip(strides, steps, strict=True):
                of[-1] = step
        else:
            sizes.append(size)
            for of, step in zip(strides, steps, strict=True):
                of.append(step)
    return sizes, strides


def pad(values: Sequence[int], length: int, value: int) -> list[int]:
    """`values`, preceded by as many `value` as make it `length` long."""
    return [*[value] * (length - len(values)), *values]


def unsupported(dims: int, x: Tensor, *tensors: Tensor | None) -> str:
    """Why kernels for rows in up to `dims` dimensions cannot take these tensors, or ""."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernels take float32, float16 and bfloat16"
    if x.shape[-1] > MAX_WIDTH:
        return f"rows have {x.shape[-1]} channels, more than {MAX_WIDTH}"
    for tensor in (x, *tensors):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return "an argument has strided channels"
    outer = [t for t in tensors if t is not None and t.dim() > 1]
    if len(collapse(x, *outer)[0]) > dims:
        return f"the rows of the arguments need more than {dims} strides"
    return ""


def cpp_unsupported(x: Tensor, *tensors: Tensor | None) -> str:
    """Why the C++ kernel cannot take this call, or ""."""
    if x.device.type != "cpu":
        return f"it computes on the CPU, x is on {x.device}"
    return ext_status() or unsupported(3, x, *tensors)


def triton_unsupported(dims: int, x: Tensor, *tensors: Tensor | None) -> str:
    """Why the Triton kernels cannot take this call, or ""."""
    return why_not_triton(x) or unsupported(dims, x, *tensors)


def empty_rows(x: Tensor) -> Tensor:
    """A contiguous result of x's shape and dtype."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def run_cpp(
    norm: str,
    x: Tensor,
    *,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(residual, normed) by the one C++ kernel of all row-wise ops; x and the residual's place is
    the result's where there is nothing of the kind."""
    residual = empty_rows(x) if y is not None else x
    out = empty_rows(x) if norm != "none" else residual
    if x.numel() == 0:
        return residual, out
    given = (y, gate, scale, shift)
    sizes, strides = collapse(x, *given)
    tensors = [
        [0 if tensor is None else tensor.data_ptr(), *pad(steps, 3, 0)]
        for tensor, steps in zip((x, *given), strides, strict=True)
    ]

    def pointer(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def dtype_of(*among: Tensor | None) -> int:
        return next((DTYPE_CODES[t.dtype] for t in among if t is not None), 0)

    ext().rows(  # type: ignore[union-attr]
        *(NORMS[norm], *tensors, pointer(weight), pointer(bias)),
        *(residual.data_ptr() if y is not None else 0, out.data_ptr() if norm != "none" else 0),
        *(pad(sizes, 3, 1), x.shape[-1], eps, DTYPE_CODES[x.dtype], dtype_of(weight, bias)),
        *(dtype_of(gate, scale, shift), torch.get_num_threads()),
    )
    return residual, out


def total_bytes(results: int, x: Tensor, *tensors: object) -> int:
    """Every input read once, `results` tensors like x written once."""
    read = [t for t in (x, *tensors) if isinstance(t, Tensor)]
    written = results * x.numel() * x.element_size()
    return written + sum(t.numel() * t.element_size() for t in read)
