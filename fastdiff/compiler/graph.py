"""Looking at and changing captured graphs.

A captured graph holds PyTorch's functions as the model's code calls them, before any decomposition.
Every node that is a tensor has a fake one in ``node.meta["example_value"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

# What `x op= y` becomes.
_IN_PLACE_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
# Methods and functions whose result may share memory with their first argument.
VIEWS = frozenset(
    """view reshape transpose permute expand unsqueeze squeeze chunk split getitem t flatten
    unflatten unbind contiguous to movedim narrow select detach type float half bfloat16 swapaxes mT
    H T view_as expand_as reshape_as tensor_split diagonal unfold real imag dropout
    identity""".split()  # noqa: SIM905
)


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

    What the target raises on fake tensors comes through, and leaves nothing in the graph.
    """
    with graph.inserting_before(before):
        if isinstance(target, str):
            node = graph.call_method(target, args, kwargs)
        else:
            node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg((args, kwargs), value_of)
    mode = next((v.fake_mode for v in _leaves(values) if hasattr(v, "fake_mode")), None)
    assert mode is not None  # every graph has fake tensors
    call = getattr(torch.Tensor, target) if isinstance(target, str) else target
    try:
        with mode, torch.no_grad():
            node.meta["example_value"] = call(*values[0], **values[1])
    except Exception:
        graph.erase_node(node)
        raise
    return node


def leave(node: fx.Node, reason: str) -> int:
    """Notes for the report why no fusion took a node that one looks for; 0, the matches."""
    node.meta.setdefault("left", reason)
    return 0


def _leaves(values: Any) -> Iterable[Any]:
    return torch.utils._pytree.tree_leaves(values)


def replace(old: fx.Node, new: fx.Node) -> None:
    """All uses of one node become uses of another; the old one is left to die."""
    old.replace_all_uses_with(new)


def tensor_users(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """All users of all nodes."""
    return {user for node in nodes for user in node.users}


def functionalise(graph: fx.Graph) -> str:
    """Rewrites in-place operations where nothing else can see them; "" or what is left of them.

    ``x += y`` and ``x[i] = y`` on a tensor that is no input, and whose memory nothing else reads
    afterwards, become an addition, and a copy of x with y in it.
    """
    for node in list(graph.nodes):
        _copy_is_setting(node)
        setting = node.op == "call_function" and node.target is operator.setitem
        if setting or (node.op == "call_function" and node.target in _IN_PLACE_OPERATORS):
            target = node.args[0]
            if not isinstance(target, fx.Node) or not isinstance(value_of(target), Tensor):
                continue  # numbers
            if _shared(target, node):
                return f"{name_of(node)} on an input, or on memory that is read elsewhere"
            if setting:
                node.target = with_item
                node.meta["example_value"] = value_of(target)
                later = _after(graph, node)
                target.replace_all_uses_with(node, delete_user_cb=later.__contains__)
                continue
            if value_of(node).dtype != value_of(target).dtype:
                return f"{name_of(node)} that changes the dtype"
            node.target = _IN_PLACE_OPERATORS[node.target]
            later = _after(graph, node)
            target.replace_all_uses_with(node, delete_user_cb=later.__contains__)
        elif _mutates(node):
            return f"{name_of(node)} in place"
    return ""


def _copy_is_setting(node: fx.Node) -> None:
    """Makes ``x[i].copy_(y)`` and ``x.data[i].copy_(y)`` what they are, ``x[i] = y``."""
    item = node.args[0] if calls(node, "copy_") and len(node.args) == 2 else None
    if not calls(item, "getitem") or node.users or node.kwargs or not is_tensor(item):
        return
    assert isinstance(item, fx.Node)
    owner, index = item.args
    while calls(owner, "_get_data_attr", "detach") and only_user(owner):  # type: ignore[arg-type]
        owner = owner.args[0]  # type: ignore[union-attr]
    if is_tensor(owner) and only_user(item):
        node.op, node.target = "call_function", operator.setitem
        node.args = (owner, index, node.args[1])


def _shared(target: fx.Node, write: fx.Node) -> bool:
    """Whether the write to a tensor is a write to an input, or is seen through another one."""
    owner = target
    while calls(owner, *VIEWS):
        owner = owner.all_input_nodes[0]
        if len(owner.users) != 1:
            return True
    if owner.op not in ("call_function", "call_method"):
        return True
    views = [user for user in target.users if user < write and calls(user, *VIEWS)]
    while views:
        users = views.pop().users
        if any(write < user for user in users):
            return True
        views += [user for user in users if calls(user, *VIEWS)]
    return False


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of a tensor in which ``copy[index] = value``."""
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def _after(graph: fx.Graph, node: fx.Node) -> set[fx.Node]:
    nodes = list(graph.nodes)
    return set(nodes[nodes.index(node) + 1 :])


def _mutates(node: fx.Node) -> bool:
    name = name_of(node)
    if node.op not in ("call_method", "call_function"):
        return False
    if name in ("setitem", "copy_") or node.kwargs.get("out") is not None:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    return argument(node, 1, "inplace", False) is True and name in _INPLACE_FUNCTIONS


_INPLACE_FUNCTIONS = frozenset(
    ("silu", "relu", "leaky_relu", "elu", "hardswish", "mish", "relu6", "selu", "celu")
)
