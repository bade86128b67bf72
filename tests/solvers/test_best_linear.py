"""best_linear: its steps against their definition, its order, and its bar against diffusers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import solvers
from fastdiff.solvers.best_linear import best_step
from fastdiff.solvers.oracle import AnisotropicGaussian, GaussianMixture
from fastdiff.solvers.plot import ORACLES, error_of, initial

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


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
GRIDS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
KINDS = [
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_type": "heun"}),
    ("UniPCMultistepScheduler", {}),
    ("UniPCMultistepScheduler", {"solver_order": 3}),
    ("DEISMultistepScheduler", {}),
    ("DEISMultistepScheduler", {"solver_order": 3}),
    ("LMSDiscreteScheduler", {}),
]
LAMBDA = {"use_lu_lambdas": True}
REFERENCES = [
    *[(name, {**own, **grid}) for name, own in KINDS for grid in GRIDS],
    *[("DPMSolverSinglestepScheduler", grid) for grid in ({}, *GRIDS[3:])],
    ("DPMSolverMultistepScheduler", LAMBDA),
    ("DPMSolverMultistepScheduler", {**LAMBDA, "solver_order": 3}),
    ("DDIMScheduler", {"clip_sample": False}),
]


def _reference_error(name, config, count, model, x, truth):
    import diffusers

    scheduler = getattr(diffusers, name)(**SD, **config)
    try:
        scheduler.set_timesteps(count)
        state = x.float() * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(state, t).double()
            state = scheduler.step(model(seen, t.double()).float(), t, state).prev_sample
    except IndexError:  # repeated timesteps of the beta grid
        return math.inf
    return (state.double() - truth).pow(2).mean().sqrt().item()


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.filterwarnings("ignore")
def test_no_reference_is_closer_at_few_evaluations(name):
    """The default solver's bar: the best of diffusers' solvers on the best of its grids."""
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.set_verbosity_error()
    model = ORACLES[name]("scaled_linear", "eps")
    x, truth = initial(model, elements=512)
    for count in EVALUATIONS:
        table = solvers.make_table("best_linear", "scaled_linear", count)
        mine = error_of(table, model, x, truth)
        others = [_reference_error(*reference, count, model, x, truth) for reference in REFERENCES]
        assert mine <= min(others), REFERENCES[others.index(min(others))]


def test_it_is_what_sample_uses():
    model = GaussianMixture("scaled_linear", "eps")
    common = {"shape": (2, 8), "schedule": "scaled_linear", "steps": 6, "seed": 0}
    expected = fastdiff.sample(model, solver="best_linear", **common)
    assert torch.equal(fastdiff.sample(model, **common), expected)


@pytest.mark.parametrize("data_std", [0.0, -1.0, math.nan, "1"])
def test_bad_deviations_are_refused(data_std):
    with pytest.raises(ValueError, match="data_std must be positive"):
        solvers.make_table("best_linear", "linear", 5, data_std=data_std)


def test_data_of_another_scale_wants_its_deviation():
    model = AnisotropicGaussian("edm", "x0", covariance=0.01 * np.eye(8))
    x, truth = initial(model)
    errors = [
        error_of(solvers.make_table("best_linear", "edm", 8, prediction="x0", **o), model, x, truth)
        for o in ({}, {"data_std": 0.1})
    ]
    assert errors[1] < errors[0]
