"""Layer norm with the adaptive scale and shift of diffusion transformers; large ones alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.compiler.graph import argument, calls, is_tensor, leave, value_of
from fastdiff.compiler.passes import _rows
from fastdiff.compiler.passes._rows import Views, dtype_of, widened

# On one core of an EPYC the op takes 0.7 of the time of PyTorch's layer norm of 1.3 million
# elements, and 1.1 to 1.4 of it for 160 thousand. On a GPU it has not been compared: left alone.
MIN_ELEMENTS_ALONE = 1 << 19


def fuse_layer_norm(graph: fx.Graph) -> int:
    """``layer_norm(x) * (1 + scale) + shift``, in any order, with what is cast in between."""
    count = 0
    for node in list(graph.nodes):
        if calls(node, "layer_norm") and is_tensor(node):
            count += _fuse(graph, node)
    return count


@dataclass
class _Modulated:
    """A use of a norm: the last node of it, and what it is scaled (1 + scale) and shifted by."""

    last: fx.Node
    scale: tuple[fx.Node, Views] | None
    shift: fx.Node | None


def _fuse(graph: fx.Graph, norm: fx.Node) -> int:
    source = argument(norm, 0, "input")
    shape = argument(norm, 1, "normalized_shape")
    if not is_tensor(source) or isinstance(shape, int) or len(shape) != 1:
        return leave(norm, "it is over more than the last dimension")
    if value_of(source).dim() < 2:
        return leave(norm, "it has one dimension")
    uses = [_modulated(user, normed, value_of(norm)) for user, normed in _rows.consumers(norm)]
    found = [use for use in uses if use is not None]
    count = 0
    if len(found) == len(uses):
        count = sum(_replace(graph, norm, source, use) for use in found)
    return count if count and count == len(uses) else count + _alone(graph, norm, source)


def _modulated(user: fx.Node, normed: fx.Node, like: Tensor) -> _Modulated | None:
    """``normed * (1 + scale) + shift``, with one of the two or both, or None."""
    shift = _rows.other_operand(user, normed, "add")
    if _rows.is_modulation(shift, like) and value_of(shift).numel() < like.numel():
        return _Modulated(user, None, shift)
    factor = _rows.other_operand(user, normed, "mul")
    scale = _rows.one_plus(factor) if _rows.is_modulation(factor, like) else None
    if scale is None or value_of(user).shape != like.shape:
        return None
    uses = _rows.consumers(user)
    if len(uses) == 1:
        total, product = uses[0]
        shift = _rows.other_operand(total, product, "add")
        if _rows.is_modulation(shift, like):
            return _Modulated(total, scale, shift)
    return _Modulated(user, scale, None)


def _replace(graph: fx.Graph, norm: fx.Node, source: fx.Node, use: _Modulated) -> bool:
    """Puts the op in the place of a use; before or after the cast that follows it."""
    for x in dict.fromkeys((widened(source), source)):
        for last in (_rows.cast_after(use.last), use.last):
            if last is not None and dtype_of(last) == dtype_of(x):
                return _insert(graph, norm, x, last, use) is not None
    return False


def _insert(
    graph: fx.Graph, norm: fx.Node, x: fx.Node, last: fx.Node, use: _Modulated | None
) -> fx.Node | None:
    affine = _affine(norm, value_of(x).dtype)
    if affine is None:
        return None
    scale = shift = None
    if use is not None:
        like = value_of(x)
        if use.scale is not None:
            scale = _rows.again(graph, last, *use.scale)
            scale = _rows.as_modulation(graph, last, scale, like)
        if use.shift is not None:
            shift = _rows.as_modulation(graph, last, use.shift, like)
        scale, shift = (_rows.wider(graph, last, row, like.dtype) for row in (scale, shift))
    op = torch.ops.fastdiff.layer_norm_modulate.default
    return _rows.fuse(graph, last, op, x, scale, shift, *affine, argument(norm, 4, "eps", 1e-5))


def _affine(norm: fx.Node, dtype: torch.dtype) -> tuple[Any, Any] | None:
    """(weight, bias), in a dtype that goes with x's; None when there is none."""
    given = argument(norm, 2, "weight"), argument(norm, 3, "bias")
    for pair in (tuple(map(widened, given)), given):
        dtypes = {dtype_of(value) for value in pair if value is not None}
        if len(dtypes) <= 1 and dtypes <= {dtype, torch.float32}:
            return pair[0], pair[1]
    return None


def _alone(graph: fx.Graph, norm: fx.Node, source: fx.Node) -> int:
    """Where it takes the place of casts too, or is faster."""
    x, cast = widened(source), _rows.cast_after(norm)
    if x is not source and cast is not None and dtype_of(cast) == dtype_of(x):
        return int(_insert(graph, norm, x, cast, None) is not None)
    value = value_of(source)
    if value.device.type != "cpu":
        return leave(norm, "nothing follows that would be fused with it")
    if value.numel() < MIN_ELEMENTS_ALONE:
        return leave(norm, "nothing follows, and it is small")
    if _insert(graph, norm, source, norm, None) is None:
        return leave(norm, "its dtypes are outside the op's contract")
    return 1
