"""The mean and variance of a sampler on normal data, from its table alone."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastdiff.solvers import NoiseSchedule, SolverTable


class Affine(Protocol):
    """A model whose output is affine in x, such as a Mixture of one component."""

    def at(self, x: Tensor, alpha: float, sigma: float) -> Tensor: ...


def moments(
    table: SolverTable,
    schedule: NoiseSchedule,
    model: Affine,
    start: tuple[float, float] | None = None,
) -> tuple[float, float]:
    """Mean and variance of register 0, by the joint covariance of the registers.

    start: those before the first row; by default of the noise a run starts from.
    """
    r = table.num_registers
    mean, cov = np.zeros(r), np.zeros((r, r))
    mean[0], cov[0, 0] = start or (0.0, table.init_scale**2)
    for row in table.rows:
        alpha, sigma = map(float, schedule.marginal(schedule.lambda_at(row.time)))
        at0 = model.at(torch.zeros(1, dtype=torch.float64), alpha, sigma).item()
        slope = model.at(torch.ones(1, dtype=torch.float64), alpha, sigma).item() - at0
        predict = np.zeros(r)
        predict[row.feed] = row.from_state + row.from_output * slope
        step, shift, noise = np.eye(r), np.zeros(r), np.zeros(r)
        for update in row.updates:
            step[update.dest] = np.array(update.from_registers) + update.from_prediction * predict
            shift[update.dest] = update.from_prediction * row.from_output * at0
            noise[update.dest] = update.from_noise
        mean = step @ mean + shift
        cov = step @ cov @ step.T + np.outer(noise, noise)
    return mean[0], cov[0, 0]
