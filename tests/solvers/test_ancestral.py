"""k-diffusion and EDM samplers, re-derived from equations in y = x/alpha, rho = sigma/alpha.

Same model, same noise, float64; and the weak order of the stochastic ones on normal data.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from mixture import Mixture
from moments import moments
from orders import lambda_grid, orders
from reference import start

import fastdiff
from fastdiff import solvers
from fastdiff.solvers import Flow, SolverTable
from fastdiff.solvers.stepper import Stepper

SCHEDULES = [solvers.ve(0.03, 15.0), solvers.edm(), solvers.scaled_linear()]
SCHEDULE_IDS = ["ve", "edm", "vp"]


class Reference:
    """D(y, rho), and the normals of a run in the order in which ``fastdiff.sample`` draws them."""

    def __init__(self, schedule: solvers.NoiseSchedule, seed: int = 5) -> None:
        self.schedule = schedule
        self.mixture = Mixture(schedule, "x0")
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, y: torch.Tensor, rho: float) -> torch.Tensor:
        alpha, sigma = map(float, self.schedule.marginal(-math.log(rho)))
        return self.mixture.at(alpha * y, alpha, sigma)

    def z(self) -> torch.Tensor:
        shape = start(torch.float64).shape
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def state(self, rho: float) -> torch.Tensor:
        """The y a run starts from."""
        return start(torch.float64) * rho


def ancestral(rho: float, to: float, eta: float) -> tuple[float, float]:
    """rho_down and rho_up."""
    up = eta * math.sqrt(to**2 * (rho**2 - to**2) / rho**2)
    return math.sqrt(to**2 - up**2), up


def dpm_2(d: Reference, y: torch.Tensor, rho: float, to: float, eta: float) -> torch.Tensor:
    down, up = ancestral(rho, to, eta)
    mid = math.sqrt(rho * down)
    at_mid = y + (y - d(y, rho)) / rho * (mid - rho)
    y = y + (at_mid - d(at_mid, mid)) / mid * (down - rho)
    return y + up * d.z() if eta else y


def dpmpp_2s(d: Reference, y: torch.Tensor, rho: float, to: float, eta: float) -> torch.Tensor:
    down, up = ancestral(rho, to, eta)
    mid = math.sqrt(rho * down)
    at_mid = mid / rho * y + (1 - mid / rho) * d(y, rho)
    y = down / rho * y + (1 - down / rho) * d(at_mid, mid)
    return y + up * d.z() if eta else y


def dpmpp_sde(d: Reference, y: torch.Tensor, rho: float, to: float, eta: float) -> torch.Tensor:
    mid = math.sqrt(rho * to)
    down, up = ancestral(rho, mid, eta)
    z = d.z()
    walked = math.sqrt(rho - mid) * z
    at_mid = down / rho * y + (1 - down / rho) * d(y, rho) + up * z
    down, up = ancestral(rho, to, eta)
    walked = walked + math.sqrt(mid - to) * d.z()
    return down / rho * y + (1 - down / rho) * d(at_mid, mid) + up / math.sqrt(rho - to) * walked


STEPS = {"dpm_2_ancestral": dpm_2, "dpmpp_2s_ancestral": dpmpp_2s, "dpmpp_sde": dpmpp_sde}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize("solver", list(STEPS))
def test_k_diffusion_steps(solver, eta, schedule):
    grid = solvers.make_grid(schedule, 12, "karras", convention="euler")
    rhos = np.exp(-grid.lambdas).tolist()
    d = Reference(schedule)
    y = d.state(rhos[0])
    for rho, to in itertools.pairwise(rhos):
        y = STEPS[solver](d, y, rho, to, eta)
    y = d(y, rhos[-1])
    # In parity mode the times of this solver are rounded on a schedule of whole timesteps.
    mode = "exact" if solver == "dpm_2_ancestral" else "parity"
    _compare(d, solver, schedule, y, rhos[0], steps=12, grid="karras", eta=eta, mode=mode)


def _compare(d, solver, schedule, y, rho, **options) -> SolverTable:
    """Our run from the same state with the same draws ends at the clean ``y``."""
    options = {"mode": "exact", **options}
    table = solvers.make_table(solver, schedule, prediction="x0", **options)
    alpha = float(schedule.marginal(-math.log(rho))[0])
    generator = torch.Generator().manual_seed(5)
    x = fastdiff.sample(d.mixture, x=alpha * d.state(rho), solver=table, generator=generator)
    torch.testing.assert_close(x, table.end_level[0] * y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(  # both drew as often
        torch.randn(3, generator=generator), torch.randn(3, generator=d.generator), rtol=0, atol=0
    )
    return table


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 11])
def test_dpm_fast(steps, eta, schedule):
    """Steps in t = -ln rho, whose noise is (y - D)/rho; algorithms 1 and 2 of arXiv 2206.00927."""
    ends = -np.log(schedule.sigma([schedule.t_max, schedule.t_min]))
    ends += np.log(schedule.alpha([schedule.t_max, schedule.t_min]))
    orders = {1: [1], 2: [2], 3: [2, 1], 4: [3, 1], 9: [3, 3, 2, 1], 11: [3, 3, 3, 2]}[steps]
    ts = np.linspace(*ends, len(orders) + 1).tolist()
    d = Reference(schedule)

    def eps(y: torch.Tensor, t: float) -> torch.Tensor:
        return (y - d(y, math.exp(-t))) * math.exp(t)

    y = d.state(math.exp(-ts[0]))
    for order, (t, t_next) in zip(orders, itertools.pairwise(ts), strict=True):
        to, up = t_next, 0.0
        if eta:
            down = ancestral(math.exp(-t), math.exp(-t_next), eta)[0]
            to = min(-math.log(down), ts[-1])
            up = math.sqrt(max(math.exp(-2 * t_next) - math.exp(-2 * to), 0.0))
        h, e0, rho = to - t, eps(y, t), math.exp(-to)
        if order == 1:
            y = y - rho * math.expm1(h) * e0
        elif order == 2:
            u = y - math.exp(-t - h / 2) * math.expm1(h / 2) * e0
            y = y - rho * math.expm1(h) * eps(u, t + h / 2)
        else:
            u = y - math.exp(-t - h / 3) * math.expm1(h / 3) * e0
            d1 = eps(u, t + h / 3) - e0
            r = 2 * h / 3
            u = y - math.exp(-t - r) * (math.expm1(r) * e0 + 2 * (math.expm1(r) / r - 1) * d1)
            d2 = eps(u, t + r) - e0
            y = y - rho * (math.expm1(h) * e0 + 1.5 * (math.expm1(h) / h - 1) * d2)
        if eta:
            y = y + up * d.z()
    table = _compare(
        d, "dpm_fast", schedule, y, math.exp(-ts[0]), steps=steps, eta=eta, mode="parity",
        grid="lambda",
    )  # fmt: skip
    assert table.evaluations == steps


def test_dpm_fast_groups_the_grids_own_points_in_exact_mode():
    schedule = solvers.scaled_linear()
    grid = solvers.make_grid(schedule, 7, "linspace", convention="dpm", final="sigma_min")
    table = solvers.dpm_fast(schedule, grid, mode="exact")
    assert len(table) == 7
    assert [table.times[i] for i in (0, 3, 6)] == [grid.times[i] for i in (0, 3, 6)]
    middle = schedule.lambda_at(list(table.times[:4]))
    np.testing.assert_allclose(np.diff(middle), (middle[3] - middle[0]) / 3, rtol=1e-9)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    "churn",
    [
        {"s_churn": 3.0, "s_tmin": 0.05, "s_tmax": 10.0, "s_noise": 1.007},
        {"s_churn": 100.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0},
    ],
    ids=["inside", "everywhere"],
)
@pytest.mark.parametrize("mode", ["parity", "exact"])
@pytest.mark.parametrize("schedule", SCHEDULES[:2], ids=SCHEDULE_IDS[:2])
def test_edm_algorithm_2(schedule, mode, churn, order):
    n = 11
    rhos = np.exp(-solvers.make_grid(schedule, n, "karras").lambdas).tolist()
    d = Reference(schedule)
    y = d.state(rhos[0])
    fed = []
    for rho, to in itertools.pairwise([*rhos, 0.0]):
        inside = churn["s_tmin"] <= rho <= churn["s_tmax"]
        gamma = min(churn["s_churn"] / n, math.sqrt(2) - 1) if inside else 0.0
        hat = rho * (1 + gamma)
        if gamma or mode == "parity":
            y = y + math.sqrt(hat**2 - rho**2) * churn["s_noise"] * d.z()
        fed.append(hat)
        slope = (y - d(y, hat)) / hat
        moved = y + (to - hat) * slope
        if to and order == 2:
            fed.append(to)
            moved = y + (to - hat) * (slope + (moved - d(moved, to)) / to) / 2
        y = moved
    # sigma_max times 1.41 is beyond the schedule's range: the model must take it.
    wide = dataclasses.replace(schedule, sigma_max=2 * schedule.sigma_max)
    d.mixture.schedule = wide
    table = _compare(
        d, "edm_stochastic", schedule, y, rhos[0], steps=n, order=order, mode=mode, **churn
    )
    assert table.evaluations == (2 * n - 1 if order == 2 else n)
    levels = [row.level for row in table.rows if row.evaluates]
    np.testing.assert_allclose(levels, [(1.0, rho) for rho in fed], rtol=1e-12)
    times = [row.time for row in table.rows if row.evaluates]
    np.testing.assert_allclose(wide.sigma(times), fed, rtol=1e-12)
    first = table.rows[0]
    assert first.evaluates != (mode == "parity" or math.isinf(churn["s_tmax"]))


def test_edm_noise_stays_within_a_schedule_of_timesteps():
    schedule = solvers.scaled_linear()
    options = {"s_churn": 100.0, "s_tmin": 0.0, "s_tmax": math.inf, "mode": "exact"}
    table = solvers.make_table("edm_stochastic", schedule, 5, grid="karras", **options)
    assert max(table.times) == 999
    plain = solvers.make_table("heun", schedule, 5, grid="karras", mode="exact")
    assert table.rows[0].level == plain.rows[0].level  # already at the most noise
    assert table.rows[2].level[1] > plain.rows[2].level[1]
    for row in table.rows:
        alpha, sigma = row.level
        expected = schedule.marginal(schedule.lambda_at(row.time))
        np.testing.assert_allclose((alpha, sigma), expected, rtol=1e-9)
    # Pure noise is not raised either.
    solvers.make_table("edm_stochastic", Flow(), 5, prediction="flow", **options)


def test_edm_without_churn_is_heun():
    for schedule in (solvers.edm(), solvers.scaled_linear()):
        churned = solvers.make_table("edm_stochastic", schedule, 7, grid="karras", s_churn=0.0)
        assert churned.rows == solvers.make_table("heun", schedule, 7, grid="karras").rows


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("schedule", [Flow(shift=2.0), solvers.edm()], ids=["flow", "edm"])
def test_midpoint(schedule, steps):
    flow = isinstance(schedule, Flow)
    table = solvers.make_table("midpoint", schedule, steps, prediction="x0")
    s = schedule.sigma(solvers.make_grid(schedule, steps, "linspace" if flow else "karras").times)
    mixture = Mixture(schedule, "x0")

    def slope(x: torch.Tensor, at: float) -> torch.Tensor:
        return (x - mixture.at(x, 1 - at if flow else 1.0, at)) / at

    x = start(torch.float64) * s[0]
    result = fastdiff.sample(mixture, x=x, solver=table)
    for at, to in itertools.pairwise([*s.tolist(), 0.0]):
        mid = (at + to) / 2
        middle = slope(x + (mid - at) * slope(x, at), mid) if to or flow else slope(x, at)
        x = x + (to - at) * middle
    torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-10)
    assert len(table) == 2 * steps - (not flow)


def _independent(table: SolverTable) -> SolverTable:
    """dpmpp_sde with a fresh noise for the whole step."""
    rows = []
    for row in table.rows:
        first, *rest = row.updates
        kept = first.from_registers[2]
        state = (*first.from_registers[:2], 0.0)
        noise = math.hypot(kept, first.from_noise)
        first = dataclasses.replace(first, from_registers=state, from_noise=noise)
        rows.append(dataclasses.replace(row, updates=(first, *rest)))
    return dataclasses.replace(table, rows=tuple(rows))


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        ("dpmpp_sde", {}, 2),
        ("dpmpp_sde", {"mode": "exact"}, 2),
        ("dpmpp_sde", {"mode": "exact", "eta": 0.6}, 2),
        ("independent", {}, 1),
        ("dpmpp_2s_sde", {"mode": "exact"}, 2),
        ("dpmpp_2s_sde", {"mode": "exact", "eta": 0.5, "solver_type": "heun"}, 2),
        ("dpmpp_2s_sde", {}, 1),
        ("dpmpp_3s_sde", {"mode": "exact", "solver_type": "heun"}, 2),
        ("dpm_2_ancestral", {}, 2),
        ("dpmpp_2s_ancestral", {}, 2),
        ("euler_ancestral", {}, 1),
    ],
)
def test_weakorders(solver, options, order):
    """The variance of normal data, from the exact law at the start, without sampling.

    Noises of one step that belong together give the second order, independent ones the first;
    diffusers' class, whose order is that of "parity" here, draws independent ones.
    """
    schedule = solvers.linear()
    model = Mixture(schedule, "eps", weights=(1.0,), means=(0.4,), stds=(0.5,))
    errors = []

    def law(lam: float) -> tuple[float, float]:
        alpha, sigma = map(float, schedule.marginal(lam))
        return 0.4 * alpha, (0.5 * alpha) ** 2 + sigma**2

    for steps in (80, 160, 320, 640):
        grid = lambda_grid(schedule, -2.0, 3.0, steps)
        build = solvers.get_solver("dpmpp_sde" if solver == "independent" else solver)
        table = build(schedule, grid, **options)
        if solver == "independent":
            table = _independent(table)
        mean, variance = moments(table, schedule, model, law(-2.0))
        # Data of one normal: every step is exact in the mean, and the rest is rounding.
        assert mean == pytest.approx(law(3.0)[0], abs=1e-11)
        errors.append(abs(variance - law(3.0)[1]))
    assert orders(errors)[-1] == pytest.approx(order, abs=0.15), errors


@pytest.mark.parametrize("mode", ["parity", "exact"])
def test_third_order_sde_has_the_right_variance(mode):
    """It tends to the data's, 0.25; with diffusers' sign it is 5 at 30 steps and 12 at 270."""
    schedule = solvers.linear()
    model = Mixture(schedule, "eps", weights=(1.0,), means=(0.4,), stds=(0.5,))
    gaps = []
    for steps in (30, 90, 270, 810):
        table = solvers.make_table("dpmpp_3s_sde", schedule, steps, mode=mode, solver_type="heun")
        gaps.append(abs(moments(table, schedule, model)[1] - 0.25))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.25 * 0.05


NEW = ("dpmpp_2s", "dpmpp_3s", "dpmpp_2s_sde", "dpmpp_3s_sde", "dpm_2s", "dpm_3s", "dpm_fast")
NEW += ("midpoint", "edm_stochastic", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde")


@pytest.mark.parametrize("mode", ["parity", "exact"])
@pytest.mark.parametrize("solver", NEW)
def test_every_engine_gives_the_same_bits(solver, mode):
    """A caller's own loop through the Stepper, the C++ loop and the reference."""
    schedule = solvers.scaled_linear()
    table = solvers.make_table(solver, schedule, 6, mode=mode)
    model = Mixture(schedule, "eps")
    assert all(row.feed == 0 for row in table.rows)
    x = start(torch.float32)
    results = []
    for engine in ("auto", "reference"):
        generator = torch.Generator().manual_seed(1)
        options = {"generator": generator, "engine": engine}
        results.append(fastdiff.sample(model, x=x, solver=table, **options))
    generator = torch.Generator().manual_seed(1)
    stepper = Stepper(table)
    for i, row in enumerate(table.rows):
        z = torch.randn(x.shape, generator=generator) if stepper.draws(i) else None
        output = model(x, torch.tensor([row.time])) if row.evaluates else x
        x, _ = stepper.step(i, x, output, z)
    assert torch.equal(results[0], results[1])
    assert torch.equal(x, results[0])


@pytest.mark.parametrize("solver", ["heun", *sorted({*NEW} - {"dpm_2s", "dpm_3s", "dpm_fast"})])
def test_zero_terminal_snr_begins_with_a_step_of_order_one(solver):
    schedule = solvers.zero_terminal_snr(solvers.scaled_linear())
    for mode in ("parity", "exact"):
        table = solvers.make_table(solver, schedule, 6, grid="trailing", prediction="v", mode=mode)
        first = next(row for row in table.rows if row.evaluates)
        assert first.time == 999
        second = next(row for row in table.rows if row.evaluates and row.time < 999)
        x0 = first.updates[0].from_prediction
        assert x0 == pytest.approx(second.level[0], rel=1e-12)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("dpm_2s", {"final_sigmas_type": "zero"}, "final_sigmas_type must be sigma_min"),
        ("dpm_fast", {"final_sigmas_type": "zero"}, "final_sigmas_type must be sigma_min"),
        ("dpm_fast", {"eta": 1.2}, "eta must be in 0..1"),
        ("dpm_fast", {"mode": "fast"}, "mode must be"),
        ("dpmpp_2s", {"solver_type": "rk"}, "solver_type must be"),
        ("dpmpp_2s_sde", {"eta": -1.0}, "eta must be finite and at least 0"),
        ("dpmpp_sde", {"eta": math.nan}, "eta must be in 0..1"),
        ("dpmpp_sde", {"s_noise": -1.0}, "s_noise must be finite and at least 0"),
        ("dpm_2_ancestral", {"prediction": "noise"}, "prediction must be"),
        ("dpmpp_2s_ancestral", {"mode": "fast"}, "mode must be"),
        ("edm_stochastic", {"order": 3}, "order must be 1 or 2"),
        ("edm_stochastic", {"s_churn": -1.0}, "s_churn must be finite and at least 0"),
        ("edm_stochastic", {"s_tmin": math.nan}, "s_tmin must be finite and at least 0"),
        ("edm_stochastic", {"s_tmax": math.nan}, "s_tmax must be at least 0"),
    ],
)
def test_bad_values_are_refused(solver, options, message):
    with pytest.raises(ValueError, match=message):
        solvers.make_table(solver, "linear", 6, **options)


@pytest.mark.parametrize("build", [solvers.dpm_singlestep, solvers.dpm_2, solvers.midpoint])
def test_steps_must_join(build):
    grid = solvers.make_grid(solvers.linear(), 7, "linspace", stride=True)
    with pytest.raises(ValueError, match="join"):
        build(solvers.linear(), grid)


def test_noise_prediction_from_pure_noise_is_refused():
    schedule = solvers.zero_terminal_snr(solvers.linear())
    for solver in ("dpm_2s", "dpm_fast"):
        with pytest.raises(ValueError, match="zero terminal SNR"):
            solvers.make_table(solver, schedule, 6, grid="trailing", prediction="v")
