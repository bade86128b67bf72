"""Steps one at a time: the row as known to the host, and the row picked on the device."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fastdiff.ops import solver_step_indexed
from fastdiff.solvers import SOLVERS, SolverTable, make_table
from fastdiff.solvers.stepper import Stepper, TracedStepper

OPTIONS = [
    (name, schedule)
    for name in SOLVERS
    for schedule in ("scaled_linear", "edm", "flow")
    if schedule == "scaled_linear" or name not in ("ddpm", "lcm", "pndm")
]


def table_of(name: str, schedule: str, steps: int) -> SolverTable:
    kind = {"scaled_linear": "eps", "edm": "x0", "flow": "flow"}[schedule]
    try:
        return make_table(name, schedule, steps, prediction=kind)
    except (ValueError, TypeError) as error:
        pytest.skip(str(error))


def run(
    table: SolverTable, stepper: Stepper | TracedStepper, x: torch.Tensor, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(4)
    prediction = x
    for index in range(first, first + len(table)):
        noise = torch.randn(x.shape, generator=random, dtype=x.dtype)
        output = torch.tanh(x)
        if isinstance(stepper, Stepper):
            noise_here = noise if stepper.draws(index) else None
            x, prediction = stepper.step(index, x, output, noise_here)
        else:
            x, prediction = stepper.step(x, output, noise if stepper.draws else None)
    return x, prediction


def counter(first: int = 0) -> torch.Tensor:
    return torch.tensor(first)


@pytest.mark.parametrize(("name", "schedule"), OPTIONS)
def test_the_traced_step_is_the_step(name, schedule):
    table = table_of(name, schedule, 7)
    if any(row.feed or row.rule for row in table.rows):
        with pytest.raises(ValueError, match="table must"):
            TracedStepper(table, 0, counter())
        return
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traced = TracedStepper(table, 0, counter())
    traced.reserve(x.shape, x.dtype)
    for mine, theirs in zip(run(table, traced, x), run(table, Stepper(table), x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_another_table_goes_into_the_same_tensors():
    tables = [make_table("dpmpp_3m", "scaled_linear", steps) for steps in (6, 63, 6)]
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    at = counter(2)
    traced = TracedStepper(tables[0], 2, at)
    traced.reserve(x.shape, x.dtype)
    held = [traced._rows, *traced.registers[tuple(x.shape)]]
    addresses = [tensor.data_ptr() for tensor in held]
    for table, first in zip(tables, (2, 0, 5), strict=True):
        at.fill_(first)
        for register in traced.registers[tuple(x.shape)]:
            register.fill_(torch.nan)  # whatever the run before left there
        traced.load(table, first)
        mine, _ = run(table, traced, x, first)
        theirs, _ = run(table, Stepper(table, first), x, first)
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        now = [traced._rows, *traced.registers[tuple(x.shape)]]
        assert [tensor.data_ptr() for tensor in now] == addresses


def test_a_short_run_with_less_history_keeps_the_program():
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    long, short = (make_table("lms", "scaled_linear", steps) for steps in (8, 2))
    assert short.num_registers < long.num_registers
    traced = TracedStepper(long, 0, counter())
    traced.reserve(x.shape, x.dtype)
    traced.load(short)
    mine, _ = run(short, traced, x)
    theirs, _ = run(short, Stepper(short), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_rows_outside_the_table_are_nan():
    x = torch.ones(2, 2)
    table = make_table("ddim", "scaled_linear", 3)
    for first, at in ((2, 0), (2, 1), (0, 3), (0, 1000)):
        traced = TracedStepper(table, first, counter(at))
        assert traced.step(x, x)[0].isnan().all()


def test_a_captured_graph_that_is_out_of_date_is_warned_of(monkeypatch):
    monkeypatch.setattr("fastdiff.solvers.stepper._CAPACITY", 64)
    traced = TracedStepper(make_table("ddim", "scaled_linear", 20), 0, counter())
    traced.captured = True
    traced.load(make_table("ddim", "scaled_linear", 50))
    with pytest.warns(UserWarning, match="capture it again"):
        traced.load(make_table("ddim", "scaled_linear", 100))


def test_errors():
    x = torch.ones(2, 2)
    table = make_table("ddim", "scaled_linear", 3)
    traced = TracedStepper(table, 0, counter())
    with pytest.raises(ValueError, match="output must have the sample's shape"):
        traced.step(x, x[:1])


def test_a_recorded_traced_step_is_one_op():
    """And the registers' copies: nothing else touches a state."""
    table = make_table("dpmpp_3m", "scaled_linear", 8)
    traced = TracedStepper(table, 0, counter())
    x = torch.randn(2, 3, 4)
    traced.reserve(x.shape, x.dtype)
    graph = make_fx(lambda sample, output: traced.step(sample, output))(x, x).graph
    computed = [
        str(node.target)
        for node in graph.nodes
        if node.op == "call_function" and getattr(node.meta["val"], "shape", ())[-3:] == x.shape
    ]
    assert computed.count("fastdiff.solver_step_indexed.default") == 1
    assert computed.count("aten.copy_.default") == table.num_registers - 1
    assert set(computed) <= {
        *("fastdiff.solver_step_indexed.default", "aten.copy_.default"),
        *("_operator.getitem", "<built-in function getitem>", "aten.select.int"),
    }


@pytest.mark.parametrize("name", ["dpmpp_3m", "ddpm"])
def test_a_warm_up_runs_the_kernel_and_changes_nothing(name, monkeypatch):
    table = make_table(name, "scaled_linear", 8)
    traced, plain = (TracedStepper(table, 0, counter()) for _ in range(2))
    x = torch.randn(2, 3, 4)
    calls = []

    def counted(*args, **kwargs):
        calls.append((args[1].dtype, kwargs["noise"] is not None))
        return solver_step_indexed(*args, **kwargs)

    monkeypatch.setattr("fastdiff.solvers.stepper.solver_step_indexed", counted)
    for _ in range(2):
        traced.warm_up(x.shape, x.dtype, torch.bfloat16)
    assert calls == [(torch.bfloat16, name == "ddpm")]
    assert int(traced.counter) == 0
    plain.reserve(x.shape, x.dtype)
    for mine, theirs in zip(run(table, traced, x), run(table, plain, x), strict=True):
        assert torch.equal(mine, theirs)
