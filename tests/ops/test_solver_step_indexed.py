"""The step whose row is on the device: solver_step's bits for every row, and nothing read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from indexed import ROWS, blank_unread, expected, random_table, run, wrong
from rows import same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff.ops.solver_step_indexed import (
    OP,
    pattern,
    reference,
    solver_step_indexed,
    solver_step_indexed_,
)

Tensor = torch.Tensor
CASES = 40


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_row_has_the_bits_of_solver_step(impl: str) -> None:
    """Out of place and in place; what the row does not read holds NaN."""
    assert wrong(range(CASES), impl) == []


@pytest.mark.interpret
@pytest.mark.slow
def test_triton_in_the_interpreter(fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from indexed import wrong; "
        "print(wrong(range(8), 'triton'))"
    )
    printed = fresh_python("-c", program, str(Path(__file__).parent), TRITON_INTERPRET="1")
    assert printed.strip() == "[]"


@pytest.mark.gpu
def test_on_the_gpu() -> None:
    assert wrong(range(CASES), "triton", "cuda") == []


def test_nothing_is_read_back() -> None:
    """A fake tensor has no numbers: whoever wants to look at one raises."""
    arguments, _ = random_table(4)
    registers = arguments.pop("registers")
    with FakeTensorMode() as mode:
        given = {name: mode.from_tensor(value) for name, value in arguments.items()}
        held = mode.from_tensor(registers)
        index = mode.from_tensor(torch.tensor(1))
        history = held[1:] if len(held) > 1 else None
        for function in (solver_step_indexed, reference, pattern):
            result = function(held[0], index=index, history=history, **given)
            assert result.shape == registers.shape
        solver_step_indexed_(held, index=index, **given)


def test_registers_that_are_apart_are_stepped_in_place() -> None:
    arguments, feeds = random_table(1)
    registers = arguments["registers"]
    wide = torch.zeros((2 * len(registers), *registers.shape[1:]), dtype=registers.dtype)
    wide[::2] = registers
    given = {**arguments, "registers": wide[::2]}
    index = torch.tensor(1)
    solver_step_indexed_(given.pop("registers"), index=index, **given)
    assert same_bits(list(wide[::2]), expected(arguments, feeds, 1)[:-1])
    assert not wide[1::2].any()


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_noise_that_is_missing_is_nan_where_it_is_added(impl: str) -> None:
    rows = torch.tensor([[[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]], [[0.0, 1.0, 1.0], [1.0, 1.0, 0.5]]])
    x = torch.ones(2, 3)
    assert torch.equal(
        solver_step_indexed(x, x, rows, torch.tensor(0), impl=impl), torch.full((1, 2, 3), 2.0)
    )
    assert solver_step_indexed(x, x, rows, torch.tensor(1), impl=impl).isnan().all()


def test_no_gradient_comes_from_what_is_not_read() -> None:
    arguments, _ = random_table(6)
    arguments = blank_unread(arguments, 0)
    registers = arguments.pop("registers").requires_grad_()
    rows = arguments.pop("rows").requires_grad_()
    result = solver_step_indexed(
        registers[0],
        arguments.pop("output"),
        rows,
        torch.tensor(0),
        history=registers[1:],
        **arguments,
    )
    result.sum().backward()
    assert registers.grad is not None
    assert rows.grad is not None
    assert registers.grad.isfinite().all()
    assert rows.grad.isfinite().all()
    assert not rows.grad[1:].any()


def test_the_index_is_left_as_it_is() -> None:
    arguments, _ = random_table(2)
    index = torch.tensor(1, dtype=torch.int32)
    solver_step_indexed_(arguments.pop("registers"), index=index, **arguments)
    assert int(index) == 1


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"state": torch.zeros(2, 3).half()}, TypeError, "state must be float32 or float64"),
        ({"state": torch.zeros(())}, ValueError, r"state must have shape \[B, ...\]"),
        ({"output": torch.zeros(2, 3).long()}, TypeError, "output must be float32"),
        ({"output": torch.zeros(2, 4)}, ValueError, r"output must have shape \(2, 3\), got"),
        ({"rows": torch.zeros(3, 3, 4).half()}, TypeError, "rows must be float32 or float64"),
        ({"rows": torch.zeros(3, 3, 5)}, ValueError, r"rows must have shape \[N, 1 \+ R, R \+ 2"),
        ({"rows": torch.zeros(0, 3, 4)}, ValueError, "rows must have shape"),
        ({"rows": torch.zeros(3, 10, 11)}, ValueError, "for 1..8 registers"),
        ({"index": torch.tensor(1.0)}, TypeError, "index must be torch.int32 or torch.int64"),
        ({"index": torch.tensor([1])}, ValueError, r"index must have shape \(\), got \(1,\)"),
        ({"history": None}, ValueError, "history must be given for 2 registers"),
        ({"history": torch.zeros(2, 2, 3)}, ValueError, r"history must have shape \(1, 2, 3\)"),
        ({"uncond": torch.zeros(2, 3).half()}, TypeError, "uncond must be torch.float32"),
        ({"noise": torch.zeros(2, 3).double()}, TypeError, "noise must be torch.float32"),
        ({"seeds": torch.zeros(2).long()}, ValueError, "seeds must be None when noise is given"),
        ({"noise": None, "seeds": torch.zeros(2).long()}, ValueError, "given together"),
        ({"seeds": torch.zeros(3).long()}, ValueError, r"seeds must have shape \(2,\)"),
        ({"draws": torch.zeros(2).long()}, ValueError, r"draws must have shape \(3,\)"),
        ({"impl": "fast"}, ValueError, "impl must be"),
    ],
)
def test_bad_arguments(edit: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "state": torch.zeros(2, 3),
        "output": torch.zeros(2, 3),
        "rows": torch.zeros(3, 3, 4),
        "index": torch.tensor(0),
        "history": torch.zeros(1, 2, 3),
        "noise": torch.zeros(2, 3),
    }
    with pytest.raises(error, match=message):
        solver_step_indexed(**{**arguments, **edit})


def test_most_random_rows_reach_the_kernel_of_the_cpu() -> None:
    """Else the test above compares the reference with itself."""
    if OP.why_not("cpp", *OP.samples[0].make("cpu", torch.float32).args, **OP.samples[0].make(
        "cpu", torch.float32).kwargs):  # fmt: skip
        pytest.skip("needs the extension")
    ran = 0
    for number in range(CASES):
        arguments, _ = random_table(number)
        for at in range(ROWS):
            try:
                run(arguments, at, "cpp")
                ran += 1
            except RuntimeError as error:
                assert "cannot run" in str(error)  # noqa: PT017
    assert ran > CASES
