"""One step, recorded once, replayed for every row of a table: the bits of the eager run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastdiff.solvers import Row, SolverTable, Update, make_table
from fastdiff.solvers.engine import run_reference
from fastdiff.solvers.noise import PhiloxNoise
from fastdiff.solvers.trajectory import IndexedTable

Tensor = torch.Tensor
SEEDS = [5, 2**40 + 1]
GUIDED = 4.5
TABLES = ["dpmpp_2m", "unipc", "euler_ancestral", "ddim", "euler", "pndm", "two feeds"]


def table_of(name: str) -> SolverTable:
    if name == "two feeds":  # a midpoint of its own, kept in the second register
        half = Update(1, (1.0, 0.0), -0.25)
        whole = Update(0, (1.0, 0.0), -0.5, 0.125)
        first = Row(0, 500.0, 1.0, 0.0, 1.0, (half,))
        second = Row(1, 250.5, 0.75, 0.5, 1.0, (whole,), draw=0)
        third = Row(0, 250.0, 0.5, 0.0, 1.0, (half,))
        last = Row(1, 0.0, 1.0, 0.0, 1.0, (whole,), draw=1)
        rows = (first, second, third, last)
        return SolverTable(name, 2, rows, num_draws=2).with_guidance(GUIDED)
    return make_table(name, "scaled_linear", 7).with_guidance(GUIDED)


class Model:
    """Some function of state, time and condition, with the protocol of engine.Evaluate."""

    def __init__(self, table: SolverTable) -> None:
        self.times = table.times

    def both(self, x: Tensor, time: Tensor) -> Tensor:
        """[uncond, cond] of a batch that has both halves."""
        half = x.shape[0] // 2
        sign = torch.tensor([-1.0] * half + [1.0] * half, device=x.device, dtype=x.dtype)
        scale = time.to(x.dtype) / 1000 + 0.5
        return x * 0.25 * scale.reshape(-1, 1, 1, 1) + sign.reshape(-1, 1, 1, 1) * 0.125

    def __call__(self, x: Tensor, row: int, /) -> Tensor:
        return self.both(x, torch.full((x.shape[0],), self.times[row], device=x.device))

    def accept(self, output: Tensor, /) -> Tensor:
        return output


def initial(table: SolverTable) -> Tensor:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    return x * table.init_scale


def eager(table: SolverTable, x: Tensor) -> Tensor:
    noise = PhiloxNoise(x.shape, SEEDS, state_dtype=x.dtype, device=x.device)
    return run_reference(table, x, Model(table), dtype=x.dtype, copies=2, noise=noise)


def one_step(table: SolverTable, steps: IndexedTable, seeds: Tensor) -> Callable[..., Tensor]:
    model = Model(table)

    def step(registers: Tensor, index: Tensor) -> Tensor:
        x = steps.model_input(registers, index, registers.dtype)
        output = model.both(torch.cat([x, x]), steps.time(index, 2 * len(x)))
        uncond, cond = output.chunk(2)
        steps.step(registers, cond, index, uncond=uncond, seeds=seeds)
        return index

    return step


@pytest.mark.parametrize("name", TABLES)
def test_a_recorded_step_replays_every_row(name: str) -> None:
    table = table_of(name)
    x = initial(table)
    steps = IndexedTable.of(table, "cpu")
    assert (steps.feeds is not None) == (name == "two feeds")
    registers, index = steps.begin(x)
    recorded = make_fx(one_step(table, steps, torch.tensor(SEEDS)))(registers, index)
    recorded.recompile()
    targets = [str(node.target) for node in recorded.graph.nodes]
    assert targets.count("fastdiff.solver_step_indexed_.default") == 1
    assert not any("_local_scalar_dense" in target for target in targets)
    for _ in range(2):  # a second run begins over the registers of the first
        registers[0].copy_(x)
        index.zero_()
        for row in range(len(table)):
            assert int(index) == row
            recorded(registers, index)
        assert torch.equal(registers[0], eager(table, x))


@pytest.mark.parametrize("name", TABLES)
def test_a_compiled_step_serves_every_row(name: str) -> None:
    torch._dynamo.reset()
    table = table_of(name)
    x = initial(table)
    steps = IndexedTable.of(table, "cpu")
    registers, index = steps.begin(x)
    function = one_step(table, steps, torch.tensor(SEEDS))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for _ in range(len(table)):
        compiled(registers, index)
    assert torch.equal(registers[0], eager(table, x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", TABLES)
def test_a_cuda_graph_of_one_step_replays_every_row(name: str) -> None:
    table = table_of(name)
    x = initial(table).cuda()
    steps = IndexedTable.of(table, x.device)
    registers, index = steps.begin(x)
    step = one_step(table, steps, torch.tensor(SEEDS, device="cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(registers, index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(registers, index)
    registers[0].copy_(x)
    index.zero_()
    for _ in range(len(table)):
        graph.replay()
    assert torch.equal(registers[0], eager(table, x))


def test_errors() -> None:
    ruled = make_table("pc", "ve", 3)
    with pytest.raises(ValueError, match="table must have no rules here"):
        IndexedTable.of(ruled, "cpu")
    table = make_table("ddpm", "scaled_linear", 3)
    steps = IndexedTable.of(table, "cpu")
    registers, index = steps.begin(initial(table))
    with pytest.raises(ValueError, match="noise or seeds must be given"):
        steps.step(registers, registers[0], index)
    assert int(index) == 0
