"""Before fusion: removes what computes nothing, which hides the patterns that fusion looks for; the
calls of our ops in the model's own code become those that passes make."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastdiff.compiler.graph import argument, calls, is_tensor, name_of, replace, value_of
from fastdiff.ops import OPS

_SHAPE_OPS = ("view", "reshape", "expand")
_CASTS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}

_OURS = {op.name for op in OPS}


def tidy(graph: fx.Graph) -> int:
    """Removes no-ops; returns how many. The graph has no in-place operations."""
    count = 0
    for node in list(graph.nodes):
        if isinstance(node.target, torch._ops.OpOverloadPacket) and name_of(node) in _OURS:
            node.target = node.target.default
        if node.op not in ("call_function", "call_method") or not node.args:
            continue
        source = node.args[0]
        if isinstance(source, fx.Node) and is_tensor(source) and _is_noop(node, source):
            replace(node, source)
            graph.erase_node(node)
            count += 1
    graph.eliminate_dead_code()
    return count


def _is_noop(node: fx.Node, source: fx.Node) -> bool:
    before, after = value_of(source), value_of(node)
    if not is_tensor(node):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    same = same and before.shape == after.shape
    if not same:
        return False
    name = name_of(node)
    if name == "dropout":
        return _number(argument(node, 1, "p", 0.5)) == 0 or argument(node, 2, "training") is False
    if name in ("truediv", "div", "mul"):
        return _number(argument(node, 1, "other")) == 1
    if name in ("add", "sub"):
        return _number(argument(node, 1, "other")) == 0 and not node.kwargs.get("alpha")
    if name == "contiguous":
        memory_format = node.kwargs.get("memory_format", torch.contiguous_format)
        return bool(before.is_contiguous(memory_format=memory_format))
    if name in ("to", "type_as") or name in _CASTS:
        return not node.kwargs.get("copy") and "memory_format" not in node.kwargs
    if name in _SHAPE_OPS:
        return bool(before.stride() == after.stride())
    return name in ("identity", "detach") or calls(node, "Identity")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
