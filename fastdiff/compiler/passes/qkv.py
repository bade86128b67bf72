"""One product for the projections of an attention that read the same input."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fastdiff.compiler import packing
from fastdiff.compiler.graph import (
    argument,
    calls,
    insert,
    is_tensor,
    leave,
    parameter_of,
    settle,
    value_of,
)
from fastdiff.compiler.orders import RESHAPES, order_of

_VIEWS = (*RESHAPES, "unsqueeze", "contiguous")
# Arguments of the attention op, by segment.
_SEGMENTS = (("q", "k", "v"), ("extra_q", "extra_k", "extra_v"))


def merge_projections(graph: fx.Graph) -> int:
    """q, k and v (or two of them) by one linear layer, for every attention op; the weights are put
    one after another in memory."""
    count = 0
    for node in list(graph.nodes):
        op = torch.ops.fastdiff.attention
        if node.target not in (op, op.default):
            continue
        for first, names in zip((0, 3), _SEGMENTS, strict=True):
            operands = [argument(node, first + i, name) for i, name in enumerate(names)]
            count += _merge_by_input([_projection(o) for o in operands])
    return count


def _projection(node: Any) -> fx.Node | None:
    """The linear layer behind views."""
    while is_tensor(node) and (calls(node, *_VIEWS) or order_of(node) is not None):
        node = node.args[0]
    return node if calls(node, "linear") and is_tensor(node) else None


def _merge_by_input(layers: list[fx.Node | None]) -> int:
    groups: dict[Any, list[fx.Node]] = {}
    for layer in layers:
        if layer is not None and layer not in groups.get(layer.args[0], ()):
            groups.setdefault(layer.args[0], []).append(layer)
    count = 0
    for group in groups.values():
        if len(group) > 1:
            why = _merge(group)
            count += not why
            for layer in group if why else ():
                leave(layer, why)
    return count


def _merge(layers: list[fx.Node]) -> str:
    """ "" or why the layers stay apart."""
    graph = layers[0].graph
    weights = [argument(layer, 1, "weight") for layer in layers]
    biases = [argument(layer, 2, "bias") for layer in layers]
    if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
        return "some have a bias, some do not"
    packed = [weights] if biases[0] is None else [weights, biases]
    real = [[parameter_of(node) for node in nodes] for nodes in packed]
    if any(tensor is None for tensors in real for tensor in tensors):
        return "a weight is computed"
    for tensors in real:
        why = packing.why_not(tensors)
        if why:
            return why
    first = min(layers, key=list(graph.nodes).index)
    stacks = [insert(graph, first, packing.stacked, *nodes) for nodes in packed]
    whole = insert(graph, first, torch.nn.functional.linear, first.args[0], *stacks)
    start, parts, users = 0, [], [set(layer.users) for layer in layers]
    for layer in layers:
        width = value_of(layer).shape[-1]
        index = (Ellipsis, slice(start, start + width))
        parts.append(insert(graph, first, operator.getitem, whole, index))
        start += width
    for layer, part in zip(layers, parts, strict=True):
        layer.replace_all_uses_with(part)
    if not settle(graph, parts):
        for layer, part, was in zip(layers, parts, users, strict=True):
            part.replace_all_uses_with(layer, delete_user_cb=was.__contains__)
        return "what follows needs another layout"
    for tensors in real:
        packing.pack(tensors)
    return ""
