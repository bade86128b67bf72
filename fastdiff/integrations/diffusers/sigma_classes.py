"""diffusers' classes that step through a list of noise levels, ``scheduler.sigmas``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.schedulers import (
    scheduling_deis_multistep,
    scheduling_dpmsolver_multistep,
    scheduling_edm_dpmsolver_multistep,
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_lcm,
    scheduling_lms_discrete,
    scheduling_unipc_multistep,
)
from torch import Tensor

from fastdiff.integrations.diffusers.base import (
    ChurnStep,
    NoisyStep,
    PlainStep,
    TableStep,
    as_constant,
    is_traced,
)
from fastdiff.integrations.diffusers.timestep_classes import lambdas_of
from fastdiff.solvers.adams import deis, lms
from fastdiff.solvers.consistency import lcm
from fastdiff.solvers.continuous import Flow, ve
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.dpm_solver import SOLVER_TYPES, dpm_multistep
from fastdiff.solvers.grids import TimeGrid
from fastdiff.solvers.prediction import EDM_SIGMA_DATA
from fastdiff.solvers.runge_kutta import heun
from fastdiff.solvers.schedules import NoiseSchedule, linear
from fastdiff.solvers.table import SolverTable
from fastdiff.solvers.unipc import unipc

# Only where alpha and sigma come from matters to a table whose grid is given in lambda.
_VP, _SIGMA_SPACE, _FLOW = linear(), ve(), Flow()


class SigmaList(TableStep):
    """Classes that step through ``self.sigmas``."""

    _variance_preserving: ClassVar[bool] = True  # else the state is x/alpha

    @property
    def begin_index(self) -> int | None:
        """As diffusers' own, and None after a traced step: who asks then finds by timestep."""
        return None if self._traced_run else self._begin_index

    def _unsupported(self) -> str:
        with np.errstate(invalid="ignore"):
            steps = np.diff(self._levels()[1])
        if not (np.all(steps[:-1] < 0) and steps[-1] <= 0):
            return "noise levels repeat or rise; fewer steps may do"
        return super()._unsupported()

    def _kind(self) -> str:
        kind = str(self.config.prediction_type)
        return "flow" if kind == "flow_prediction" else kind

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        """Times [N] and sigmas [N + 1], float64."""
        times = self.timesteps.double().cpu().numpy()
        # There may be more sigmas, which no step reaches.
        return times, self.sigmas.double().cpu().numpy()[: len(times) + 1]

    def _schedule(self) -> NoiseSchedule:
        if getattr(self.config, "use_flow_sigmas", False):
            return _FLOW
        return _VP if self._variance_preserving else _SIGMA_SPACE

    def _grid(self, start: int) -> TimeGrid:
        times, sigmas = self._levels()
        with np.errstate(divide="ignore"):
            lambdas = -np.log(sigmas)
            if self._schedule() is _FLOW:
                # At -40 sigma is 1 to the last digit, and h stays finite: only a step to the clean
                # sample has h = inf.
                lambdas = np.maximum(np.log1p(-sigmas) + lambdas, -40.0)
        grid = TimeGrid("diffusers", times, lambdas[:-1], lambdas[1:], len(times))
        return grid.from_step(start)


class ScaledInput(SigmaList):
    """Classes whose state is x/alpha, and whose model sees it divided by a deviation."""

    _variance_preserving = False

    def _data_deviation(self) -> float:
        return 1.0

    def _traced_facts(self) -> np.ndarray:
        """The scale of the model's input, and sigma."""
        sigmas = self.sigmas.double().cpu().numpy()[: len(self.timesteps)]
        return np.stack([1.0 / np.hypot(sigmas, self._data_deviation()), sigmas], axis=1)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """As diffusers' own."""
        if is_traced(sample):
            self._prepare(None, (), sample.dtype, sample.device)
            if not self._reason:
                return sample * self._fact(0)
        elif self._traced_run:  # only the device knows the step
            return sample * self._fact(0)
        return super().scale_model_input(sample, timestep)  # type: ignore[misc]


class FlowList(SigmaList):
    """Rectified flow's classes."""

    _gives_x0 = False

    def _kind(self) -> str:
        return "flow"

    def _schedule(self) -> NoiseSchedule:
        return _FLOW


class EDMList(ScaledInput):
    """Classes with EDM's preconditioning (arXiv 2206.00364, table 1)."""

    def _unsupported(self) -> str:
        if self.config.prediction_type not in ("epsilon", "v_prediction"):
            return f"prediction_type is {self.config.prediction_type!r}"
        return super()._unsupported()

    def _kind(self) -> str:
        return "edm"

    def _data_deviation(self) -> float:
        return float(self.config.sigma_data)

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        # "edm" is for data of deviation EDM_SIGMA_DATA: all is measured in units in which it is.
        times, sigmas = super()._levels()
        # With final_sigmas_type="sigma_min" the last two are one level, rounded in two ways.
        sigmas[-1:] = sigmas[-2:].min()
        return times, sigmas * (EDM_SIGMA_DATA / self._data_deviation())

    def _in_units_of_the_state(self, table: SolverTable) -> SolverTable:
        unit = self._data_deviation() / EDM_SIGMA_DATA
        # diffusers' "v_prediction" is a network that predicts -F.
        output = unit if self.config.prediction_type == "epsilon" else -unit
        rows = tuple(
            replace(
                row,
                from_output=row.from_output * output,
                updates=tuple(replace(u, from_noise=u.from_noise * unit) for u in row.updates),
                level=None,
            )
            for row in table.rows
        )
        return replace(table, rows=rows, end_level=None)


def _dpm_table(scheduler: SigmaList, start: int) -> SolverTable:
    config = scheduler.config
    return dpm_multistep(
        scheduler._schedule(),
        scheduler._grid(start),
        prediction=scheduler._kind(),
        order=config.solver_order,
        algorithm_type=config.algorithm_type,
        solver_type=config.solver_type,
        lower_order_final=config.lower_order_final,
        euler_at_final=config.euler_at_final,
    )


class DPMSolverMultistepScheduler(SigmaList, diffusers.DPMSolverMultistepScheduler):
    """diffusers' class of this name; the third-order SDE has the sign right that it has wrong."""

    _result = scheduling_dpmsolver_multistep.SchedulerOutput
    _gives_x0 = False

    _noise_dtype = torch.float32

    def _unsupported(self) -> str:
        if self.config.solver_type not in SOLVER_TYPES:
            return f"solver_type is {self.config.solver_type!r}"
        if self.config.algorithm_type == "sde-dpmsolver" and self.config.solver_order == 3:
            return "the third order of sde-dpmsolver does not exist"
        return super()._unsupported()

    def _table(self, start: int) -> SolverTable:
        return _dpm_table(self, start)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        if self._runs_own_step(sample):
            return super().step(
                model_output, timestep, sample, generator, variance_noise, return_dict
            )
        results = self._advance(model_output, timestep, sample, generator, variance_noise)
        return self._output(return_dict, *results)


class UniPCMultistepScheduler(PlainStep, SigmaList, diffusers.UniPCMultistepScheduler):
    """diffusers' class of this name."""

    _result = scheduling_unipc_multistep.SchedulerOutput
    _gives_x0 = False

    def _unsupported(self) -> str:
        if self.config.solver_p is not None:
            return "solver_p is another scheduler"
        return super()._unsupported()

    def _table(self, start: int) -> SolverTable:
        return unipc(
            self._schedule(),
            self._grid(start),
            prediction=self._kind(),
            order=self.config.solver_order,
            solver_type=self.config.solver_type,
            predict_x0=self.config.predict_x0,
            lower_order_final=self.config.lower_order_final,
            disable_corrector=tuple(i - start for i in self.config.disable_corrector),
        )


class DEISMultistepScheduler(PlainStep, SigmaList, diffusers.DEISMultistepScheduler):
    """diffusers' class of this name, without what its float32 coefficients lose."""

    _result = scheduling_deis_multistep.SchedulerOutput
    _gives_x0 = False

    def _table(self, start: int) -> SolverTable:
        return deis(
            self._schedule(),
            self._grid(start),
            prediction=self._kind(),
            order=self.config.solver_order,
            lower_order_final=self.config.lower_order_final,
        )


class EulerDiscreteScheduler(ChurnStep, ScaledInput, diffusers.EulerDiscreteScheduler):
    """diffusers' class of this name; churn (``s_churn`` > 0) runs its own step."""

    _result = scheduling_euler_discrete.EulerDiscreteSchedulerOutput
    _timesteps_set = True
    _has_history = False

    def _table(self, start: int) -> SolverTable:
        return ddim(self._schedule(), self._grid(start), prediction=self._kind())


class EulerAncestralDiscreteScheduler(
    NoisyStep, ScaledInput, diffusers.EulerAncestralDiscreteScheduler
):
    """diffusers' class of this name."""

    _result = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput
    _timesteps_set = True
    _has_history = False

    def _table(self, start: int) -> SolverTable:
        return ddim(self._schedule(), self._grid(start), prediction=self._kind(), eta=1.0)


class HeunList(SigmaList):
    """Two evaluations in each step but the last."""

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times, sigmas = super()._levels()  # all but the ends are there twice
        return np.append(times[:1], times[1::2]), np.append(sigmas[:1], sigmas[1::2])

    def _table(self, start: int) -> SolverTable:
        # A start between the two evaluations of a step has no table: begin with the step.
        table = heun(self._schedule(), self._grid(start // 2), prediction=self._kind())
        if start % 2:
            raise ValueError(f"the first step must be an even number in the list, got {start}")
        return table


class HeunDiscreteScheduler(PlainStep, HeunList, ScaledInput, diffusers.HeunDiscreteScheduler):
    """diffusers' class of this name."""

    _result = scheduling_heun_discrete.HeunDiscreteSchedulerOutput


class FlowMatchHeunDiscreteScheduler(
    ChurnStep, HeunList, FlowList, diffusers.FlowMatchHeunDiscreteScheduler
):
    """diffusers' class of this name; churn (``s_churn`` > 0) runs its own step."""

    _result = scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteSchedulerOutput


class EDMEulerScheduler(EDMList, diffusers.EDMEulerScheduler):
    """diffusers' class of this name; churn, or an x0 from elsewhere, runs its own step."""

    _result = scheduling_edm_euler.EDMEulerSchedulerOutput
    _timesteps_set = True
    _has_history = False

    def _table(self, start: int) -> SolverTable:
        table = ddim(self._schedule(), self._grid(start), prediction=self._kind())
        return self._in_units_of_the_state(table)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        """As diffusers' own."""
        if self._runs_own_step(sample) or s_churn > 0 or pred_original_sample is not None:
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                return_dict, pred_original_sample,
            )  # fmt: skip
        return self._output(return_dict, *self._advance(model_output, timestep, sample))


class EDMDPMSolverMultistepScheduler(NoisyStep, EDMList, diffusers.EDMDPMSolverMultistepScheduler):
    """diffusers' class of this name, with the third-order SDE that it lacks."""

    _result = scheduling_edm_dpmsolver_multistep.SchedulerOutput
    _gives_x0 = False

    def _table(self, start: int) -> SolverTable:
        return self._in_units_of_the_state(_dpm_table(self, start))


class LMSDiscreteScheduler(ScaledInput, diffusers.LMSDiscreteScheduler):
    """diffusers' class of this name, started with order 1 wherever in the list it starts.

    diffusers', started part of the way, takes the weights of order 4 for the one evaluation it has.
    """

    _result = scheduling_lms_discrete.LMSDiscreteSchedulerOutput
    _options = (4,)

    def _table(self, start: int) -> SolverTable:
        (order,) = self._options
        return lms(self._schedule(), self._grid(start), prediction=self._kind(), order=order)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = 4,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        options = (int(as_constant(order)),)
        if self._runs_own_step(sample, options):
            return super().step(model_output, timestep, sample, order, return_dict)
        sigma = self._fact(1) if is_traced(sample) else self.sigmas[self._index(timestep)]
        following, eps = self._advance(model_output, timestep, sample, options=options)
        return self._output(return_dict, following, sample - sigma * eps)


class FlowMatchEulerDiscreteScheduler(FlowList, diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' class of this name; stochastic sampling and per-token times run its own step."""

    _result = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
    _has_history = False

    def _unsupported(self) -> str:
        if self.config.stochastic_sampling:
            return "stochastic_sampling is set"
        return super()._unsupported()

    def _table(self, start: int) -> SolverTable:
        return ddim(_FLOW, self._grid(start), prediction="flow")

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        if self._runs_own_step(sample) or per_token_timesteps is not None:
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                per_token_timesteps, return_dict,
            )  # fmt: skip
        return self._output(return_dict, *self._advance(model_output, timestep, sample))


class LCMScheduler(NoisyStep, SigmaList, diffusers.LCMScheduler):
    """diffusers' class of this name (with ``clip_sample=False``, its default)."""

    _result = scheduling_lcm.LCMSchedulerOutput
    _has_history = False

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times = self.timesteps.double().cpu().numpy()
        return times, np.append(np.exp(-lambdas_of(self.alphas_cumprod, times)), 0.0)

    def _table(self, start: int) -> SolverTable:
        return lcm(
            _VP,
            self._grid(start),
            prediction=self.config.prediction_type,
            timestep_scaling=self.config.timestep_scaling,
        )
