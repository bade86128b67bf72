"""The programs of the time for all steps of a run, before the first step.

Their results for a vector of all steps' times are those of each step, one behind the other, where
every row of what they compute depends on its own row of the inputs alone. That is not to be seen
from a graph: shapes of one step may be written into it. So it is tried: once for every number of
steps, the results must have the shapes, and up to rounding the values, that each step gives alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.graph import value_of
from fastdiff.compiler.runner import KEPT, TIMED, Runner
from fastdiff.compiler.split import Program

# Steps that run at once: more would only take more memory.
CHUNK = 64


class Schedule:
    """Runs the programs of :data:`TIMED` of a runner for many steps.

    why_not: why the steps are not run at once, or "". together, alone: how many steps were run so,
    and each by itself.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.programs = [p for p in runner.programs if p.name in TIMED]
        self.names = tuple(name for program in self.programs for name in program.outputs)
        self.why_not = ""
        self.together = self.alone = 0
        self._proven: set[tuple[int, int]] = set()
        self._constants: bool | None = None
        expected = [value for program in self.programs for value in _results(program)]
        self.expected: list[tuple[torch.Size, torch.dtype]] | None = None
        if all(isinstance(value, Tensor) and _static(value) for value in expected):
            self.expected = [(value.shape, value.dtype) for value in expected]
        else:
            self.why_not = "it gives what is no tensor of a fixed shape"
        inductor = any(runner.plain[p.name] is not p.module for p in self.programs)
        if not self.why_not and inductor:
            self.why_not = "Inductor has compiled it for the shapes of one step"

    def stacked(self, values: dict[str, Any], name: str, times: Tensor) -> list[Tensor]:
        """The results for all steps, each [steps, ...].

        values: the inputs by name, with the results of the programs before. name: of the time.
        times: [steps, batch]. TypeError where a result is no tensor.
        """
        if self.expected is None:
            raise TypeError(f"results must be tensors here: {self.why_not}")
        chunks = [self._chunk(values, name, part) for part in times.split(CHUNK)]
        if len(chunks) == 1:
            return chunks[0]
        return [torch.cat(parts) for parts in zip(*chunks, strict=True)]

    def _chunk(self, values: dict[str, Any], name: str, times: Tensor) -> list[Tensor]:
        if not self.why_not and len(times) > 1:
            together = self._tried(values, name, times)
            if together is not None:
                self.together += len(times)
                return together
        self.alone += len(times)
        return self._one_by_one(values, name, times)

    def _tried(self, values: dict[str, Any], name: str, times: Tensor) -> list[Tensor] | None:
        """All steps at once, if that is known to be right or now proves to be; else why_not."""
        # Constants that a model makes for its batch (a vector of ones) are repeated, too, or not.
        for constants in (False, True) if self._constants is None else (self._constants,):
            try:
                together = self._together(values, name, times, constants)
                size = (len(times), times.shape[1])
                if size not in self._proven:
                    single = self._one_by_one(values, name, times)
                    if not all(map(same, together, single)):
                        raise ValueError("its rows depend on each other")
                    self._proven.add(size)
                self.why_not, self._constants = "", constants
                return together
            except Exception as error:  # whatever a graph for one step raises for more rows
                first = str(error).strip().splitlines() or [""]
                self.why_not = self.why_not or f"{type(error).__name__}: {first[0]}"
        return None

    def facts(self) -> dict[str, Any]:
        """For reports: "together", "alone", "why_not"; nothing where there are no such programs."""
        if not self.programs:
            return {}
        return {"together": self.together, "alone": self.alone, "why_not": self.why_not}

    def _one_by_one(self, values: dict[str, Any], name: str, times: Tensor) -> list[Tensor]:
        rows = [self._run({**values, name: time}) for time in times]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def _together(
        self, values: dict[str, Any], name: str, times: Tensor, constants: bool
    ) -> list[Tensor]:
        """As one batch of all steps; ValueError where a result has not as many rows."""
        steps, batch = times.shape
        own = {n for program in self.programs for n in program.inputs} - {name}
        wide = dict(values)
        for other in own & values.keys():
            if self._per_row(other, constants):
                wide[other] = torch.utils._pytree.tree_map_only(
                    Tensor, lambda value: _repeated(value, steps, batch), values[other]
                )
        results = self._run({**wide, name: times.reshape(-1)})
        assert self.expected is not None
        for value, (shape, dtype) in zip(results, self.expected, strict=True):
            right = len(shape) > 0 and shape[0] == batch
            if not right or value.shape != (steps * batch, *shape[1:]) or value.dtype != dtype:
                raise ValueError(
                    f"a result {list(shape)} became {list(value.shape)} for {steps} steps"
                )
        return [value.unflatten(0, (steps, batch)) for value in results]

    def _per_row(self, name: str, constants: bool) -> bool:
        """Whether an input of the programs may have a row for each of the batch: no weight."""
        role = self.runner.roles.get(name)
        if role is not None:
            return role != "weights"
        made = any(p.name == "weights" and name in p.outputs for p in self.runner.programs)
        return constants or not made

    def _run(self, values: dict[str, Any]) -> list[Tensor]:
        results: list[Tensor] = []
        for program in self.programs:
            run = self.runner.plain[program.name]
            # Not as a module: of what fails inside, PyTorch would print a traceback.
            run = program.module.forward if run is program.module else run
            made = run(*(values[name] for name in program.inputs))
            values.update(zip(program.outputs, made, strict=True))
            results += made
        return results

    def keep(self, values: dict[str, Any], name: str, times: Sequence[Tensor]) -> None:
        """Puts the results of all steps where calls with these times find them.

        Nothing where they are there, cannot be kept or are not computed at once.
        """
        kept = [k for k in self.runner.kept if k.program.name in TIMED]
        if self.why_not or not kept or len(times) > min(KEPT[k.program.name] for k in kept):
            return
        rows = []
        for time in times:
            row = {**values, name: time}
            rows.append((row, self.runner.keys(row)))
        rows = [(row, keys) for row, keys in rows if not all(k.has(keys) for k in kept)]
        unknown = any(keys[n] is None for _, keys in rows for k in kept for n in k.others)
        if len(rows) < 2 or unknown:
            return
        all_times = torch.stack([row[name] for row, _ in rows])
        results = self.stacked(values, name, all_times)
        if self.why_not:
            return
        for i, (row, keys) in enumerate(rows):
            row.update(zip(self.names, (value[i] for value in results), strict=True))
            for one in kept:
                one.put(row, keys, tuple(row[n] for n in one.program.outputs))


class Tables:
    """The results of all steps as one tensor for each dtype, [rows, elements].

    So a step reads all of its results by one launch, with the number of its row on the device.
    """

    ALIGN = 64  # elements; kernels read whole vectors

    def __init__(
        self,
        expected: Sequence[tuple[torch.Size, torch.dtype]],
        rows: int,
        device: torch.device,
    ) -> None:
        self._places, sizes = _placed(expected, self.ALIGN)
        with torch.inference_mode(False):
            self._tables = {
                dtype: torch.zeros((rows, size), dtype=dtype, device=device)
                for dtype, size in sizes.items()
            }

    @classmethod
    def row_nbytes(cls, expected: Sequence[tuple[torch.Size, torch.dtype]]) -> int:
        """Bytes of a row of such tables."""
        return sum(dtype.itemsize * n for dtype, n in _placed(expected, cls.ALIGN)[1].items())

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(table.numel() * table.element_size() for table in self._tables.values())

    def fill(self, results: Sequence[Tensor]) -> None:
        """results: each [steps, ...], steps no more than the rows."""
        for (dtype, start, shape), value in zip(self._places, results, strict=True):
            into = self._tables[dtype][: len(value), start : start + shape.numel()]
            into.copy_(value.reshape(len(value), -1))

    def row(self, index: Tensor) -> list[Tensor]:
        """The results of the row that ``index``, 0-dim int64, names on the device."""
        index = index.reshape(1)
        rows = {dtype: table.index_select(0, index)[0] for dtype, table in self._tables.items()}
        return [
            rows[dtype][start : start + shape.numel()].view(shape)
            for dtype, start, shape in self._places
        ]


def _placed(
    expected: Sequence[tuple[torch.Size, torch.dtype]], align: int
) -> tuple[list[tuple[torch.dtype, int, torch.Size]], dict[torch.dtype, int]]:
    """(dtype, first element, shape) of each result in a row, and the elements of rows by dtype."""
    places: list[tuple[torch.dtype, int, torch.Size]] = []
    sizes: dict[torch.dtype, int] = {}
    for shape, dtype in expected:
        start = sizes.get(dtype, 0)
        places.append((dtype, start, shape))
        sizes[dtype] = start + -(-shape.numel() // align) * align
    return places, sizes


def same(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors are one up to rounding: norms within the root of the dtype's epsilon.

    Rows that were mixed up differ as much as the steps do. How far rounding may go, the contracts
    of the ops say, for every shape.
    """
    if not value.is_floating_point():
        return torch.equal(value, other)
    near = torch.finfo(value.dtype).eps ** 0.5
    value, other = value.double().flatten(1), other.double().flatten(1)
    apart = torch.linalg.vector_norm(value - other, dim=1)
    bound = torch.linalg.vector_norm(other, dim=1) * near
    return bool((apart <= bound).all())


def _results(program: Program) -> list[Any]:
    (output,) = (node for node in program.module.graph.nodes if node.op == "output")
    return [value_of(node) for node in output.args[0]]


def _static(value: Tensor) -> bool:
    return all(type(size) is int for size in value.shape)


def _repeated(value: Tensor, steps: int, batch: int) -> Tensor:
    if value.dim() == 0 or value.shape[0] != batch:
        return value
    return value.repeat(steps, *[1] * (value.dim() - 1))
