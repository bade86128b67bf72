"""Schedules, grids and tables as data: closed forms, limits, printing, files, refusals."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastdiff import solvers
from fastdiff.solvers import Row, SolverTable, Update, make_grid, make_table
from fastdiff.solvers.multistep import phi

SCHEDULES = [solvers.linear(), solvers.scaled_linear(), solvers.cosine()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_schedule_maps_are_inverse_and_normalised(schedule):
    t = np.array([0.0, 0.5, 1.0, 17.25, 500.0, 998.75, 999.0])
    lam = schedule.lambda_at(t)
    assert np.all(np.diff(lam) < 0)
    np.testing.assert_allclose(schedule.time_at(lam), t, atol=1e-9)
    alpha, sigma = schedule.marginal(lam)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-15)
    np.testing.assert_allclose(np.log(alpha / sigma), lam, rtol=1e-12)
    whole = np.arange(1000)
    np.testing.assert_allclose(schedule.alpha(whole) ** 2, schedule.alphas_cumprod, rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(whole) ** 2, 1 - schedule.alphas_cumprod, rtol=1e-10)


def test_marginal_at_the_ends_of_lambda():
    alpha, sigma = solvers.linear().marginal(np.array([np.inf, -np.inf]))
    assert alpha.tolist() == [1.0, 0.0]
    assert sigma.tolist() == [0.0, 1.0]


def test_cosine_schedule_is_the_papers_curve():
    u = np.arange(1, 900) / 1000  # before the cap on beta
    f = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(solvers.cosine().alphas_cumprod[:899], f, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: solvers.from_betas([0.1, -0.1]), "betas"),
        (lambda: solvers.from_betas([0.1, float("nan")]), "betas"),
        (lambda: solvers.from_alphas_cumprod([0.9, 0.95]), "alphas_cumprod"),
        (lambda: solvers.from_alphas_cumprod([0.9]), "alphas_cumprod"),
        (lambda: solvers.get_schedule("scaled-linear"), "did you mean 'scaled_linear'"),
        (lambda: solvers.linear().lambda_at(1000), r"0\.\.999"),
        (lambda: solvers.linear().lambda_at(float("nan")), "finite"),
        (lambda: make_grid(solvers.linear(), 1001), "at most 1000"),
        (lambda: make_grid(solvers.linear(), 10, "leading", steps_offset=200), "steps_offset"),
        (lambda: make_grid(solvers.linear(), 1000, "leading", convention="dpm"), "fewer steps"),
        (lambda: make_grid(solvers.linear(), 10, "krras"), "karras"),
        (lambda: make_grid(solvers.linear(100), 10, "ays_sd15"), "1000 timesteps"),
        (lambda: make_grid(solvers.linear(), 200, "quadratic"), "fewer steps"),
        (lambda: solvers.explicit_grid(solvers.linear(), [1, 2]), "decrease"),
        (lambda: solvers.explicit_grid(solvers.linear(), []), "non-empty"),
        (lambda: solvers.explicit_grid(solvers.linear(), [1000.0, 1]), r"0\.\.999"),
        (lambda: make_table("dpmpp2m", "linear", 5), "did you mean 'dpmpp_2m'"),
        (lambda: make_table("ddim", "linear", 5, eta=1.5), "eta"),
        (lambda: make_table("ddim", "linear", 5, eta=float("nan")), "eta"),
        (lambda: make_table("unipc", "linear", 5, order=5), "order"),
        (lambda: make_table("dpmpp_2m", "linear", 5, final_sigmas_type="none"), "final_sigmas"),
        (lambda: make_table("ddpm", "linear", 5, variance_type="learned"), "variance_type"),
        (lambda: make_table("ddpm", "linear", 5, prediction="noise"), "prediction"),
        (lambda: make_table("ddpm", "linear", 5, mode="fast"), "mode"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_option_names_the_options():
    with pytest.raises(TypeError, match="eta"):
        make_table("ddim", "linear", 5, order=2)


def test_multistep_solver_refuses_a_grid_whose_steps_do_not_join():
    grid = make_grid(solvers.linear(), 7, "linspace", stride=True)
    with pytest.raises(ValueError, match="join"):
        solvers.dpm_multistep(solvers.linear(), grid)


# Solvers that evaluate twice a step, but for the step to the clean sample.
TWICE = ("heun", "midpoint", "edm_stochastic", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral")
TWICE = (*TWICE, "dpmpp_sde")


def _evaluations(solver: str, steps: int, mode: str) -> int:
    if solver in TWICE:
        return 2 * steps - 1
    single = re.fullmatch(r"(dpm|dpmpp)_(\d)s(_sde)?", solver)
    if single and mode == "exact":  # in parity mode the grid's steps are evaluations
        order = int(single[2])
        return order * steps - (single[1] == "dpmpp") * (order - 1)
    other = {
        "pndm": steps + (steps > 1),
        "pc": 2 * steps,
        "annealed_langevin": 2 * steps + 1,
    }
    return other.get(solver, steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 500])
@pytest.mark.parametrize("mode", ["parity", "exact"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "karras", "lambda"])
@pytest.mark.parametrize("solver", list(solvers.SOLVERS))
def test_every_table_is_finite(solver, spacing, mode, steps):
    # Construction validates each number; duplicates of rounded times must not turn into NaN.
    schedule = solvers.scaled_linear()
    options = {"steps_per_level": 2} if solver == "annealed_langevin" else {}
    table = make_table(solver, schedule, steps, grid=spacing, mode=mode, prediction="v", **options)
    idle = table.times.count(0.0) * (solver == "lcm")  # it returns the state itself there
    assert table.evaluations == _evaluations(solver, steps, mode) - idle
    assert all(0 <= t <= 999 for t in table.times)


def test_quadratic_spacing_is_the_ddim_authors():
    expected = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 10) ** 2][::-1]
    table = make_table("ddim", "linear", 10, grid="quadratic")
    assert list(table.times) == expected
    # Steps join: the rule t - T//N is for equal strides.
    grid = make_grid(solvers.linear(), 10, "quadratic")
    assert table.rows == solvers.ddim(solvers.linear(), grid).rows
    assert make_table("ddim", "linear", 1, grid="quadratic").times == (800.0,)


def test_aligned_steps_are_the_published_ones():
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    for name, theirs in (("ays_sd15", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")):
        table = make_table("dpmpp_2m", "scaled_linear", 10, grid=name)
        assert list(table.times) == scheduling.AysSchedules[f"{theirs}Timesteps"]
        for steps in (1, 2, 7, 25):
            times = make_table("dpmpp_2m", "scaled_linear", steps, grid=name).times
            assert len(times) == steps
            assert times[0] == 999


def test_noise_free_end_returns_the_prediction_itself():
    ended = 0
    for solver in solvers.SOLVERS:
        options = solvers.get_solver(solver).options()
        zero = {"final_sigmas_type": "zero"} if "final_sigmas_type" in options else {}
        if solver.startswith("dpm_"):
            zero = {}  # noise prediction has no step to the clean sample
        table = make_table(solver, "linear", 4, **zero)
        if table.prediction != "x0" or solver == "best_linear":
            continue  # which has a better estimate of x0 than the last prediction alone
        ended += 1
        last = table.rows[-1].updates[0]
        assert last.from_prediction == 1.0
        assert all(c == 0 for c in last.from_registers)
    assert ended > 8


def test_empty_last_step_is_the_identity():
    # Karras to sigma_min repeats the last level in diffusers, which makes heun NaN there.
    table = make_table(
        "dpmpp_2m", "linear", 20, grid="karras", final_sigmas_type="sigma_min", solver_type="heun"
    )
    last = table.rows[-1].updates[0]
    assert last == Update(0, (1.0, 0.0), 0.0)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr_is_finite_and_starts_from_noise_alone(prediction):
    acp = np.append(solvers.linear().alphas_cumprod[:-1], 0.0)
    schedule = solvers.from_alphas_cumprod(acp)
    for solver in ("ddim", "ddpm", "dpmpp_2m"):
        table = make_table(solver, schedule, 10, grid="trailing", prediction=prediction)
        assert table.times[0] == 999
    with pytest.raises(ValueError, match="zero terminal SNR"):
        make_table("ddim", schedule, 10, grid="trailing", prediction="eps")
    with pytest.raises(ValueError, match="finite range"):
        make_table("dpmpp_2m", schedule, 10, grid="karras", prediction="v")


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_against_exact_arithmetic(k):
    def exact(h: float) -> float:
        x, total = Fraction(h), Fraction(0)
        for j in range(80):
            total += (-x) ** j / math.factorial(j + k)
        return float(total)

    for h in [0.0, 1e-300, 1e-12, 1e-6, 0.0199, 0.5, 0.999, 1.0, 1.001, 3.0, 12.0]:
        for signed in (h, -h):
            assert phi(k, signed) == pytest.approx(exact(signed), rel=1e-13)
    assert phi(k, math.inf) == 0.0


def test_ddim_eta_one_is_ddpm():
    grid = make_grid(solvers.cosine(), 12)
    a = solvers.ddim(solvers.cosine(), grid, eta=1.0, mode="exact")
    b = solvers.ddpm(solvers.cosine(), grid, mode="exact")
    assert a.rows == b.rows


def test_printing_names_the_registers_and_aligns():
    text = str(make_table("dpmpp_2m", "linear", 4))
    lines = text.splitlines()
    assert "2 registers (x, r1; in float32 8 bytes for each element of the state)" in lines[0]
    assert re.search(r"x = \d\.\d+ x - \d\.\d+ r1 \+ \d\.\d+ p;  r1 = p", lines[4])
    assert lines[-1].endswith("x = p")
    column = lines[2].index("updates")
    assert all(line[column - 2 : column + 4] == "  x = " for line in lines[3:])
    assert "z0" in str(make_table("ddpm", "linear", 4))


@pytest.mark.parametrize("solver", list(solvers.SOLVERS))
def test_file_round_trip_keeps_every_bit(solver, tmp_path):
    table = make_table(solver, "cosine", 7, guidance_scale=7.5)
    path = tmp_path / "table.json"
    table.save(path)
    assert SolverTable.load(path) == table


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "fastdiff.SolverTable"}', "\x80"])
def test_loading_something_else_is_refused(text, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError):
        SolverTable.load(path)


def _row(**changes) -> Row:
    row = Row(0, 10.0, 1.0, 0.0, 1.0, (Update(0, (0.5, 0.0), 0.5), Update(1, (0.0, 0.0), 1.0)))
    return dataclasses.replace(row, **changes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([_row(feed=2)], r"feed must be in 0\.\.1"),
        ([_row(feed=1)], "written before"),
        ([_row(time=math.nan)], "time must be finite"),
        ([_row(from_output=math.inf)], "from_output must be finite"),
        ([_row(updates=())], "updates"),
        ([_row(updates=(Update(0, (1.0,), 1.0),))], "one coefficient per register"),
        ([_row(updates=(Update(0, (1.0, 0.5), 1.0),))], "not written"),
        ([_row(updates=(Update(0, (1.0, 0.0), 1.0),) * 2)], "once per row"),
        ([_row(updates=(Update(0, (1.0, 0.0), 1.0, 0.3),))], "without a draw"),
        ([_row(updates=(Update(0, (1.0, math.nan), 1.0),))], "finite"),
    ],
)
def test_tables_no_engine_could_run_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        SolverTable("test", 2, tuple(rows))


def test_pack_matches_the_rows():
    table = make_table("ddpm", "linear", 6, guidance_scale=3.0)
    for i, row in enumerate(table.rows):
        packed = table.pack()
        r = packed.num_registers
        follows = table.rows[i + 1] if i + 1 < len(table) else None
        assert packed.index[i].tolist() == [0, row.draw, 1, 0 if follows else -1, 0]
        update = row.updates[0]
        assert packed.coef[i].tolist() == [
            follows.input_scale if follows else 0.0,
            row.from_state,
            row.from_output,
            3.0,
            *update.from_registers,
            update.from_prediction,
            update.from_noise,
        ]
        assert packed.coef.shape == (6, 4 + r + 2)
    assert packed.times.tolist() == list(table.times)


def test_nbytes_counts_registers_and_holds_half_in_float32():
    table = make_table("dpmpp_2m", "linear", 6)
    assert table.nbytes((2, 4, 8, 8), torch.float16) == 2 * 512 * 4
    assert table.nbytes((2, 4, 8, 8), torch.float64) == 2 * 512 * 8


def test_starting_part_way():
    table = make_table("ddpm", "linear", 6)
    rest = table.from_step(2)
    assert rest.times == table.times[2:]
    assert [row.draw for row in rest.rows] == [0, 1, 2, -1]
    with pytest.raises(ValueError, match=re.escape("grid.from_step(start)")):
        make_table("dpmpp_2m", "linear", 6).from_step(2)
    grid = make_grid(solvers.linear(), 6, "linspace", convention="dpm").from_step(2)
    assert make_table("dpmpp_2m", "linear", grid=grid).times == tuple(grid.times)


@pytest.mark.parametrize(
    ("steps", "mode", "lower"), [(14, "parity", True), (15, "parity", False), (14, "exact", False)]
)
def test_last_step_is_of_order_one_in_short_runs(steps, mode, lower):
    options = {"mode": mode, "final_sigmas_type": "sigma_min"}
    last = make_table("dpmpp_2m", "linear", steps, **options).rows[-1].updates[0]
    assert (last.from_registers[1] == 0) == lower
    # Starting part way leaves the rule to the run's planned number of steps.
    grid = make_grid(
        solvers.linear(), steps, "linspace", convention="dpm", final="sigma_min"
    ).from_step(3)
    rest = make_table("dpmpp_2m", "linear", grid=grid, mode=mode)
    assert (rest.rows[-1].updates[0].from_registers[1] == 0) == lower


def test_time_tensors_are_kept_until_somebody_writes_to_them():
    table = make_table("dpmpp_2m", "linear", 5)
    facts = (2, torch.float32, torch.device("cpu"))
    first = table.time_tensors(*facts)
    assert [t.tolist() for t in first] == [[int(time)] * 2 for time in table.times]
    assert all(t.dtype == torch.int64 for t in first)
    assert table.time_tensors(*facts)[0] is first[0]
    first[3].add_(1)
    again = table.time_tensors(*facts)
    assert [t.tolist() for t in again] == [[int(time)] * 2 for time in table.times]
    assert table.time_tensors(3, *facts[1:])[0].shape == (3,)
    with torch.inference_mode():
        assert table.time_tensors(*facts)[0].shape == (2,)
    fractional = make_table("euler", "linear", 5, grid="karras")
    assert fractional.time_tensors(1, torch.float64, facts[2])[1].dtype == torch.float64
