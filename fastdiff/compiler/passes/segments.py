"""What happens to queries and keys before an attention: norm, rotary embedding, concatenation."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import argument, calls, insert, is_tensor, value_of
from fastdiff.compiler.orders import Order, through
from fastdiff.compiler.passes.products import Operand

_WIDENING = ("float", "to", "type")


@dataclass
class Norm:
    """kind: "rms" or "layer"; weight: [D] or None."""

    kind: str
    weight: fx.Node | None
    eps: float

    def fits(self, other: Norm | None) -> bool:
        """Whether one call of the op can have both."""
        return other is not None and (self.kind, self.eps, self.weight is None) == (
            other.kind,
            other.eps,
            other.weight is None,
        )


@dataclass
class Tables:
    """Rows [start, stop) of a rotation's tables; any shape with as many numbers as [S, D]."""

    cos: fx.Node
    sin: fx.Node
    rows: int
    start: int
    stop: int

    def same(self, other: Tables | None) -> bool:
        """Whether they hold the same numbers."""
        return (
            other is not None
            and (self.start, self.stop) == (other.start, other.stop)
            and _same(self.cos, other.cos)
            and _same(self.sin, other.sin)
        )

    def inserted(self, graph: fx.Graph, known: dict[Any, fx.Node]) -> list[fx.Node]:
        """cos and sin [stop - start, D], made where the tables are, once for all layers."""
        made = []
        for table in (self.cos, self.sin):
            table = next((t for t, *part in known if not part and _same(t, table)), table)
            after = table.next
            while after.op == "placeholder":
                after = after.next
            if (table,) not in known:
                shape = (self.rows, value_of(table).shape[-1])
                known[(table,)] = insert(graph, after, torch.reshape, table, shape)
            key = (table, self.start, self.stop)
            if key not in known:
                rows, part = known[(table,)], slice(self.start, self.stop)
                whole = (self.start, self.stop) == (0, self.rows)
                after = rows.next
                known[key] = rows if whole else insert(graph, after, operator.getitem, rows, part)
            made.append(known[key])
        return made


@dataclass
class Side:
    """One segment of q or k, and what the op does to it."""

    operand: Operand
    norm: Norm | None = None
    tables: Tables | None = None

    @property
    def length(self) -> int:
        return int(value_of(self.operand.node).shape[self.operand.order[2]])


def sides(operand: Operand, fold: frozenset[str]) -> list[Side]:
    """The segments of q, k or v, the first ones first; ``fold``: what of "norm", "rope" and "cat"
    is taken out of the graph."""
    node, turned = through(operand.node)
    order: Order = tuple(turned[i] for i in operand.order)
    here = Operand(node, order)
    if "rope" in fold and order[3] == 3:
        found = _rope(node, order)
        if found is not None:
            source, cos, sin = found
            inner = sides(Operand(source, order), fold - {"rope"})
            rows, start = sum(side.length for side in inner), 0
            for side in inner:
                side.tables = Tables(cos, sin, rows, start, start + side.length)
                start += side.length
            return inner
    if "cat" in fold and calls(node, "cat", "concat") and isinstance(node.args[0], (list, tuple)):
        parts = [part for part in node.args[0] if is_tensor(part)]
        dim = argument(node, 1, "dim", 0) % value_of(node).dim()
        if len(parts) == len(node.args[0]) == 2 and dim == order[2]:
            both = [sides(Operand(p, order), fold - {"cat"}) for p in parts]  # type: ignore[arg-type]
            return [side for found in both for side in found]
    if "norm" in fold and order[3] == 3:
        normed = _norm(node)
        if normed is not None:
            source, norm = normed
            inner = sides(Operand(source, order), fold - {"norm", "rope"})
            return [replace(side, norm=norm) for side in inner]
    return [Side(here)]


def _same(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two nodes are the same calls of the same tensors."""
    if a is b:
        return True
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(type(a) is type(b) and repr(a) == repr(b) and "fx" not in type(a).__module__)
    if depth == 0 or a.op != b.op or a.target != b.target or a.op == "placeholder":
        return False
    if len(a.args) != len(b.args) or repr(a.kwargs) != repr(b.kwargs):
        return False
    return all(_same(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


# --- norms ----------------------------------------------------------------------------------------


def _norm(node: fx.Node) -> tuple[fx.Node, Norm] | None:
    """(input, norm) of a norm over the last dimension that keeps the dtype."""
    op = torch.ops.fastdiff.rms_norm
    if node.target in (op, op.default):  # of the model, or of a pass before
        weight, eps = argument(node, 1, "weight"), argument(node, 2, "eps", 1e-6)
        found: Any = (node.args[0], Norm("rms", weight, eps))
    elif calls(node, "rms_norm", "layer_norm"):
        found = _torch_norm(node)
    else:
        found = _written_rms(node)
    if found is None or value_of(found[0]).dtype != value_of(node).dtype:
        return None
    weight, width = found[1].weight, value_of(node).shape[-1]
    if weight is not None and (not is_tensor(weight) or tuple(value_of(weight).shape) != (width,)):
        return None
    return found  # type: ignore[no-any-return]


def _torch_norm(node: fx.Node) -> tuple[fx.Node, Norm] | None:
    source, shape = node.args[0], argument(node, 1, "normalized_shape")
    kind = "rms" if calls(node, "rms_norm") else "layer"
    eps = argument(node, 3 if kind == "rms" else 4, "eps", None if kind == "rms" else 1e-5)
    if not is_tensor(source) or eps is None or len(shape) != 1:
        return None
    if kind == "layer" and argument(node, 3, "bias") is not None:
        return None
    return source, Norm(kind, argument(node, 2, "weight"), float(eps))  # type: ignore[return-value]


def _written_rms(node: fx.Node) -> tuple[fx.Node, Norm] | None:
    """x * rsqrt(mean(x^2) + eps), with a weight or without, and casts anywhere."""
    bare = _uncast(node)
    if not calls(bare, "mul") or len(bare.args) != 2:
        return None
    for x, factor in (bare.args, bare.args[::-1]):
        if calls(factor, "rsqrt"):
            return _root(x, factor)
    for inner, weight in (bare.args, bare.args[::-1]):
        if is_tensor(weight) and value_of(weight).dim() == 1 and is_tensor(inner):
            found = _written_rms(inner)
            if found is not None and found[1].weight is None:
                return found[0], Norm("rms", weight, found[1].eps)  # type: ignore[arg-type]
    return None


def _root(x: Any, root: Any) -> tuple[fx.Node, Norm] | None:
    total = root.args[0]
    if not calls(total, "add") or len(total.args) != 2:
        return None
    mean, eps = total.args
    if not calls(mean, "mean") or not isinstance(eps, float):
        return None
    dim = argument(mean, 1, "dim")
    if dim not in (-1, [-1], (-1,)) or argument(mean, 2, "keepdim", False) is not True:
        return None
    squares, x = mean.args[0], _uncast(x)
    power = calls(squares, "pow") and squares.args[1] == 2
    if not power and not calls(squares, "square"):
        return None
    if _uncast(squares.args[0]) is not x:
        return None
    # In half precision the squares must be those of a wider type, as in the op.
    if value_of(squares).dtype not in (torch.float32, torch.float64):
        return None
    return x, Norm("rms", None, eps)


def _uncast(node: Any) -> Any:
    """The tensor before casts."""
    while calls(node, *_WIDENING, "half", "bfloat16") and is_tensor(node.args[0]):
        before, after = value_of(node.args[0]), value_of(node)
        if before.device != after.device or not before.is_floating_point():
            break
        node = node.args[0]
    return node


# --- rotary embedding -----------------------------------------------------------------------------


def _rope(node: fx.Node, order: Order) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) of x * cos + (-x[1], x[0], -x[3], x[2], ...) * sin."""
    total = _uncast(node)
    if not calls(total, "add") or len(total.args) != 2 or total.kwargs:
        return None
    if not all(calls(a, "mul") and len(a.args) == 2 for a in total.args):
        return None
    value = value_of(node)
    for first, second in (total.args, total.args[::-1]):
        for x, cos in (first.args, first.args[::-1]):
            for turned, sin in (second.args, second.args[::-1]):
                source = _turned(turned)
                if source is None or _uncast(x) is not source:
                    continue
                if value_of(source).dtype != value.dtype:
                    continue
                if all(_is_table(t, value, order) for t in (cos, sin)):
                    return source, cos, sin
    return None


def _is_table(node: Any, like: Any, order: Order) -> bool:
    """Whether it has a row of numbers for every position, the same for all images and heads."""
    if not is_tensor(node):
        return False
    shape = tuple(value_of(node).shape)
    shape = (1,) * (4 - len(shape)) + shape
    wanted = [1] * 4
    wanted[order[2]], wanted[3] = like.shape[order[2]], like.shape[3]
    return shape == tuple(wanted)


def _turned(node: Any) -> fx.Node | None:
    """x of (-x[1], x[0], -x[3], x[2], ...)."""
    node = _uncast(node)
    if not calls(node, "flatten", "reshape", "view") or not is_tensor(node.args[0]):
        return None
    pairs = node.args[0]
    if not calls(pairs, "stack") or value_of(pairs).shape[-1] != 2:
        return None
    if argument(pairs, 1, "dim", 0) not in (-1, value_of(pairs).dim() - 1):
        return None
    parts = pairs.args[0]
    if len(parts) != 2 or not calls(parts[0], "neg"):
        return None
    odd, even = _half(parts[0].args[0], 1), _half(parts[1], 0)
    if odd is None or odd is not even or value_of(odd).shape != value_of(node).shape:
        return None
    return odd


def _half(node: Any, which: int) -> Any:
    """x of x.unflatten(-1, (-1, 2))[..., which]."""
    if not calls(node, "getitem"):
        return None
    parts, index = node.args
    if calls(parts, "unbind") and index == which:
        if argument(parts, 1, "dim", 0) not in (-1, value_of(parts.args[0]).dim() - 1):
            return None
        pairs = parts.args[0]
    elif is_tensor(parts) and index == (Ellipsis, which):
        pairs = parts
    else:
        return None
    if not calls(pairs, "reshape", "view", "unflatten") or value_of(pairs).shape[-1] != 2:
        return None
    source: Any = pairs.args[0]
    if not is_tensor(source) or value_of(source).shape[:-1] != value_of(pairs).shape[:-2]:
        return None
    return _uncast(source)
