"""What a run allocates: the registers its table names, before the first step, and nothing after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdiff
from fastdiff import solvers
from fastdiff._ext import ext

SHAPE = (2, 4, 32, 32)
needs_cpp = pytest.mark.skipif(ext() is None, reason="needs the C++ loop")


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations make, and when: ``marks`` of the total."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.marks: list[int] = []
        self._kept: list[Tensor] = []  # so that no address comes twice
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._known.add(value.untyped_storage().data_ptr())
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self._known.add(storage.data_ptr())
                    self.total += storage.nbytes()
                    self._kept.append(value)
        return result

    def mark(self, *_: Any) -> None:
        self.marks.append(self.total)


def small(table: solvers.SolverTable) -> int:
    """Bytes of the times, one int64 or float per row and image, with their intermediate copies."""
    return 8 * len(table) * (3 * SHAPE[0] + 4) + 64


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddim", {}),
        ("dpmpp_2m", {}),
        ("dpmpp_3m", {}),
        ("dpmpp_3m_sde", {}),
        ("unipc", {"order": 3}),
        ("deis", {"order": 3}),
        ("pndm", {}),
        ("heun", {}),
        ("dpmpp_3s", {}),
    ],
)
@pytest.mark.parametrize("given", [True, False], ids=["x given", "noise drawn"])
def test_a_run_allocates_its_registers_before_the_first_step(solver, options, dtype, given):
    table = solvers.make_table(solver, "scaled_linear", 12, **options)
    output = torch.zeros(SHAPE, dtype=dtype)
    start = {"x": torch.ones(SHAPE, dtype=dtype)} if given else {"shape": SHAPE}
    allocations = Allocations()

    def model(x: Tensor, t: Tensor) -> Tensor:
        allocations.mark()
        return output

    with allocations:
        result = fastdiff.sample(model, solver=table, seed=0, dtype=dtype, **start)
    assert result.shape == SHAPE
    registers = table.nbytes(SHAPE, dtype)
    assert registers == table.num_registers * output.nbytes
    drawn = 0 if given else output.nbytes  # float32 noise, before it is widened or scaled
    assert registers <= allocations.total <= registers + drawn + small(table)
    # Not a byte between the first evaluation and the result.
    assert allocations.marks == [allocations.total] * table.evaluations


@needs_cpp
def test_half_precision_adds_the_models_input():
    table = solvers.make_table("dpmpp_2m", "scaled_linear", 12)
    output, x = (torch.zeros(SHAPE, dtype=torch.bfloat16) for _ in range(2))
    allocations = Allocations()

    def model(x: Tensor, t: Tensor) -> Tensor:
        allocations.mark()
        return output

    with allocations:
        fastdiff.sample(model, x=x, solver=table, seed=0)
    # The registers in float32, the first of them x widened, and the input; the result in the end.
    size = x.nbytes
    assert allocations.marks[0] <= 2 * table.num_registers * size + size + small(table)
    assert set(allocations.marks) == {allocations.marks[0]}
    assert allocations.total == allocations.marks[0] + size


def test_the_table_prints_what_it_costs():
    table = solvers.make_table("unipc", "scaled_linear", 12, order=3)
    bytes_each = 4 * table.num_registers
    assert f"{bytes_each} bytes for each element of the state" in str(table)
    assert table.nbytes((1, 4, 64, 64)) == bytes_each * 4 * 64 * 64
