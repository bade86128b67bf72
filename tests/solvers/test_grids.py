"""Grids given by their noise levels: explicit sigmas, SGM uniform, align your steps for SVD."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from mixture import Mixture

import fastdiff
from fastdiff import solvers
from fastdiff.solvers import make_grid, make_table, sigma_grid

AYS_SVD = [700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034]


def _sigmas(grid: solvers.TimeGrid) -> np.ndarray:
    return np.exp(-np.append(grid.lambdas, grid.targets[-1]))


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "euler", "ddim"])
def test_sgm_uniform_is_comfyuis(solver, steps):
    """Timesteps linspace(T-1, 0, N+1) without the last; ln sigma linear between timesteps; 0."""
    schedule = solvers.scaled_linear()
    table = make_table(solver, schedule, steps, grid="sgm_uniform")
    times = np.linspace(999, 0, steps + 1)[:-1]
    np.testing.assert_allclose(table.times, times, rtol=1e-14)
    acp = schedule.alphas_cumprod
    sigma = np.exp(np.interp(times, np.arange(1000), 0.5 * np.log((1 - acp) / acp)))
    ours = [row.level[1] / row.level[0] for row in table.rows]
    np.testing.assert_allclose(ours, sigma, rtol=1e-12)
    assert table.end_level == (1.0, 0.0)
    grid = make_grid(schedule, steps, "sgm_uniform", final="sigma_min")
    assert _sigmas(grid)[-1] == pytest.approx(math.sqrt(1 / acp[0] - 1), rel=1e-12)


def test_sgm_uniform_in_continuous_time_is_the_uniform_grid():
    a = make_table("dpmpp_2m", "flow", 6, grid="sgm_uniform", prediction="flow")
    assert a.rows == make_table("dpmpp_2m", "flow", 6, grid="linspace", prediction="flow").rows


def test_aligned_steps_of_svd_are_the_published_ones():
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    schedule = solvers.edm(0.002, 700.0)
    grid = make_grid(schedule, 10, "ays_svd")
    theirs = scheduling.AysSchedules["StableDiffusionVideoSigmas"]
    assert theirs[:-1] == AYS_SVD
    np.testing.assert_allclose(_sigmas(grid), theirs, rtol=1e-14)
    np.testing.assert_allclose(grid.times, np.log(AYS_SVD) / 4, rtol=1e-13)
    # The paper's list ends at 0.002.
    end = make_grid(schedule, 10, "ays_svd", final="sigma_min")
    assert _sigmas(end)[-1] == pytest.approx(0.002, rel=1e-14)


def test_aligned_steps_of_svd_at_other_counts_are_log_linear():
    schedule = solvers.edm(0.002, 700.0)
    grid = make_grid(schedule, 20, "ays_svd", final="sigma_min")
    sigmas = _sigmas(grid)
    np.testing.assert_allclose(sigmas[::2], [*AYS_SVD, 0.002], rtol=1e-13)
    np.testing.assert_allclose(sigmas[1::2] ** 2, sigmas[:-1:2] * sigmas[2::2], rtol=1e-12)
    assert len(make_table("euler", schedule, 25, grid="ays_svd", prediction="v")) == 25
    one = make_grid(schedule, 1, "ays_svd")
    np.testing.assert_allclose(_sigmas(one), [700.0, 0.0], rtol=1e-14)


@pytest.mark.parametrize(
    ("schedule", "spacing"), [("scaled_linear", "karras"), ("edm", "karras"), ("vp", "lambda")]
)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_the_sigmas_of_a_grid_give_its_table(schedule, spacing, final):
    schedule = solvers.get_schedule(schedule)
    grid = make_grid(schedule, 8, spacing, final=final, mode="exact")
    ours = make_table("dpmpp_2m", schedule, sigmas=_sigmas(grid))
    theirs = make_table("dpmpp_2m", schedule, grid=grid)
    assert ours.num_draws == theirs.num_draws
    np.testing.assert_allclose(ours.times, theirs.times, rtol=1e-9, atol=1e-9)
    for a, b in zip(ours.rows, theirs.rows, strict=True):
        for mine, its in zip(a.updates, b.updates, strict=True):
            np.testing.assert_allclose(mine.from_registers, its.from_registers, rtol=1e-9)
            assert mine.from_prediction == pytest.approx(its.from_prediction, rel=1e-9)


def test_sigmas_beyond_the_schedule_keep_their_noise_and_get_the_nearest_time():
    schedule = solvers.scaled_linear()
    grid = sigma_grid(schedule, [14.7, 1.0, 0.001, 0.0])
    assert (grid.times[0], grid.times[2]) == (999.0, 0.0)
    np.testing.assert_allclose(_sigmas(grid), [14.7, 1.0, 0.001, 0.0], rtol=1e-14)
    assert grid.contiguous
    flow = sigma_grid(solvers.Flow(), [math.inf, 1.0, 0.0])
    np.testing.assert_allclose(flow.times, [1000.0, 500.0], rtol=1e-14)


def test_sigmas_pass_through_sample():
    schedule = solvers.edm()
    model = Mixture(schedule)
    sigmas = [10.0, 3.0, 1.0, 0.2, 0.0]
    x = torch.linspace(-9, 9, 10, dtype=torch.float64)[None]
    ours = fastdiff.sample(model, x=x, solver="euler", schedule=schedule, sigmas=sigmas)
    y = x
    for s, to in itertools.pairwise(sigmas):
        y = y + (to - s) * model.at(y, 1.0, s)
    torch.testing.assert_close(ours, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: sigma_grid(s, [1.0]), "2 or more"),
        (lambda s: sigma_grid(s, [1.0, 2.0, 0.0]), "decrease strictly"),
        (lambda s: sigma_grid(s, [2.0, 1.0, 1.0]), "decrease strictly"),
        (lambda s: sigma_grid(s, [2.0, math.nan]), "decrease strictly"),
        (lambda s: sigma_grid(s, [2.0, -1.0]), "at 0 or above"),
        (lambda s: sigma_grid(s, [math.inf, 1.0]), "finite"),
        (lambda s: make_table("ddim", s, grid="karras", sigmas=[1.0, 0.0]), "grid must be None"),
        (
            lambda s: make_table("euler", s, sigmas=[1.0, 0.0], final_sigmas_type="zero"),
            "final_sigmas_type must not",
        ),
        (lambda s: make_table("euler", s), "steps must be given"),
        (lambda s: make_grid(s, 10, "ays_svd"), "from 700"),
        (lambda s: make_grid(solvers.edm(), 10, "ays_svd"), "from 700"),
        (lambda s: make_grid(s, 10, "sgm_uniform", stride=True), "stride must"),
        (lambda s: make_grid(s, 1001, "sgm_uniform"), "at most 1000"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(solvers.scaled_linear())
