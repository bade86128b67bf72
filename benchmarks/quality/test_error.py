"""Error against model evaluations on analytic data, ours beside the references' classes.

The error is the root mean square difference to the exact solution of the probability-flow ODE
(`fastdiff.solvers.plot`), from one noise, with Stable Diffusion's schedule and an exact eps model.
Ours computes in the grid that the reference's class has by default, its twin; "best_linear", the
default solver, has its own. A reference is diffusers' class, k-diffusion's function (on its Karras
sigmas) or dpm-solver's class where they are installed. The gate: ours and diffusers' of one name
have the same errors. The bar: nowhere is best_linear further from the truth than any reference.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff.solvers import from_diffusers, plot
from fastdiff.solvers.oracle import Oracle

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COUNTS = (5, 8, 10, 15, 20)
ELEMENTS = 512
FLOAT32 = 1e-3  # diffusers' sigmas and states are float32; of an error
# Ours: diffusers' class, its configuration, and the evaluations of a step.
DIFFUSERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, 1),
    "euler": ("EulerDiscreteScheduler", {}, 1),
    "heun": ("HeunDiscreteScheduler", {}, 2),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, 1),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, 1),
    "unipc": ("UniPCMultistepScheduler", {}, 1),
    "deis": ("DEISMultistepScheduler", {}, 1),
    "lms": ("LMSDiscreteScheduler", {}, 1),
}
KDIFFUSION = {  # k-diffusion's function, the evaluations of a step
    "sample_euler": 1,
    "sample_heun": 2,
    "sample_dpmpp_2m": 1,
    "sample_lms": 1,
}
DPM_SOLVER = {"dpmsolver++ 2": 2, "dpmsolver++ 3": 3}  # the order

Run = Callable[[Oracle, Tensor, int], Tensor]  # (oracle, x at the noisiest level, evaluations)


def with_diffusers(name: str) -> tuple[Any, Run]:
    """(the scheduler, a run of it)."""
    import diffusers

    class_name, config, evaluations = DIFFUSERS[name]
    scheduler = getattr(diffusers, class_name)(**SD, **config)

    def run(oracle: Oracle, x: Tensor, count: int) -> Tensor:
        scheduler.set_timesteps((count + evaluations - 1) // evaluations)
        # x as the class writes it: alpha = 1 where it starts from sigma. Its own factor is sigma
        # instead of sqrt(1 + sigma^2) on some grids, which would be another noise level.
        sigma = float(scheduler.sigmas[0]) if float(scheduler.init_noise_sigma) != 1 else 0.0
        state = x.float() * math.hypot(1, sigma)
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(state, t).double()
            state = scheduler.step(oracle(seen, t.double()).float(), t, state).prev_sample
        return state.double()

    return scheduler, run


def with_k_diffusion(function: str) -> Run:
    sampling = importlib.import_module("k_diffusion.sampling")

    def run(oracle: Oracle, x: Tensor, count: int) -> Tensor:
        schedule = oracle.schedule
        ends = schedule.lambda_at(torch.tensor([schedule.t_max, schedule.t_min]).numpy())
        most, least = (math.exp(-lam) for lam in ends)
        steps = (count + KDIFFUSION[function] - 1) // KDIFFUSION[function]
        sigmas = sampling.get_sigmas_karras(steps, least, most).double()

        def denoise(state: Tensor, sigma: Tensor) -> Tensor:  # state = x0 + sigma z
            alpha = 1 / math.hypot(1, float(sigma[0]))
            return oracle.posterior(state * alpha, alpha, float(sigma[0]) * alpha)[0]

        start = x * math.hypot(1, most)
        end: Tensor = getattr(sampling, function)(denoise, start, sigmas, disable=True)
        return end

    return run


def with_dpm_solver(name: str) -> Run:
    module = importlib.import_module("dpm_solver_pytorch")

    def run(oracle: Oracle, x: Tensor, count: int) -> Tensor:
        betas = torch.linspace(SD["beta_start"] ** 0.5, SD["beta_end"] ** 0.5, 1000).double() ** 2  # type: ignore[operator]
        schedule = module.NoiseScheduleVP("discrete", betas=betas, dtype=torch.float64)
        model = module.model_wrapper(oracle, schedule, model_type="noise")
        solver = module.DPM_Solver(model, schedule, algorithm_type="dpmsolver++")
        end: Tensor = solver.sample(  # the last evaluation goes from the schedule's end to zero
            x,
            steps=count - 1,
            order=DPM_SOLVER[name],
            skip_type="logSNR",
            method="multistep",
            denoise_to_zero=True,
        )
        return end

    return run


def references() -> dict[str, Run]:
    """Every reference that is installed: "diffusers unipc", "k-diffusion sample_heun", ..."""
    found: dict[str, Run] = {}
    kinds: tuple[tuple[str, str, Any, Any], ...] = (
        ("diffusers", "diffusers", DIFFUSERS, lambda name: with_diffusers(name)[1]),
        ("k-diffusion", "k_diffusion.sampling", KDIFFUSION, with_k_diffusion),
        ("dpm-solver", "dpm_solver_pytorch", DPM_SOLVER, with_dpm_solver),
    )
    for package, module, names, make in kinds:
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        found |= {f"{package} {name}": make(name) for name in names}
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("oracle_name", plot.ORACLES)
@torch.no_grad()
def test_error_against_evaluations(
    oracle_name: str, benchmark: Any, record: Callable[..., None], quick: bool
) -> None:
    pytest.importorskip("diffusers")
    counts = COUNTS[:2] if quick else COUNTS
    oracle = plot.make_oracle(oracle_name, "scaled_linear", "eps")
    x, truth = plot.initial(oracle, ELEMENTS)

    def error(result: Tensor) -> float:
        return float((result - truth).pow(2).mean().sqrt())

    def ours(name: str) -> list[float]:
        schedule: Any = "scaled_linear"
        if name in DIFFUSERS:
            schedule = from_diffusers(with_diffusers(name)[0])
        chosen = plot.get_schedule(schedule)
        tables = [plot.table_within(name, chosen, count) for count in counts]
        return [
            math.nan if table is None else plot.error_of(table, oracle, x, truth)
            for table in tables
        ]

    def every() -> dict[str, list[float]]:
        found = {f"fastdiff {name}": ours(name) for name in ("best_linear", *DIFFUSERS)}
        for name, run in references().items():
            found[name] = [error(run(oracle, x, count)) for count in counts]
        return found

    errors = benchmark.pedantic(every, rounds=1)
    row = {
        "name": f"error on the {oracle_name} oracle, eps model, scaled-linear schedule",
        "evaluations": list(counts),
        "error": errors,
    }
    benchmark.extra_info.update(row)
    record("cpu", row)
    print("\n" + plot.as_text(errors, counts))
    for name in DIFFUSERS:
        twin = pytest.approx(errors[f"diffusers {name}"], rel=FLOAT32)
        assert errors[f"fastdiff {name}"] == twin, name
    mine = errors["fastdiff best_linear"]
    for name, others in errors.items():
        if not name.startswith("fastdiff"):
            assert all(m <= o for m, o in zip(mine, others, strict=True)), name
