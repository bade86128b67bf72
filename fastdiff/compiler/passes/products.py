"""Finding softmax(scale * q k^T) v in a graph, in the forms that models write it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.compiler.graph import argument, calls, insert, is_tensor, only_user, value_of
from fastdiff.compiler.orders import RESHAPES, Order, permuted, through

_CASTS = ("to", "type", "float", "half", "bfloat16", "type_as", "double")
_PRODUCTS = ("bmm", "matmul", "baddbmm", "einsum")


@dataclass
class Operand:
    """``node.permute(order)`` is [B, H, S, D]."""

    node: fx.Node
    order: Order

    def spread(self, graph: fx.Graph, before: fx.Node) -> fx.Node:
        """[B, S, H, D]."""
        a, b, c, d = self.order
        return permuted(graph, before, self.node, (a, c, b, d))


@dataclass
class Product:
    """An attention in the graph.

    result: the node that is replaced. order: of [B, H, S, D] that gives it; flat: after its first
    two dimensions have become one. why: a reason to leave it, or "".
    """

    result: fx.Node
    q: Any = None
    k: Any = None
    v: Any = None
    scale: float = 1.0
    mask: fx.Node | None = None
    order: Order = (0, 1, 2, 3)
    flat: bool = False
    why: str = ""

    def restored(self, graph: fx.Graph, out: fx.Node) -> fx.Node:
        """The result, from the op's [B, S, H, D]."""
        if not self.flat:
            swapped = (0, 2, 1, 3)
            return permuted(graph, self.result, out, tuple(swapped[i] for i in self.order))
        out = permuted(graph, self.result, out, (0, 2, 1, 3))
        flat = insert(graph, self.result, torch.flatten, out, 0, 1)
        return permuted(graph, self.result, flat, self.order)


def products(graph: fx.Graph) -> Iterator[Product]:
    """All attentions, those that have to be left with the reason."""
    for node in list(graph.nodes):
        found = None
        if calls(node, "scaled_dot_product_attention") and is_tensor(node):
            found = _sdpa(graph, node)
        elif calls(node, "softmax") and is_tensor(node):
            found = _manual(graph, node)
        if found is not None:
            yield found


# --- scaled_dot_product_attention -----------------------------------------------------------------


def _sdpa(graph: fx.Graph, node: fx.Node) -> Product:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    scale = argument(node, 6, "scale")
    product = Product(node)
    values = [value_of(x) for x in (q, k, v)]
    if argument(node, 5, "is_causal", False) is not False:
        product.why = "it is causal"
    elif dropout != 0:
        product.why = "it has dropout"
    elif argument(node, 7, "enable_gqa", False) is not False:
        product.why = "heads share keys"
    elif scale is not None and not isinstance(scale, (int, float)):
        product.why = "its scale is no number"
    elif not all(isinstance(x, Tensor) and x.dim() == values[0].dim() for x in values):
        product.why = "its operands differ in their dimensions"
    elif values[0].dim() not in (3, 4):
        product.why = f"its operands have {values[0].dim()} dimensions"
    elif not values[0].shape[:-2] == values[1].shape[:-2] == values[2].shape[:-2]:
        product.why = "its operands are broadcast"
    elif mask is not None and values[0].dim() != 4:
        product.why = "it has a mask and three dimensions"
    elif mask is not None and value_of(mask).dtype != torch.bool:
        product.why = "its mask is added to the scores"
    if product.why:
        return product
    product.scale = values[0].shape[-1] ** -0.5 if scale is None else float(scale)
    product.mask = mask
    if values[0].dim() == 4:
        product.q, product.k, product.v = (Operand(x, (0, 1, 2, 3)) for x in (q, k, v))
    else:
        product.q, product.k, product.v = (_one_head(graph, node, x, (0, 1, 2)) for x in (q, k, v))
        product.flat, product.order = True, (0, 1, 2)
    return product


def key_mask(graph: fx.Graph, product: Product) -> fx.Node | None:
    """[B, keys] of a bool mask that is the same for all heads and queries, else None."""
    assert product.mask is not None
    mask, before = product.mask, product.result
    value = value_of(mask)
    batch, keys = _extent(product.q, 0), _extent(product.k, 2)
    for axis in (-3, -2):
        if value.dim() >= -axis and value.shape[axis] != 1 and value.stride(axis) != 0:
            return None
    index: list[Any] = [slice(None)] * (value.dim() == 4) + [0] * min(value.dim() - 1, 2)
    row = insert(graph, before, operator.getitem, mask, tuple(index)) if index else mask
    return insert(graph, before, torch.Tensor.expand, row, batch, keys)


def _extent(operand: Operand, axis: int) -> int:
    return int(value_of(operand.node).shape[operand.order[axis]])


# --- matmul, softmax, matmul ----------------------------------------------------------------------


def _manual(graph: fx.Graph, softmax: fx.Node) -> Product | None:
    """The attention around a softmax, or None when there is none."""
    value = value_of(softmax)
    if value.dim() not in (3, 4) or argument(softmax, 1, "dim") not in (-1, value.dim() - 1):
        return None
    scores, scale = _scaled(softmax.args[0], None)
    if not calls(scores, *_PRODUCTS) or not is_tensor(scores):
        return _biased(softmax, scores)
    probabilities = softmax
    user = only_user(probabilities)
    while user is not None and calls(user, *_CASTS) and user.args[0] is probabilities:
        probabilities, user = user, only_user(user)
    if user is None:
        return Product(softmax, why="its probabilities are used elsewhere too")
    if not calls(user, "bmm", "matmul", "einsum") or not is_tensor(user):
        return None
    first, second = _letters(scores), _letters(user)
    if first is None or second is None or not _private(softmax, scores):
        return None
    product = Product(user)
    if calls(scores, "baddbmm"):
        if argument(scores, 3, "beta", 1) != 0:
            product.why = "its scores have a mask or bias added"
            return product
        scale *= argument(scores, 4, "alpha", 1)
    operands = _operands(first, second, probabilities)
    if operands is None:
        return None
    *three, product.order = operands
    dtype = value_of(three[2][0]).dtype
    for i in range(2):
        (node, order), (node, factor, turned) = three[i], _source(three[i][0], dtype)
        three[i] = (node, tuple(turned[o] for o in order))
        scale *= factor
    product.scale = scale
    if value.dim() == 4:
        product.q, product.k, product.v = (Operand(*x) for x in three)
        return product
    product.flat = True
    apart = [_heads_apart(node, order, dtype) for node, order in three]
    if all(a is not None for a in apart):
        parts = [a for a in apart if a is not None]
        heads = {(_extent(a, 0), _extent(a, 1)) for a, _ in parts}
        if len(heads) == 1 and parts[2][1] == 1:
            product.q, product.k, product.v = (a for a, _ in parts)
            product.scale *= parts[0][1] * parts[1][1]
            return product
    product.q, product.k, product.v = (_one_head(graph, user, *x) for x in three)
    return product


def _biased(softmax: fx.Node, scores: Any) -> Product | None:
    """A softmax over changed scores: an attention that has to be left."""
    if calls(scores, "add", "masked_fill", "where", "sub"):
        inputs = [_scaled(node, None)[0] for node in scores.all_input_nodes]
        if any(calls(node, *_PRODUCTS) for node in inputs):
            return Product(softmax, why="its scores have a mask or bias added")
    return None


def _scaled(node: Any, dtype: torch.dtype | None) -> tuple[Any, float]:
    """(source, factor) behind multiplications by numbers, and casts (to more digits than dtype)."""
    factor = 1.0
    while isinstance(node, fx.Node) and is_tensor(node) and node.args:
        source = node.args[0]
        other = node.args[1] if len(node.args) == 2 else None
        if calls(node, "mul") and isinstance(source, (int, float)):
            source, other = other, source
        if calls(node, "mul", "truediv", "div") and is_tensor(source) and not node.kwargs:
            if not isinstance(other, (int, float)) or isinstance(other, bool) or other == 0:
                break
            if not calls(node, "mul") and node.args[0] is not source:
                break
            factor *= other if calls(node, "mul") else 1 / other
        elif calls(node, *_CASTS) and is_tensor(source) and _widens(source, node, dtype):  # type: ignore[arg-type]
            pass
        else:
            break
        node = source
    return node, factor


def _widens(source: fx.Node, node: fx.Node, dtype: torch.dtype | None) -> bool:
    before, after = value_of(source), value_of(node)
    if before.device != after.device or not before.is_floating_point():
        return False
    wider = torch.promote_types(before.dtype, after.dtype) == after.dtype
    return wider and dtype in (None, before.dtype)


def _source(node: fx.Node, dtype: torch.dtype) -> tuple[fx.Node, float, Order]:
    """(source, factor, order): source.permute(order) * factor has the node's values."""
    factor, order = 1.0, tuple(range(value_of(node).dim()))
    while True:
        start = node
        node, turned = through(node)
        order = tuple(turned[i] for i in order)
        node, times = _scaled(node, dtype)
        factor *= times
        if node is start:
            return node, factor, order


def _private(softmax: fx.Node, scores: fx.Node) -> bool:
    """Whether nothing else looks at the scores and what follows up to the softmax."""
    node: Any = softmax
    while node is not scores:
        node = next(n for n in node.args if is_tensor(n))
        if len(node.users) != 1:
            return False
    return True


def _letters(node: fx.Node) -> tuple[fx.Node, str, fx.Node, str, str] | None:
    """(left, its dimensions, right, its dimensions, those of the result), as einsum has them."""
    if calls(node, "einsum"):
        equation = str(node.args[0]).replace(" ", "")
        given = node.args[1] if isinstance(node.args[1], (list, tuple)) else node.args[1:]
        sides = equation.split("->")
        inputs = sides[0].split(",")
        if len(sides) != 2 or len(inputs) != 2 or len(given) != 2 or "." in equation:
            return None
        left, right = given
        names = (*inputs, sides[1])
    else:
        skip = 1 if calls(node, "baddbmm") else 0
        left, right = argument(node, skip, "input"), argument(node, skip + 1, "other")
        count = value_of(node).dim()
        batch = "abc"[: count - 2]
        names = (f"{batch}xy", f"{batch}yz", f"{batch}xz")
    if not is_tensor(left) or not is_tensor(right):
        return None
    for letters, tensor in ((names[0], left), (names[1], right), (names[2], node)):
        if len(set(letters)) != len(letters) or len(letters) != value_of(tensor).dim():
            return None
    return left, names[0], right, names[1], names[2]  # type: ignore[return-value]


def _operands(first: Any, second: Any, probabilities: fx.Node) -> Any:
    """q, k, v as (node, order), and the order of the result, all for [batch ..., S, D]."""
    left, ls, right, rs, scores = first
    key = scores[-1]
    if key in ls:
        left, ls, right, rs = right, rs, left, ls
    batch = "".join(c for c in scores[:-1] if c in ls and c in rs)
    query = "".join(c for c in scores[:-1] if c not in rs)
    inner = "".join(c for c in ls if c in rs and c not in scores)
    if len(query) != 1 or len(inner) != 1 or len(batch) != len(scores) - 2:
        return None
    if sorted(ls) != sorted(batch + query + inner) or sorted(rs) != sorted(batch + key + inner):
        return None
    probs, ps, v, vs, out = second
    if probs is not probabilities:
        probs, ps, v, vs = v, vs, probs, ps
    if probs is not probabilities or v is probabilities:
        return None
    # The second equation's letters, by the first one's.
    of = dict(zip(scores, ps, strict=True))
    batch2 = "".join(of[c] for c in batch)
    width = "".join(c for c in vs if c not in ps)
    if len(width) != 1 or sorted(vs) != sorted(batch2 + of[key] + width):
        return None
    whole = batch2 + of[query] + width
    if sorted(out) != sorted(whole):
        return None
    return (
        (left, tuple(ls.index(c) for c in batch + query + inner)),
        (right, tuple(rs.index(c) for c in batch + key + inner)),
        (v, tuple(vs.index(c) for c in batch2 + of[key] + width)),
        tuple(whole.index(c) for c in out),
    )


def _heads_apart(node: fx.Node, order: Order, dtype: torch.dtype) -> tuple[Operand, float] | None:
    """[B, H, S, D] that was made [B * H, S, D], and a factor on the way; None for other sources."""
    node, turned = through(node)
    if tuple(turned[o] for o in order) != (0, 1, 2) or not calls(node, *RESHAPES):
        return None
    source, shape = node.args[0], tuple(value_of(node).shape)
    if not is_tensor(source) or value_of(source).dim() != 4:
        return None
    before = tuple(value_of(source).shape)
    if (math.prod(before[:2]), *before[2:]) != shape:
        return None
    source, factor, order = _source(source, dtype)  # type: ignore[arg-type]
    return Operand(source, order), factor


def _one_head(graph: fx.Graph, before: fx.Node, node: fx.Node, order: Order) -> Operand:
    """[A, S, D] as one head of each of A images."""
    apart = insert(graph, before, torch.unsqueeze, node, 0)
    return Operand(apart, (order[0] + 1, 0, order[1] + 1, order[2] + 1))
