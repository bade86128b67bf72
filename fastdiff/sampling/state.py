"""A run that was interrupted, whole: what ``sample(resume=...)`` goes on from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.solvers.engine import StepInfo
from fastdiff.solvers.noise import GeneratorNoise, Noise, PhiloxNoise
from fastdiff.solvers.table import SolverTable

FORMAT = "fastdiff.RunState"


@dataclass(frozen=True)
class RunState:
    """Everything a run needs besides the model and its conditions.

    table: the solver's. next_row: the first row that was not run. registers: copies, None for those
    not written. dtype: of the model input. seeds: of the noise, or () where ``generators`` holds
    the states of torch generators. initial: the noise the run started from, where a hook uses it.

    A callback gets one from ``info.capture()``.
    """

    table: SolverTable
    next_row: int
    registers: tuple[Tensor | None, ...]
    dtype: torch.dtype
    seeds: tuple[int, ...] = ()
    generators: tuple[Tensor, ...] = ()
    initial: Tensor | None = None

    @staticmethod
    def of(
        info: StepInfo,
        table: SolverTable,
        noise: Noise,
        dtype: torch.dtype,
        initial: Tensor | None,
    ) -> RunState:
        """The state after the step that ``info`` tells of."""
        return RunState(
            table,
            info.index + 1,
            tuple(None if r is None else r.clone() for r in info.registers),
            dtype,
            tuple(noise.seeds) if isinstance(noise, PhiloxNoise) else (),
            tuple(noise.states()) if isinstance(noise, GeneratorNoise) else (),
            initial,
        )

    @property
    def x(self) -> Tensor:
        """The state itself, [B, ...]."""
        assert self.registers[0] is not None  # the table's validation
        return self.registers[0]

    def noise(self) -> Noise:
        """The noise of the rest of the run."""
        shape, held, device = tuple(self.x.shape), self.x.dtype, self.x.device
        if self.seeds:
            return PhiloxNoise(shape, self.seeds, state_dtype=held, device=device)
        return GeneratorNoise.resumed(
            shape, self.generators, dtype=self.dtype, state_dtype=held, device=device
        )

    def to(self, device: torch.device | str) -> RunState:
        """The same on another device; the states of generators stay where they were made."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return RunState(
            self.table,
            self.next_row,
            tuple(map(move, self.registers)),
            self.dtype,
            self.seeds,
            self.generators,
            move(self.initial),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, complete or not at all."""
        from safetensors.torch import save_file

        tensors = {f"register.{j}": r for j, r in enumerate(self.registers) if r is not None}
        tensors |= {f"generator.{i}": state for i, state in enumerate(self.generators)}
        if self.initial is not None:
            tensors["initial"] = self.initial
        metadata = {
            "format": FORMAT,
            "table": json.dumps(self.table.to_dict()),
            "next_row": str(self.next_row),
            "dtype": str(self.dtype).removeprefix("torch."),
            "seeds": json.dumps(self.seeds),
        }
        part = f"{os.fspath(path)}.part"
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, part, metadata)
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RunState:
        """Reads a file of :meth:`save`, on the CPU; ValueError when it is none."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path must be a saved run, got {path} ({error})") from error
        try:
            if metadata["format"] != FORMAT:
                raise ValueError(f"its format is {metadata['format']!r}")
            table = SolverTable.from_dict(json.loads(metadata["table"]))
            next_row, seeds = int(metadata["next_row"]), tuple(json.loads(metadata["seeds"]))
            dtype = getattr(torch, metadata["dtype"])
            registers = tuple(tensors.get(f"register.{j}") for j in range(table.num_registers))
            states = [n for n in tensors if n.startswith("generator.")]
            if registers[0] is None or not 0 < next_row <= len(table) or not (seeds or states):
                raise ValueError("its parts do not fit together")
        except (KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"path must be a saved run, got {path} ({error})") from error
        generators = tuple(tensors[f"generator.{i}"] for i in range(len(states)))
        return cls(table, next_row, registers, dtype, seeds, generators, tensors.get("initial"))
