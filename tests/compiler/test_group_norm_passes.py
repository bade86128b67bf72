"""Fusion of group norms: what is replaced, what is not, and that the results stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from denoisers import made
from torch import Tensor, nn

from fastdiff import compiler, ops

silu = nn.functional.silu


class Block(nn.Module):
    """A residual block as diffusers writes it."""

    def __init__(self, channels: int, into: int, scale: float = 1.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, into)
        self.conv1 = nn.Conv2d(channels, into, 3, padding=1)
        self.conv2 = nn.Conv2d(into, into, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, into, 1) if channels != into else nn.Identity()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return (self.shortcut(x) + h) / self.scale


class Model(nn.Module):
    """A forward of its own over blocks and norms."""

    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.body = forward

    def forward(self, sample: Tensor) -> Any:
        return self.body(self, sample)


def run(forward: Any, **parts: nn.Module) -> dict[str, int]:
    """What was fused, after comparing the results."""
    torch.manual_seed(0)
    model = Model(forward, **parts).eval().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    sample = torch.randn(2, 8, 6, 6)
    expected = model(sample)
    compiler.compile(model)
    result = model(sample)
    for mine, theirs in zip(
        torch.utils._pytree.tree_leaves(result),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    report = compiler.report(model)
    assert not report.eager
    (graph,) = report.graphs
    assert graph.unfused["group_norm"] == 0
    return {name: count for name, count in graph.fused.items() if count}


def test_a_blocks_end_is_joined_with_the_next_ones_beginning() -> None:
    """The second block reads the first one's sum in its norm and in its own addition."""
    fused = run(lambda m, x: m.b(m.a(x)), a=Block(8, 8), b=Block(8, 8))
    assert fused == {"add_group_norm_silu": 1, "group_norm_silu": 3}


def test_a_sum_that_is_scaled_is_not() -> None:
    fused = run(lambda m, x: m.b(m.a(x)), a=Block(8, 8, 2.0), b=Block(8, 8))
    assert fused == {"group_norm_silu": 4}


def test_the_shortcut_of_the_next_block_reads_the_sum() -> None:
    """A user that comes after the norm, and one before it."""
    fused = run(lambda m, x: m.b(m.a(x)), a=Block(8, 8), b=Block(8, 12))
    assert fused == {"add_group_norm_silu": 1, "group_norm_silu": 3}

    def early(m: Any, x: Tensor) -> Tensor:
        total = x + m.conv(x)
        other = total * 2
        return m.norm(total) + other + total

    parts = {"norm": nn.GroupNorm(2, 8, affine=False), "conv": nn.Conv2d(8, 8, 1)}
    assert run(early, **parts) == {"add_group_norm_silu": 1}


def test_two_norms_of_one_sum() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        total = x + m.conv(x)
        return m.first(total) - silu(m.second(total))

    parts = {"first": nn.GroupNorm(2, 8), "second": nn.GroupNorm(4, 8), "conv": nn.Conv2d(8, 8, 1)}
    assert run(forward, **parts) == {"add_group_norm_silu": 1, "group_norm_silu": 1}


def test_norms_that_the_model_calls_as_ops() -> None:
    """As fastdiff's own models do; not where the op does more than to normalise the sum."""
    norm = ops.group_norm_silu

    def forward(m: Any, x: Tensor) -> Any:
        total = x + m.conv(x)
        second = norm(total * 2, num_groups=2, activation="none")
        third = norm(x=total + second, num_groups=4, eps=1e-3, activation="none")
        added = norm(total - x, 2, add=total.mean((2, 3)))
        return norm(total, 4, m.norm.weight, m.norm.bias), second, third, added, total

    parts = {"norm": nn.GroupNorm(4, 8), "conv": nn.Conv2d(8, 8, 1)}
    assert run(forward, **parts) == {"add_group_norm_silu": 2}

    def more(m: Any, x: Tensor) -> Any:
        total, row = x + m.conv(x), x.mean((2, 3))
        given: list[dict[str, Any]] = [{name: row} for name in ("add", "scale", "shift")]
        given += [{"skip": x}, {"impl": "reference"}]
        return [norm(total, 2, **one) for one in given]

    assert run(more, conv=nn.Conv2d(8, 8, 1)) == {}


@pytest.mark.parametrize(
    "add",
    [
        lambda x: torch.add(x, x.flip(1), alpha=2),
        lambda x: x + x.mean((2, 3), keepdim=True),
        lambda x: x + x[:1],
        lambda x: x + 1.5,
    ],
    ids=["alpha", "per channel", "broadcast", "number"],
)
def test_other_additions_are_left_to_the_norm(add: Any) -> None:
    fused = run(lambda m, x: silu(m.norm(add(x))), norm=nn.GroupNorm(4, 8))
    assert fused == {"group_norm_silu": 1}


def test_scale_and_shift_go_before_the_sum() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        total = x + m.conv(x)
        scale, shift = m.linear(x.mean((2, 3)))[:, :, None, None].chunk(2, 1)
        return silu(m.norm(total) * (1 + scale) + shift) + total

    parts = {
        "norm": nn.GroupNorm(4, 8),
        "conv": nn.Conv2d(8, 8, 1),
        "linear": nn.Linear(8, 16),
    }
    assert run(forward, **parts) == {"group_norm_silu": 1}


def joins_and_skips(forward: Any, **parts: nn.Module) -> tuple[int, int]:
    """How many joins the only graph makes, and how many norms have a skip."""
    model = Model(forward, **parts).eval().requires_grad_(False)
    compiler.compile(model)
    model(torch.randn(2, 8, 6, 6))
    (entry,) = model._compiled_call_impl._entries.values()
    nodes = [node for p in entry.runners[0].programs for node in p.module.graph.nodes]
    calls = [node for node in nodes if node.op == "call_function"]
    norms = [n for n in calls if n.target is torch.ops.fastdiff.group_norm_silu.default]
    assert norms
    return sum(n.target is torch.cat for n in calls), sum(n.args[9] is not None for n in norms)


@pytest.mark.parametrize("norms", [1, 2])
@pytest.mark.parametrize("dim", [1, -3])
def test_a_join_that_only_norms_read_is_not_made(norms: int, dim: int) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        joined = torch.cat([m.conv(x), x], dim=dim)
        result = silu(m.a(joined))
        return result + m.b(joined) if norms == 2 else result

    parts = {"a": nn.GroupNorm(3, 12), "b": nn.GroupNorm(4, 12), "conv": nn.Conv2d(8, 4, 1)}
    assert run(forward, **parts) == {"group_norm_silu": norms}
    assert joins_and_skips(forward, **parts) == (0, norms)


@pytest.mark.parametrize("kind", ["shortcut", "three", "channels of one image", "added"])
def test_other_joins_are_made(kind: str) -> None:
    """The 1x1 convolution of an up block's shortcut reads the joined tensor: it must exist."""

    def forward(m: Any, x: Tensor) -> Any:
        h = m.conv(x)
        if kind == "three":
            return silu(m.norm(torch.cat([h, x[:, :4], x[:, 4:]], 1)))
        if kind == "channels of one image":
            return silu(m.norm(torch.cat([m.wide(x)[:1], m.wide(x)[1:]])))
        joined = torch.cat([h, x], 1)
        if kind == "added":
            return silu(m.norm(joined + joined.mean((2, 3), keepdim=True)))
        return silu(m.norm(joined)) + m.shortcut(joined)

    parts = {
        "norm": nn.GroupNorm(3, 12),
        "conv": nn.Conv2d(8, 4, 1),
        "wide": nn.Conv2d(8, 12, 1),
        "shortcut": nn.Conv2d(12, 12, 1),
    }
    assert run(forward, **parts) == {"group_norm_silu": 1}
    assert joins_and_skips(forward, **parts) == (1, 0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_what_the_passes_find_in_a_unet() -> None:
    """Every block but the first one of a resolution begins with a sum; the up path's joins stay,
    each has a shortcut."""
    pytest.importorskip("diffusers")
    model, inputs = made("unet")
    compiler.compile(model)
    with torch.no_grad():
        model(**inputs(0))
    (graph,) = compiler.report(model).graphs
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert graph.fused["add_group_norm_silu"] == 11
    assert graph.fused["group_norm_silu"] == norms - 11
    assert graph.unfused["group_norm"] == 0
