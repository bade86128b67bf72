"""Cases of the ops on rows of transformer blocks: what their examples and samples are made of."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fastdiff.ops._contract import Call, Example

Tensor = torch.Tensor


def row_example(
    parts: dict[str, str],
    name: str,
    shape: tuple[int, ...],
    modulation: str = "row",
    affine: bool = False,
    wide: str = "",
    mean: float = 0.0,
    magnitude: float = 1.0,
    view: str = "",
    values: Callable[[Tensor], Tensor] | None = None,
) -> Example:
    """A case with random numbers, the same on every machine.

    parts: the op's arguments and what each is: "like x" (also x itself), "modulation", or "affine",
    in the order of the schema. modulation: all of them are chunks of one tensor, [B, k C] ("row"),
    [B, 1, k C] ("row 1"), [B, ..., k C] ("token"), [1, k C] for the whole batch ("expanded"), or
    there is none (""). wide: "affine" and "modulation" are float32 where it names them. view: of
    what x and its likes are views, see `_view`. values: edits x.
    """

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(23)

        def random(*size: int, to: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, generator=generator).to(device=device, dtype=to)

        def like_x(first: bool) -> Tensor:
            numbers = torch.randn(shape, generator=generator)
            if first:
                numbers = numbers * magnitude + mean
                numbers = values(numbers) if values else numbers
            return _view(numbers.to(device=device, dtype=dtype), view)

        batch, width = shape[0], shape[-1]
        count = sum(kind == "modulation" for kind in parts.values())
        to = torch.float32 if "modulation" in wide else dtype
        sizes = {
            "row": (batch,), "row 1": (batch, *[1] * (len(shape) - 2)), "token": shape[:-1],
            "expanded": (1,),
        }  # fmt: skip
        chunks: list[Tensor] = []
        if modulation and count:
            whole = random(*sizes[modulation], count * width, to=to)
            if modulation == "expanded":
                whole = whole.expand(batch, -1)
            chunks = list(whole.chunk(count, -1))
        arguments = {}
        for part, kind in parts.items():
            if kind == "like x":
                arguments[part] = like_x(part == "x")
            elif kind == "modulation" and chunks:
                arguments[part] = chunks.pop(0)
            elif kind == "affine" and affine:
                to = torch.float32 if "affine" in wide else dtype
                arguments[part] = random(width, to=to)
        x = arguments.pop("x")
        return Call((x,), arguments)

    return Example(name, make)


def _view(x: Tensor, kind: str) -> Tensor:
    """The same numbers as a view.

    "sliced": the first tokens of a longer sequence. "fused": one third of a fused [..., 3, H, D].
    "heads": [B, H, N, D], transposed from the [B, N, H, D] of a fused QKV. "transposed": channels
    are strided, as patch embedding leaves them. "columns": the first of twice as many channels.
    """
    if kind == "sliced":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    if kind == "fused":
        return torch.stack([x, x, x], -3).select(-3, 1)
    if kind == "heads":
        fused = x.transpose(1, 2)
        return torch.stack([fused, fused, fused], 2)[:, :, 1].transpose(1, 2)
    if kind == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "columns":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x


def large_values(x: Tensor) -> Tensor:
    """The largest float16 numbers with both signs, where squares leave float16."""
    return torch.where(x > 0, 65504.0, -65504.0)


def constant_rows(x: Tensor) -> Tensor:
    """Rows of one value each: no deviation."""
    rows = math.prod(x.shape[:-1])
    return torch.linspace(-7, 7, rows).reshape(*x.shape[:-1], 1).expand(x.shape).clone()
