"""diffusers' classes for distilled models: LCM, TCD and consistency models."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers import scheduling_consistency_models, scheduling_lcm, scheduling_tcd
from torch import Tensor

from fastdiff.integrations.diffusers.base import NoisyStep, as_constant
from fastdiff.integrations.diffusers.sigma_classes import EDMList, SigmaList
from fastdiff.integrations.diffusers.timestep_classes import lambdas_of
from fastdiff.solvers.consistency import consistency, lcm, tcd
from fastdiff.solvers.continuous import cm
from fastdiff.solvers.schedules import from_diffusers
from fastdiff.solvers.table import SolverTable, Update


class DistilledList(SigmaList):
    """Classes that jump to x0 from whole timesteps; the level of the last step's end is given."""

    _has_history = False

    def _end(self) -> float:
        return 0.0

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times = self.timesteps.double().cpu().numpy()
        sigmas = np.exp(-lambdas_of(self.alphas_cumprod, times))
        return times, np.append(sigmas, self._end())


class LCMScheduler(NoisyStep, DistilledList, diffusers.LCMScheduler):
    """diffusers' class of this name (with ``clip_sample=False``, its default)."""

    _result = scheduling_lcm.LCMSchedulerOutput

    def _table(self, start: int) -> SolverTable:
        return lcm(
            self._schedule(),
            self._grid(start),
            prediction=self.config.prediction_type,
            timestep_scaling=self.config.timestep_scaling,
        )


class TCDScheduler(DistilledList, diffusers.TCDScheduler):
    """diffusers' class of this name."""

    _result = scheduling_tcd.TCDSchedulerOutput
    _options = (0.3,)

    def _end(self) -> float:
        return float(np.exp(-lambdas_of(self.alphas_cumprod, np.zeros(1)))[0])

    def _table(self, start: int) -> SolverTable:
        (eta,) = self._options
        kind = self.config.prediction_type
        table = tcd(from_diffusers(self), self._grid(start), prediction=kind, eta=eta)
        # diffusers' second result is x_s, not x0: with x' = r x_s + std z and r^2 + std^2 = 1.
        rows = []
        for row in table.rows:
            (update,) = row.updates
            r = math.sqrt(1.0 - update.from_noise**2)
            from_x0 = update.from_prediction / r
            rows.append(
                replace(
                    row,
                    from_state=update.from_registers[0] / r + from_x0 * row.from_state,
                    from_output=from_x0 * row.from_output,
                    updates=(Update(0, (0.0,), r, update.from_noise),),
                )
            )
        return replace(table, rows=tuple(rows), prediction="x_s")

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        options = (as_constant(eta),)
        if self._runs_own_step(sample, options):
            return super().step(model_output, timestep, sample, eta, generator, return_dict)
        results = self._advance(model_output, timestep, sample, generator, options=options)
        return self._output(return_dict, *results)


class CMStochasticIterativeScheduler(NoisyStep, EDMList, diffusers.CMStochasticIterativeScheduler):
    """diffusers' class of this name (with ``clip_denoised=False``)."""

    _result = scheduling_consistency_models.CMStochasticIterativeSchedulerOutput
    _gives_x0 = False
    _timesteps_set = True
    _has_history = False

    def _unsupported(self) -> str:
        if self.config.clip_denoised:
            return "clip_denoised is not linear in the state"
        return super()._unsupported()

    def _output_type(self) -> str:
        return "epsilon"

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times, sigmas = super()._levels()
        if len(sigmas) == len(times):  # before set_timesteps
            sigmas = np.append(sigmas, sigmas[-1])
        return times, sigmas

    def _table(self, start: int) -> SolverTable:
        config, unit = self.config, self._unit()
        schedule = cm(config.sigma_min / unit, config.sigma_max / unit)
        table = consistency(schedule, self._grid(start), prediction="edm", s_noise=config.s_noise)
        return self._in_units_of_the_state(table)
