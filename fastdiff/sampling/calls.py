"""Calling the model: its arguments, what it returns, and the evaluation of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff._ext import DTYPE_CODES
from fastdiff.sampling.guidance import Guidance, rescaled
from fastdiff.sampling.hooks import Hook, Place
from fastdiff.sampling.rules import langevin, learned_range
from fastdiff.solvers.continuous import SigmaSchedule
from fastdiff.solvers.engine import state_dtype
from fastdiff.solvers.named import get_schedule
from fastdiff.solvers.noise import Noise
from fastdiff.solvers.prediction import to_model, to_x0
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable

Kwargs = Mapping[str, Any]


def schedule_for(model: Any, schedule: str | NoiseSchedule) -> NoiseSchedule:
    """The schedule with the times of ``model``: its own, or sigma for a model that is given that.

    Such a model has ``time == "sigma"`` and ``levels``, the (least, most) noise it knows
    (``fastdiff.models.preconditioning``). Every sigma schedule serves it, whatever its times, cut
    to the levels as EDM's sampler does it. ValueError for a schedule of another kind.
    """
    schedule = get_schedule(schedule)
    if getattr(model, "time", None) != "sigma":
        return schedule
    if not isinstance(schedule, SigmaSchedule):
        raise ValueError(
            "schedule must be a sigma schedule ('edm', 'cm', 've') for a model that is given "
            f"sigma, got {schedule.name}"
        )
    least, most = model.levels
    return replace(
        schedule,
        sigma_min=max(schedule.sigma_min, least),
        sigma_max=min(schedule.sigma_max, most),
        logarithmic=False,
        time_scale=1.0,
    )


def check_times(model: Any, table: SolverTable) -> None:
    """ValueError for a table whose times are not those of a model that is given sigma."""
    if getattr(model, "time", None) != "sigma":
        return
    for row in table.rows:
        if row.evaluates and row.level is not None:
            sigma = row.level[1] / row.level[0] if row.level[0] else math.inf
            if not math.isclose(row.time, sigma, rel_tol=1e-6):
                raise ValueError(
                    "solver must be a table with sigma as its time for a model that is given "
                    f"that, as one of SigmaSchedule(0.002, 80.0), got time {row.time:g} at sigma "
                    f"{sigma:g}"
                )


@dataclass(frozen=True)
class Arguments:
    """The model's keyword arguments: with the condition, without it, and both as [other, cond]."""

    cond: dict[str, Any]
    uncond: dict[str, Any]
    stacked: dict[str, Any]

    @staticmethod
    def of(
        batch: int,
        guided: bool,
        cond: Kwargs | None,
        uncond: Kwargs | None,
        model_kwargs: Kwargs | None,
    ) -> Arguments:
        """Checked and brought to the batch; ``stacked`` is empty unless guided by both."""
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise TypeError(f"model_kwargs must be a dict, got {type(model_kwargs).__name__}")
        shared = dict(model_kwargs or {})
        given = dict(cond if cond is not None else uncond or {})
        clash = sorted(shared.keys() & given.keys())
        if clash:
            raise ValueError(f"model_kwargs must not repeat arguments of cond, got {clash}")
        own = {**shared, **{k: _expand(f"cond[{k!r}]", v, batch) for k, v in given.items()}}
        if not guided or uncond is None:
            return Arguments(own, own, {})
        without = dict(uncond)
        if given.keys() != without.keys():
            raise ValueError(
                f"uncond must have the keys of cond, {sorted(given)}, got {sorted(without)}"
            )
        stacked = {k: _stack(repr(k), without[k], given[k], batch) for k in given}
        other = {k: _expand(f"uncond[{k!r}]", v, batch) for k, v in without.items()}
        twice = {
            key: torch.cat([value, value])
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch
            else value
            for key, value in shared.items()
        }
        return Arguments(own, {**shared, **other}, {**twice, **stacked})


def _expand(where: str, value: Any, batch: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] == batch:
        return value
    if value.shape[0] == 1:
        return value.expand(batch, *value.shape[1:])
    raise ValueError(
        f"{where} must have the batch ({batch}) or 1 first, got shape {tuple(value.shape)}"
    )


def _stack(where: str, without: Any, given: Any, batch: int) -> Any:
    """[uncond, cond] along the batch for tensors, recursively in dicts; the rest must agree."""
    if isinstance(given, Mapping) and isinstance(without, Mapping):
        if given.keys() != without.keys():
            raise ValueError(f"uncond[{where}] must have the keys of cond[{where}]")
        return {k: _stack(f"{where}][{k!r}", without[k], given[k], batch) for k in given}
    if isinstance(given, Tensor) and isinstance(without, Tensor) and given.dim() > 0:
        first = _expand(f"uncond[{where}]", without, batch)
        second = _expand(f"cond[{where}]", given, batch)
        if first.shape != second.shape or first.dtype != second.dtype:
            raise ValueError(
                f"uncond[{where}] must have the shape and dtype of cond[{where}], "
                f"{tuple(second.shape)} {second.dtype}, got {tuple(first.shape)} {first.dtype}"
            )
        return torch.cat([first, second])
    same = given is without
    if not same and type(given) is type(without):
        same = torch.equal(given, without) if isinstance(given, Tensor) else bool(given == without)
    if not same:
        raise ValueError(
            f"uncond[{where}] must be a tensor with the batch first, or equal to cond[{where}], "
            f"got {type(without).__name__} and {type(given).__name__}"
        )
    return given


@dataclass(frozen=True)
class Outputs:
    """What a model's output must be, for a batch of ``shape[0]``.

    drop_variance: an output of twice the channels is cut to its first half.
    memory_format: that of the state.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format
    drop_variance: bool = False

    def accept(self, output: Any) -> Tensor:
        """``output`` as a tensor of this kind; TypeError or ValueError when it is none."""
        output = self._checked(output)
        if output.shape != self.shape:
            output = self._reshape(output)
        return output.to(self.dtype).contiguous(memory_format=self.memory_format)

    def accept_both(self, output: Any) -> tuple[Tensor, Tensor]:
        """(mean, learned variance) of an output with twice the channels."""
        output = self._checked(output)
        if not self._learned(output):
            got, want = tuple(output.shape), tuple(self.shape)
            raise ValueError(
                f"model must return twice the channels of {want} for a learned variance, got {got}"
            )
        return self.accept(output[:, : self.shape[1]]), self.accept(output[:, self.shape[1] :])

    def _checked(self, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            output = _unwrap(output)
        if output.dtype not in DTYPE_CODES:
            raise TypeError(f"model must return a floating-point tensor, got {output.dtype}")
        if output.device != self.device:
            raise ValueError(f"model must return a tensor on {self.device}, got {output.device}")
        return output

    def _learned(self, output: Tensor) -> bool:
        got, want = tuple(output.shape), tuple(self.shape)
        return (
            len(got) == len(want) > 1
            and got[1] == 2 * want[1]
            and (got[0], *got[2:]) == (want[0], *want[2:])
        )

    def _reshape(self, output: Tensor) -> Tensor:
        learned = self._learned(output)
        if learned and self.drop_variance:
            return output[:, : self.shape[1]]
        hint = (
            ": twice the channels is a learned variance; drop_variance=True uses the mean"
            if learned
            else ""
        )
        got, want = tuple(output.shape), tuple(self.shape)
        raise ValueError(f"model must return shape {want}, got {got}{hint}")


def _unwrap(output: Any) -> Tensor:
    """The tensor in a diffusers output object or a tuple."""
    inner = getattr(output, "sample", None)
    if inner is None and isinstance(output, (tuple, list)) and output:
        inner = output[0]
    if not isinstance(inner, Tensor):
        raise TypeError(
            "model must return a tensor, a tuple that starts with one, or an object with .sample, "
            f"got {type(output).__name__}"
        )
    return inner


class PlainEvaluate:
    """The model as it is; guidance, conversion and scaling are the loop's.

    versions: the model knows its inputs by their versions (one of ``fastdiff.compile`` does), and
    the kernels of the loop, which write to one input in every row, count none.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        table: SolverTable,
        kwargs: Kwargs,
        outputs: Outputs,
        versions: bool = False,
    ) -> None:
        self._model = model
        self._versions = versions
        self._kwargs = dict(kwargs)
        self.accept = outputs.accept
        # One tensor per step, made before the run.
        self.times = table.time_tensors(
            outputs.shape[0], state_dtype(outputs.dtype), outputs.device
        )

    def __call__(self, model_input: Tensor, row: int, /) -> Any:
        if self._versions and not model_input.is_inference():
            torch.autograd.graph.increment_version(model_input)
        return self._model(model_input, self.times[row], **self._kwargs)


class ComposedEvaluate:
    """A step's prediction in full: guidance of every form, hooks and rules.

    For a loop over ``table.of_predictions``: it is given a register, and returns the prediction.
    ``noise`` is the run's; rows with a rule draw from it here, and the loop's draw gets the result.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        table: SolverTable,
        arguments: Arguments,
        outputs: Outputs,
        guidance: Guidance,
        hooks: Sequence[Hook],
        noise: Noise,
    ) -> None:
        self._model, self._table, self._arguments = model, table, arguments
        self._guidance, self._noise = guidance, noise
        self._hooks = [hook for hook in hooks if _overrides(hook, "predict")]
        self._adding = [hook for hook in hooks if _overrides(hook, "arguments")]
        batch, dtype, device = outputs.shape[0], outputs.dtype, outputs.device
        self._state = state_dtype(dtype)
        self._one = outputs
        self._two = Outputs(
            torch.Size((2 * batch, *outputs.shape[1:])),
            dtype,
            device,
            outputs.memory_format,
            outputs.drop_variance,
        )
        self._times = table.time_tensors(batch, self._state, device)
        self._times_two = table.time_tensors(2 * batch, self._state, device)
        # A model of that kind returns the variance in every row, used or not.
        self._learned = any(row.rule == "learned_range" for row in table.rows)
        self._drawn: Tensor | None = None

    def accept(self, output: Any, /) -> Tensor:
        """Never needed: a call returns what the loop wants."""
        assert isinstance(output, Tensor)
        return output.contiguous(memory_format=self._one.memory_format)

    def initial(self) -> Tensor:
        """As the run's noise."""
        return self._noise.initial()

    def draw(self, index: int) -> Tensor:
        """The noise of a row after its rule."""
        drawn, self._drawn = self._drawn, None
        return self._noise.draw(index) if drawn is None else drawn

    def __call__(self, x: Tensor, index: int, /) -> Tensor:
        row = self._table.rows[index]
        model_input = x * row.input_scale if row.input_scale != 1 else x
        model_input = model_input.to(self._one.dtype, copy=model_input is x)
        place = Place(index, row.time, row.level)
        output, variance = self._output(model_input, row, place)
        prediction = row.from_output * output.to(self._state)
        if row.from_state:
            prediction = prediction + row.from_state * x
        if self._guidance.gradient is not None:
            prediction = self._push(prediction, x, place)
        for hook in self._hooks:
            prediction = self._hooked(hook, prediction, x, place)
        if row.rule:
            z = self._noise.draw(row.draw)
            if row.rule == "langevin":
                prediction, z = langevin(prediction, z)
            else:
                assert variance is not None
                z = learned_range(z, variance.to(self._state), row.rule_value)
            self._drawn = z
        return prediction.contiguous(memory_format=self._one.memory_format)

    def _output(self, x: Tensor, row: Row, place: Place) -> tuple[Tensor, Tensor | None]:
        """The guided output, and the learned variance of a model that has one."""
        guidance, arguments = self._guidance, self._arguments
        learned = self._learned
        times = self._times[place.index]

        def call(model: Callable[..., Any], kwargs: Kwargs) -> tuple[Tensor, Tensor | None]:
            output = model(x, times, **self._with_hooks(x, times, kwargs, place))
            return self._one.accept_both(output) if learned else (self._one.accept(output), None)

        if row.guidance_scale == 1:
            return call(self._model, arguments.cond)
        variance: Tensor | None
        if guidance.guide is not None or not guidance.batched:
            other = call(guidance.guide or self._model, arguments.uncond)[0]
            cond, variance = call(self._model, arguments.cond)
        else:
            twice, both = torch.cat([x, x]), self._times_two[place.index]
            kwargs = self._with_hooks(twice, both, arguments.stacked, place)
            output = self._model(twice, both, **kwargs)
            mean, spread = (
                self._two.accept_both(output) if learned else (self._two.accept(output), None)
            )
            other, cond = mean.chunk(2)
            variance = None if spread is None else spread.chunk(2)[1]
        other, cond = other.to(self._state), cond.to(self._state)
        guided = other + (cond - other) * row.guidance_scale
        if guidance.rescale:
            guided = rescaled(guided, cond, guidance.rescale)
        return guided, variance

    def _with_hooks(self, x: Tensor, times: Tensor, kwargs: Kwargs, place: Place) -> Kwargs:
        for hook in self._adding:
            kwargs = {**kwargs, **hook.arguments(x, times, kwargs, place)}
        return kwargs

    def _push(self, prediction: Tensor, x: Tensor, place: Place) -> Tensor:
        """Adds the gradient to the score; linear in it, so added to any prediction as its image."""
        alpha, sigma = place.needed("gradient")
        if alpha == 0:
            raise ValueError("gradient must be None for a schedule with zero terminal SNR")
        gradient = self._guidance.gradient
        assert gradient is not None
        pushed = gradient(x, self._times[place.index], **self._arguments.cond)
        if not isinstance(pushed, Tensor) or pushed.shape != x.shape:
            raise ValueError(
                f"gradient must return a tensor of shape {tuple(x.shape)}, "
                f"got {tuple(getattr(pushed, 'shape', ()))}"
            )
        share = to_model(self._table.prediction, alpha, sigma)[1] * sigma**2 / alpha
        return prediction + pushed.to(self._state) * (share * self._guidance.gradient_scale)

    def _hooked(self, hook: Hook, prediction: Tensor, x: Tensor, place: Place) -> Tensor:
        """Hooks work on x0; the table may work on something else."""
        kind = self._table.prediction
        if kind == "x0":
            return hook.predict(prediction, place)
        alpha, sigma = place.needed(type(hook).__name__)
        from_x, from_output = to_x0(kind, alpha, sigma)
        x0 = hook.predict(from_x * x + from_output * prediction, place)
        from_x, from_x0 = to_model(kind, alpha, sigma)
        return from_x * x + from_x0 * x0


def _overrides(hook: Hook, method: str) -> bool:
    return getattr(type(hook), method) is not getattr(Hook, method)
