"""A whole run as replays of one recorded step: model, guidance, solver and the next row's number.

What is recorded reads everything that differs between runs and rows from memory that stays: the
model's arguments, the prompt's results, the tables of the schedule and of the solver, the seeds,
the registers, and the row's number, which the step itself advances. So another prompt, seed,
table, schedule or number of steps needs no recording, and between the rows the host does nothing:
it launches as many replays as there are rows, by the C++ extension where that can. Noise is drawn
by Philox inside the step; its counter is the draw that the solver's table names for the row.

Only models of ``fastdiff.compile`` are recorded: their programs are known to be functions of their
inputs. :func:`ahead` is for all other runs of them: the schedule's results for all steps at once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff._philox import device_seeds
from fastdiff.compiler.captured import Graph
from fastdiff.compiler.compiled import Compiled
from fastdiff.compiler.cuda_graphs import Buffers, Counted, Pool
from fastdiff.compiler.runner import BEFORE, Runner, instead
from fastdiff.compiler.schedule import Tables
from fastdiff.ops.solver_step import empty_stack
from fastdiff.sampling.calls import Outputs
from fastdiff.solvers.noise import Noise, PhiloxNoise
from fastdiff.solvers.table import SolverTable
from fastdiff.solvers.trajectory import IndexedTable

Resume = tuple[int, Sequence[Tensor | None]]
# Room in the tables: a run with no more rows than the next power of two needs no recording.
ROWS = 64


def replayed(
    compiled: Compiled,
    table: SolverTable,
    state: Tensor,
    kwargs: Mapping[str, Any],
    outputs: Outputs,
    *,
    copies: int,
    noise: Noise,
    resume: Resume | None = None,
) -> Tensor | str:
    """The state after the table's rows, in memory of its own; or why the run is no replay.

    The arguments are those of ``engine.run``, and the result has its bits but for how the
    schedule's results are rounded. Two threads may call it at once: their runs are launched one
    after the other, each as a whole.
    """
    pool = compiled.pool
    if pool is None:
        return "cuda_graphs=False"
    if table.num_draws and not isinstance(noise, PhiloxNoise):
        return "its noise comes from torch generators; seed=... is drawn inside the step"
    on_gpu = state.device.type == "cuda"
    device = torch.cuda.device(state.device) if on_gpu else contextlib.nullcontext()
    with device, torch.no_grad(), compiled.lock, pool.lock:
        reason = pool.recorder.why_not([state])
        if reason:
            return reason
        trajectory = _trajectory(compiled, pool, table, state, kwargs, outputs, copies)
        if isinstance(trajectory, str):
            return trajectory
        seeds = noise.seeds if isinstance(noise, PhiloxNoise) else [0] * len(state)
        pool.recorder.wait()
        try:
            return trajectory.run(table, state, kwargs, seeds, resume)
        finally:
            pool.recorder.done()


def _trajectory(
    compiled: Compiled,
    pool: Pool,
    table: SolverTable,
    state: Tensor,
    kwargs: Mapping[str, Any],
    outputs: Outputs,
    copies: int,
) -> Trajectory | str:
    """The one for such runs, made if there is none yet; or why there can be none."""
    leaves, structure = torch.utils._pytree.tree_flatten(dict(kwargs))
    described = [
        (v.shape, v.dtype, v.device, v.stride()) if isinstance(v, Tensor) else (type(v), v)
        for v in leaves
    ]
    times = table.time_tensors(outputs.shape[0], state.dtype, state.device)
    place = (state.shape, state.dtype, state.device, times[0].dtype)
    key = (*place, outputs, copies, structure, *described)
    try:
        found = compiled.trajectories.get(key)
    except TypeError:
        return "an argument of the model is neither a tensor nor hashable"
    if found is None:
        found = Trajectory(compiled, pool, state, outputs, copies, times[0].dtype)
        compiled.trajectories[key] = found
        while len(compiled.trajectories) > compiled.options.max_graphs:
            compiled.trajectories.popitem(last=False)[1].drop()
    compiled.trajectories.move_to_end(key)
    assert isinstance(found, Trajectory)
    return found


@contextlib.contextmanager
def ahead(
    compiled: Compiled,
    times: Sequence[Tensor],
    like: Tensor,
    kwargs: Mapping[str, Any],
) -> Iterator[None]:
    """Computes the schedule's results for the calls within, where they all run at once.

    times: of the rows, the very tensors of the calls. like: what the model is given, whose
    contents do not matter. What the model itself raises comes out.
    """
    with torch.no_grad():
        seen = compiled.seen(like, times[0], **kwargs)
        if isinstance(seen, str):
            yield
            return
        graph, values = seen
        name = name_of(values, times[0])
        if graph.schedule.programs and name and not graph.schedule.why_not:
            graph.runner.begin(values)
            graph.schedule.keep(values, name, times)
            graph.runner.fresh = True
        try:
            yield
        finally:
            graph.runner.fresh = False


def name_of(values: Mapping[str, Any], time: Tensor) -> str:
    """The name of the time among a graph's inputs; "" where it is none of them."""
    return next((name for name, value in values.items() if value is time), "")


class Trajectory(Counted):
    """One step of a run, recorded; see the top of this file.

    state: [B, ...], for its shape, dtype and memory order. copies: 2 evaluates [uncond, cond] as a
    batch of 2B. why_not: a reason never to record, or "". loaded: the table of the last run.
    """

    def __init__(
        self,
        compiled: Compiled,
        pool: Pool,
        state: Tensor,
        outputs: Outputs,
        copies: int,
        time_dtype: torch.dtype,
    ) -> None:
        self._compiled, self._pool = compiled, pool
        self._outputs, self._copies, self._time_dtype = outputs, copies, time_dtype
        self._like = torch.empty_like(state, device="meta")
        self._device = state.device
        self.why_not = ""
        self.recordings = self.replays = 0
        self._graph: Graph | None = None
        self._name = ""
        self.forget()

    def forget(self) -> None:
        """Frees the recording and all memory; it is recorded again when it is needed."""
        self.nbytes = 0
        self._key: tuple[Any, ...] | None = None
        self._replay: Any = None
        self._arguments: Buffers | None = None
        self._prompt: Buffers | None = None
        self._before: dict[str, Any] = {}
        self._steps: IndexedTable | None = None
        self._tables: Tables | None = None
        self._stamp: tuple[Any, ...] | None = None
        self.loaded: SolverTable | None = None
        self._static: dict[str, Tensor] = {}

    def drop(self) -> None:
        """Like ``forget``, and neither the pool nor the report knows it any more."""
        with self._pool.lock:
            self.forget()
            self._pool.without(self)
            self._follow(None)

    def run(
        self,
        table: SolverTable,
        state: Tensor,
        kwargs: Mapping[str, Any],
        seeds: Sequence[int],
        resume: Resume | None,
    ) -> Tensor | str:
        """As :func:`replayed`. The pool's lock is held."""
        if self.why_not:
            return self.why_not
        first, given = (0, ()) if resume is None else resume
        reason = self._load(table, kwargs)
        if reason:
            return reason
        registers = self._static["registers"]
        self._static["seeds"].copy_(device_seeds(tuple(seeds), self._device))
        for register, value in zip(registers, [state, *given[1:]], strict=False):
            if value is not None:
                register.copy_(value)
        self.rewind(first)
        self.launch(table, first)
        self._pool.used(self)
        return registers[0].clone()

    @property
    def native(self) -> bool:
        """Whether replays are launched by the extension, without Python."""
        return bool(getattr(self._replay, "native", False))

    def rewind(self, first: int = 0) -> None:
        """The row that the next replay runs; the registers stay."""
        self._static["index"].fill_(first)

    def launch(self, table: SolverTable, first: int = 0) -> None:
        """All rows; a row that evaluates no model is a solver step alone. Waits for nothing."""
        for evaluates, rows in itertools.groupby(table.rows[first:], lambda row: row.evaluates):
            count = len(list(rows))
            if evaluates:
                self._replay(count)
                self.replays += count
                continue
            for _ in range(count):
                self._solve(self._static["input"])

    def _load(self, table: SolverTable, kwargs: Mapping[str, Any]) -> str:
        """Everything but the state into its memory, and a recording if there is none; or why not.

        The guards of the model's graph are looked at, as by a call.
        """
        leaves, self._structure = torch.utils._pytree.tree_flatten(dict(kwargs))
        if self._arguments is None:
            self._arguments = Buffers(leaves, self._pool.recorder.constant)
            self._allocate()
        self._arguments.load(leaves)
        seen = self._compiled.seen(self._static["input"], self._static["time"], **self._kwargs())
        if isinstance(seen, str):
            return seen
        graph, values = seen
        reason = self._why_not(graph, values)
        if reason:
            return reason
        self._follow(graph)
        graph.runner.begin(values)
        self._take(graph.runner, values)
        if self._steps is None or not self._steps.holds(table):
            self._make_room(table)
        reason = self._fill(graph, values, table)
        if reason:
            return reason
        key = self._addresses(graph.runner, values)
        if self._replay is None or key != self._key:
            try:
                self._record(key)
            except Exception as error:  # what a graph cannot hold, or no memory for it
                self.forget()
                line = (str(error).strip().splitlines() or [""])[0]
                self.why_not = f"recording failed: {type(error).__name__}: {line}"
        return self.why_not

    def _why_not(self, graph: Graph, values: dict[str, Any]) -> str:
        if graph.why_whole:
            return f"its graph is left as it was: {graph.why_whole}"
        if graph.runner.cache is not None:
            return "its steps are cached, and not all of them run alike"
        if graph.runner.random:
            return "it draws random numbers"
        self._name = name_of(values, self._static["time"])
        if graph.schedule.programs and graph.schedule.expected is None:
            return f"the results of its schedule cannot be tables: {graph.schedule.why_not}"
        return ""

    def _kwargs(self) -> Any:
        assert self._arguments is not None
        return torch.utils._pytree.tree_unflatten(self._arguments.values, self._structure)

    def _allocate(self) -> None:
        """The memory whose size no table decides."""
        shape, device = self._outputs.shape, self._device
        with torch.inference_mode(False):
            self._static = {
                "input": torch.zeros(shape, dtype=self._outputs.dtype, device=device).to(
                    memory_format=self._outputs.memory_format
                ),
                "time": torch.zeros(shape[0], dtype=self._time_dtype, device=device),
                "index": torch.zeros((), dtype=torch.int64, device=device),
                "seeds": torch.zeros(self._like.shape[0], dtype=torch.int64, device=device),
            }

    def _make_room(self, table: SolverTable) -> None:
        """Tables and registers for this table and those of earlier runs; records again."""
        registers, rows = table.num_registers, max(ROWS, 1 << (len(table) - 1).bit_length())
        if self._steps is not None:
            registers = max(registers, self._steps.registers)
            rows = max(rows, self._steps.rows.shape[0])
        self._steps = IndexedTable.of(
            table, self._device, self._like.dtype, registers=registers, rows=rows
        )
        self._tables, self._replay, self._stamp = None, None, None
        self.loaded = table
        with torch.inference_mode(False):
            state = torch.empty_like(self._like, device=self._device)
            self._static["registers"] = empty_stack(state, registers).zero_()

    def _fill(self, graph: Graph, values: dict[str, Any], table: SolverTable) -> str:
        """The solver's rows and the schedule's results into their tables; or why not."""
        assert self._steps is not None
        stamp = graph.runner.stamp(values, self._name)
        changed = stamp is None or stamp != self._stamp or table is not self.loaded
        if table is not self.loaded:
            self._steps.load(table)
            self.loaded = table
        expected = graph.schedule.expected
        if not expected:
            return ""
        if self._tables is None:
            rows = self._steps.rows.shape[0]
            size = rows * Tables.row_nbytes(expected)
            if size > self._pool.max_bytes:
                return (
                    f"the results of its schedule take {size / 2**20:.0f} MiB for {rows} steps, "
                    f"more than max_graph_bytes ({self._pool.max_bytes / 2**20:.0f} MiB)"
                )
            self._tables = Tables(expected, rows, self._device)
        if changed:
            batch = len(self._static["time"])
            times = torch.stack(table.time_tensors(batch, self._like.dtype, self._device))
            self._tables.fill(graph.schedule.stacked(values, self._name, times))
            self._stamp = stamp
        return ""

    def _take(self, runner: Runner, values: dict[str, Any]) -> None:
        """The results of the programs before the schedule: the prompt's are copied."""
        names = {p.name: p.outputs for p in runner.programs if p.name in BEFORE}
        self._before = {name: values[name] for name in names.get("weights", ())}
        prompt = {name: values[name] for name in names.get("prompt", ())}
        leaves, structure = torch.utils._pytree.tree_flatten(prompt)
        if self._prompt is None:
            self._prompt = Buffers(leaves, self._pool.recorder.constant)
        self._prompt.load(leaves)
        self._before |= torch.utils._pytree.tree_unflatten(self._prompt.values, structure)

    def _addresses(self, runner: Runner, values: dict[str, Any]) -> tuple[Any, ...]:
        """What a recording holds besides its own memory: weights' addresses, and numbers."""
        assert self._arguments is not None
        assert self._prompt is not None
        weights = [name for name, role in runner.roles.items() if role == "weights"]
        made = [n for p in runner.programs if p.name == "weights" for n in p.outputs]
        fixed = torch.utils._pytree.tree_leaves([values[name] for name in (*weights, *made)])
        found = [self._held(v) if self._by_value(v) else v.data_ptr() for v in fixed]
        moving = (*self._arguments.values, *self._prompt.values)
        return (*found, *(self._held(v) for v in moving if self._by_value(v)))

    def _by_value(self, value: Any) -> bool:
        return not isinstance(value, Tensor) or self._pool.recorder.constant(value)

    def _held(self, value: Any) -> Any:
        return value.item() if isinstance(value, Tensor) else value

    def _record(self, key: tuple[Any, ...]) -> None:
        index = self._static["index"]
        index.zero_()
        self._step()  # a capture can neither load kernels nor tune them
        index.zero_()
        self._replay, _, taken = self._pool.recorder.record(self._step)
        self._key = key
        buffers = [
            b.nbytes for b in (self._arguments, self._prompt, self._tables, self._steps) if b
        ]
        own = sum(t.numel() * t.element_size() for t in self._static.values())
        self.nbytes = taken + own + sum(buffers)
        self.recordings += 1

    def _step(self) -> tuple[()]:
        """What is recorded: the row that the index names, and the index after it."""
        assert self._steps is not None
        static, dtype = self._static, self._outputs.dtype
        fed = self._steps.model_input(static["registers"], static["index"], dtype)
        for part in static["input"].chunk(self._copies):
            part.copy_(fed)
        static["time"].copy_(self._steps.time(static["index"], len(static["time"])))
        with instead(self._run_step):
            output = self._compiled(static["input"], static["time"], **self._kwargs())
        self._solve(self._outputs.accept(output))
        return ()

    def _solve(self, output: Tensor) -> None:
        """The solver's part of a step."""
        assert self._steps is not None
        uncond, cond = output.chunk(2) if self._copies == 2 else (None, output)
        self._steps.step(
            self._static["registers"],
            cond,
            self._static["index"],
            uncond=uncond,
            seeds=self._static["seeds"],
        )

    def _run_step(self, runner: Runner, values: dict[str, Any]) -> Any:
        """In place of the runner's call: its step, with the row's results of the schedule."""
        assert self._graph is not None
        assert runner is self._graph.runner  # its guards were looked at
        values.update(self._before)
        if self._tables is not None:
            results = self._tables.row(self._static["index"])
            values.update(zip(self._graph.schedule.names, results, strict=True))
        return runner.run_step(values)

    def _follow(self, graph: Graph | None) -> None:
        """Records another graph from now on; the report and the eviction of the old one know."""
        if graph is self._graph:
            return
        if self._graph is not None:
            known = self._graph.runner.graphed
            for name in [name for name, user in known.items() if user is self]:
                del known[name]
            kept = self._arguments, self._static
            self.forget()
            self._arguments, self._static = kept
        self._graph = graph
        if graph is not None:
            number = sum(name.startswith("trajectory") for name in graph.runner.graphed)
            graph.runner.graphed[f"trajectory {number + 1}" if number else "trajectory"] = self
