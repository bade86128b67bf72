"""GroupNorm with what surrounds it: a residual's addition, the join with a skip connection or an
addition per channel before; scale and shift, SiLU after."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.compiler.graph import (
    argument,
    calls,
    insert,
    is_tensor,
    only_user,
    replace,
    value_of,
)


def fuse_add_group_norm(graph: fx.Graph) -> int:
    """``silu(group_norm(x + residual))``, and without the SiLU: what ends one residual block and
    begins the next, which usually reads the sum again. Not where a scale and shift follow. The norm
    may be a call of ``group_norm_silu`` in the model's own code."""
    count = 0
    for node in list(graph.nodes):
        if (calls(node, "group_norm") or _calls_own(node)) and is_tensor(node):
            count += _fuse_add(graph, node)
    return count


def _calls_own(node: fx.Node) -> bool:
    """Whether it is our op of x alone: nothing added, scaled, shifted or joined, and no kernel
    asked for."""
    given = ((4, "add"), (5, "scale"), (6, "shift"), (9, "skip"))
    return (
        node.target is torch.ops.fastdiff.group_norm_silu.default
        and all(argument(node, *one) is None for one in given)
        and argument(node, 10, "impl", "auto") == "auto"
    )


def _fuse_add(graph: fx.Graph, norm: fx.Node) -> int:
    own = _calls_own(norm)
    total, num_groups = argument(norm, 0, "x"), argument(norm, 1, "num_groups")
    weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
    if not isinstance(total, fx.Node) or not calls(total, "add") or total.kwargs:
        return 0
    x, residual = total.args
    summed = value_of(total)
    for term in (x, residual):
        value = value_of(term)
        if not is_tensor(term) or (value.shape, value.dtype) != (summed.shape, summed.dtype):
            return 0
    if not _dtypes_fit(summed, weight, bias):
        return 0
    if own:
        last, activation = norm, argument(norm, 8, "activation", "silu")
    elif _film(graph, norm, summed) is not None:
        return 0
    else:
        last, activation = _activated(norm)
    # The sum's other users may come before the norm, so that all of it moves to where the sum is.
    nodes = list(graph.nodes)
    known = set(nodes[: nodes.index(total)])
    if any(isinstance(value, fx.Node) and value not in known for value in (weight, bias)):
        return 0
    eps = argument(norm, 7 if own else 4, "eps", 1e-5)
    try:
        both = insert(
            graph,
            total,
            torch.ops.fastdiff.add_group_norm_silu.default,
            *(x, residual, num_groups, weight, bias, eps, activation),
        )
    except (ValueError, TypeError):  # outside the op's contract
        return 0
    normed = insert(graph, total, operator.getitem, both, 1)
    if value_of(normed).dtype != value_of(last).dtype:
        graph.erase_node(normed)
        graph.erase_node(both)
        return 0
    replace(last, normed)
    replace(total, insert(graph, total, operator.getitem, both, 0))
    return 1


def fuse_group_norm(graph: fx.Graph) -> int:
    """``silu(group_norm(x + t[:, :, None, None]) * (1 + scale) + shift)``, and its parts.

    x may be ``cat([x, skip], 1)``, which is then not made; only where nothing but group norms reads
    it. In the up path of most U-Nets the 1x1 convolution of the block's shortcut does, too: the
    joined tensor must exist there, and the norm reads it.
    """
    count = 0
    for node in list(graph.nodes):
        if calls(node, "group_norm") and is_tensor(node):
            count += _fuse(graph, node)
    return count


def _fuse(graph: fx.Graph, norm: fx.Node) -> int:
    x, num_groups = norm.args[0], argument(norm, 1, "num_groups")
    weight, bias = argument(norm, 2, "weight"), argument(norm, 3, "bias")
    eps = argument(norm, 4, "eps", 1e-5)
    if not isinstance(x, fx.Node) or not _dtypes_fit(value_of(x), weight, bias):
        return 0
    add = None
    if calls(x, "add") and len(x.users) == 1 and not x.kwargs:
        for tensor, other in (x.args[:2], x.args[1::-1]):
            channel = _per_channel(graph, x, other, value_of(tensor))
            if channel is not None and is_tensor(tensor):
                add, x = channel, tensor
                break
    last, scale, shift = norm, None, None
    film = _film(graph, norm, value_of(x))
    if film is not None:
        last, scale, shift = film
    last, activation = _activated(last)
    assert isinstance(x, fx.Node)
    x, skip = _joined(x, norm.args[0])
    try:
        new = insert(
            graph,
            last,
            torch.ops.fastdiff.group_norm_silu.default,
            *(x, num_groups, weight, bias, add, scale, shift, eps, activation, skip),
        )
    except (ValueError, TypeError):  # outside the op's contract
        return 0
    if value_of(new).dtype != value_of(last).dtype:
        graph.erase_node(new)
        return 0
    replace(last, new)
    return 1


def _activated(last: fx.Node) -> tuple[fx.Node, str]:
    """A SiLU that is the node's only user and "silu", or the node and "none"."""
    user = only_user(last)
    return (user, "silu") if user is not None and calls(user, "silu") else (last, "none")


def _joined(x: fx.Node, normed: Any) -> tuple[fx.Node, fx.Node | None]:
    """(x, skip) of ``cat([x, skip], 1)`` that nothing else reads; normed: what the norm takes, x or
    an addition to it."""
    tensors, dim = argument(x, 0, "tensors"), argument(x, 1, "dim", 0)
    if not calls(x, "cat", "concat", "concatenate") or not isinstance(tensors, (tuple, list)):
        return x, None
    if len(tensors) != 2 or dim not in (1, 1 - value_of(x).dim()):
        return x, None
    if not all(user is normed or calls(user, "group_norm") for user in x.users):
        return x, None
    first, skip = tensors
    if not (is_tensor(first) and is_tensor(skip)):
        return x, None
    if any(value_of(t).dtype != value_of(x).dtype for t in (first, skip)):
        return x, None
    return first, skip


def _dtypes_fit(x: Any, weight: Any, bias: Any) -> bool:
    given = [value_of(w) for w in (weight, bias) if w is not None]
    return isinstance(x, Tensor) and all(
        isinstance(w, Tensor) and w.dtype in (x.dtype, torch.float32) for w in given
    )


def _per_channel(graph: fx.Graph, before: fx.Node, node: Any, like: Any) -> fx.Node | None:
    """[N, C] of a tensor [N, C, 1, ...] that is added or multiplied to ``like`` [N, C, ...]."""
    value = value_of(node)
    if not is_tensor(node) or not isinstance(like, Tensor) or not isinstance(value, Tensor):
        return None
    shape, full = tuple(value.shape), tuple(like.shape)
    if len(shape) != len(full) or len(full) < 3 or shape[1] != full[1]:
        return None
    if any(size != 1 for size in shape[2:]) or shape[0] not in (1, full[0]):
        return None
    if value.dtype not in (like.dtype, torch.float32) or value.numel() == like.numel():
        return None
    flat = insert(graph, before, torch.flatten, node, 1)
    if shape[0] != full[0]:
        flat = insert(graph, before, torch.Tensor.expand, flat, full[0], -1)
    return flat


def _film(graph: fx.Graph, norm: fx.Node, like: Any) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(last node, scale, shift) of ``norm * (1 + scale) + shift``."""
    product = only_user(norm)
    if product is None or not calls(product, "mul"):
        return None
    factor = product.args[1] if product.args[0] is norm else product.args[0]
    total = only_user(product)
    if not calls(factor, "add") or total is None or not calls(total, "add"):
        return None
    assert isinstance(factor, fx.Node)
    parts = [a for a in factor.args if not (isinstance(a, (int, float)) and a == 1)]
    if len(parts) != 1 or len(factor.args) != 2:
        return None
    other = total.args[1] if total.args[0] is product else total.args[0]
    scale = _per_channel(graph, product, parts[0], like)
    shift = _per_channel(graph, product, other, like) if scale is not None else None
    return None if scale is None or shift is None else (total, scale, shift)
