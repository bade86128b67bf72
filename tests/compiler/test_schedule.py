"""The schedule's results for all steps of a run at once, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorders import Again
from torch import Tensor
from trajectories import Tiny, draw, prepared, tiny

from fastdiff import compiler
from fastdiff.solvers import make_table


@pytest.fixture
def recorder() -> Again:
    return Again()


def counted(model: Any) -> dict[str, int]:
    """Program -> how often it has run since, in the graph that was captured last."""
    entry = next(reversed(model._compiled_call_impl._entries.values()))
    runs: dict[str, int] = {}

    def wrapped(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def go(*values: Any) -> Any:
            runs[name] = runs.get(name, 0) + 1
            return run(*values)

        return go

    (runner,) = entry.runners
    for kept in runner.kept:
        kept.run = wrapped(kept.program.name, kept.run)
        runner.plain[kept.program.name] = kept.run
    for graph in entry.graphs:
        graph.schedule.why_not = ""
    return runs


def test_on_a_cpu_the_schedule_runs_before_the_steps():
    model = compiler.compile(tiny())
    torch.testing.assert_close(draw(model, steps=7), draw(tiny(), steps=7))
    runs = counted(model)
    torch.testing.assert_close(draw(model, steps=9), draw(tiny(), steps=9))
    before, after = (make_table("dpmpp_2m", "scaled_linear", n).times for n in (7, 9))
    new = len({*after} - {*before})
    # The new ones together, and each alone to compare; with the same times nothing runs.
    assert runs["schedule"] == runs["both"] == 1 + new
    draw(model, steps=9, seed=5)
    assert runs["schedule"] == runs["both"] == 1 + new
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    draw(model, steps=9)
    # All nine are new, which is another number: compared once more.
    assert runs["schedule"] == runs["both"] == 1 + new + 1 + 9


def test_a_batch_written_into_the_model_falls_back(recorder):
    model = compiler.compile(tiny(fixed=4))
    torch.testing.assert_close(draw(model), draw(tiny(fixed=4)))
    (graph,) = compiler.report(model).graphs
    assert "must match the size of tensor b (4)" in graph.schedule["why_not"]
    assert f"alone: {graph.schedule['why_not']}" in str(compiler.report(model))
    model._compiled_call_impl.pool.recorder = recorder
    assert torch.equal(draw(model, engine="graph"), draw(model, engine="reference"))
    (graph,) = compiler.report(model).graphs
    assert graph.schedule["together"] == 0
    assert graph.schedule["alone"] >= 6


class Mixed(Tiny):
    """Its rows depend on each other, with the same shapes for every number of them."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t + 100 * t.float().var(), y)


def test_rows_that_depend_on_each_other_fall_back(recorder):
    torch.manual_seed(0)
    model = Mixed().eval()
    right = draw(model)
    prepared(recorder, model)
    torch.testing.assert_close(draw(model, engine="graph"), right)
    (graph,) = compiler.report(model).graphs
    assert graph.schedule["why_not"] == "ValueError: its rows depend on each other"
