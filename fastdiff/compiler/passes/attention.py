"""Attention without transposes and concatenations: [B, S, H, D] in one or two segments."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import (
    argument,
    calls,
    insert,
    leave,
    only_user,
    settle,
    value_of,
)
from fastdiff.compiler.orders import RESHAPES, order_of, untwist
from fastdiff.compiler.passes.products import Operand, Product, key_mask, products
from fastdiff.compiler.passes.segments import Side, sides
from fastdiff.compiler.tidy import tidy

# What is taken into the op, the most first.
FOLDS = tuple(map(frozenset, (("norm", "rope", "cat"), ("norm", "rope"), ("cat",), ())))


def fuse_attention(graph: fx.Graph) -> int:
    """scaled_dot_product_attention, and softmax between two products, with what is around them:
    transposes, norms and rotary embedding of q and k, concatenated sequences."""
    tables: dict[Any, fx.Node] = {}
    count = 0
    untwist(graph)
    for product in products(graph):
        if not product.why:
            product.why = _fuse(graph, product, tables)
        if product.why:
            leave(product.result, product.why)
        else:
            count += 1
    untwist(graph)
    tidy(graph)
    return count


def _fuse(graph: fx.Graph, product: Product, tables: dict[Any, fx.Node]) -> str:
    """ "" or why the product stays."""
    mask = None
    if product.mask is not None:
        mask = key_mask(graph, product)
        if mask is None:
            return "its mask differs by query or head"
    why = "unknown"
    for fold in FOLDS:
        try:
            new, old = _called(graph, product, mask, fold, tables)
        except (ValueError, TypeError) as error:  # outside the op's contract
            why = str(error)
            continue
        if not new:
            continue
        if [value_of(n).dtype for n in new] != [value_of(n).dtype for n in old]:
            return "its result has another dtype"
        users = [set(n.users) for n in old]
        for before, after in zip(old, new, strict=True):
            before.replace_all_uses_with(after)
        if settle(graph, new):
            return ""
        for before, after, was in zip(old, new, users, strict=True):
            after.replace_all_uses_with(before, delete_user_cb=was.__contains__)
        why = "what follows needs another layout"
    return why


def _called(
    graph: fx.Graph,
    product: Product,
    mask: fx.Node | None,
    fold: frozenset[str],
    tables: dict[Any, fx.Node],
) -> tuple[list[fx.Node], list[fx.Node]]:
    """(new nodes, the nodes they replace) with the op called, or two empty lists where this much
    cannot be folded. ValueError and TypeError come from the op."""
    before = product.result
    q, k = sides(product.q, fold), sides(product.k, fold)
    v = sides(product.v, fold & {"cat"})
    parts: tuple[list[fx.Node], ...] = ()
    if "cat" in fold:
        if len(q) > 2 or not len(k) == len(v) == 2 or mask is not None:
            return [], []
        if [s.length for s in k] != [s.length for s in v]:
            return [], []
        if len(q) == 2:
            parts = _parts(product, q[0].length)
            if not parts:
                return [], []
            if not parts[0]:  # only the second half is looked at
                q, k, v, parts = q[::-1], k[::-1], v[::-1], parts[::-1]
            if not parts[1]:
                q, parts = q[:1], parts[:1]
    if not _agree(q, k):
        return [], []
    given: dict[str, Any] = {"scale": product.scale, "key_mask": mask}
    if k[0].norm is not None:
        given.update(norm=k[0].norm.kind, eps=k[0].norm.eps)
    for i, prefix in enumerate(("", "extra_")[: len(k)]):
        rotation = k[i].tables
        if rotation is not None:
            given[f"{prefix}cos"], given[f"{prefix}sin"] = rotation.inserted(graph, tables)
        for name, found in (("q", q), ("k", k), ("v", v)):
            if i >= len(found):
                continue
            if i:
                given[f"extra_{name}"] = found[i].operand.spread(graph, before)
            norm = found[i].norm
            if norm is not None:
                given[f"{prefix}{name}_weight"] = norm.weight
    for side in (*q, *k, *v):
        _autocast(graph, before, side)
    main = [found[0].operand.spread(graph, before) for found in (q, k, v)]
    op = torch.ops.fastdiff.attention.default
    call = insert(graph, before, op, *main, **{n: x for n, x in given.items() if x is not None})
    out = insert(graph, before, operator.getitem, call, 0)
    if not parts:
        return [product.restored(graph, out)], [before]
    new, old = [], []
    for i, slices in enumerate(parts):
        whole = out if i == 0 else insert(graph, before, operator.getitem, call, 1)
        joined = insert(graph, before, torch.flatten, whole, 2)
        new += [joined] * len(slices)
        old += slices
    return new, old


def _autocast(graph: fx.Graph, before: fx.Node, side: Side) -> None:
    """Casts an operand as autocast does in front of a product."""
    node, dtype = side.operand.node, value_of(before).dtype
    device = value_of(node).device.type
    if value_of(node).dtype == dtype or side.norm is not None or side.tables is not None:
        return
    if torch.is_autocast_enabled(device) and dtype == torch.get_autocast_dtype(device):
        side.operand = Operand(insert(graph, before, "to", node, dtype), side.operand.order)


def _agree(q: list[Side], k: list[Side]) -> bool:
    """Whether one call can do what happens to all of them."""
    first = q[0].norm
    for side in (*q, *k):
        if side.norm is not first and (first is None or not first.fits(side.norm)):
            return False
    for mine, other in zip(q, k, strict=False):
        if mine.tables is not None and not mine.tables.same(other.tables):
            return False
        if mine.tables is None and other.tables is not None:
            return False
    return len(q) == len(k) or all(side.tables is None for side in k[len(q) :])


def _parts(product: Product, first: int) -> tuple[list[fx.Node], ...]:
    """The slices [B, S, H * D] of the result before and after row ``first``; empty when it is
    looked at in another way."""
    node: Any = product.result
    value = value_of(node)
    if product.flat or product.order != (0, 1, 2, 3):
        return ()
    batch, heads, length, width = value.shape
    turned = only_user(node)
    if turned is None or order_of(turned) != (0, 2, 1, 3):
        return ()
    node = only_user(turned)
    if node is None or not calls(node, *RESHAPES):
        return ()
    if tuple(value_of(node).shape) != (batch, length, heads * width):
        return ()
    halves: tuple[list[fx.Node], ...] = ([], [])
    for user in node.users:
        for piece, rows in _pieces(user, length):
            if rows == (0, first):
                halves[0].append(piece)
            elif rows == (first, length):
                halves[1].append(piece)
            elif piece.users:
                return ()
    return halves if halves[0] or halves[1] else ()


def _pieces(user: fx.Node, length: int) -> Iterable[tuple[fx.Node, tuple[int, int]]]:
    """(node, rows) of what a user takes of its [B, S, C]; rows (-1, -1) for something else."""
    other = [(user, (-1, -1))]
    if calls(user, "getitem"):
        index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        everything = slice(None)
        rest = [*index[:1], *index[2:]]
        if len(index) < 2 or any(i not in (everything, Ellipsis) for i in rest):
            return other
        if index[0] is Ellipsis or not isinstance(index[1], slice):
            return other
        start, stop, step = index[1].indices(length)
        return [(user, (start, stop))] if step == 1 else other
    if calls(user, "split", "split_with_sizes") and argument(user, 2, "dim", 0) in (1, -2):
        sizes = argument(user, 1, "split_size_or_sections", user.kwargs.get("split_sizes"))
        if not isinstance(sizes, (list, tuple)):
            return other
        found, starts = [], [sum(sizes[:i]) for i in range(len(sizes))]
        for piece in user.users:
            if not calls(piece, "getitem") or not isinstance(piece.args[1], int):
                return other
            at = piece.args[1] % len(sizes)
            found.append((piece, (starts[at], starts[at] + sizes[at])))
        return found
    return other
