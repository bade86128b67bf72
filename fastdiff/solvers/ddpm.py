"""DDPM ancestral sampling (arXiv 2006.11239, algorithm 2 and equation 7).

The posterior mean and the small variance are those of DDIM with eta = 1. In terms of
h = lambda' - lambda::

    x'   = (sigma'/sigma) e^{-h} x + alpha' (1 - e^{-2h}) x0 + std z
    std  = sigma' sqrt(1 - e^{-2h})     "fixed_small": beta~_t, the posterior variance
    std  = sigma  sqrt(1 - e^{-2h})     "fixed_large": beta_t

"learned_range" (improved DDPM, arXiv 2102.09672, equation 15) interpolates between the logarithms
of the two by v, what the model's further channels say, from -1 to 1::

    std = small^{1 - (1 + v)/2} large^{(1 + v)/2} = small (large/small)^{(1 + v)/2}
"""

from __future__ import annotations

import math
from dataclasses import replace

from fastdiff.solvers.ddim import posterior
from fastdiff.solvers.grids import MODES, TimeGrid, check_choice
from fastdiff.solvers.prediction import canonical, steps_of, table_of
from fastdiff.solvers.schedules import NoiseSchedule
from fastdiff.solvers.table import Row, SolverTable, Update

VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")


def ddpm(
    schedule: NoiseSchedule,
    grid: TimeGrid,
    *,
    prediction: str = "eps",
    mode: str = "parity",
    variance_type: str = "fixed_small",
) -> SolverTable:
    """The table of DDPM.

    prediction: what the model predicts: "eps", "v" or "x0".
    variance_type: "fixed_small" (beta~), "fixed_large" (beta), or "fixed_small_log", another name
        for fixed_small (diffusers goes through a logarithm and back). "learned_range": the model
        returns 2C channels, the second half of which is v (rows with ``rule="learned_range"``);
        guided-diffusion and DDPMScheduler. There is no "learned", where v is the variance itself.
    mode: "exact" adds no noise in the step to the clean sample (algorithm 2, line 3). "parity" is
        diffusers: noise wherever the model's time is above 0, and a fixed_small variance of at
        least 1e-20, so with ``steps_offset=1`` the last step is noisy.

    Raises ValueError for an unknown prediction, mode or variance_type.
    """
    check_choice("mode", mode, MODES)
    check_choice("variance_type", variance_type, VARIANCES)
    kind = canonical(prediction)
    rows: list[Row] = []
    draws = 0
    for step in steps_of(schedule, grid, kind):
        from_x, from_x0, std = posterior(step, eta=1.0)
        large = step.sigma * math.sqrt(-math.expm1(-2.0 * step.h))
        if variance_type == "fixed_large":
            std = large
        elif mode == "parity":
            std = max(std, 1e-10)
        noisy = step.time > 0 if mode == "parity" else math.isfinite(step.target)
        # An empty step has no noise to choose: large is 0, and the ratio is not defined.
        learned = noisy and variance_type == "learned_range" and large > 0
        if not noisy or (variance_type == "learned_range" and large == 0):
            std = 0.0
        draw = -1
        if noisy:
            draw, draws = draws, draws + 1
        row = step.row(Update(0, (from_x,), from_x0, std), draw=draw)
        if learned:
            row = replace(row, rule="learned_range", rule_value=large / std)
        rows.append(row)
    description = f"{variance_type}, {kind} model, {mode}"
    return table_of("ddpm", schedule, grid, rows, description=description)
