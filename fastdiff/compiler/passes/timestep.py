"""The sinusoidal embedding of the time, where a model computes it with the op's own operations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import argument, calls, insert, is_tensor, leave, replace, value_of
from fastdiff.compiler.passes import _rows
from fastdiff.compiler.passes._rows import Views, dtype_of


def fuse_timestep_embedding(graph: fx.Graph) -> int:
    """``cat(sin(a), cos(a))`` of ``a = t * exp(-log(period) * arange(half) / (half - shift))``.

    Other orders of the operations round the frequencies in another way, and are left alone.
    """
    count = 0
    for node in list(graph.nodes):
        if calls(node, "sin") and is_tensor(node) and value_of(node).dim() == 2:
            count += _fuse(graph, node)
    return count


def _fuse(graph: fx.Graph, sin: fx.Node) -> int:
    angle = sin.args[0]
    whole = _whole(sin)
    if whole is None:
        return 0
    found = _angle(angle)
    if found is None:
        return leave(sin, "it is no sinusoidal embedding in the op's order of operations")
    last, flip = whole
    t, period, denominator, scale = found
    half = value_of(sin).shape[1]
    shift = half - denominator
    if half - shift != denominator or not _rows.on_device(t):
        return leave(sin, "its frequencies are not those of the op")
    op = torch.ops.fastdiff.timestep_embedding.default
    try:
        new = insert(graph, last, op, t, 2 * half, flip, float(shift), period, scale)
    except (ValueError, TypeError):  # outside the op's contract
        return leave(sin, "its arguments are outside the op's contract")
    assert value_of(new).dtype == dtype_of(last)
    replace(last, new)
    return 1


def _whole(sin: fx.Node) -> tuple[fx.Node, bool] | None:
    """(last node, cosines first) of the concatenation of sin and cos, with or without a swap."""
    half = value_of(sin).shape[1]
    for cat in sin.users:
        parts = _parts(cat)
        if len(parts) != 2 or sin not in parts:
            continue
        flip = parts[1] is sin
        cos = parts[0] if flip else parts[1]
        if not calls(cos, "cos") or cos.args[0] is not sin.args[0]:
            continue
        users = {user for part in cat.users for user in part.users}
        if len(cat.users) == 2 and len(users) == 1:
            swapped = next(iter(users))
            if [_slice_of(part, cat) for part in _parts(swapped)] == [(half, None), (None, half)]:
                return swapped, not flip
        return cat, flip
    return None


def _parts(cat: Any) -> list[Any]:
    """What a concatenation along the last of two dimensions puts together."""
    if not calls(cat, "cat", "concat") or not isinstance(cat.args[0], (list, tuple)):
        return []
    return list(cat.args[0]) if argument(cat, 1, "dim", 0) in (-1, 1) else []


def _slice_of(node: Any, source: fx.Node) -> tuple[Any, Any] | None:
    """(start, stop) of ``source[:, start:stop]``."""
    if not calls(node, "getitem") or node.args[0] is not source:
        return None
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None):
        return None
    return (index[1].start, index[1].stop) if isinstance(index[1], slice) else None


def _number(node: Any, *names: str) -> tuple[float, Any] | None:
    """(number, the other one) of a product."""
    pair = _rows.operands(node, *names)
    for one, other in (pair, pair[::-1]) if pair is not None else ():
        if isinstance(one, (int, float)) and is_tensor(other):
            return one, other
    return None


def _angle(node: Any) -> tuple[fx.Node, float, float, float] | None:
    """(t, max_period, half - downscale_freq_shift, scale) of the angles."""
    scaled = _number(node, "mul")
    scale, product = scaled if scaled is not None else (1, node)
    pair = _rows.operands(product, "mul")
    for time, frequency in (pair, pair[::-1]) if pair is not None else ():
        t, exp = _column(time), _row(frequency)
        if t is None or not calls(exp, "exp") or dtype_of(product) != torch.float32:
            continue
        quotient = _rows.operands(exp.args[0], "truediv", "div")
        if quotient is None or not isinstance(quotient[1], (int, float)):
            continue
        exponent = _number(quotient[0], "mul")
        if exponent is None or not _counts(exponent[1]):
            continue
        period = _period(exponent[0])
        if period is not None:
            return t, period, quotient[1], float(scale)
    return None


def _period(factor: float) -> float | None:
    """The period of which ``factor`` is exactly minus the logarithm."""
    if not -700 < factor < 0:
        return None
    value = math.exp(-factor)
    return next((p for p in (float(round(value)), value) if -math.log(p) == factor), None)


def _counts(node: Any) -> bool:
    """Whether it is 0, 1, 2, ... in float32."""
    if not calls(node, "arange") or dtype_of(node) != torch.float32:
        return False
    start = node.args[0] if len(node.args) > 1 else node.kwargs.get("start", 0)
    step = argument(node, 2, "step", 1)
    return start == 0 and step == 1


def _viewed(node: Any) -> tuple[Any, Views]:
    views: Views = []
    while is_tensor(node) and (calls(node, "getitem", "unsqueeze") or calls(node, *_rows.CASTS)):
        views.append(node)
        node = node.args[0]
    return node, views


def _column(node: Any) -> fx.Node | None:
    """The times [S] of ``t[:, None].float()``, in any order, whatever their dtype but float64."""
    if not is_tensor(node):
        return None
    t, views = _viewed(node)
    while views and value_of(t).dim() != 1:
        t = views.pop()
    if not is_tensor(t) or value_of(t).dim() != 1 or dtype_of(t) == torch.float64:
        return None
    rows = value_of(t).shape[0]
    same = all(value_of(view).dtype in (value_of(t).dtype, torch.float32) for view in views)
    shaped = [view for view in views if value_of(view).dim() == 2]
    if not same or not shaped or tuple(value_of(node).shape) != (rows, 1):
        return None
    only = [view for view in views if not calls(view, *_rows.CASTS)]
    return t if len(only) == 1 and dtype_of(node) == torch.float32 else None


def _row(node: Any) -> Any:
    """The frequencies of ``frequencies[None]``."""
    inner, views = _viewed(node)
    if len(views) != 1 or value_of(inner).dim() != 1 or value_of(node).shape[0] != 1:
        return None
    return inner
