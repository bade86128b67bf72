"""One run: the model with its conditions, guidance, hooks and noise, ready for any table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.sampling.calls import Arguments, ComposedEvaluate, Outputs, PlainEvaluate
from fastdiff.sampling.guidance import Guidance, is_guided
from fastdiff.sampling.hooks import Hook, RunFacts
from fastdiff.sampling.state import RunState
from fastdiff.solvers.engine import OnStep, StepInfo, run, state_dtype
from fastdiff.solvers.noise import Noise
from fastdiff.solvers.table import SolverTable


@dataclass
class Run:
    """What the tables of a run have in common; the fields are ``fastdiff.sample``'s arguments.

    shape, device, dtype: of the model's input. noise: of the state's dtype. initial: the noise the
    run started from, kept where there are hooks, which may ask for it.
    """

    model: Callable[..., Any]
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    noise: Noise
    guidance: Guidance = field(default_factory=Guidance)
    hooks: tuple[Hook, ...] = ()
    cond: Mapping[str, Any] | None = None
    uncond: Mapping[str, Any] | None = None
    model_kwargs: Mapping[str, Any] | None = None
    drop_variance: bool = False
    engine: str = "auto"
    initial: Tensor | None = None
    _arguments: dict[bool, Arguments] = field(default_factory=dict)

    @property
    def held(self) -> torch.dtype:
        """The state's dtype."""
        return state_dtype(self.dtype)

    def arguments(self, guided: bool) -> Arguments:
        """The model's keyword arguments, checked, for a table with or without guidance."""
        if guided not in self._arguments:
            self._arguments[guided] = Arguments.of(
                self.shape[0], guided, self.cond, self.uncond, self.model_kwargs
            )
        return self._arguments[guided]

    def check(self, table: SolverTable) -> None:
        """TypeError or ValueError for conditions that are none, or too few for the guidance."""
        given = {"cond": self.cond, "uncond": self.uncond}
        for name, value in given.items():
            if value is not None and not isinstance(value, Mapping):
                raise TypeError(
                    f"{name} must be a dict of the model's keyword arguments, "
                    f"got {type(value).__name__}"
                )
        missing = [name for name, value in given.items() if value is None]
        if is_guided(table) and missing and self.guidance.guide is None:
            scale = self.guidance.scale if self.guidance.scale != 1 else max(table.scales)
            raise ValueError(
                "guidance_scale must be 1 unless cond and uncond are given, "
                f"got {scale} without {' and '.join(missing)}"
            )
        self.arguments(is_guided(table))

    def initial_noise(self) -> Tensor:
        """z, [B, ...]; the same one every time where there are hooks."""
        z = self.noise.initial() if self.initial is None else self.initial
        if self.hooks:
            self.initial = z
        return z

    def start(self, table: SolverTable, x: Tensor | None, init: Tensor | None) -> Tensor:
        """The state before the first row: x, or init with the noise of that row, or noise."""
        if x is not None:
            state = x.detach().to(self.device, self.held)
        elif init is not None:
            level = table.rows[0].level
            if level is None:
                raise ValueError("init must be None for a table whose rows do not give their level")
            clean = init.detach().to(self.device, self.held)
            state = clean * level[0] + self.initial_noise() * level[1]
        else:
            state = self.initial_noise()
            if table.init_scale != 1:
                state = torch.mul(
                    state, table.init_scale, out=state if self.owns(state, None) else None
                )
        return state.contiguous(memory_format=_memory_format(state))

    def owns(self, state: Tensor, given: Tensor | None) -> bool:
        """Whether the state's memory is the run's alone, and may become a register."""
        others = (given, self.initial)
        return all(other is None or other.data_ptr() != state.data_ptr() for other in others)

    def begin(self, table: SolverTable, state: Tensor) -> None:
        """Tells the hooks."""
        for hook in self.hooks:
            facts = RunFacts(table, self.shape, self.held, state.device, self.initial_noise)
            hook.begin(facts)

    def capture(self, info: StepInfo, table: SolverTable) -> RunState:
        """What a run needs to go on after that step."""
        return RunState.of(info, table, self.noise, self.dtype, self.initial)

    def loop(
        self,
        table: SolverTable,
        state: Tensor,
        *,
        after: OnStep | None = None,
        resume: tuple[int, Sequence[Tensor | None]] | None = None,
        owned: bool = False,
    ) -> Tensor:
        """The state after the table's rows, in the state's dtype; see ``engine.run``."""
        guided = is_guided(table)
        arguments = self.arguments(guided)
        evaluate: PlainEvaluate | ComposedEvaluate
        if self.guidance.plain(table) and not self.hooks and not table.has_rules:
            copies = 2 if guided else 1
            outputs = self._outputs(copies, state)
            kwargs = arguments.stacked if guided else arguments.cond
            evaluate = PlainEvaluate(self.model, table, kwargs, outputs)
            plan, noise, seen = table, self.noise, self.dtype
        else:
            copies, outputs = 1, self._outputs(1, state)
            composed = ComposedEvaluate(
                self.model, table, arguments, outputs, self.guidance, self.hooks, self.noise
            )
            evaluate, plan, seen = composed, table.of_predictions, self.held
            # A rule changes the noise, which must then be drawn outside the kernels.
            noise = composed if table.has_rules else self.noise
        stepping = [hook for hook in self.hooks if type(hook).step is not Hook.step]

        def on_step(info: StepInfo) -> bool:
            for hook in stepping:
                hook.step(info)
            return after is None or after(info)

        with torch.no_grad():
            return run(
                plan,
                state,
                evaluate,
                dtype=seen,
                copies=copies,
                noise=noise,
                on_step=on_step if after is not None or stepping else None,
                engine=self.engine,
                resume=resume,
                owned=owned,
            )

    def _outputs(self, copies: int, state: Tensor) -> Outputs:
        shape = torch.Size((copies * self.shape[0], *self.shape[1:]))
        memory_format = _memory_format(state)
        return Outputs(shape, self.dtype, state.device, memory_format, self.drop_variance)


def _memory_format(state: Tensor) -> torch.memory_format:
    channels_last = state.dim() == 4 and state.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not state.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
