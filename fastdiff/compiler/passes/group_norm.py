"""GroupNorm with what surrounds it: an addition per channel before, scale and shift, SiLU after."""

from __future__ import annotations

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


def fuse_group_norm(graph: fx.Graph) -> int:
    """``silu(group_norm(x + t[:, :, None, None]) * (1 + scale) + shift)``, and its parts."""
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
    activation = "none"
    user = only_user(last)
    if user is not None and calls(user, "silu"):
        last, activation = user, "silu"
    try:
        new = insert(
            graph,
            last,
            torch.ops.fastdiff.group_norm_silu.default,
            *(x, num_groups, weight, bias, add, scale, shift, eps, activation),
        )
    except (ValueError, TypeError):  # outside the op's contract
        return 0
    if value_of(new).dtype != value_of(last).dtype:
        graph.erase_node(new)
        return 0
    replace(last, new)
    return 1


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
