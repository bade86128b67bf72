"""Writes to tensors: what functionalise makes of them, and when it must not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import check, random
from torch import fx

from fastdiff.compiler.graph import functionalise

B, N, C, H = 2, 5, 16, 4

# What writes to a tensor: a rotation as Wan, CogView4 and HunyuanVideo write it.


def test_items_that_are_set_do_not_stop_fusion():
    def function(x, y, gate):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2] * 2
        out[..., 1::2] = x[..., 0::2] - 1
        return out.type_as(x) + gate[:, None] * y, x

    args = random(B, N, C), random(B, N, C) + 1, random(B, C)
    assert check(function, *args, exact=True) == {"gate_residual": 1}


def test_items_that_are_copied_to_are_set():
    """CogVideoX puts the positions of the text's tokens before those of the video's."""

    def function(x, y, gate):
        table = x.new_zeros(B, N + 3, C)
        table.data[:, 3:].copy_(x)
        return table, table[:, :N] + gate[:, None] * y

    args = random(B, N, C), random(B, N, C) + 1, random(B, C)
    assert check(function, *args, exact=True) == {"gate_residual": 1}


def test_items_of_heads_are_set_without_a_trace():
    """CogView4 rotates a part of the queries, which are views of a projection."""

    def function(x, weight):
        q = F.linear(x, weight).unflatten(2, (H, -1)).transpose(1, 2)
        q[:, :, 2:] = q[:, :, 2:] * 2
        q += 1
        return q.transpose(1, 2).flatten(2).chunk(2, dim=-1)[0], q

    args = random(B, N, C), random(C, C)
    assert check(function, *args, exact=True) == {}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x.__setitem__(0, 1), x + 1)[1],  # an input
        lambda x: ((y := x * 2).view(-1), y.__setitem__(0, 1), y)[0],  # a view is read later
        lambda x: ((y := x * 2)[0].__setitem__(0, 1), y)[1],  # of a view
        lambda x: ((y := x * 2).chunk(2)[0].__setitem__(0, 1), y.sum())[1],
        lambda x: ((v := (y := x * 2).view(-1)[3:]), y.__setitem__(0, 1), v + 1)[2],
        lambda x: ((v := (y := x * 2).view(-1)), y[1:].copy_(x[1:]), v + 1)[2],
        lambda x: (x[1:].copy_(x[:-1] * 2), x + 1)[1],
        lambda x: ((y := x * 2), (v := y[1:]).copy_(x[1:]), v + 1)[2],
        lambda x: ((y := x * 2), y[1:].copy_(x[1:]) + 1)[1],
    ],
)
def test_items_that_something_else_sees_are_no_copy(function):
    reasons: list[str] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Any:
        reasons.append(functionalise(module.graph))
        return module.forward

    x = random(N, C)
    right = function(x.clone())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, backend=backend, fullgraph=True)(x.clone()), right)
    assert "setitem" in reasons[0] or "copy_" in reasons[0]
