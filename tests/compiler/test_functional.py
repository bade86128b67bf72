"""In-place operations in a captured graph, and models that cannot be captured whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import check as check_fused
from fusing import random
from torch import Tensor, fx, nn

from fastdiff import compiler
from fastdiff.compiler.functional import functionalise, interleaved

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
B, N, C, H = 2, 5, 16, 4
Function = Callable[[Tensor, Tensor], Any]


def sign_of_a_power(x: Tensor, t: Tensor) -> Tensor:
    # PyTorch prints a graph as Python without parentheses: -1 ** x.
    return x * ((-1) ** torch.arange(4))


def method(x: Tensor, t: Tensor) -> Tensor:
    y = x + 1
    y.mul_(t).clamp_(min=0)
    return y


def items_of_zeros(x: Tensor, t: Tensor) -> Tensor:
    y = torch.zeros(2, 6, 4)
    y[:, 2:4] = x[:, :2] * t
    y[:, 0] = 1
    return y + x


def rotary(x: Tensor, t: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 0::2] * t - x[..., 1::2]
    y[..., 1::2] = x[..., 1::2] * t + x[..., 0::2]
    return y.type_as(x)


def rotary_in_double(x: Tensor, t: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[..., 1::2] = x[..., 1::2].double() * t
    y[..., 0::2] = x[..., 0::2].double() * t
    return y


def copied_through_data(x: Tensor, t: Tensor) -> Tensor:
    y = x.new_zeros(2, 8, 4)
    y.data[:, :6].copy_(x)
    return y * t


def a_view_written_twice(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    z = y[:, 1:3]
    z *= t
    z.add_(1)
    return y, z


def transposed(x: Tensor, t: Tensor) -> Tensor:
    y = x * 2
    y.transpose(1, 2)[:, 0].fill_(3.0)
    return y


def through_a_reshape(x: Tensor, t: Tensor) -> Tensor:
    y = torch.ones(2, 6, 4) * t
    y.view(12, 4)[3] = x[0, 0]
    return y


def masked(x: Tensor, t: Tensor) -> Tensor:
    y = x.exp()
    y.masked_fill_(x > 0, 0.0)
    return y


def a_chunk(x: Tensor, t: Tensor) -> Tensor:
    a, b = (x * 2).chunk(2, 1)
    a += b
    return a


def an_activation(x: Tensor, t: Tensor) -> Tensor:
    y = x * 2
    return nn.functional.silu(y, inplace=True) + y


def constants_of_the_time(x: Tensor, t: Tensor) -> Tensor:
    # What is written must not be what is kept for the next step.
    y = torch.zeros(3)
    y[0] = t
    y[1:] = t * x.mean()
    return x * y.sum()


def logic(x: Tensor, t: Tensor) -> Tensor:
    return x * ((x > 0) & (x < 1) | (x < -1))


def a_view_read_before_and_after(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    rows = y.view(12, 4)
    total = rows.sum()
    rows[0] = t
    return y + total, rows.mean(0)


def a_base_written_with_a_view_unread(x: Tensor, t: Tensor) -> Tensor:
    y = x * 2
    first = y[0]
    z = first + 1
    y[0] = t
    return y + z


REWRITTEN = [
    sign_of_a_power, method, items_of_zeros, rotary, rotary_in_double, copied_through_data,
    a_view_written_twice, transposed, through_a_reshape, masked, a_chunk, an_activation,
    constants_of_the_time, logic, a_view_read_before_and_after,
    a_base_written_with_a_view_unread,
]  # fmt: skip


def on_an_input(x: Tensor, t: Tensor) -> Tensor:
    x[:, 0] = t
    return x + 1


def two_overlapping_views(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    a, b = y[:, :2], y[:, 1:]
    a.mul_(3)
    return a, b


def a_base_written_with_a_view_read(x: Tensor, t: Tensor) -> Tensor:
    y = x * 2
    rows = y.view(-1)[3:]
    y[0] = t
    return rows + 1


LEFT = {
    a_base_written_with_a_view_read: "setitem on memory with another name",
    on_an_input: "setitem on an input",
    two_overlapping_views: "mul_ on memory with another name",
}


def model_of(function: Function) -> nn.Module:
    class Model(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            return function(sample, timestep)

    return Model().eval()


def check(function: Function, model: nn.Module, exact: bool = True) -> None:
    """Three steps equal the function, inputs included."""
    leaves = torch.utils._pytree.tree_leaves
    with torch.no_grad():
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 6, 4, generator=generator)
            t = torch.rand((), generator=generator)
            mine, own = x.clone(), x.clone()
            results, expected = leaves(model(mine, t)), leaves(function(own, t))
            for result, other in zip(results, expected, strict=True):
                if exact:
                    assert torch.equal(result, other)
                torch.testing.assert_close(result, other)
            assert torch.equal(mine, own)


@pytest.mark.parametrize("function", REWRITTEN)
def test_writes_become_values(function):
    model = model_of(function)
    compiler.compile(model)
    check(function, model)
    (graph,) = compiler.report(model).graphs
    assert graph.why_whole == ""


@pytest.mark.parametrize("function", LEFT)
def test_writes_that_somebody_else_sees_stay(function):
    model = model_of(function)
    compiler.compile(model)
    check(function, model)
    (graph,) = compiler.report(model).graphs
    assert graph.why_whole == LEFT[function]


def test_a_rotary_embedding_takes_one_pass():
    model = model_of(rotary)
    compiler.compile(model)
    check(rotary, model)
    (entry,) = model._compiled_call_impl._entries.values()
    targets = [node.target for node in entry.runners[0].step.module.graph.nodes]
    assert interleaved in targets
    assert not any(getattr(target, "__name__", "") == "with_item" for target in targets)


class Branches(nn.Module):
    """A denoiser whose code asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        self.out = nn.Conv1d(6, 6, 1)
        self.register_buffer("table", torch.randn(6, 1))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(sample)) * self.table.exp()
        if bool(x.sum() > 0):
            x = x + timestep
        return self.out(x) if bool(x.mean() > -1e9) else x


def test_a_model_that_asks_for_values_is_captured_in_pieces():
    torch.manual_seed(0)
    model = Branches().eval().requires_grad_(False)
    compiler.compile(model)
    check(model._call_impl, model, exact=False)
    model.table.mul_(2)
    model.out.weight.data = model.out.weight.data * 2
    check(model._call_impl, model, exact=False)
    report = compiler.report(model)
    assert len(report.graphs) > 1
    assert all(graph.why_piece for graph in report.graphs)
    assert sum(graph.fused["group_norm_silu"] for graph in report.graphs) == 1
    assert f"a piece of the model: {report.graphs[0].why_piece}" in str(report)
    assert not report.eager


def test_what_cannot_be_captured_at_all_runs_as_it_is():
    from torch.nn.attention.flex_attention import flex_attention

    def function(x: Tensor, t: Tensor) -> Tensor:
        q = torch.stack([x] * 4, -1).transpose(1, 2)
        return flex_attention(q, q, q) * t

    model = model_of(function)
    compiler.compile(model)
    x, t = torch.randn(2, 16, 16), torch.rand(())
    with torch.no_grad(), pytest.warns(UserWarning, match="flex_attention"):
        torch.testing.assert_close(model(x, t), function(x, t))
    (reason,) = compiler.report(model).eager
    assert reason == (
        "it cannot be captured: NotImplementedError: flex_attention is a higher-order operator"
    )


def test_errors_of_the_model_are_the_models():
    model = Branches().eval()
    compiler.compile(model)
    with torch.no_grad():
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"(?i)channels|divisible|size"):
                model(torch.randn(2, 5, 4), torch.rand(()))
        x, t = torch.randn(2, 6, 4), torch.rand(())
        torch.testing.assert_close(model(x, t), model._call_impl(x, t))


def test_items_that_are_set_do_not_stop_fusion():
    def function(x, y, gate):
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2] * 2
        out[..., 1::2] = x[..., 0::2] - 1
        return out.type_as(x) + gate[:, None] * y, x

    args = random(B, N, C), random(B, N, C) + 1, random(B, C)
    assert check_fused(function, *args, exact=True) == {"gate_residual": 1}


def test_items_that_are_copied_to_are_set():
    """CogVideoX puts the positions of the text's tokens before those of the video's."""

    def function(x, y, gate):
        table = x.new_zeros(B, N + 3, C)
        table.data[:, 3:].copy_(x)
        return table, table[:, :N] + gate[:, None] * y

    args = random(B, N, C), random(B, N, C) + 1, random(B, C)
    assert check_fused(function, *args, exact=True) == {"gate_residual": 1}


def test_items_of_heads_are_set_without_a_trace():
    """CogView4 rotates a part of the queries, which are views of a projection."""

    def function(x, weight):
        q = F.linear(x, weight).unflatten(2, (H, -1)).transpose(1, 2)
        q[:, :, 2:] = q[:, :, 2:] * 2
        q += 1
        return q.transpose(1, 2).flatten(2).chunk(2, dim=-1)[0], q

    args = random(B, N, C), random(C, C)
    assert check_fused(function, *args, exact=True) == {}


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
def test_writes_that_something_else_sees(function):
    def backend(module: fx.GraphModule, _: list[Any]) -> Any:
        functionalise(module.graph)
        module.recompile()
        return module.forward

    x = random(N, C)
    right = function(x.clone())
    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, backend=backend, fullgraph=True)(x.clone()), right)
