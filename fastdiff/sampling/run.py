"""One run: the model with its conditions, guidance, hooks and noise, ready for any table."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.sampling.calls import (
    Arguments,
    ComposedEvaluate,
    Outputs,
    PlainEvaluate,
    check_times,
)
from fastdiff.sampling.guidance import Guidance, is_guided
from fastdiff.sampling.hooks import Hook, RunFacts
from fastdiff.sampling.state import RunState
from fastdiff.solvers.engine import OnStep, StepInfo, run, state_dtype
from fastdiff.solvers.grids import check_choice
from fastdiff.solvers.noise import Noise
from fastdiff.solvers.table import SolverTable

ENGINES = ("auto", "graph", "cpp", "reference")
_LOG = logging.getLogger("fastdiff.sampling")


@dataclass
class Run:
    """What the tables of a run have in common; the fields are ``fastdiff.sample``'s arguments.

    shape, device, dtype: of the model's input. noise: of the state's dtype. initial: the noise the
    run started from, kept where there are hooks, which may ask for it. stepwise: after ``loop``,
    why it was no replay of a recorded step, or "".
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
    stepwise: str = ""
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
        """TypeError or ValueError for conditions that are none, or too few for the guidance, and
        for times that are not the model's."""
        check_times(self.model, table)
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
        """The state after the table's rows, in the state's dtype; see ``engine.run``.

        RuntimeError for engine "graph" where the run cannot be the replay of a recorded step.
        """
        check_choice("engine", self.engine, ENGINES)
        guided = is_guided(table)
        arguments = self.arguments(guided)
        evaluate: PlainEvaluate | ComposedEvaluate
        self.stepwise = self._why_stepwise(table, after)
        plain = self.guidance.plain(table) and not self.hooks and not table.has_rules
        copies = 2 if guided and plain else 1
        outputs = self._outputs(copies, state)
        kwargs = arguments.stacked if guided else arguments.cond
        if not self.stepwise:
            from fastdiff.sampling.captured import replayed

            done = replayed(
                _compiled(self.model),
                table,
                state,
                kwargs,
                outputs,
                copies=copies,
                noise=self.noise,
                resume=resume,
            )
            if isinstance(done, Tensor):
                return done
            self.stepwise = done
        self._tell()
        before: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if plain:
            compiled = _compiled(self.model)
            evaluate = PlainEvaluate(self.model, table, kwargs, outputs, compiled is not None)
            if compiled is not None:
                before = _ahead(compiled, evaluate.times, state, outputs, kwargs)
            plan, noise, seen = table, self.noise, self.dtype
        else:
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

        with torch.no_grad(), before:
            return run(
                plan,
                state,
                evaluate,
                dtype=seen,
                copies=copies,
                noise=noise,
                on_step=on_step if after is not None or stepping else None,
                engine="auto" if self.engine == "graph" else self.engine,
                resume=resume,
                owned=owned,
            )

    def _why_stepwise(self, table: SolverTable, after: OnStep | None) -> str:
        """Why nobody need try to replay a recorded step, or ""."""
        if self.engine not in ("auto", "graph"):
            return f"engine={self.engine!r}"
        if _compiled(self.model) is None:
            return "the model is not one that fastdiff.compile was given"
        if self.hooks:
            return f"hooks: {', '.join(type(hook).__name__ for hook in self.hooks)}"
        if after is not None:
            return "a callback or a progress bar follows the steps"
        if table.has_rules:
            return f"a rule of {table.name} is not linear"
        if not self.guidance.plain(table):
            return f"guidance: {self.guidance.beyond(table)}"
        return ""

    def _tell(self) -> None:
        """Why the run goes step by step, to whom it concerns."""
        if self.engine == "graph":
            raise RuntimeError(f"engine='graph' cannot run: {self.stepwise}")
        _LOG.debug("step by step: %s", self.stepwise)
        compiled = _compiled(self.model)
        if compiled is not None:
            compiled.stepwise[self.stepwise] += 1

    def _outputs(self, copies: int, state: Tensor) -> Outputs:
        shape = torch.Size((copies * self.shape[0], *self.shape[1:]))
        memory_format = _memory_format(state)
        return Outputs(shape, self.dtype, state.device, memory_format, self.drop_variance)


def _compiled(model: Any) -> Any:
    """What ``fastdiff.compile`` put in a model; None for what it was not given."""
    if not isinstance(model, nn.Module) or model._compiled_call_impl is None:
        return None  # and the compiler need not be imported
    from fastdiff.compiler.api import compiled

    return compiled(model)


def _ahead(
    compiled: Any, times: Sequence[Tensor], state: Tensor, outputs: Outputs, kwargs: Any
) -> contextlib.AbstractContextManager[None]:
    """``captured.ahead`` for the calls of that loop."""
    from fastdiff.sampling.captured import ahead

    like = torch.zeros(outputs.shape, dtype=outputs.dtype, device=state.device)
    return ahead(compiled, times, like.to(memory_format=outputs.memory_format), kwargs)


def _memory_format(state: Tensor) -> torch.memory_format:
    channels_last = state.dim() == 4 and state.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not state.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format
