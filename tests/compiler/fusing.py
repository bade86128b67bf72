"""Capturing and fusing one function: what the tests of the passes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fastdiff.compiler.functional import functionalise
from fastdiff.compiler.passes import PASSES
from fastdiff.compiler.tidy import tidy
from fastdiff.testing import assert_within_2x


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def capture(function: Callable[..., Any], *args: Tensor) -> tuple[dict[str, int], Any, fx.Graph]:
    """(matches by pass, results, the graph) of a function, fused."""
    found: dict[str, int] = {}
    graphs: list[fx.Graph] = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Any:
        graph = module.graph
        assert functionalise(graph) == ""
        tidy(graph)
        for name, fuse in PASSES.items():
            found[name] = fuse(graph)
            graph.eliminate_dead_code()
        graph.lint()
        module.recompile()
        graphs.append(graph)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*args)
    return {name: count for name, count in found.items() if count}, result, graphs[0]


def check(function: Callable[..., Any], *args: Tensor, exact: bool = False) -> dict[str, int]:
    """The matches, after a comparison with the function itself."""
    found, mine, _ = capture(function, *args)
    wide = [a.double() if a.is_floating_point() else a for a in args]
    leaves = torch.utils._pytree.tree_leaves
    results = leaves(mine), leaves(function(*wide)), leaves(function(*args))
    for result, oracle, eager in zip(*results, strict=True):
        assert_within_2x(result, oracle, eager)
        if exact:
            assert torch.equal(result, eager)
    return found
