"""Every combination gives finite numbers, or is refused by an error that says what to change."""

from __future__ import annotations

import itertools
import math
import random
import re
import warnings
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff import solvers
from fastdiff.solvers.grids import SPACINGS
from fastdiff.solvers.oracle import GaussianMixture
from fastdiff.solvers.registry import OWN_GRIDS

SCHEDULES: dict[str, Any] = {
    **{name: solvers.get_schedule(name) for name in solvers.SCHEDULES},
    "zero SNR": solvers.zero_terminal_snr(solvers.scaled_linear()),
    "shifted flow": solvers.Flow(shift=3.0),
}
GRIDS = (None, *SPACINGS, *OWN_GRIDS)
PREDICTIONS = ("eps", "v", "x0", "flow", "score", "edm")
STEPS = (1, 2, 3, 7, 20, 100, 999, 1000)
MODES = ("parity", "exact")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def options(solver: str) -> dict[str, Any]:
    return {"steps_per_level": 1} if solver == "annealed_langevin" else {}


def build(solver: str, schedule: str, grid: Any, prediction: str, steps: int, mode: str) -> Any:
    """The table, or None where it is refused properly."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return solvers.make_table(
                solver,
                SCHEDULES[schedule],
                steps,
                grid=grid,
                prediction=prediction,
                mode=mode,
                **options(solver),
            )
        except (ValueError, TypeError) as error:
            message = str(error)
    # "<argument> must <rule>, got <value>", or the grids' "... : use fewer steps".
    assert re.search(r"\b[a-z_0-9]+( and [a-z_]+)* must |use fewer steps|needs SciPy", message)
    return None


def chosen(count: int, *axes: Any, seed: int = 1) -> list[tuple[Any, ...]]:
    """``count`` random cases and, besides, every value of each axis with every solver."""
    generator = random.Random(seed)
    cases = [tuple(generator.choice(axis) for axis in axes) for _ in range(count)]
    first = axes[0]
    for axis in range(1, len(axes)):
        for solver, value in itertools.product(first, axes[axis]):
            case = [solver, *(generator.choice(other) for other in axes[1:])]
            case[axis] = value
            cases.append(tuple(case))
    return cases


def test_tables_are_finite_or_refused():
    built = refused = 0
    axes = (list(solvers.SOLVERS), list(SCHEDULES), GRIDS, PREDICTIONS, STEPS, MODES)
    for solver, schedule, grid, prediction, steps, mode in chosen(2500, *axes):
        if steps > 100 and built % 3:  # the long ones take long
            steps = 20
        table = build(solver, schedule, grid, prediction, steps, mode)
        built, refused = built + (table is not None), refused + (table is None)
    # A table's construction refuses every number that is not finite.
    assert built > 1000
    assert refused > 200


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_finite(dtype):
    axes = (list(solvers.SOLVERS), list(SCHEDULES), GRIDS, PREDICTIONS, (1, 2, 5, 12), MODES)
    ran = 0
    for solver, schedule, grid, prediction, steps, mode in chosen(150, *axes, seed=2)[:420]:
        table = build(solver, schedule, grid, prediction, steps, mode)
        if table is None or len(table) > 60:
            continue
        model = GaussianMixture(SCHEDULES[schedule], prediction)
        low = float(SCHEDULES[schedule].lambda_at(SCHEDULES[schedule].t_max))
        if prediction in ("eps", "score") and low < -9 and dtype != torch.float64:
            continue  # 1/alpha there is more than these dtypes' digits: x0 is lost in the model
        try:
            result = fastdiff.sample(
                model, (2, 3), solver=table, dtype=dtype, seed=ran, engine="auto"
            )
        except ZeroDivisionError:
            # The oracle itself has no finite answer there (a score at sigma = 0).
            assert math.isinf(float(SCHEDULES[schedule].lambda_at(SCHEDULES[schedule].t_min)))
            continue
        assert result.isfinite().all(), (solver, schedule, grid, prediction, steps, mode)
        ran += 1
    assert ran > 100
