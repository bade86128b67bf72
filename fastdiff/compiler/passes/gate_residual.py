"""The gated residual of adaLN-Zero, and with it the adaptive layer norm that follows."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.compiler.graph import insert, is_tensor, only_user, replace, value_of
from fastdiff.compiler.passes import _rows
from fastdiff.compiler.passes._rows import dtype_of, widened


def fuse_gate_residual(graph: fx.Graph) -> int:
    """``x + gate * y``, computed in float32 or not, with the bits it has."""
    count = 0
    for node in list(graph.nodes):
        terms = _rows.operands(node, "add")
        if terms is None or not all(map(is_tensor, terms)) or _products(terms) != 1:
            continue
        x, product = terms[::-1] if _is_product(terms[0]) else terms
        count += _fuse(graph, node, x, product)
    return count


def _is_product(node: Any) -> bool:
    return _rows.operands(node, "mul") is not None and only_user(node) is not None


def _products(terms: Any) -> int:
    """A sum of two products is no residual: a rotation of queries or keys looks like that."""
    return sum(map(_is_product, terms))


def _fuse(graph: fx.Graph, total: fx.Node, x: fx.Node, product: fx.Node) -> int:
    shape = value_of(total).shape
    factors = _rows.operands(product, "mul")
    if factors is None or not all(map(is_tensor, factors)) or value_of(x).shape != shape:
        return 0
    for gate, y in (factors, factors[::-1]):
        if value_of(y).shape == shape and _is_gate(gate, value_of(total)):
            return _replace(graph, total, x, y, gate, product)
    return 0


def _is_gate(gate: fx.Node, like: Tensor) -> bool:
    """Shared by the tokens, or one per token of a sequence."""
    if like.dim() < 2 or not _rows.is_modulation(gate, like):
        return False
    return value_of(gate).numel() < like.numel() or like.dim() == 3


def _replace(
    graph: fx.Graph, total: fx.Node, x: fx.Node, y: fx.Node, gate: fx.Node, product: fx.Node
) -> int:
    for last in (_rows.cast_after(total), total):
        dtype = dtype_of(last)
        if last is None or dtype_of(gate) not in (dtype, torch.float32):
            continue
        xs = [node for node in (x, widened(x)) if dtype_of(node) == dtype]
        ys = [node for node in (y, widened(y)) if dtype_of(node) == dtype]
        if not xs or not ys or dtype_of(total) not in (dtype, torch.float32):
            continue
        op = torch.ops.fastdiff.gate_residual.default
        rows = _rows.as_modulation(graph, last, gate, value_of(total))
        # The product is rounded to the wider dtype of gate and y, here as there.
        if torch.promote_types(value_of(gate).dtype, value_of(ys[0]).dtype) != dtype_of(product):
            rows = insert(graph, last, "to", rows, dtype_of(product))
        return int(_rows.fuse(graph, last, op, xs[0], ys[0], rows) is not None)
    return 0


def fuse_gate_residual_norm(graph: fx.Graph) -> int:
    """A gated residual and the adaptive layer norm of it, after the passes for each."""
    count = 0
    for node in list(graph.nodes):
        if node.target is torch.ops.fastdiff.gate_residual.default:
            norms = [user for user in node.users if _is_norm_of(user, node)]
            count += any(_join(graph, node, norm) for norm in sorted(norms))
    return count


def _is_norm_of(node: fx.Node, residual: fx.Node) -> bool:
    op = torch.ops.fastdiff.layer_norm_modulate.default
    return node.target is op and node.args[0] is residual and None not in node.args[1:3]


def _join(graph: fx.Graph, residual: fx.Node, norm: fx.Node) -> bool:
    x, y, gate = residual.args[:3]
    _, scale, shift, weight, bias, eps = norm.args[:6]
    # At the norm, when nothing needs the residual before it; else where the residual is.
    if all(user is norm or norm < user for user in residual.users):
        before = norm
    elif all(node < residual for node in norm.all_input_nodes if node is not residual):
        before = residual
    else:
        return False
    if dtype_of(gate) == torch.float32 and dtype_of(scale) != torch.float32:
        # One dtype for all; a wider gate would round in another place, these do not.
        scale, shift = (insert(graph, before, "float", row) for row in (scale, shift))
    op = torch.ops.fastdiff.gate_residual_norm_modulate.default
    try:
        pair = insert(graph, before, op, x, y, gate, scale, shift, weight, bias, eps)
    except (ValueError, TypeError):  # outside the op's contract: gate and scale of two dtypes
        return False
    replace(residual, insert(graph, before, operator.getitem, pair, 0))
    replace(norm, insert(graph, before, operator.getitem, pair, 1))
    return True
