"""One row of a table at a time, for a caller who owns the loop and the state.

:class:`Stepper` knows which row it runs. :class:`TracedStepper` runs the same program for every
row, which is what compilers and CUDA graphs need.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff._ext import DTYPE_CODES, ext
from fastdiff.ops.solver_step_indexed import results, solver_step_indexed
from fastdiff.solvers.engine import native_table, state_dtype, step_reference
from fastdiff.solvers.table import SolverTable, Update
from fastdiff.solvers.trajectory import dense_rows, rows_dtype


def _functional(table: SolverTable) -> SolverTable:
    """The same rows with the new state in register R and the prediction in register R + 1."""
    count = table.num_registers
    rows = []
    for row in table.rows:
        updates = [
            Update(
                count if update.dest == 0 else update.dest,
                (*update.from_registers, 0.0, 0.0),
                update.from_prediction,
                update.from_noise,
            )
            for update in row.updates
        ]
        updates.append(Update(count + 1, (0.0,) * (count + 2), 1.0))
        rows.append(dataclasses.replace(row, updates=tuple(updates)))
    return dataclasses.replace(table, num_registers=count + 2, rows=tuple(rows))


def _check_rows(table: SolverTable) -> None:
    if table.has_rules:
        raise ValueError(f"table must have no rules here, {table.name} has")
    if any(row.feed != 0 for row in table.rows):
        raise ValueError(f"table must feed the model from register 0, got {table.name}")


def kernel_output(output: Tensor, held: torch.dtype) -> Tensor:
    """In ``held`` what the kernels do not take: float64 with other registers, other dtypes."""
    if torch.float64 in (held, output.dtype) or output.dtype not in DTYPE_CODES:
        return output.to(held)
    return output


class Stepper:
    """Runs a table's rows over a state that the caller holds: nothing of it is modified.

    The registers besides the state (earlier predictions) are the stepper's own, float32 or float64.
    first: the number of the table's row 0 in the caller's count.

    Raises ValueError for a table whose model is not fed from the state itself (register 0).
    """

    def __init__(self, table: SolverTable, first: int = 0) -> None:
        _check_rows(table)
        self.table = table
        self.first = first
        self.next = first
        self._wide = _functional(table)
        self._registers: list[Tensor] = []

    def follows(self, index: int) -> bool:
        """Whether row ``index`` can run now: the next one, the first again, any without history."""
        if index in (self.next, self.first):
            return True
        return self.table.num_registers == 1 and index >= self.first

    def draws(self, index: int) -> bool:
        """Whether the row ``index`` (in the caller's count) needs noise."""
        return self.table.rows[index - self.first].draw >= 0

    def step(
        self, index: int, sample: Tensor, output: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the state after row ``index``, the row's prediction), in the registers' dtype.

        sample: the state the model was given, before its input scale. output: the model's, of the
        sample's shape. noise: of the sample's shape, where ``draws(index)``.

        Raises ValueError for an output of another shape.
        """
        if output.shape != sample.shape:
            raise ValueError(
                f"output must have the sample's shape {tuple(sample.shape)}, "
                f"got {tuple(output.shape)}"
            )
        held = state_dtype(sample.dtype)
        state = sample.to(held).contiguous()
        output = kernel_output(output, held).contiguous()
        new, prediction = torch.empty_like(state), torch.empty_like(state)
        if self.table.num_registers > 1 and not self._fits(state):
            extra = self.table.num_registers - 1
            self._registers = [torch.empty_like(state) for _ in range(extra)]
        registers = [state, *self._registers, new, prediction]
        if noise is not None:
            noise = noise.to(state.device, held).contiguous()
        row = index - self.first
        if not self._native(row, registers, output, noise):
            with torch.no_grad():
                step_reference(self._wide.rows[row], registers, output.to(held), noise)
        self.next = index + 1
        return new, prediction

    def _fits(self, state: Tensor) -> bool:
        return len(self._registers) == self.table.num_registers - 1 and all(
            r.shape == state.shape and r.dtype == state.dtype and r.device == state.device
            for r in self._registers
        )

    def _native(
        self, row: int, registers: list[Tensor], output: Tensor, noise: Tensor | None
    ) -> bool:
        """Runs the row in the extension; False where it cannot."""
        module, state = ext(), registers[0]
        on_gpu = state.device.type == "cuda"
        if module is None or not (state.device.type == "cpu" or on_gpu) or not state.numel():
            return False
        if on_gpu and not hasattr(module, "cuda_solver_step"):
            return False
        number = state.numel()
        pointers = [register.data_ptr() for register in registers]
        model_dtype = DTYPE_CODES[output.dtype]
        drawn = 0 if noise is None else noise.data_ptr()
        table = native_table(module, self._wide.pack())
        # table, row, registers, state_dtype, output, uncond, output_dtype, input, input_dtype,
        # copies, noise: by position, which costs a third of the time of names.
        shared: tuple[Any, ...] = (
            *(table, row, pointers, DTYPE_CODES[state.dtype]),
            *(output.data_ptr(), 0, model_dtype, 0, model_dtype, 1, drawn),
        )
        if not on_gpu:  # seeds, images, per_image, threads
            module.solver_step(*shared, [], 1, number, torch.get_num_threads())
            return True
        with torch.cuda.device(state.device):  # seeds, images, per_image, stream
            stream = torch.cuda.current_stream().cuda_stream
            module.cuda_solver_step(*shared, 0, 1, number, stream)
        return True


# More rows than two evaluations of each of 1000 timesteps have: another number of steps needs no
# other tensor, so no other graph.
_CAPACITY = 2048


def capacity(rows: int) -> int:
    """How many rows a tensor for ``rows`` of them has: a power of two, and one more than needed."""
    size = _CAPACITY
    while size <= rows:
        size *= 2
    return size


class TracedStepper:
    """A table's rows as tensors: one step is the same torch operations whichever row it is.

    The row is picked by ``counter``, a 0-dim int64 tensor on ``device`` that every step increments,
    so the host knows neither the row nor its coefficients: a compiler sees one graph, and a CUDA
    graph of one step replays a whole run. Nothing is read back.

    ``load`` puts another table in the same tensors where they are large enough, and ``reserve``
    makes the registers of a state; both are for the host, outside of any trace. captured: a CUDA
    graph holds the tensors; ``load`` warns where it needs others.

    Raises ValueError for a table whose model is not fed from register 0, or that has rules.
    """

    def __init__(self, table: SolverTable, first: int, counter: Tensor) -> None:
        self.counter = counter
        self.registers: dict[tuple[int, ...], Tensor] = {}
        self.captured = False
        self.num_registers = 1
        self._rows: Tensor | None = None
        self.load(table, first)

    def load(self, table: SolverTable, first: int = 0) -> None:
        """Takes the rows of ``table``, the first of which is run where the counter is ``first``.

        Rows before and after them are NaN. What is in the registers does not matter: a table reads
        none that it has not written.
        """
        _check_rows(table)
        # A short run may have less history. It does with what there is: the program is the same.
        self.num_registers = max(self.num_registers, table.num_registers)
        before = self._rows
        rows = dense_rows(table, self.num_registers)
        self._rows = place_rows(before, rows, first, self.counter.device)
        self.draws = table.num_draws > 0
        if self.captured and self._rows is not before:
            self.captured = False
            warnings.warn(
                "the CUDA graph of a step holds the rows of an earlier run, and this one has more: "
                "capture it again",
                stacklevel=2,
            )

    def reserve(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Makes the registers for states of this shape and dtype, unless there are some."""
        if self.reserved(shape, dtype):
            return
        shape = (self.num_registers - 1, *shape)
        with torch.inference_mode(False):
            self.registers[shape[1:]] = torch.zeros(
                shape, dtype=state_dtype(dtype), device=self.counter.device
            )

    def warm_up(self, shape: Sequence[int], dtype: torch.dtype, output_dtype: torch.dtype) -> None:
        """Reserves, and runs the kernel of such a step, which changes nothing else.

        A capture can neither make memory that stays nor load a kernel.
        """
        if self.reserved(shape, dtype):
            return
        self.reserve(shape, dtype)
        with torch.inference_mode(False):
            sample = torch.zeros(tuple(shape), dtype=dtype, device=self.counter.device)
            self._new_values(
                sample, sample.to(output_dtype), sample if self.draws else None, solver_step_indexed
            )

    def reserved(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether :meth:`reserve` has been called for such states."""
        kept = self.registers.get(tuple(shape))
        return (
            kept is not None
            and kept.shape[0] == self.num_registers - 1
            and kept.dtype == state_dtype(dtype)
        )

    def step(
        self, sample: Tensor, output: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the next state, the prediction) in the registers' dtype; as :meth:`Stepper.step`.

        One launch and a copy of each register besides the state, where a kernel runs. A compiler
        gets the plain operations, which it fuses with those around them.
        """
        if output.shape != sample.shape:
            raise ValueError(
                f"output must have the sample's shape {tuple(sample.shape)}, "
                f"got {tuple(output.shape)}"
            )
        run = results if torch.compiler.is_compiling() else solver_step_indexed
        with torch.no_grad():
            following, *history, prediction = self._new_values(sample, output, noise, run)
            if self.num_registers > 1:
                kept = self.registers[tuple(sample.shape)]
                for register, value in zip(kept.unbind(0), history, strict=True):
                    register.copy_(value)
            self.counter.add_(1)
        return following, prediction

    def _new_values(
        self,
        sample: Tensor,
        output: Tensor,
        noise: Tensor | None,
        run: Callable[..., Iterable[Tensor]],
    ) -> Iterable[Tensor]:
        """Of the counter's row: the state, the other registers, the prediction."""
        assert self._rows is not None
        held = state_dtype(sample.dtype)
        return run(
            sample.to(held),
            kernel_output(output, held),
            self._rows,
            self.counter,
            history=self.registers[tuple(sample.shape)] if self.num_registers > 1 else None,
            noise=None if noise is None else noise.to(held),
            with_prediction=True,
        )


def place_rows(kept: Tensor | None, values: np.ndarray, first: int, device: torch.device) -> Tensor:
    """``values`` as rows ``first``.. of a tensor that is NaN elsewhere: ``kept`` where it fits."""
    size = capacity(first + len(values))
    if kept is not None and kept.device == device and kept.shape[1:] == values.shape[1:]:
        size = max(size, kept.shape[0])
    filled = np.full((size, *values.shape[1:]), np.nan)
    filled[first : first + len(values)] = values
    with torch.inference_mode(False):
        new = torch.from_numpy(filled).to(rows_dtype(device))
        if kept is not None and kept.device == device and kept.shape == new.shape:
            return kept.copy_(new)
        return new.to(device)
