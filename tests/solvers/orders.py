"""Measuring an order of convergence."""

from __future__ import annotations

import itertools
import math

import numpy as np

from fastdiff.solvers import NoiseSchedule, TimeGrid


def lambda_grid(
    schedule: NoiseSchedule, start: float, end: float, steps: int, power: int = 1
) -> TimeGrid:
    """Uniform in (lambda - start)^(1/power).

    A multistep solver's first step is of order 1: at power 2 it is h^2 long, its error h^4.
    """
    points = start + (end - start) * np.linspace(0, 1, steps + 1) ** power
    return TimeGrid("test", schedule.time_at(points[:-1]), points[:-1], points[1:], steps)


def orders(errors: list[float]) -> list[float]:
    """The order that each halving of the step shows."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]
