"""GEGLU and SwiGLU: one half of a projection times the activated other half."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import argument, calls, is_tensor, leave, only_user, value_of
from fastdiff.compiler.passes import _rows
from fastdiff.compiler.passes._rows import dtype_of, widened


def fuse_geglu(graph: fx.Graph) -> int:
    """``hidden * gelu(gate)``, hidden and gate the halves of the last dimension."""
    return sum(_fuse(graph, node) for node in list(graph.nodes) if calls(node, "gelu"))


def fuse_swiglu(graph: fx.Graph) -> int:
    """``hidden * silu(gate)``, the gate being either half."""
    return sum(_fuse(graph, node) for node in list(graph.nodes) if calls(node, "silu"))


def _fuse(graph: fx.Graph, activation: fx.Node) -> int:
    if not is_tensor(activation):
        return 0
    activated = _rows.cast_after(activation) or activation
    product = only_user(activated)
    hidden = _rows.other_operand(product, activated, "mul")
    gate = widened(argument(activation, 0, "input"))
    if product is None or not is_tensor(hidden):
        return leave(activation, "it is no gate") if calls(activation, "gelu") else 0
    first, second = half_of(hidden), half_of(gate)
    if first is None or second is None or first[0] is not second[0] or first[1] == second[1]:
        return leave(activation, "it gates another tensor than the other half")
    x = first[0]
    if calls(activation, "silu"):
        op, option = torch.ops.fastdiff.swiglu.default, "last" if second[1] else "first"
    else:
        op, option = (
            torch.ops.fastdiff.geglu.default,
            argument(activation, 1, "approximate", "none"),
        )
        if not second[1]:
            return leave(activation, "the gate is the first half")
    if dtype_of(product) != dtype_of(x):
        return leave(activation, "the product has another dtype than the projection")
    return int(_rows.fuse(graph, product, op, x, option) is not None)


def half_of(node: Any) -> tuple[fx.Node, int] | None:
    """(tensor, 0 or 1): the tensor of whose last dimension a node is the first or second half."""
    if not is_tensor(node) or not calls(node, "getitem", "narrow"):
        return None
    source, which = node.args[0], node.args[1]
    half = value_of(node).shape[-1]
    if calls(node, "narrow"):
        found = source, which, argument(node, 2, "start")
    elif isinstance(which, int):
        if not calls(source, "chunk", "split", "split_with_sizes", "tensor_split"):
            return None
        parts = value_of(source)
        start = sum(part.shape[-1] for part in parts[: which % len(parts)])
        found = source.args[0], argument(source, 2, "dim", 0), start
    else:
        found = source, -1, _start(which, source, half)
    x, dim, start = found
    if not is_tensor(x) or dim not in (-1, value_of(x).dim() - 1) or start not in (0, half):
        return None
    if tuple(value_of(x).shape) != (*value_of(node).shape[:-1], 2 * half):
        return None
    return x, start // half


def _start(index: Any, source: Any, half: int) -> int | None:
    """Where ``[..., :half]`` or ``[..., half:]`` begins."""
    if not isinstance(index, tuple) or not is_tensor(source):
        return None
    *rest, last = index
    full = rest == [Ellipsis] or rest == [slice(None)] * (value_of(source).dim() - 1)
    if not full or not isinstance(last, slice) or last.step not in (None, 1):
        return None
    return {(None, half): 0, (0, half): 0, (half, None): half, (half, 2 * half): half}.get(
        (last.start, last.stop)
    )
