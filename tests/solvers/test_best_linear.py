"""best_linear: its steps against their definition, its order, and its bar against diffusers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import solvers
from fastdiff.solvers.best_linear import best_step
from fastdiff.solvers.oracle import GaussianMixture

EVALUATIONS = (5, 8, 10, 15, 20)


def test_every_step_keeps_a_constant_and_the_order_of_its_nodes():
    for start, end in ((1.5, 1.2), (1.2, 0.4), (0.3, 0.0), (math.pi / 2, 1.5)):
        for nodes in ((start,), (start, start + 0.01), (end, start, start + 0.02)):
            if len(set(nodes)) < len(nodes) or max(nodes) > math.pi / 2 + 0.03:
                continue
            a, *weights = best_step(start, end, nodes)
            assert a * math.cos(start) + sum(weights) == pytest.approx(math.cos(end), abs=1e-13)


def test_steps_are_the_least_squares_solution():
    """Any other step, unbiased too, has a larger expected error; from the definition."""
    start, end, nodes = 1.1, 0.6, (1.1, 1.3, 1.45)
    found = np.array(best_step(start, end, nodes))
    c = np.geomspace(1e-3, 4, 48)
    density = c**0.5 / np.sum(c**0.5)

    def spread(phi):
        return np.sqrt(c * np.cos(phi) ** 2 + np.sin(phi) ** 2)

    def risk(step):
        a, *weights = step
        gap = a * spread(start) - spread(end)
        for weight, node in zip(weights, nodes, strict=True):
            gap = gap + weight * c * np.cos(node) / spread(node)
        return float(density @ gap**2)

    best = risk(found)
    rng = np.random.default_rng(0)
    for _ in range(50):
        change = rng.normal(size=4) * 10.0 ** rng.uniform(-4, -1)
        change[1] = -change[0] * math.cos(start) - change[2:].sum()  # still unbiased
        assert risk(found + change) > best


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence(order):
    schedule = solvers.scaled_linear()
    model = GaussianMixture(schedule, "eps")
    start, end = -2.0, 3.0
    x = torch.linspace(-2.5, 2.5, 64, dtype=torch.float64).reshape(1, 64)
    truth = model.endpoint(x, start, end)
    errors = []
    for steps in (640, 1280):
        points = start + (end - start) * np.linspace(0, 1, steps + 1) ** 2
        times = schedule.time_at(points[:-1])
        grid = solvers.TimeGrid("test", times, points[:-1], points[1:], steps)
        table = solvers.best_linear(schedule, grid, order=order)
        result = fastdiff.sample(_exact(model, table), x=x, solver=table)
        errors.append((result - truth).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15), errors


def _exact(model, table):
    """The model at the level of the row whose time it is given: times are rounded to float64."""
    levels = {row.time: row.level for row in table.rows}
    return lambda x, t: model.at(x, *levels[float(t.reshape(-1)[0])])
