"""On a CPU with bf16 instructions: weights in the order that oneDNN computes in, images channels
last.

PyTorch's own bf16 layers reorder their weights in every call, which for small batches is most of
the time, and convolutions of channels-first images reorder those too. Reordered weights depend on
the weights alone, so the split keeps them, as long as the weights stay what they are. Results have
the bits of PyTorch's own layers for contiguous rows and for channels-last images; for other layouts
oneDNN adds up in another order. A GELU that alone uses a linear layer is computed in it, of sums
that are not rounded in between: 0.91 of the time of DiT-XL's feed-forward (256 rows, one core of
an EPYC).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from fastdiff.compiler.graph import argument, calls, is_tensor, only_user, parameter_of, value_of
from fastdiff.compiler.packing import stacked

# Fewer multiplications than this are not worth a call of their own.
LEAST = 1 << 16


def prepack(graph: fx.Graph) -> int:
    """Linear layers and 2-D convolutions; how many were changed."""
    if not usable():
        return 0
    count = 0
    convolutions = False
    for node in list(graph.nodes):
        if calls(node, "linear") and _linear_fits(node):
            x, weight = node.args[0], node.args[1]
            rows = value_of(x).numel() // value_of(x).shape[-1]
            packed = call(graph, node, pack_linear, value_of(weight), weight, rows)
            bias = argument(node, 2, "bias")
            node, how = _activated(node)
            new = call(graph, node, linear, value_of(node), x, packed, bias, *how)
        elif calls(node, "conv2d") and _convolution_fits(node):
            options = _conv_options(node)
            x, weight = node.args[0], node.args[1]
            shape = tuple(value_of(x).shape)
            packed = call(graph, node, pack_conv, value_of(weight), weight, *options, shape)
            bias = argument(node, 2, "bias")
            new = call(graph, node, conv2d, value_of(node), x, packed, bias, *options)
            convolutions = True
        else:
            continue
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        count += 1
    if convolutions:
        any_layout(graph)
    return count


def usable() -> bool:
    """Whether this CPU has bf16 products and this PyTorch the operators for them."""
    names = (
        *("_reorder_linear_weight", "_linear_pointwise"),
        *("_reorder_convolution_weight", "_convolution_pointwise", "_nbytes"),
    )
    return (
        torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


def pack_linear(weight: Tensor, rows: int) -> Tensor:
    """The weight [N, K] in oneDNN's order for ``rows`` rows."""
    if isinstance(weight, FakeTensor):
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: str = "") -> Tensor:
    """``torch.nn.functional.linear`` with a packed weight. gelu: "none" or "tanh", which GELU
    follows, of the sums in float32; "": none does."""
    if isinstance(packed, FakeTensor):
        y = functional.linear(x, packed, bias)
        return functional.gelu(y, approximate=gelu) if gelu else y
    after = "gelu" if gelu else "none"
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, after, [], gelu)
    return result


def _activated(node: fx.Node) -> tuple[fx.Node, tuple[str, ...]]:
    """(the GELU that alone uses a linear layer, its kind), or the layer."""
    user = only_user(node)
    if user is None or not calls(user, "gelu") or not is_tensor(user):
        return node, ()
    kind = argument(user, 1, "approximate", "none")
    return (user, (kind,)) if kind in ("none", "tanh") else (node, ())


def pack_conv(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int],
) -> Tensor:
    """The weight of a 2-D convolution in oneDNN's order for channels-last inputs of ``shape``."""
    if isinstance(weight, FakeTensor):
        return weight
    last = weight.detach().contiguous(memory_format=torch.channels_last)
    options = (list(padding), list(stride), list(dilation), groups, list(shape))
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(last, *options)
    return packed


def conv2d(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with a packed weight; the result is channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    options = (list(padding), list(stride), list(dilation), groups)
    if isinstance(packed, FakeTensor):
        return functional.conv2d(x, packed, bias, *(stride, padding, dilation, groups))
    result: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, packed, bias, *options, "none", [], ""
    )
    return result


def restored(x: Tensor, stride: Sequence[int]) -> Tensor:
    """The same values with these strides."""
    if x.stride() == tuple(stride):
        return x
    if all(a == b for a, b, size in zip(x.stride(), stride, x.shape, strict=True) if size > 1):
        return x.as_strided(x.shape, stride)
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def any_layout(graph: fx.Graph) -> None:
    """Views of what is channels last now may need a copy; results keep the model's own strides."""
    for node in graph.nodes:
        as_dtype = any(isinstance(size, torch.dtype) for size in node.args)
        if node.op == "call_method" and node.target == "view" and not as_dtype:
            node.target = "reshape"
    output = next(node for node in graph.nodes if node.op == "output")
    given = [value_of(node) for node in graph.nodes if node.op == "placeholder" and is_tensor(node)]
    last = any(_channels_last(value) for value in given)

    def own_strides(node: fx.Node) -> fx.Node:
        value = value_of(node)
        if node.op == "placeholder" or not is_tensor(node) or not _dense(value):
            return node
        strides = value.stride()
        if _channels_last(value) and len(value) == 1 and not last:
            # The stride of one image does not count, but is what says channels last; that of a
            # fake tensor is another one after a reshape.
            strides = torch.empty(value.shape, device="meta").stride()
        return call(graph, output, restored, value, node, tuple(strides))

    output.args = fx.node.map_arg(output.args, own_strides)


def _dense(value: Tensor) -> bool:
    """Every place of its memory is one element."""
    sizes = sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True))
    expected = 1
    for stride, size in sizes:
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _channels_last(value: Any) -> bool:
    """And not contiguous."""
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return bool(channels_last and not value.is_contiguous())


def call(graph: fx.Graph, before: fx.Node, target: Any, value: Any, *args: Any) -> fx.Node:
    with graph.inserting_before(before):
        node = graph.call_function(target, args)
    node.meta["example_value"] = value
    return node


def _fits(x: Any, weight: Any) -> bool:
    """Both bf16 on the CPU, the weight one of the model's own or a view of it."""
    if not (is_tensor(x) and is_tensor(weight)):
        return False
    parts = weight.args if weight.target is stacked else (weight,)
    if not all(isinstance(parameter_of(_behind_views(part)), nn.Parameter) for part in parts):
        return False
    values = value_of(x), value_of(weight)
    return all(v.device.type == "cpu" and v.dtype == torch.bfloat16 for v in values)


def _behind_views(node: Any) -> Any:
    """The weight of a 1x1 convolution that its model takes as one of a linear layer."""
    while calls(node, "squeeze", "flatten", "view", "reshape") and is_tensor(node.args[0]):
        node = node.args[0]
    return node


def _linear_fits(node: fx.Node) -> bool:
    x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    if len(node.args) < 2 or not _fits(x, weight) or value_of(weight).dim() != 2:
        return False
    return bool(value_of(x).numel() * value_of(weight).shape[0] >= LEAST)


def _convolution_fits(node: fx.Node) -> bool:
    if len(node.args) < 2 or not _fits(node.args[0], node.args[1]):
        return False
    x, weight = value_of(node.args[0]), value_of(node.args[1])
    if x.dim() != 4 or x.numel() == 0 or _conv_options(node) is None:
        return False
    return bool(x.numel() * weight.shape[0] >= LEAST)


def _conv_options(node: fx.Node) -> Any:
    """(stride, padding, dilation, groups), pairs of numbers; None for padding by a name."""

    def pair(value: Any) -> tuple[int, ...]:
        return (value, value) if isinstance(value, int) else tuple(value)

    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
    if isinstance(padding, str):
        return None
    dilation = argument(node, 5, "dilation", 1)
    return pair(stride), pair(padding), pair(dilation), argument(node, 6, "groups", 1)
