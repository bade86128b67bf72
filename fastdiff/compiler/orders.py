"""Orders of dimensions: seeing through transposes, and taking them out where they cancel.

An order of a tensor ``x`` is a tuple for ``x.permute``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import calls, insert, is_tensor, name_of, settle, value_of

Order = tuple[int, ...]


def order_of(node: fx.Node) -> Order | None:
    """The order by which a node permutes its first argument, None when it does something else."""
    if not node.args or not is_tensor(node.args[0]) or not is_tensor(node):
        return None
    count = value_of(node).dim()
    rest: list[Any] = list(node.args[1:])
    identity = list(range(count))
    name = name_of(node)
    if name == "getattr" and rest == ["mT"]:
        name, rest = "transpose", [-1, -2]
    if node.kwargs or not all(isinstance(r, (int, tuple, list)) for r in rest):
        return None
    if name in ("transpose", "swapaxes", "swapdims") and len(rest) == 2:
        a, b = (r % count for r in rest)
        identity[a], identity[b] = identity[b], identity[a]
        return tuple(identity)
    if name == "permute" and rest:
        dims: Any = rest[0] if isinstance(rest[0], (tuple, list)) else rest
        return tuple(int(d) % count for d in dims)
    if name in ("movedim", "moveaxis") and [type(r) for r in rest] == [int, int]:
        a, b = (r % count for r in rest)
        identity.insert(b, identity.pop(a))
        return tuple(identity)
    return None


def through(node: fx.Node) -> tuple[fx.Node, Order]:
    """(source, order), where ``source.permute(order)`` is the node, but for its layout."""
    order: Order = tuple(range(value_of(node).dim()))
    while True:
        here = order_of(node)
        if here is not None:
            order = tuple(here[i] for i in order)
        elif not calls(node, "contiguous"):
            return node, order
        node = node.args[0]  # type: ignore[assignment]


def permuted(graph: fx.Graph, before: fx.Node, node: fx.Node, order: Order) -> fx.Node:
    """``node.permute(order)``, without a call where the order is the one it has."""
    if order == tuple(range(len(order))):
        return node
    return insert(graph, before, torch.permute, node, order)


def untwist(graph: fx.Graph) -> int:
    """Removes transposes that cancel, and reshapes to the shape of before; returns how many."""
    count = 0
    for node in list(graph.nodes):
        source = _undone(node)
        if source is None or source is node:
            continue
        users = list(node.users)
        if any(source in user.all_input_nodes for user in users):
            continue  # could not be told apart again
        node.replace_all_uses_with(source)
        if settle(graph, [source]):
            count += 1
        else:
            for user in users:
                user.replace_input_with(source, node)
    graph.eliminate_dead_code()
    return count


def _undone(node: fx.Node) -> fx.Node | None:
    """The tensor that a node gives back, a chain of shape operations before."""
    if not node.users or not is_tensor(node):
        return None
    if order_of(node) is not None:
        source, order = through(node)
        return source if order == tuple(range(len(order))) else None
    before: Any = node
    while calls(before, *RESHAPES) and is_tensor(before.args[0]):
        before = before.args[0]
        if value_of(before).shape == value_of(node).shape:
            return before  # type: ignore[no-any-return]
    return None


RESHAPES = ("view", "reshape", "flatten", "unflatten")
