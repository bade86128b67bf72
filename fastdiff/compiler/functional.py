"""Rewriting in-place operations, so that every value of a graph is written once.

Fusion and the split into programs move computations, which is right only when no value changes
behind their back. A write to memory that the graph made itself becomes a new value; what aliases
that memory and is used later becomes new with it. A write to an input stays what it is, and such a
graph is left whole.
"""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.compiler.graph import calls, insert, is_tensor, name_of, value_of

# What `x op= y` becomes.
_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}
_INPLACE_ARGUMENT = frozenset(
    ("silu", "relu", "leaky_relu", "elu", "hardswish", "mish", "relu6", "selu", "celu", "dropout")
)
# Methods that write what they are given, of any dtype, over everything.
_OVERWRITES = ("copy_", "fill_", "zero_")


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of a tensor with ``[index] = value``."""
    result = tensor.clone()
    result[index] = value
    return result


def interleaved(even: Tensor, odd: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 2 n] in ``dtype`` of two [..., n]: what lies at [..., 0::2] and at [..., 1::2]."""
    return torch.stack((even.to(dtype), odd.to(dtype)), -1).flatten(-2)


def repair(graph: fx.Graph) -> None:
    """Mends what PyTorch prints wrongly: a graph becomes Python, where ``-1 ** x`` is -(1 ** x)."""
    for node in graph.nodes:
        if node.target is operator.pow and node.op == "call_function":
            base = node.args[0]
            if isinstance(base, (int, float)) and base < 0:
                node.target = torch.pow


def functionalise(graph: fx.Graph) -> str:
    """Rewrites in-place operations; "" or what is left of them."""
    for node in list(graph.nodes):
        if _mutates(node):
            target = node.args[0]
            if not isinstance(target, fx.Node) or not isinstance(value_of(target), Tensor):
                continue  # numbers and lists
            reason = _rewrite(graph, node, target)
            if reason:
                return reason
    _interleave(graph)
    graph.eliminate_dead_code()
    return ""


def _mutates(node: fx.Node) -> bool:
    name = name_of(node)
    if node.op == "call_function":
        if node.target in _OPERATORS or node.target is operator.setitem:
            return True
        if getattr(node.target, "__module__", "") == "_operator":
            return False  # operator.and_, operator.not_
        if node.kwargs.get("out") is not None:
            return True
        if name in _INPLACE_ARGUMENT and node.kwargs.get("inplace"):
            return True
    elif node.op != "call_method":
        return False
    return name.endswith("_") and not name.endswith("__")


def _rewrite(graph: fx.Graph, node: fx.Node, target: fx.Node) -> str:
    """Makes one write a new value; "" or why not."""
    nodes = list(graph.nodes)
    position = nodes.index(node)
    later = set(nodes[position + 1 :])
    storage = _storage(target)
    if storage is None:
        return f"{name_of(node)} on a tensor without storage"
    aliases = [n for n in nodes[:position] if storage in _storages(n)]
    if any(n.op in ("placeholder", "get_attr") for n in aliases):
        return f"{name_of(node)} on an input"
    chain = [target]
    while _storage(chain[-1].args[0] if chain[-1].args else None) == storage:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    live = [n for n in aliases if any(user in later for user in n.users)]
    if any(n not in chain for n in live):
        return f"{name_of(node)} on memory with another name"
    # Up to the last one that is used later: what is above it has no reader.
    chain = chain[: max((chain.index(n) for n in live), default=0) + 1]
    new = _value_after(graph, node, target)
    if new is None:
        return f"{name_of(node)} in place"
    if value_of(new).dtype != value_of(target).dtype:
        return f"{name_of(node)} that changes the dtype"
    for view, parent in itertools.pairwise(chain):
        changed = _written_back(graph, node, parent, view, new)
        if changed is None:
            return f"{name_of(node)} on a view made by {name_of(view)}"
        new = changed
    # Down again: the names of the same memory, made of the new value, share memory as before.
    again = new
    for alias in reversed(chain):
        if alias is not chain[-1]:
            again = _same_view(graph, node, alias, again)
        alias.replace_all_uses_with(again, delete_user_cb=later.__contains__)
    node.replace_all_uses_with(again)
    graph.erase_node(node)
    return ""


def _same_view(graph: fx.Graph, before: fx.Node, view: fx.Node, parent: fx.Node) -> fx.Node:
    assert not isinstance(view.target, torch.nn.Module)
    return insert(graph, before, view.target, parent, *view.args[1:], **view.kwargs)


def _value_after(graph: fx.Graph, node: fx.Node, target: fx.Node) -> fx.Node | None:
    """The new value of what a node writes to."""
    name = name_of(node)
    if node.op == "call_function" and node.target in _OPERATORS:
        return insert(graph, node, _OPERATORS[node.target], *node.args, **node.kwargs)
    if node.target is operator.setitem:
        return insert(graph, node, with_item, *node.args)
    if name in _OVERWRITES:
        value = node.args[1] if len(node.args) > 1 else 0
        return insert(graph, node, with_item, target, Ellipsis, value)
    if node.kwargs.get("inplace"):
        kwargs = {**node.kwargs, "inplace": False}
        assert callable(node.target)
        return insert(graph, node, node.target, *node.args, **kwargs)
    pure = getattr(Tensor, name.removesuffix("_"), None)
    if node.kwargs.get("out") is not None or pure is None or node.op != "call_method":
        return None
    return insert(graph, node, pure, *node.args, **node.kwargs)


def _written_back(
    graph: fx.Graph, before: fx.Node, parent: fx.Node, view: fx.Node, new: fx.Node
) -> fx.Node | None:
    """The parent's new value, when a view of it has become ``new``."""
    if calls(view, "getitem"):
        return insert(graph, before, with_item, parent, view.args[1], new)
    if calls(
        view, "detach", "contiguous", "to", "float", "type_as", "_get_data_attr"
    ):  # the same memory: no change
        return new
    if calls(view, "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"):
        return insert(graph, before, torch.Tensor.reshape, new, value_of(parent).shape)
    if calls(view, "transpose", "swapaxes"):
        return insert(graph, before, torch.Tensor.transpose, new, *view.args[1:], **view.kwargs)
    return None


def _interleave(graph: fx.Graph) -> None:
    """``y = empty_like(x); y[..., 0::2] = a; y[..., 1::2] = b`` in one pass over memory."""
    for last in list(graph.nodes):
        first = last.args[0] if last.target is with_item else None
        if not isinstance(first, fx.Node) or first.target is not with_item:
            continue
        start = first.args[0]
        if len(first.users) != 1 or not calls(start, "empty_like"):
            continue
        halves = {_half(node): node.args[2] for node in (first, last)}
        whole, even, odd = value_of(last), halves.get(0), halves.get(1)
        if None in halves or not is_tensor(even) or not is_tensor(odd):
            continue
        half = (*whole.shape[:-1], whole.shape[-1] // 2)
        if any(tuple(value_of(part).shape) != half for part in (even, odd)):
            continue
        new = insert(graph, last, interleaved, even, odd, whole.dtype)
        last.replace_all_uses_with(new)


def _half(node: fx.Node) -> int | None:
    """0 or 1 for a write to [..., 0::2] or [..., 1::2]."""
    index = node.args[1]
    if not isinstance(index, tuple) or len(index) != 2 or index[0] is not Ellipsis:
        return None
    part = index[1]
    if not isinstance(part, slice) or part.step != 2 or part.stop is not None:
        return None
    return {0: 0, None: 0, 1: 1}.get(part.start)


def _storage(node: Any) -> int | None:
    """The memory of a tensor in the graph."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return _address(value) if isinstance(value, Tensor) else None


def _storages(node: fx.Node) -> set[int | None]:
    """The memory of a node's tensors, one or several."""
    leaves = torch.utils._pytree.tree_leaves(value_of(node))
    return {_address(leaf) for leaf in leaves if isinstance(leaf, Tensor)} - {None}


def _address(tensor: Tensor) -> int | None:
    """None for tensors without memory of their own: those inside torch.vmap."""
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return None
