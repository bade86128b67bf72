"""RMS norm: PyTorch's own, and written out as pow, mean, rsqrt and products."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import argument, calls, is_tensor, leave, value_of
from fastdiff.compiler.passes import _rows
from fastdiff.compiler.passes._rows import dtype_of, widened


def fuse_rms_norm(graph: fx.Graph) -> int:
    """``x * rsqrt(mean(x ** 2) + eps) * weight`` and ``torch.rms_norm``."""
    count = 0
    for node in list(graph.nodes):
        if calls(node, "rms_norm") and is_tensor(node):
            count += _fuse_call(graph, node)
        elif calls(node, "rsqrt") and is_tensor(node):
            count += _fuse_written_out(graph, node)
    return count


def _fuse_call(graph: fx.Graph, norm: fx.Node) -> int:
    source = argument(norm, 0, "input")
    shape = argument(norm, 1, "normalized_shape")
    weight, eps = argument(norm, 2, "weight"), argument(norm, 3, "eps")
    if not is_tensor(source) or isinstance(shape, int) or len(shape) != 1:
        return leave(norm, "it is over more than the last dimension")
    if not isinstance(eps, (int, float)):
        return leave(norm, "eps is the dtype's, not a number")
    if _insert(graph, norm, source, norm, weight, eps):
        return 1
    return leave(norm, "its dtypes are outside the op's contract")


def _insert(
    graph: fx.Graph, norm: fx.Node, source: fx.Node, last: fx.Node, weight: Any, eps: float
) -> bool:
    """Puts the op in the place of ``last`` or of the cast that follows it."""
    for x in dict.fromkeys((widened(source), source)):
        for end in (_rows.cast_after(last), last):
            if end is None or dtype_of(end) != dtype_of(x):
                continue
            for vector in dict.fromkeys((widened(weight), weight)):
                if vector is None or dtype_of(vector) in (dtype_of(x), torch.float32):
                    op = torch.ops.fastdiff.rms_norm.default
                    return _rows.fuse(graph, end, op, x, vector, float(eps)) is not None
    return False


def _fuse_written_out(graph: fx.Graph, rsqrt: fx.Node) -> int:
    square = _mean_square(rsqrt)
    if square is None:
        return leave(rsqrt, "it is not of a mean of squares over the last dimension")
    squared, eps = square
    users = _rows.consumers(rsqrt)
    if len(users) != 1:
        return leave(rsqrt, "it is used more than once")
    product, factor = users[0]
    source = _rows.other_operand(product, factor, "mul")
    if not is_tensor(source) or widened(source) is not widened(squared):
        return leave(rsqrt, "it does not scale what it is the mean square of")
    last, weight = product, None
    uses = _rows.consumers(product)
    if len(uses) == 1:
        user, normed = uses[0]
        vector = _rows.other_operand(user, normed, "mul")
        if is_tensor(vector) and value_of(vector).shape == value_of(product).shape[-1:]:
            last, weight = user, vector
    if _insert(graph, rsqrt, squared, last, weight, eps):
        return 1
    if weight is not None and _insert(graph, rsqrt, squared, product, None, eps):
        return 1
    return leave(rsqrt, "its dtypes are outside the op's contract")


def _mean_square(rsqrt: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, eps) of ``rsqrt(mean(x ** 2, -1, keepdim=True) + eps)``."""
    total = _rows.operands(rsqrt.args[0], "add")
    if total is None:
        return None
    for eps, mean in (total, total[::-1]):
        if isinstance(eps, (int, float)) and calls(mean, "mean"):
            squares, dim = mean.args[0], argument(mean, 1, "dim")
            dims = list(dim) if isinstance(dim, (tuple, list)) else [dim]
            x = _squared(squares)
            if x is None or argument(mean, 2, "keepdim", False) is not True:
                return None
            if dims not in ([-1], [value_of(x).dim() - 1]) or mean.kwargs.get("dtype"):
                return None
            return x, float(eps)
    return None


def _squared(node: Any) -> fx.Node | None:
    if calls(node, "square") and is_tensor(node.args[0]):
        return node.args[0]
    pair = _rows.operands(node, "mul")
    if pair is not None and pair[0] is pair[1]:
        return pair[0]
    power = _rows.operands(node, "pow")
    if power is not None and power[1] == 2 and is_tensor(power[0]):
        return power[0]
    return None
