"""diffusers' classes that go from an image to noise."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
from diffusers.schedulers import scheduling_ddim_inverse, scheduling_dpmsolver_multistep_inverse
from torch import Tensor

from fastdiff.integrations.diffusers.base import GivenNoiseStep
from fastdiff.integrations.diffusers.sigma_classes import SigmaList, dpm_table
from fastdiff.integrations.diffusers.timestep_classes import TimestepList
from fastdiff.solvers.ddim import ddim_inverse
from fastdiff.solvers.schedules import linear
from fastdiff.solvers.table import SolverTable


class DDIMInverseScheduler(TimestepList, diffusers.DDIMInverseScheduler):
    """diffusers' class of this name (with ``clip_sample=False``)."""

    if TYPE_CHECKING:
        initial_alpha_cumprod: Tensor

    _result = scheduling_ddim_inverse.DDIMSchedulerOutput
    _has_history = False

    def _whole_table(self) -> SolverTable:
        # The grid is that of the run to invert, which goes down the list.
        times = self.timesteps.double().cpu().numpy()[::-1]
        grid = self._strided_grid(times, float(self.initial_alpha_cumprod))
        return ddim_inverse(linear(), grid, prediction=self.config.prediction_type)

    def _table(self, start: int) -> SolverTable:
        return self._whole_table().from_step(start)

    def _step_facts(self) -> np.ndarray:
        """Alpha and sigma of the state at every evaluation."""
        return np.array([row.level for row in self._whole_table().rows])

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> Any:
        """As diffusers' own."""
        if self._runs_own_step(sample):
            return super().step(model_output, timestep, sample, return_dict)
        alpha, sigma = (self._fact_of_step(i, sample, timestep) for i in (0, 1))
        following, eps = self._advance(model_output, timestep, sample)
        return self._output(return_dict, following, (sample - sigma * eps) / alpha)


# Inverted, noise and data change places: with alpha and sigma, eps and x0 exchanged, the steps to
# more noise are the steps of another algorithm to less. A model of v then predicts -v.
_EXCHANGED = {
    "dpmsolver++": "dpmsolver",
    "dpmsolver": "dpmsolver++",
    "epsilon": "sample",
    "sample": "epsilon",
}


class DPMSolverMultistepInverseScheduler(
    GivenNoiseStep, SigmaList, diffusers.DPMSolverMultistepInverseScheduler
):
    """diffusers' class of this name, for an ODE: the SDEs, NaN there, raise ValueError."""

    _result = scheduling_dpmsolver_multistep_inverse.SchedulerOutput
    _gives_x0 = False

    def _unsupported(self) -> str:
        if self.config.use_flow_sigmas:
            return "its list with use_flow_sigmas goes to less noise"
        return super()._unsupported()

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times, sigmas = super()._levels()
        return times, 1.0 / sigmas

    def _kind(self) -> str:
        kind = super()._kind()
        return _EXCHANGED.get(kind, kind)

    def _table(self, start: int) -> SolverTable:
        algorithm = self.config.algorithm_type
        if algorithm not in _EXCHANGED:
            raise ValueError(
                "algorithm_type must be dpmsolver++ or dpmsolver for a run to more noise, which an "
                f"SDE's steps have no deviation for, got {algorithm!r}"
            )
        table = dpm_table(self, start, _EXCHANGED[algorithm])
        sign = 1.0 if self._kind() in ("epsilon", "sample") else -1.0
        rows = tuple(
            replace(row, from_output=sign * row.from_output, level=None) for row in table.rows
        )
        return replace(table, rows=rows, end_level=None)
