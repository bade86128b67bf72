"""A solver table as tensors on a device, so that one recorded step replays a whole trajectory.

The number of the row is a tensor, too: what is recorded of a step (a CUDA graph, an FX graph) is
the same for every row, and nothing is read back::

    steps = IndexedTable.of(table, device)
    registers, index = steps.begin(x)

    def step():
        output = model(steps.model_input(registers, index, dtype), steps.time(index, len(x)))
        steps.step(registers, output, index, seeds=seeds)

    step(); registers[0].copy_(x); index.zero_()     # the warm-up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(len(table)):
        graph.replay()
    sample = registers[0]

The bits are those of ``fastdiff.sample`` with the same model and noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.ops.solver_step import empty_stack
from fastdiff.ops.solver_step_indexed import solver_step_indexed_
from fastdiff.solvers.table import SolverTable


def dense_rows(table: SolverTable, registers: int) -> np.ndarray:
    """The rows as float64 [N, 1 + R, R + 2], R = ``registers``: what solver_step_indexed reads.

    The first line of a row is [from each register .., from_output, guidance_scale] of its
    prediction, line 1 + r is [from each register .., from_prediction, from_noise] of register r.
    What a row does not update stays; registers that the table has not got do, too.
    """
    rows = np.zeros((len(table), 1 + registers, registers + 2))
    rows[:, range(1, 1 + registers), range(registers)] = 1.0
    for row, values in zip(table.rows, rows, strict=True):
        values[0, row.feed] = row.from_state
        values[0, registers:] = row.from_output, row.guidance_scale
        for update in row.updates:
            line = values[1 + update.dest]
            line[: table.num_registers] = update.from_registers
            line[table.num_registers :] = 0.0
            line[registers:] = update.from_prediction, update.from_noise
    return rows


def rows_dtype(device: torch.device) -> torch.dtype:
    """float64, but on the only accelerator without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def pick_row(rows: Tensor, counter: Tensor) -> Tensor:
    """``rows[counter]`` without a look at the counter; past the end, the last row."""
    return rows.index_select(0, counter.clamp(max=rows.shape[0] - 1).reshape(1))[0]


def _columns(
    table: SolverTable, registers: int, rows: int, device: torch.device, time_dtype: torch.dtype
) -> dict[str, Any]:
    """The tensors of an IndexedTable; 0 in the rows that the table has not got."""
    numbers = rows_dtype(device)
    values = {
        "rows": torch.from_numpy(dense_rows(table, registers)).to(numbers),
        "scales": torch.tensor([row.input_scale for row in table.rows], dtype=numbers),
        "feeds": torch.tensor(table.feeds),
        "times": torch.cat(table.time_tensors(1, time_dtype, torch.device("cpu"))),
        "draws": torch.tensor([max(row.draw, 0) for row in table.rows]),
    }
    missing = rows - len(table)
    with torch.inference_mode(False):
        return {
            name: torch.cat([value, value.new_zeros(missing, *value.shape[1:])]).to(device)
            for name, value in values.items()
        }


@dataclass(frozen=True)
class IndexedTable:
    """A table's rows as tensors on one device, for a step whose row is a tensor.

    :meth:`load` puts another table in the same memory, so that what was recorded of a step serves
    it, too. rows: [N, 1 + R, R + 2], see :func:`dense_rows`. scales: [N], of the model's input.
    feeds: [N], the register that feeds the model, None where it is always the state. times: [N],
    int64 where all are whole. draws: [N], the noise draw of each row. draws_noise: whether there
    is any.
    """

    rows: Tensor
    scales: Tensor
    feeds: Tensor | None
    times: Tensor
    draws: Tensor
    draws_noise: bool

    @staticmethod
    def of(
        table: SolverTable,
        device: torch.device | str,
        time_dtype: torch.dtype = torch.float32,
        *,
        registers: int = 0,
        rows: int = 0,
    ) -> IndexedTable:
        """time_dtype: of times that are not all whole. registers, rows: room for so many.

        ValueError for a table with rules.
        """
        if table.has_rules:
            raise ValueError(f"table must have no rules here, {table.name} has")
        room = max(registers, table.num_registers), max(rows, len(table))
        columns = _columns(table, *room, torch.device(device), time_dtype)
        if not any(table.feeds) and not (registers > 1 and rows):
            columns["feeds"] = None  # room for others: tables to come may feed from any register
        return IndexedTable(**columns, draws_noise=table.num_draws > 0)

    def holds(self, table: SolverTable) -> bool:
        """Whether there is room for the table."""
        feeds = self.feeds is not None or not any(table.feeds)
        return feeds and self.rows.shape[0] >= len(table) and self.registers >= table.num_registers

    def load(self, table: SolverTable) -> None:
        """The rows of another table, in the same memory; it must have room for them."""
        columns = _columns(
            table, self.registers, self.rows.shape[0], self.rows.device, self.times.dtype
        )
        for name, new in columns.items():
            kept = getattr(self, name)
            if kept is not None:
                kept.copy_(new)

    @property
    def registers(self) -> int:
        """How many registers the rows are for."""
        return int(self.rows.shape[1]) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        kept = (self.rows, self.scales, self.feeds, self.times, self.draws)
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(registers [R, B, ...] with the state ``x`` as the first, index 0)."""
        registers = empty_stack(x, self.registers).zero_()
        registers[0].copy_(x)
        return registers, torch.zeros((), dtype=torch.int64, device=x.device)

    def model_input(self, registers: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """What the row gives the model, [B, ...], in memory of its own."""
        fed = registers[0]
        if self.feeds is not None:
            fed = registers.index_select(0, pick_row(self.feeds, index).reshape(1))[0]
        return (fed * pick_row(self.scales, index).to(fed.dtype)).to(dtype)

    def time(self, index: Tensor, batch: int) -> Tensor:
        """The row's time, [batch]."""
        return pick_row(self.times, index).expand(batch)

    def step(
        self,
        registers: Tensor,
        output: Tensor,
        index: Tensor,
        *,
        uncond: Tensor | None = None,
        noise: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> None:
        """The row's updates, in place on ``registers``; then ``index`` names the next row.

        output, uncond: of the model, [B, ...]. noise: like the state; or seeds, int64 [B], with the
        noise streams of ``fastdiff.sample``. A row that evaluates no model leaves ``output``
        unread.

        Raises ValueError when the table draws noise and there is neither.
        """
        if self.draws_noise and noise is None and seeds is None:
            raise ValueError("noise or seeds must be given for a table with draws, got neither")
        solver_step_indexed_(
            registers,
            output,
            self.rows,
            index,
            uncond=uncond,
            noise=noise,
            seeds=seeds,
            draws=None if seeds is None else self.draws,
        )
        index.add_(1)
