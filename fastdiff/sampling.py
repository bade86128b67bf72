"""``fastdiff.sample``: draw samples from any model with any solver."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff._ext import DTYPE_CODES
from fastdiff.solvers import NoiseSchedule, SolverTable, make_table
from fastdiff.solvers.engine import StepInfo, run, state_dtype
from fastdiff.solvers.noise import GeneratorNoise, Noise, PhiloxNoise
from fastdiff.solvers.registry import Grid, get_solver

Seed = int | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator]


def sample(
    model: Callable[..., Any],
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    solver: str | SolverTable = "dpmpp_2m",
    steps: int = 20,
    schedule: str | NoiseSchedule | None = None,
    grid: Grid = None,
    prediction: str | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: float | Sequence[float] = 1.0,
    seed: Seed | None = None,
    generator: Generators | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[StepInfo], Any] | None = None,
    progress: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    drop_variance: bool = False,
    engine: str = "auto",
    **solver_options: Any,
) -> Tensor:
    """Draws samples: x_T is noise, the solver's table says the rest.

    model: called as ``model(x, t, **kwargs)`` with x [B, ...] and t [B]; t is int64 when every time
        of the run is whole, else of the state's dtype. Returns a tensor like x, or a tuple whose
        first entry is one, or an object with ``.sample`` (diffusers). A model with an attribute
        ``sampling`` (schedule, prediction, grid, shape) gives the defaults of those four.
    shape: [B, ...] of the result. Default: x's, or one image (or one per seed) of the model's.
    x: the state to start from instead of drawn noise; not modified. It is the state x_T itself: the
        table's ``init_scale`` is not applied.
    solver, steps, schedule, grid, prediction, solver_options: see
        :func:`fastdiff.solvers.make_table`; ``solver`` may also be a SolverTable.
    cond, uncond: keyword arguments for the model with and without the condition; tensors in them
        have the batch first (or 1, repeated). With guidance both are evaluated as one batch of 2B
        in the order [uncond, cond], output = uncond + guidance_scale*(cond - uncond). With
        ``guidance_scale=1`` only cond is evaluated.
    model_kwargs: further keyword arguments; tensors whose first dimension is B are repeated for the
        batch of 2B, everything else is passed as it is.
    seed: image i draws its own Philox stream seed + i, or seed[i]; the picture of a seed does not
        depend on the batch it is in. generator: draws of torch.randn, as diffusers makes them.
        Neither: PyTorch's global generator.
    device, dtype: of the model input and the result; default x's, else the model's parameters',
        else the CPU and float32. The state is float32 for half-precision dtypes. The model's
        output is converted to ``dtype`` when it has another one.
    callback: called after each step with a StepInfo (``.x`` is a view: clone it to keep it).
        Returning False stops the run, and the state at that point is the result.
    progress: shows a tqdm bar. drop_variance: a model with learned variance returns 2C channels;
        True uses the first C (the mean), without it that is an error.
    engine: "auto", "cpp" (RuntimeError where it cannot run) or "reference".

    Runs without autograd. Raises ValueError or TypeError for bad arguments and for a model output
    of the wrong kind, shape, dtype or device. NaNs are not looked for: that would cost a
    synchronisation per step.

    >>> image = fastdiff.sample(model, (1, 3, 32, 32), schedule="linear", seed=0)  # doctest: +SKIP
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator must not both be given")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    defaults = _model_defaults(model)
    shape, device, dtype = _state_facts(model, defaults, shape, x, seed, device, dtype)
    guided = _is_guided(guidance_scale, cond, uncond)
    kwargs = _model_arguments(shape[0], guided, cond, uncond, model_kwargs)
    scale: float | tuple[float, ...] = 1.0
    if guided:
        scale = guidance_scale if isinstance(guidance_scale, (int, float)) else (*guidance_scale,)
    table = _table(defaults, solver, steps, schedule, grid, prediction, scale, solver_options)

    held = state_dtype(dtype)
    noise = _noise(shape, seed, generator, dtype, held, device)
    if x is None:
        state = noise.initial()
        if table.init_scale != 1:
            state = state * table.init_scale
    else:
        state = x.detach().to(held)
    copies = 2 if guided else 1
    evaluate = _Evaluate(model, table, kwargs, shape, copies, dtype, state, drop_variance)

    bar: Any = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=len(table), desc=table.name)

    def on_step(info: StepInfo) -> bool:
        if bar is not None:
            bar.update()
        return callback is None or callback(info) is not False

    try:
        with torch.no_grad():
            result = run(
                table,
                evaluate.layout(state),
                evaluate,
                dtype=dtype,
                copies=copies,
                noise=noise,
                on_step=on_step if bar is not None or callback is not None else None,
                engine=engine,
            )
    finally:
        if bar is not None:
            bar.close()
    return result.to(dtype)


def _model_defaults(model: Any) -> Any:
    """The model's ``sampling`` when it is what the zoo's models carry, else None."""
    sampling = getattr(model, "sampling", None)
    if hasattr(sampling, "schedule") and hasattr(sampling, "prediction"):
        return sampling
    return None


def _table(
    defaults: Any,
    solver: str | SolverTable,
    steps: int,
    schedule: str | NoiseSchedule | None,
    grid: Grid,
    prediction: str | None,
    scale: float | tuple[float, ...],
    options: dict[str, Any],
) -> SolverTable:
    if isinstance(solver, SolverTable):
        if options:
            raise TypeError(f"solver is a finished table and takes no options, got {list(options)}")
        return solver if scale == 1 else solver.with_guidance(scale)
    get_solver(solver)  # the solver's name first: the likelier mistake
    if schedule is None:
        schedule = getattr(defaults, "schedule", None)
    if schedule is None:
        raise ValueError(
            "schedule must be given for a model without .sampling "
            "(a name such as 'scaled_linear', or a NoiseSchedule), got None"
        )
    if prediction is None:
        prediction = getattr(defaults, "prediction", None) or "eps"
    if grid is None:
        grid = getattr(defaults, "grid", None)
    if isinstance(grid, (list, np.ndarray)):
        grid = tuple(float(time) for time in grid)
    make: Callable[..., SolverTable] = _cached_table
    try:
        hash((solver, schedule, steps, grid, prediction, scale, *options.values()))
    except TypeError:
        make = make_table
    return make(
        solver,
        schedule,
        steps,
        grid=grid,
        prediction=prediction,
        guidance_scale=scale,
        **options,
    )


# A table depends on its arguments alone; making one takes longer than a step of a small model.
# `typed` keeps steps=True from finding the table of steps=1.
_cached_table = functools.lru_cache(maxsize=64, typed=True)(make_table)


def _state_facts(
    model: Any,
    defaults: Any,
    shape: Sequence[int] | None,
    x: Tensor | None,
    seed: Seed | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
    """Shape, device and dtype of the run, checked against each other."""
    if x is not None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPE_CODES:
            raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
        if shape is not None and tuple(shape) != tuple(x.shape):
            raise ValueError(f"shape must be x's, {tuple(x.shape)}, got {tuple(shape)}")
        shape = tuple(x.shape)
    elif shape is None:
        per_image = getattr(defaults, "shape", None)
        if per_image is None:
            raise ValueError("shape or x must be given for a model without .sampling, got neither")
        count = 1 if seed is None or isinstance(seed, (int, np.integer)) else len(seed)
        shape = (count, *per_image)
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError as error:
        raise TypeError(f"shape must be a sequence of integers, got {shape!r}") from error
    if not sizes or min(sizes) < 1:
        raise ValueError(f"shape must hold positive integers, batch first, got {shape}")

    reference = x
    if reference is None and isinstance(model, nn.Module):
        reference = next((p for p in model.parameters() if p.is_floating_point()), None)
    place = torch.device(device) if device is not None else None
    if place is None:
        place = torch.device("cpu") if reference is None else reference.device
    elif x is not None and (
        place.type != x.device.type or place.index not in (None, x.device.index)
    ):
        raise ValueError(f"device must be x's, {x.device}, got {place}")
    if dtype is None:
        dtype = torch.float32 if reference is None else reference.dtype
    if dtype not in DTYPE_CODES:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    return sizes, place, dtype


def _is_guided(guidance_scale: object, cond: object, uncond: object) -> bool:
    for name, value in (("cond", cond), ("uncond", uncond)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(
                f"{name} must be a dict of the model's keyword arguments, "
                f"got {type(value).__name__}"
            )
    if isinstance(guidance_scale, (int, float)) and not isinstance(guidance_scale, bool):
        scales: list[Any] = [guidance_scale]
    elif isinstance(guidance_scale, Sequence) and not isinstance(guidance_scale, str):
        scales = list(guidance_scale)
    else:
        raise TypeError(
            f"guidance_scale must be a number or one per step, got {type(guidance_scale).__name__}"
        )
    if not all(isinstance(g, (int, float)) and math.isfinite(g) for g in scales):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    guided = any(g != 1 for g in scales)
    if guided and (cond is None or uncond is None):
        missing = (
            "cond and uncond"
            if cond is None and uncond is None
            else ("cond" if cond is None else "uncond")
        )
        raise ValueError(
            f"guidance_scale must be 1 unless cond and uncond are given, got {guidance_scale} "
            f"without {missing}"
        )
    return guided


def _model_arguments(
    batch: int,
    guided: bool,
    cond: Mapping[str, Any] | None,
    uncond: Mapping[str, Any] | None,
    model_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The keyword arguments of every model call; stacked [uncond, cond] when guided."""
    if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a dict, got {type(model_kwargs).__name__}")
    shared = dict(model_kwargs or {})
    given = dict(cond if cond is not None else uncond or {})
    clash = sorted(shared.keys() & given.keys())
    if clash:
        raise ValueError(f"model_kwargs must not repeat arguments of cond, got {clash}")
    if not guided:
        return {**shared, **{k: _expand(f"cond[{k!r}]", v, batch) for k, v in given.items()}}
    without = dict(uncond or {})
    if given.keys() != without.keys():
        raise ValueError(
            f"uncond must have the keys of cond, {sorted(given)}, got {sorted(without)}"
        )
    stacked = {k: _stack(repr(k), without[k], given[k], batch) for k in given}
    for key, value in shared.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
            shared[key] = torch.cat([value, value])
    return {**shared, **stacked}


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


def _noise(
    shape: tuple[int, ...],
    seed: Seed | None,
    generator: Generators | None,
    dtype: torch.dtype,
    held: torch.dtype,
    device: torch.device,
) -> Noise:
    if seed is None:
        return GeneratorNoise(shape, generator, dtype=dtype, state_dtype=held, device=device)
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        seeds = [int(seed) + i for i in range(shape[0])]
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = list(seed)
    else:
        raise TypeError(f"seed must be an integer or one per image, got {type(seed).__name__}")
    return PhiloxNoise(shape, seeds, state_dtype=held, device=device)


class _Evaluate:
    """Calls the model and checks what it returns; one instance per run."""

    def __init__(
        self,
        model: Callable[..., Any],
        table: SolverTable,
        kwargs: dict[str, Any],
        shape: tuple[int, ...],
        copies: int,
        dtype: torch.dtype,
        state: Tensor,
        drop_variance: bool,
    ) -> None:
        self._model = model
        self._kwargs = kwargs
        self._shape = torch.Size((copies * shape[0], *shape[1:]))
        self._device = state.device
        self._dtype = dtype
        self._drop_variance = drop_variance
        self._format = torch.contiguous_format
        channels_last = state.dim() == 4 and state.is_contiguous(memory_format=torch.channels_last)
        if channels_last and not state.is_contiguous():
            self._format = torch.channels_last
        # One tensor per step, made before the run.
        self._times = table.time_tensors(self._shape[0], state_dtype(dtype), state.device)

    def layout(self, tensor: Tensor) -> Tensor:
        """``tensor`` in the run's memory format."""
        return tensor.contiguous(memory_format=self._format)

    def __call__(self, model_input: Tensor, row: int, /) -> Any:
        return self._model(model_input, self._times[row], **self._kwargs)

    def accept(self, output: Any, /) -> Tensor:
        """``output`` as a tensor like the model input; TypeError or ValueError when it is none."""
        if not isinstance(output, Tensor):
            output = _unwrap(output)
        if output.shape != self._shape:
            output = self._reshape(output)
        if output.dtype not in DTYPE_CODES:
            raise TypeError(f"model must return a floating-point tensor, got {output.dtype}")
        if output.device != self._device:
            raise ValueError(f"model must return a tensor on {self._device}, got {output.device}")
        return output.to(self._dtype).contiguous(memory_format=self._format)

    def _reshape(self, output: Tensor) -> Tensor:
        got, want = tuple(output.shape), tuple(self._shape)
        learned = (
            len(got) == len(want) > 1
            and got[1] == 2 * want[1]
            and (got[0], *got[2:]) == (want[0], *want[2:])
        )
        if learned and self._drop_variance:
            return output[:, : want[1]]
        hint = (
            ": twice the channels is a learned variance; drop_variance=True uses the mean"
            if learned
            else ""
        )
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
