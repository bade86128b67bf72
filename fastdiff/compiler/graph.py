"""Looking at and changing captured graphs.

A captured graph holds PyTorch's functions as the model's code calls them, before any decomposition.
Every node that is a tensor has a fake one in ``node.meta["example_value"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx


def name_of(node: fx.Node) -> str:
    """The plain name of what a node calls: "add", "group_norm", "view", ... ; "" for no call."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return str(getattr(node.target, "__name__", node.target))
    return ""


def value_of(node: Any) -> Any:
    """The fake tensor (or whatever else) of a node; the argument itself when it is no node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    """Whether an argument is a tensor in the graph."""
    return isinstance(node, fx.Node) and isinstance(value_of(node), Tensor)


def calls(node: Any, *names: str) -> bool:
    """Whether the node calls a function or method of one of these names."""
    return isinstance(node, fx.Node) and name_of(node) in names


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's user when it has exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def insert(
    graph: fx.Graph, before: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any
) -> fx.Node:
    """A call of ``target`` before a node, with its fake value."""
    with graph.inserting_before(before):
        node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg((args, kwargs), value_of)
    mode = next((v.fake_mode for v in _leaves(values) if hasattr(v, "fake_mode")), None)
    assert mode is not None  # every graph has fake tensors
    with mode, torch.no_grad():
        node.meta["example_value"] = target(*values[0], **values[1])
    return node


def _leaves(values: Any) -> Iterable[Any]:
    return torch.utils._pytree.tree_leaves(values)


def replace(old: fx.Node, new: fx.Node) -> None:
    """All uses of one node become uses of another; the old one is left to die."""
    old.replace_all_uses_with(new)


def tensor_users(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All users of all nodes."""
    return {user for node in nodes for user in node.users}
