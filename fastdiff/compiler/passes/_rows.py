"""What the passes for row-wise ops share: casts, modulation, and results with another layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.compiler.graph import calls, insert, is_tensor, only_user, replace, value_of

Views = list[fx.Node]  # of one tensor, the last one first
CASTS = ("to", "float", "half", "bfloat16", "double", "type_as", "type")
_RESHAPING = (
    "getitem", "unsqueeze", "squeeze", "view", "reshape", "expand", "flatten", "unflatten",
    "permute", "transpose", "contiguous",
)  # fmt: skip
# Their results have a layout of their own, whatever their arguments' is.
_OWN_LAYOUT = ("linear", "layer_norm", "matmul", "bmm", "baddbmm", "conv1d", "conv2d", "conv3d")


def on_device(node: fx.Node) -> bool:
    """Whether a tensor is where the ops are defined."""
    return value_of(node).device.type in ("cpu", "cuda")


def is_cast(node: Any) -> bool:
    """Whether a node changes a tensor's float dtype and nothing else."""
    if not calls(node, *CASTS) or not is_tensor(node) or not is_tensor(node.args[0]):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    floats = before.is_floating_point() and after.is_floating_point()
    return bool(floats and before.shape == after.shape and before.device == after.device)


def _widens(node: Any) -> bool:
    if not is_cast(node):
        return False
    before, after = value_of(node.args[0]).dtype, value_of(node).dtype
    return bool(torch.promote_types(before, after) == after)


def widened(node: Any) -> Any:
    """The tensor with the same numbers in a narrower dtype that a node was cast from, or itself."""
    while _widens(node):
        node = node.args[0]
    return node


def wider(graph: fx.Graph, before: fx.Node, node: fx.Node | None, dtype: torch.dtype) -> Any:
    """A tensor in a dtype that has all its numbers, as autocast mixes them; else as it is."""
    mine = dtype_of(node)
    if mine in (None, dtype) or torch.promote_types(mine, dtype) != dtype:  # type: ignore[arg-type]
        return node
    return insert(graph, before, "to", node, dtype)


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a tensor in the graph."""
    return value_of(node).dtype if is_tensor(node) else None


def consumers(node: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """(user, the node or its cast that it uses): all uses of a tensor, seen through casts."""
    found = []
    for user in node.users:
        if is_cast(user):
            found += consumers(user)
        else:
            found.append((user, node))
    return found


def cast_after(node: fx.Node) -> fx.Node | None:
    """The cast that is the only use of a node."""
    user = only_user(node)
    return user if is_cast(user) else None


def operands(node: Any, *names: str) -> tuple[Any, Any] | None:
    """The two arguments of a binary operation."""
    if not calls(node, *names) or node.kwargs or len(node.args) != 2 or not is_tensor(node):
        return None
    return node.args[0], node.args[1]


def other_operand(node: Any, one: fx.Node, *names: str) -> Any:
    """What a binary operation combines ``one`` with; None when it is no such operation."""
    found = operands(node, *names)
    if found is None or found[0] is found[1]:
        return None
    return found[1] if found[0] is one else found[0]


def is_modulation(node: Any, like: Tensor) -> bool:
    """Whether a tensor broadcasts to ``like`` [B, ..., C], in every dimension but the last."""
    if not is_tensor(node):
        return False
    shape, full = tuple(value_of(node).shape), tuple(like.shape)
    if not shape or len(shape) > len(full) or shape[-1] != full[-1]:
        return False
    padded = (1,) * (len(full) - len(shape)) + shape
    return all(mine in (1, whole) for mine, whole in zip(padded, full, strict=True))


def as_modulation(graph: fx.Graph, before: fx.Node, node: fx.Node, like: Tensor) -> fx.Node:
    """It with as many dimensions as ``like``: [N, C] would be one per sample for an op."""
    shape = tuple(value_of(node).shape)
    missing = like.dim() - len(shape)
    return insert(graph, before, "reshape", node, (1,) * missing + shape) if missing else node


def one_plus(node: Any) -> tuple[fx.Node, Views] | None:
    """(s, views) of the views of ``1 + s``: a scalar may as well be added after them."""
    views: Views = []
    while (
        is_tensor(node) and (calls(node, *_RESHAPING) or _widens(node)) and is_tensor(node.args[0])
    ):
        views.append(node)
        node = node.args[0]
    found = operands(node, "add")
    if found is not None:
        for number, other in (found, found[::-1]):
            if isinstance(number, (int, float)) and number == 1 and is_tensor(other):
                return other, views
    return None


def again(graph: fx.Graph, before: fx.Node, node: fx.Node, views: Views) -> fx.Node:
    """The same views of another tensor, which may lie in memory in another way."""
    for view in reversed(views):
        target = "reshape" if calls(view, "view") else view.target
        if not calls(view, "contiguous"):
            node = insert(graph, before, target, node, *view.args[1:], **view.kwargs)
    return node


def untransposed(node: fx.Node) -> tuple[fx.Node, Views]:
    """(tensor, views): the tensor before its rows changed places, as heads do before attention."""
    whole: tuple[fx.Node, Views] = (node, [])
    if not calls(node, "transpose", "permute", "swapaxes") or node.kwargs:
        return whole
    count = value_of(node).dim()
    if calls(node, "permute"):
        dims = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        moved = dims[-1] % count != count - 1
    else:
        moved = any(dim % count == count - 1 for dim in node.args[1:])
    return whole if moved else (node.all_input_nodes[0], [node])


def fuse(
    graph: fx.Graph, last: fx.Node, target: Callable[..., Any], x: fx.Node, *args: Any
) -> fx.Node | None:
    """Puts a row-wise op of x and ``args`` in the place of ``last``; None when it does not fit.

    The op is applied before a transposition of x, which is then one of its result.
    """
    if not on_device(x):
        return None
    inner, views = untransposed(x)
    if any(is_tensor(argument) and value_of(argument).dim() > 1 for argument in args):
        inner, views = x, []  # the modulation would have to be transposed too
    try:
        new = insert(graph, last, target, inner, *args)
    except (ValueError, TypeError):  # outside the op's contract
        return None
    result = again(graph, last, new, views)
    mine, theirs = value_of(result), value_of(last)
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape or not relaid(result, last):
        for node in dict.fromkeys((result, new)):
            graph.erase_node(node)
        return None
    replace(last, result)
    return new


def relaid(new: fx.Node, old: fx.Node) -> bool:
    """Makes what uses a tensor take one with other strides; False where that cannot be done.

    ``view``, which depends on strides, becomes ``reshape``.
    """
    if value_of(new).stride() == value_of(old).stride():
        return True
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    pending = list(old.users)
    while pending:
        node = pending.pop()
        if node in seen or calls(node, *_OWN_LAYOUT):
            continue
        seen.add(node)
        if calls(node, "as_strided", "stride", "is_contiguous", "data_ptr", "set_"):
            return False
        if node.op == "call_method" and node.target == "view":
            found.append(node)
        pending += node.users
    for node in found:
        if not any(isinstance(arg, torch.dtype) for arg in node.args):
            node.target = "reshape"
    return True
