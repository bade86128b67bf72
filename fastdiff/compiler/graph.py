"""Looking at and changing captured graphs.

A captured graph holds PyTorch's functions as the model's code calls them, before any decomposition.
Every node that is a tensor has a fake one in ``node.meta["example_value"]``.
"""

from __future__ import annotations

import functools
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
    """Whether an argument is a tensor in the graph whose shape does not depend on values."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and all(type(size) is int for size in value.shape)


def calls(node: Any, *names: str) -> bool:
    """Whether the node calls a function or method of one of these names."""
    return isinstance(node, fx.Node) and name_of(node) in names


def parameter_of(node: Any) -> Any:
    """The tensor that a placeholder stands for, while the graph is being captured; else None."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    return getattr(node.meta.get("grapharg"), "example", None)


def only_user(node: fx.Node) -> fx.Node | None:
    """The node's user when it has exactly one."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def insert(
    graph: fx.Graph, before: fx.Node, target: Callable[..., Any] | str, *args: Any, **kwargs: Any
) -> fx.Node:
    """A call of ``target`` before a node, with its fake value; a string is a method's name.

    It counts as a call of the same module as that node.

    What the target raises on fake tensors comes through, and leaves the graph as it was.
    """
    values = fx.node.map_arg((args, kwargs), value_of)
    check = _checks().get(target)
    if check is not None:  # of what fails inside, PyTorch would print a traceback
        check(*values[0], **values[1])
    mode = _mode(values)
    assert mode is not None  # every graph has fake tensors
    call = getattr(torch.Tensor, target) if isinstance(target, str) else target
    with mode, torch.no_grad():
        result = call(*values[0], **values[1])
    with graph.inserting_before(before):
        if isinstance(target, str):
            node = graph.call_method(target, args, kwargs)
        else:
            node = graph.call_function(target, args, kwargs)
    node.meta["example_value"] = result
    if "nn_module_stack" in before.meta:
        node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
    return node


@functools.cache
def _checks() -> dict[Any, Callable[..., None]]:
    from fastdiff.ops import OPS

    return {getattr(torch.ops.fastdiff, op.name).default: op.check for op in OPS}


def _mode(values: Any) -> Any:
    """The fake mode that fake tensors among ``values`` belong to, if there are any."""
    return next((v.fake_mode for v in _leaves(values) if hasattr(v, "fake_mode")), None)


def _leaves(values: Any) -> Iterable[Any]:
    return torch.utils._pytree.tree_leaves(values)


def replace(old: fx.Node, new: fx.Node) -> None:
    """All uses of one node become uses of another; the old one is left to die."""
    old.replace_all_uses_with(new)


def leave(node: fx.Node, reason: str) -> int:
    """Notes for the report why no fusion took a node that one looks for; 0, the matches."""
    node.meta.setdefault("left", reason)
    return 0


def settle(graph: fx.Graph, changed: Iterable[fx.Node]) -> bool:
    """Computes anew the fake values of what uses ``changed``, whose strides are others now.

    False, and nothing is stored, when a call downstream refuses them (a view of what is no longer
    contiguous) or would give another shape or dtype.
    """
    new: dict[fx.Node, Any] = {}
    waiting = tensor_users(changed)
    mode = _mode([value_of(node) for node in changed])
    if mode is None:
        return True
    for node in graph.nodes if waiting else ():
        if node not in waiting or node.op not in ("call_function", "call_method"):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: new.get(n, value_of(n)))
        try:
            with mode, torch.no_grad():
                if node.op == "call_method":
                    value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    value = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # whatever a function of the model raises for a layout it cannot take
            return False
        before, after = _layout(value_of(node)), _layout(value)
        if [kind[:-1] for kind in before] != [kind[:-1] for kind in after]:
            return False
        if before != after:
            new[node] = value
            waiting |= set(node.users)
    for node, value in new.items():
        node.meta["example_value"] = value
    return True


def _layout(values: Any) -> list[tuple[Any, ...]]:
    return [
        (v.shape, v.dtype, v.device, v.stride()) if isinstance(v, Tensor) else (v, None)
        for v in _leaves(values)
    ]


def tensor_users(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All users of all nodes."""
    return {user for node in nodes for user in node.users}
