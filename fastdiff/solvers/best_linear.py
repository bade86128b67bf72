r"""The best linear step: multistep coefficients by least squares over data of unknown scale.

A linear multistep method takes the next state from the current one and predictions m_j of x0. With
n^2 = alpha^2 + sigma^2, z = x/n and the angle phi = atan(sigma/alpha) (see ``oracle.py``) ::

    z(t) = a z(s) + sum_j w_j m_j

Every solver of this kind amounts to a choice of a and w_j. DPM-Solver++ and UniPC choose
a = sin t/sin s (the exact solution for a point) and the w_j of a polynomial in lambda. Here they
are those with the least expected squared error for normal data of mean mu and variance c, along
whose exact trajectories, xi ~ N(0, 1) being the same everywhere, ::

    z(phi)  = cos phi mu + sqrt(c cos^2 phi + sin^2 phi) xi
    m(phi)  = mu + c cos phi/sqrt(c cos^2 phi + sin^2 phi) xi

with nothing known of mu, so that cos t = a cos s + sum_j w_j, and c unknown: its logarithm has the
density c^(1/2) on data_std^2 [1/1000, 4]. (Directions of images and of latents have variances over
that many orders of magnitude: their spectra are power laws.) This is the best linear unbiased
predictor of statistics. The steps are exact to first order for all data and of third order for
smooth trajectories, since the functions above span constants, slopes and curvatures in phi.

As in UniPC (arXiv 2302.04867), the model's evaluation at a predicted state also corrects that state
by a second such step, to which the new prediction has been added, at no evaluation of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

from fastdiff.solvers.grids import MODES, TimeGrid, angle, check_choice, check_data_std
from fastdiff.solvers.multistep import History, check_joined, check_order
from fastdiff.solvers.prediction import Step, canonical, steps_of, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

# Variances of the data in units of data_std^2, and the root of their weights, which sum to 1.
_VARIANCES = np.geomspace(1e-3, 4.0, 48)
_ROOTS = np.sqrt(_VARIANCES**0.5 / np.sum(_VARIANCES**0.5))


def _state(variances: np.ndarray, phi: float) -> np.ndarray:
    return np.asarray(_ROOTS * np.sqrt(variances * math.cos(phi) ** 2 + math.sin(phi) ** 2))


def _clean(variances: np.ndarray, phi: float) -> np.ndarray:
    return np.asarray(_ROOTS**2 * variances * math.cos(phi) / _state(variances, phi))


@functools.lru_cache(maxsize=4096)
def best_step(
    start: float, end: float, nodes: tuple[float, ...], data_std: float = 1.0
) -> tuple[float, ...]:
    """(a, w_0, w_1, ..): z(end) = a z(start) + sum_j w_j m(nodes[j]), all angles in 0..pi/2.

    The nodes are distinct. In the limits start = end and nodes next to each other, the step is
    that of the directions which are still determined.
    """
    if start == end:
        return (1.0, *[0.0] * len(nodes))
    variances = data_std**2 * _VARIANCES
    first = _clean(variances, nodes[0])
    # w_0 follows from the condition on the mean.
    columns = [_state(variances, start) - math.cos(start) * first]
    columns += [_clean(variances, node) - first for node in nodes[1:]]
    target = _state(variances, end) - math.cos(end) * first
    # The step for a point first: what it leaves tends to 0 with the step.
    a = math.sin(end) / math.sin(start)
    matrix = np.stack(columns, axis=1)
    sizes = np.linalg.norm(matrix, axis=0)
    found = np.linalg.lstsq(matrix / sizes, target - a * columns[0], rcond=1e-9)[0] / sizes
    a += float(found[0])
    rest = [float(value) for value in found[1:]]
    return (a, math.cos(end) - a * math.cos(start) - sum(rest), *rest)


def best_linear(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    order: int = 3,
    data_std: float = 1.0,
) -> SolverTable:
    """The table of best linear steps.

    prediction: what the model predicts. order: how many predictions a step reads, 1 to 4.
    data_std: the data's standard deviation, 1 for latents; a wrong one costs accuracy, not
        convergence. mode: both are the same; there is no reference implementation.

    Raises ValueError for options outside those, and for a grid whose steps do not join.
    """
    check_choice("mode", mode, MODES)
    kind = canonical(prediction)
    check_order(order, 4)
    check_data_std(data_std)
    check_joined(grid)
    n = len(grid)
    angles = [angle(lam) for lam in (*grid.lambdas.tolist(), float(grid.targets[-1]))]
    history = History(2, order - 1)
    rows: list[Row] = []
    before: Step | None = None

    def weights(start: int, newest: int) -> list[float]:
        """Coefficients of x(start) and of the predictions newest, newest - 1, .. in x(start+1)."""
        count = min(order, newest + 1)
        nodes = tuple(angles[newest - j] for j in range(count))
        a, *rest = best_step(angles[start], angles[start + 1], nodes, float(data_std))
        return [a, *rest, *[0.0] * (order - count)]

    for step in steps_of(schedule, grid, kind):
        i = step.index
        norm, norm_to = math.hypot(step.alpha, step.sigma), math.hypot(step.alpha_to, step.sigma_to)
        # The state this step starts from: what the model saw, or its correction.
        state, now, past = (1.0, 0.0), 0.0, [0.0] * (order - 1)
        if before is not None and before.h > 0:
            a, now, *past = weights(i - 1, i)
            state = (0.0, a * norm / math.hypot(before.alpha, before.sigma))
            now, past = norm * now, [norm * value for value in past]
        a, new, *older = weights(i, i)
        a = a * norm_to / norm
        moved = Update(
            0,
            history.row(i, [a * s for s in state], _sum(past, older, a, norm_to)),
            a * now + norm_to * new,
        )
        start = Update(1, history.row(i, state, past), now)
        rows.append(step.row(*([moved] if i == n - 1 else [moved, start, *history.keep(i)])))
        before = step
    return table_of(
        "best_linear",
        schedule,
        grid,
        rows,
        registers=history.registers,
        description=f"order {order}, data_std={data_std:g}, {kind} model, {mode}",
    )


def _sum(past: Sequence[float], older: Sequence[float], a: float, norm: float) -> list[float]:
    return [a * p + norm * w for p, w in zip(past, older, strict=True)]
