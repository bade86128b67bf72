"""One row of a table at a time, for a caller who owns the loop and the state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastdiff._ext import DTYPE_CODES, ext
from fastdiff.solvers.engine import native_table, state_dtype, step_reference
from fastdiff.solvers.table import SolverTable, Update


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


class Stepper:
    """Runs a table's rows over a state that the caller holds: nothing of it is modified.

    The registers besides the state (earlier predictions) are the stepper's own, float32 or float64.
    first: the number of the table's row 0 in the caller's count.

    Raises ValueError for a table whose model is not fed from the state itself (register 0).
    """

    def __init__(self, table: SolverTable, first: int = 0) -> None:
        if any(row.feed != 0 for row in table.rows):
            raise ValueError(f"table must feed the model from register 0, got {table.name}")
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
        # The kernels take float64 registers with a float64 output, and no other mixture.
        if torch.float64 in (held, output.dtype) or output.dtype not in DTYPE_CODES:
            output = output.to(held)
        state = sample.to(held).contiguous()
        output = output.contiguous()
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
