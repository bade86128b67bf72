"""Error against model evaluations, measured on the oracles: a table of numbers and a picture.

The error of a solver is the root mean square, over elements, of the difference between its sample
and the exact solution of the probability-flow ODE at the clean end, both from one state at the
schedule's noisiest level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastdiff._canvas import COLOURS, GREY, LIGHT, MARKERS, Canvas
from fastdiff.solvers.named import get_schedule
from fastdiff.solvers.oracle import AnisotropicGaussian, GaussianMixture, Oracle
from fastdiff.solvers.registry import Grid, make_table
from fastdiff.solvers.schedules import NoiseSchedule, unknown
from fastdiff.solvers.table import SolverTable

ORACLES: dict[str, Callable[..., Oracle]] = {
    # Three wide components that overlap; three narrow ones; variances over three decades.
    "mixture": GaussianMixture,
    "narrow": partial(
        GaussianMixture, weights=(0.4, 0.35, 0.25), means=(-1.0, 0.2, 1.3), stds=(0.05, 0.1, 0.08)
    ),
    "gaussian": partial(
        AnisotropicGaussian,
        covariance=AnisotropicGaussian.conditioned(8, 1e3),
        mean=np.linspace(-1.0, 1.0, 8),
    ),
}
SOLVERS_SHOWN = ("best_linear", "unipc", "dpmpp_2m", "dpmpp_3m", "deis", "heun", "pndm", "euler")
COUNTS = (5, 8, 10, 15, 20, 30, 40)


def make_oracle(name: str, schedule: str | NoiseSchedule, prediction: str) -> Oracle:
    """An oracle by its name in ORACLES; ValueError for another."""
    if name not in ORACLES:
        raise ValueError(unknown("oracle", name, list(ORACLES)))
    return ORACLES[name](schedule, prediction)


def initial(oracle: Oracle, elements: int = 2048) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_T, the clean sample it belongs to), float64 [elements/8, 8], always the same noise."""
    schedule = oracle.schedule
    lam = float(schedule.lambda_at(schedule.t_max))
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(elements // 8, 8, generator=generator, dtype=torch.float64)
    x = math.hypot(*map(float, schedule.marginal(lam))) * z
    return x, oracle.endpoint(x, lam)


def error_of(table: SolverTable, oracle: Oracle, x: torch.Tensor, truth: torch.Tensor) -> float:
    """The root mean square error of one run; ValueError for a table that draws noise."""
    from fastdiff.sampling import sample

    if table.num_draws:
        raise ValueError(f"solver must be deterministic to have an error, got {table.name}")
    return float((sample(oracle, x=x, solver=table) - truth).pow(2).mean().sqrt())


def table_within(
    solver: str, schedule: NoiseSchedule, evaluations: int, **options: Any
) -> SolverTable | None:
    """The solver's table with the most steps that takes at most ``evaluations``; None: none does.

    Raises what ``make_table`` raises for ``steps=evaluations``.
    """
    table = make_table(solver, schedule, evaluations, **options)
    steps = evaluations
    while table.evaluations > evaluations and steps > 1:
        steps -= 1
        table = make_table(solver, schedule, steps, **options)
    return table if table.evaluations <= evaluations else None


def measure(
    solvers: Sequence[str] = SOLVERS_SHOWN,
    evaluations: Sequence[int] = COUNTS,
    *,
    oracle: str = "mixture",
    schedule: str | NoiseSchedule = "scaled_linear",
    grid: Grid = None,
    prediction: str = "eps",
    mode: str = "parity",
) -> dict[str, list[float]]:
    """The errors of each solver at each number of model evaluations; NaN where it takes more.

    oracle: a name in ORACLES. The other arguments are those of ``make_table``. A solver that takes
    more than one evaluation per step has the most steps that fit.

    Raises ValueError for an unknown name, a stochastic solver or a refused combination.
    """
    chosen = get_schedule(schedule)
    model = make_oracle(oracle, chosen, prediction)
    x, truth = initial(model)
    errors: dict[str, list[float]] = {}
    for name in solvers:
        errors[name] = []
        for count in evaluations:
            table = table_within(name, chosen, count, grid=grid, prediction=prediction, mode=mode)
            errors[name].append(math.nan if table is None else error_of(table, model, x, truth))
    return errors


def as_text(errors: Mapping[str, Sequence[float]], evaluations: Sequence[int]) -> str:
    """The numbers as a Markdown table, one row per solver."""
    width = max(len("evaluations"), *(len(name) + 2 for name in errors))
    rows = [
        [f"{'evaluations':{width}}", *(f"{count:>8}" for count in evaluations)],
        ["-" * width, *("-" * 7 + ":" for _ in evaluations)],
    ]
    for name, values in errors.items():
        cells = [f"{value:8.2e}" if math.isfinite(value) else f"{'-':>8}" for value in values]
        rows.append([f"{f'`{name}`':{width}}", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


_SIZE = (920, 580)
_BOX = (84, 56, 730, 510)  # left, top, right, bottom of the axes


def draw(
    errors: Mapping[str, Sequence[float]], evaluations: Sequence[int], title: str = ""
) -> Image.Image:
    """The numbers as a picture, both axes logarithmic.

    errors: per solver, one number for each entry of ``evaluations``; NaN leaves a gap. At most
    eight solvers, which differ in colour and in marker.

    Raises ValueError for more solvers, none, or no positive number.
    """
    if not 1 <= len(errors) <= len(COLOURS):
        raise ValueError(f"solvers must be 1 to {len(COLOURS)} names, got {len(errors)}")
    shown = [v for values in errors.values() for v in values if math.isfinite(v) and v > 0]
    if not shown:
        raise ValueError("errors must hold a positive finite number, got none")
    left, top, right, bottom = _BOX
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    high = max(high, low + 1)
    first, last = math.log(min(evaluations) * 0.93), math.log(max(evaluations) * 1.07)

    def across(count: float) -> float:
        return left + (right - left) * (math.log(count) - first) / (last - first)

    def down(error: float) -> float:
        return bottom - (bottom - top) * (math.log10(error) - low) / (high - low)

    canvas = Canvas(_SIZE)
    for decade in range(low, high + 1):
        for minor in range(2, 10) if decade < high else ():
            y = down(minor * 10.0**decade)
            canvas.line([(left, y), (right, y)], "#F2F2F2", 1)
    for decade in range(low, high + 1):
        y = down(10.0**decade)
        canvas.line([(left - 5, y), (right, y)], LIGHT, 1)
        canvas.text(left - 10, y, f"1e{decade}", 13, "rm", GREY)
    for count in sorted(set(evaluations)):
        x = across(count)
        canvas.line([(x, top), (x, bottom + 5)], LIGHT, 1)
        canvas.text(x, bottom + 10, str(count), 13, "mt", GREY)
    canvas.line([(left, top), (left, bottom), (right, bottom)], GREY, 1.5)
    canvas.text((left + right) / 2, bottom + 36, "model evaluations", 15, "mt", GREY)
    canvas.upright(22, (top + bottom) / 2, "root mean square error", 15)
    canvas.text(left, 28, title, 16, "lm", "black")

    styles = list(zip(errors.items(), COLOURS, MARKERS, strict=False))
    # The first is drawn last, above the others.
    for (_, values), colour, kind in reversed(styles):
        run: list[tuple[float, float]] = []
        for count, value in [*zip(evaluations, values, strict=True), (1, math.nan)]:
            if math.isfinite(value) and value > 0:
                run.append((across(count), down(value)))
                continue
            if len(run) > 1:
                canvas.line(run, colour, 2)
            for x, y in run:
                canvas.marker(kind, x, y, colour)
            run = []
    for i, ((name, _), colour, kind) in enumerate(styles):
        y = top + 12 + 26 * i
        canvas.line([(right + 18, y), (right + 50, y)], colour, 2)
        canvas.marker(kind, right + 34, y, colour)
        canvas.text(right + 60, y, name, 14, "lm", "black")
    return canvas.finished()
