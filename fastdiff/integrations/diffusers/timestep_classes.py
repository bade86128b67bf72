"""diffusers' classes that look everything up by the timestep."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import numpy as np
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_pndm
from torch import Tensor

from fastdiff.integrations.diffusers.base import NoisyStep, PlainStep, TableStep, as_constant
from fastdiff.solvers.adams import pndm_part_way
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import VARIANCES, ddpm
from fastdiff.solvers.grids import TimeGrid
from fastdiff.solvers.schedules import from_diffusers, linear
from fastdiff.solvers.table import SolverTable

# Only where alpha and sigma come from matters to a table whose grid is given in lambda.
_VP = linear()


def lambdas_of(alphas_cumprod: Tensor, times: np.ndarray) -> np.ndarray:
    """ln(alpha/sigma) at whole timesteps, those below 0 taken as 0; -inf where nothing is left."""
    a = alphas_cumprod.double().cpu().numpy()[np.maximum(times, 0).astype(np.int64)]
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(np.maximum(a, 0.0)) - np.log1p(-a))


class TimestepList(TableStep):
    """Classes that look everything up by the timestep."""

    _positions: tuple[Any, dict[int, int]] | None = None

    def _grid(self, times: np.ndarray, following: np.ndarray, end: float = math.inf) -> TimeGrid:
        """From ``times`` to ``following``; below the first timestep the level is ``end``."""
        targets = np.where(following >= 0, lambdas_of(self.alphas_cumprod, following), end)
        lambdas = lambdas_of(self.alphas_cumprod, times)
        return TimeGrid("diffusers", times, lambdas, targets, len(times))

    def _strided_grid(self, times: np.ndarray, last: float) -> TimeGrid:
        """Each step goes ``T // N`` timesteps on, the last one to alphas_cumprod ``last``."""
        following = times - self.config.num_train_timesteps // self.num_inference_steps
        end = math.inf if last == 1 else math.log(last / (1 - last)) / 2
        return self._grid(times, following, end)

    def _index(self, timestep: Any) -> int:
        times = self.timesteps
        if isinstance(timestep, Tensor) and timestep.device == times.device:
            # An entry of the list itself says by its address which it is: no value is read.
            offset, rest = divmod(timestep.data_ptr() - times.data_ptr(), times.element_size())
            same_type = timestep.dtype == times.dtype and timestep.numel() == 1
            if same_type and rest == 0 and 0 <= offset < len(times):
                return offset
        if self._positions is None or self._positions[0] is not times:
            places = reversed(list(enumerate(times.tolist())))
            self._positions = times, {time: place for place, time in places}
        found = self._positions[1].get(int(timestep))
        if found is None:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {int(timestep)}")
        return found


class DDIMScheduler(TimestepList, diffusers.DDIMScheduler):
    """diffusers' class of this name (with ``clip_sample=False``, as Stable Diffusion has it)."""

    _result = scheduling_ddim.DDIMSchedulerOutput
    _has_history = False
    _options = (0.0,)

    def _table(self, start: int) -> SolverTable:
        (eta,) = self._options
        times = self.timesteps.double().cpu().numpy()
        grid = self._strided_grid(times, float(self.final_alpha_cumprod))
        return ddim(_VP, grid.from_step(start), prediction=self.config.prediction_type, eta=eta)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own; without clipping ``use_clipped_model_output`` changes nothing."""
        options = (as_constant(eta),)
        if self._runs_own_step(sample, options):
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator,
                variance_noise, return_dict,
            )  # fmt: skip
        results = self._advance(model_output, timestep, sample, generator, variance_noise, options)
        return self._output(return_dict, *results)


class DDPMScheduler(NoisyStep, TimestepList, diffusers.DDPMScheduler):
    """diffusers' class of this name (with ``clip_sample=False``).

    Learned variances ("learned", "learned_range") run its own step: there the noise is multiplied
    by a power of the model's output.
    """

    _result = scheduling_ddpm.DDPMSchedulerOutput
    _timesteps_set = True
    _has_history = False

    def _unsupported(self) -> str:
        if self.config.variance_type not in VARIANCES:
            return f"variance_type is {self.config.variance_type!r}"
        return super()._unsupported()

    def _table(self, start: int) -> SolverTable:
        times = self.timesteps.double().cpu().numpy()
        following = np.array([float(self.previous_timestep(int(t))) for t in times])
        return ddpm(
            _VP,
            self._grid(times, following).from_step(start),
            prediction=self.config.prediction_type,
            variance_type=self.config.variance_type,
        )


class PNDMScheduler(PlainStep, TimestepList, diffusers.PNDMScheduler):
    """diffusers' class of this name (with ``skip_prk_steps=True``, as Stable Diffusion has it)."""

    _result = scheduling_pndm.SchedulerOutput
    _gives_x0 = False

    # Where in the list the run began.
    _first: int = 0

    def _unsupported(self) -> str:
        if not self.config.skip_prk_steps:
            return "skip_prk_steps is False: no table has the Runge-Kutta start"
        return super()._unsupported()

    def _table(self, start: int) -> SolverTable:
        # The list is t_0, t_1, t_1, t_2, ...
        listed = self.timesteps.double().cpu().numpy()
        times = np.delete(listed, 1) if len(listed) > 1 else listed
        grid = self._strided_grid(times, float(self.final_alpha_cumprod))
        grid = replace(grid, planned_steps=self.num_inference_steps)
        kind = self.config.prediction_type
        return pndm_part_way(from_diffusers(self), grid, start, prediction=kind)

    def _index(self, timestep: Any) -> int:
        if self.counter == 0:
            self._first = super()._index(timestep)
        return self._first + int(self.counter)

    def _count(self, index: int) -> None:
        self.counter += 1
