"""``fastdiff.sample``: draw samples from any model with any solver."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff._ext import DTYPE_CODES
from fastdiff.sampling.calls import schedule_for
from fastdiff.sampling.guidance import (
    Guidance,
    Scale,
    TableGuidance,
    check_scale,
    guided_table,
)
from fastdiff.sampling.hooks import Hook
from fastdiff.sampling.run import Run
from fastdiff.sampling.state import RunState
from fastdiff.solvers import NoiseSchedule, SigmaSchedule, SolverTable, make_table
from fastdiff.solvers.engine import StepInfo, state_dtype
from fastdiff.solvers.noise import GeneratorNoise, Noise, PhiloxNoise
from fastdiff.solvers.registry import Grid, get_solver, start_of

Seed = int | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator]


def sample(
    model: Callable[..., Any],
    shape: Sequence[int] | None = None,
    *,
    x: Tensor | None = None,
    init: Tensor | None = None,
    strength: float = 1.0,
    solver: str | SolverTable = "best_linear",
    steps: int = 20,
    schedule: str | NoiseSchedule | None = None,
    grid: Grid = None,
    sigmas: Sequence[float] | Tensor | None = None,
    prediction: str | None = None,
    cond: Mapping[str, Any] | None = None,
    uncond: Mapping[str, Any] | None = None,
    guidance_scale: Scale = 1.0,
    guidance: Guidance | None = None,
    hooks: Sequence[Hook] = (),
    seed: Seed | None = None,
    generator: Generators | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[StepInfo], Any] | None = None,
    progress: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
    drop_variance: bool = False,
    resume: RunState | None = None,
    engine: str = "auto",
    **solver_options: Any,
) -> Tensor:
    """Draws samples: x_T is noise, the solver's table says the rest.

    model: called as ``model(x, t, **kwargs)`` with x [B, ...] and t [B]; t is int64 when every time
        of the run is whole, else of the state's dtype. Returns a tensor like x, or a tuple whose
        first entry is one, or an object with ``.sample`` (diffusers). A model with an attribute
        ``sampling`` (schedule, prediction, grid, shape) gives the defaults of those four; one with
        ``time == "sigma"`` is given sigma whatever the times of its sigma schedule.
    shape: [B, ...] of the result. Default: x's, or one image (or one per seed) of the model's.
    x: the state to start from instead of drawn noise; not modified. It is the state x_T itself: the
        table's ``init_scale`` is not applied.
    init, strength: image-to-image (SDEdit, arXiv 2108.01073): the run starts from the clean samples
        ``init`` [B, ...], brought to the noise of the first of the last int(strength*N) steps.
    solver, steps, schedule, grid, prediction, solver_options: see
        :func:`fastdiff.solvers.make_table`; ``solver`` may also be a SolverTable.
    sigmas: instead of grid, the noise levels sigma/alpha of the steps, decreasing; a last 0 is the
        clean sample. Without a schedule this is k-diffusion's convention: ``model(x, sigma)``
        returns the clean sample (unless ``prediction`` says otherwise), x = x0 + sigma*z.
    cond, uncond: keyword arguments for the model with and without the condition (or with a negative
        prompt); tensors in them have the batch first (or 1, repeated). With guidance both are
        evaluated as one batch of 2B in the order [uncond, cond], output = uncond +
        guidance_scale*(cond - uncond). With ``guidance_scale=1`` only cond is evaluated.
    guidance: further forms of guidance, instead of guidance_scale; see :class:`Guidance`.
    hooks: thresholding, inpainting, ControlNet, previews; see ``fastdiff.sampling.hooks``.
    model_kwargs: further keyword arguments; tensors whose first dimension is B are repeated for the
        batch of 2B, everything else is passed as it is.
    seed: image i draws its own Philox stream seed + i, or seed[i]; the picture of a seed does not
        depend on the batch it is in. generator: draws of torch.randn, as diffusers makes them.
        Neither: PyTorch's global generator.
    device, dtype: of the model input and the result; default x's, else the model's parameters',
        else the CPU and float32. The state is float32 for half-precision dtypes. The model's
        output is converted to ``dtype`` when it has another one.
    callback: called after each step with a StepInfo (``.x`` is a view, to be read: clone it to keep
        it, use a hook to change it). Returning False stops the run, and the state at that point is
        the result; ``info.capture()`` gives what ``resume`` goes on from.
    progress: shows a tqdm bar. drop_variance: a model with learned variance returns 2C channels;
        True uses the first C (the mean), without it that is an error unless the solver uses it.
    resume: a RunState: the run goes on after the step it was captured in, with its table, state and
        noise; the model, its conditions, ``guidance`` and ``hooks`` are given again.
    engine: "auto", "graph", "cpp" or "reference". "graph" replays one recorded step for all rows
        (see ``fastdiff/sampling/captured.py``); RuntimeError where it or "cpp" cannot run. "auto"
        replays where it can: models of ``fastdiff.compile`` on CUDA devices, in runs that nothing
        looks at between the steps: no callback, progress bar or hook, no guidance beyond a scale
        for every step, noise by ``seed`` or none. Else ``fastdiff.report(model).stepwise`` says
        why, as does the logger "fastdiff.sampling" at level DEBUG.

    Runs without autograd. Raises ValueError or TypeError for bad arguments and for a model output
    of the wrong kind, shape, dtype or device. NaNs are not looked for: that would cost a
    synchronisation per step.

    >>> image = fastdiff.sample(model, (1, 3, 32, 32), schedule="linear", seed=0)  # doctest: +SKIP
    """
    _check_arguments(model, x, init, strength, seed, generator, callback, hooks, resume, shape)
    if guidance is None:
        guidance = _plain_guidance(guidance_scale)
    elif check_scale("guidance_scale", guidance_scale) != 1:
        raise ValueError(f"guidance_scale must be 1 when guidance is given, got {guidance_scale}")
    defaults = _model_defaults(model)
    given = resume.x if resume is not None else init if x is None else x
    if dtype is None and resume is not None:
        dtype = resume.dtype
    shape, device, dtype = state_facts(
        model, defaults, shape, given, seed, device, dtype, "x" if init is None else "init"
    )
    if resume is not None:
        if solver_options:
            raise TypeError(f"resume has its table and takes no options, got {[*solver_options]}")
        table = resume.table
    else:
        options = dict(solver_options, sigmas=sigmas) if sigmas is not None else solver_options
        if strength != 1:
            options = dict(options, strength=float(strength))
        table = _table(model, solver, steps, schedule, grid, prediction, guidance, options)
    run = Run(
        model,
        shape,
        device,
        dtype,
        noise=noise_of(shape, seed, generator, dtype, device) if resume is None else resume.noise(),
        guidance=guidance,
        hooks=tuple(hooks),
        cond=cond,
        uncond=uncond,
        model_kwargs=model_kwargs,
        drop_variance=drop_variance,
        engine=engine,
        initial=None if resume is None else resume.initial,
    )
    run.check(table)
    done = 0 if resume is None else resume.next_row
    state = run.start(table, x if resume is None else resume.x, init)
    run.begin(table, state)
    if done == len(table):
        return state.to(dtype)
    bar: Any = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=len(table), desc=table.name, initial=done)

    def after(info: StepInfo) -> bool:
        if bar is not None:
            bar.update()
        if callback is None:
            return True
        captured = info.with_capture(lambda: run.capture(info, table))
        return callback(captured) is not False

    try:
        result = run.loop(
            table,
            state,
            after=after if bar is not None or callback is not None else None,
            resume=None if resume is None else (done, resume.registers),
            owned=run.owns(state, given),
        )
    finally:
        if bar is not None:
            bar.close()
    return result.to(dtype)


def _check_arguments(
    model: object,
    x: object,
    init: object,
    strength: object,
    seed: object,
    generator: object,
    callback: object,
    hooks: object,
    resume: object,
    shape: object,
) -> None:
    """The kinds of the arguments, and which of them exclude each other."""
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable, got {type(callback).__name__}")
    if seed is not None and generator is not None:
        raise ValueError("seed and generator must not both be given")
    if init is not None and x is not None:
        raise ValueError("x must be None when init is given, got both")
    if not isinstance(hooks, Sequence) or not all(isinstance(hook, Hook) for hook in hooks):
        raise TypeError(f"hooks must be a list of fastdiff.sampling.Hook, got {hooks!r}")
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"strength must be a number, got {type(strength).__name__}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    if init is None and strength != 1:
        raise ValueError(f"strength must be 1 unless init is given, got {strength}")
    if resume is None:
        return
    if not isinstance(resume, RunState):
        raise TypeError(f"resume must be a RunState, got {type(resume).__name__}")
    others = {"x": x, "init": init, "seed": seed, "generator": generator, "shape": shape}
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} must be None when resume is given")


@functools.lru_cache(maxsize=64, typed=True)
def _guidance_of(scale: float | tuple[float, ...]) -> Guidance:
    return Guidance(scale)


def _plain_guidance(scale: object) -> Guidance:
    return _guidance_of(check_scale("guidance_scale", scale))


def _model_defaults(model: Any) -> Any:
    """The model's ``sampling`` when it is what the zoo's models carry, else None."""
    sampling = getattr(model, "sampling", None)
    if hasattr(sampling, "schedule") and hasattr(sampling, "prediction"):
        return sampling
    return None


def _table(
    model: Any,
    solver: str | SolverTable,
    steps: int,
    schedule: str | NoiseSchedule | None,
    grid: Grid,
    prediction: str | None,
    guidance: Guidance,
    options: dict[str, Any],
) -> SolverTable:
    if isinstance(solver, SolverTable):
        given = {key: value for key, value in options.items() if key != "strength"}
        if given:
            raise TypeError(f"solver is a finished table and takes no options, got {list(given)}")
        if "strength" in options:
            solver = solver.from_step(start_of(len(solver), options["strength"]))
        return guided_table(solver, guidance.in_table)
    get_solver(solver)  # the solver's name first: the likelier mistake
    defaults = _model_defaults(model)
    if "sigmas" in options:
        levels = np.asarray(options["sigmas"], dtype=np.float64)
        if levels.ndim != 1:
            raise ValueError(f"sigmas must be a list of numbers, got shape {levels.shape}")
        options = dict(options, sigmas=tuple(levels.tolist()))
        if schedule is None and not hasattr(defaults, "schedule"):
            schedule = _levels_alone(options["sigmas"])
            prediction = prediction or "x0"
    if schedule is None:
        schedule = getattr(defaults, "schedule", None)
    if schedule is None:
        raise ValueError(
            "schedule must be given for a model without .sampling "
            "(a name such as 'scaled_linear', or a NoiseSchedule), got None"
        )
    if prediction is None:
        prediction = getattr(defaults, "prediction", None) or "eps"
    if grid is None and "sigmas" not in options:
        grid = getattr(defaults, "grid", None)
    if isinstance(grid, (list, np.ndarray)):
        grid = tuple(float(time) for time in grid)
    schedule = schedule_for(model, schedule)
    make: Callable[..., SolverTable] = _cached_table
    arguments = (solver, schedule, steps, grid, prediction, guidance.in_table)
    try:
        hash((*arguments, *options.values()))
    except TypeError:
        make = _make_table
    return make(*arguments, **options)


def _make_table(
    solver: str,
    schedule: str | NoiseSchedule,
    steps: int,
    grid: Grid,
    prediction: str,
    guidance: TableGuidance,
    **options: Any,
) -> SolverTable:
    table = make_table(solver, schedule, steps, grid=grid, prediction=prediction, **options)
    return guided_table(table, guidance)


# A table depends on its arguments alone; making one takes longer than a step of a small model.
# `typed` keeps steps=True from finding the table of steps=1.
_cached_table = functools.lru_cache(maxsize=64, typed=True)(_make_table)


def _levels_alone(sigmas: tuple[float, ...]) -> NoiseSchedule:
    """The schedule x = x0 + sigma*z through these levels."""
    above = [s for s in sigmas if s > 0]
    if len(above) < 1 or not np.all(np.isfinite(sigmas)):
        raise ValueError(f"sigmas must be finite and start above 0, got {sigmas}")
    return SigmaSchedule(min(above) / 2, max(above) * 2, name="sigmas")


def state_facts(
    model: Any,
    defaults: Any,
    shape: Sequence[int] | None,
    x: Tensor | None,
    seed: Seed | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    name: str,
) -> tuple[tuple[int, ...], torch.device, torch.dtype]:
    """Shape, device and dtype of the run, checked against each other; ``name`` is what x is."""
    if x is not None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPE_CODES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {x.dtype}")
        if shape is not None and tuple(shape) != tuple(x.shape):
            raise ValueError(f"shape must be {name}'s, {tuple(x.shape)}, got {tuple(shape)}")
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
        raise ValueError(f"device must be {name}'s, {x.device}, got {place}")
    if dtype is None:
        dtype = torch.float32 if reference is None else reference.dtype
    if dtype not in DTYPE_CODES:
        raise TypeError(f"dtype must be float32, float16, bfloat16 or float64, got {dtype}")
    return sizes, place, dtype


def noise_of(
    shape: tuple[int, ...],
    seed: Seed | None,
    generator: Generators | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Noise:
    held = state_dtype(dtype)
    if seed is None:
        return GeneratorNoise(shape, generator, dtype=dtype, state_dtype=held, device=device)
    if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
        seeds = [int(seed) + i for i in range(shape[0])]
    elif isinstance(seed, Sequence) and not isinstance(seed, str):
        seeds = list(seed)
    else:
        raise TypeError(f"seed must be an integer or one per image, got {type(seed).__name__}")
    return PhiloxNoise(shape, seeds, state_dtype=held, device=device)
