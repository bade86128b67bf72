"""diffusers' classes that step through a list of noise levels, ``scheduler.sigmas``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.schedulers import (
    scheduling_deis_multistep,
    scheduling_dpmsolver_multistep,
    scheduling_dpmsolver_singlestep,
    scheduling_edm_dpmsolver_multistep,
    scheduling_edm_euler,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_flow_match_heun_discrete,
    scheduling_heun_discrete,
    scheduling_k_dpm_2_ancestral_discrete,
    scheduling_k_dpm_2_discrete,
    scheduling_lms_discrete,
    scheduling_unipc_multistep,
)
from torch import Tensor

from fastdiff.integrations.diffusers.base import (
    ChurnStep,
    GivenNoiseStep,
    NoisyStep,
    PlainStep,
    TableStep,
    as_constant,
    is_traced,
)
from fastdiff.solvers.adams import deis, lms
from fastdiff.solvers.ancestral import dpm_2, dpm_2_ancestral
from fastdiff.solvers.continuous import Flow, ve
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.dpm_solver import SOLVER_TYPES, dpm_multistep
from fastdiff.solvers.grids import TimeGrid
from fastdiff.solvers.prediction import EDM_SIGMA_DATA
from fastdiff.solvers.runge_kutta import heun
from fastdiff.solvers.schedules import NoiseSchedule, linear
from fastdiff.solvers.singlestep import dpm_singlestep
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
            return "noise levels repeat or turn back; fewer steps may do"
        kind, on_flow = self._kind(), self._schedule() is _FLOW
        if kind in ("flow", "v_prediction") and (kind == "flow") is not on_flow:
            return f"prediction_type is {kind!r} and use_flow_sigmas is {on_flow}"
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
                lambdas = np.log1p(-sigmas) + lambdas
        grid = TimeGrid("diffusers", times, lambdas[:-1], lambdas[1:], len(times))
        return grid.from_step(start)


class ScaledInput(SigmaList):
    """Classes whose state is x/alpha, and whose model sees it divided by a deviation."""

    _variance_preserving = False

    def _data_deviation(self) -> float:
        return 1.0

    def _fed_levels(self) -> np.ndarray:
        """Sigma of the state at every evaluation."""
        return self.sigmas.double().cpu().numpy()[: len(self.timesteps)].copy()

    def _step_facts(self) -> np.ndarray:
        """The scale of the model's input, and sigma."""
        sigmas = self._fed_levels()
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
        if self._output_type() not in ("epsilon", "v_prediction"):
            return f"prediction_type is {self._output_type()!r}"
        return super()._unsupported()

    def _kind(self) -> str:
        return "edm"

    def _output_type(self) -> str:
        return str(self.config.prediction_type)

    def _data_deviation(self) -> float:
        return float(self.config.sigma_data)

    def _unit(self) -> float:
        """Levels are measured in units in which the data has the deviation that "edm" is for."""
        return self._data_deviation() / EDM_SIGMA_DATA

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times, sigmas = super()._levels()
        # With final_sigmas_type="sigma_min" the last two are one level, rounded in two ways.
        sigmas[-1:] = sigmas[-2:].min()
        return times, sigmas / self._unit()

    def _in_units_of_the_state(self, table: SolverTable) -> SolverTable:
        unit = self._unit()
        # diffusers' "v_prediction" is a network that predicts -F.
        output = unit if self._output_type() == "epsilon" else -unit
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


def dpm_table(scheduler: SigmaList, start: int, algorithm_type: str) -> SolverTable:
    """The multistep DPM-Solver that the configuration asks for."""
    config = scheduler.config
    return dpm_multistep(
        scheduler._schedule(),
        scheduler._grid(start),
        prediction=scheduler._kind(),
        order=config.solver_order,
        algorithm_type=algorithm_type,
        solver_type=config.solver_type,
        lower_order_final=config.lower_order_final,
        euler_at_final=config.euler_at_final,
    )


class DPMSolverMultistepScheduler(GivenNoiseStep, SigmaList, diffusers.DPMSolverMultistepScheduler):
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
        return dpm_table(self, start, self.config.algorithm_type)


class DPMSolverSinglestepScheduler(NoisyStep, SigmaList, diffusers.DPMSolverSinglestepScheduler):
    """diffusers' class of this name; the third-order SDE has the sign right that it has wrong."""

    _result = scheduling_dpmsolver_singlestep.SchedulerOutput
    _gives_x0 = False

    def _table(self, start: int) -> SolverTable:
        return dpm_singlestep(
            self._schedule(),
            self._grid(start),
            prediction=self._kind(),
            order=self.config.solver_order,
            algorithm_type=self.config.algorithm_type,
            solver_type=self.config.solver_type,
            lower_order_final=self.config.lower_order_final,
        )


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


class TwoEvaluations(SigmaList):
    """Two evaluations in each step but the last."""

    _solver: ClassVar[Callable[..., SolverTable]] = staticmethod(heun)

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times, sigmas = super()._levels()  # all levels but the ends are there twice
        return times[::2], np.append(sigmas[:1], sigmas[1::2])

    def _table(self, start: int) -> SolverTable:
        # A start between the two evaluations of a step has no table: begin with the step.
        if start % 2:
            raise ValueError(f"the first step must be an even number in the list, got {start}")
        return self._solver(self._schedule(), self._grid(start // 2), prediction=self._kind())


class HeunDiscreteScheduler(
    PlainStep, TwoEvaluations, ScaledInput, diffusers.HeunDiscreteScheduler
):
    """diffusers' class of this name."""

    _result = scheduling_heun_discrete.HeunDiscreteSchedulerOutput


class FlowMatchHeunDiscreteScheduler(
    ChurnStep, TwoEvaluations, FlowList, diffusers.FlowMatchHeunDiscreteScheduler
):
    """diffusers' class of this name; churn (``s_churn`` > 0) runs its own step."""

    _result = scheduling_flow_match_heun_discrete.FlowMatchHeunDiscreteSchedulerOutput


class KDPM2List(TwoEvaluations, ScaledInput):
    """The second evaluation of a step lies inside it."""

    if TYPE_CHECKING:
        sigmas_interpol: Tensor

    # Where in sigmas_interpol the first inner level is.
    _inner: ClassVar[int]

    @property
    def state_in_first_order(self) -> bool:
        """As diffusers' own, of the step that runs."""
        if self._reason:
            return bool(super().state_in_first_order)  # type: ignore[misc]
        return self.step_index is None or self.step_index % 2 == 0

    def _fed_levels(self) -> np.ndarray:
        levels = super()._fed_levels()
        inner = self.sigmas_interpol.double().cpu().numpy()
        levels[1::2] = inner[self._inner :: 2][: len(levels) // 2]
        return levels


class KDPM2DiscreteScheduler(PlainStep, KDPM2List, diffusers.KDPM2DiscreteScheduler):
    """diffusers' class of this name."""

    _result = scheduling_k_dpm_2_discrete.KDPM2DiscreteSchedulerOutput
    _solver = staticmethod(dpm_2)
    _inner = 1


class KDPM2AncestralDiscreteScheduler(
    NoisyStep, KDPM2List, diffusers.KDPM2AncestralDiscreteScheduler
):
    """diffusers' class of this name."""

    _result = scheduling_k_dpm_2_ancestral_discrete.KDPM2AncestralDiscreteSchedulerOutput
    _solver = staticmethod(dpm_2_ancestral)
    _inner = 0


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
        return self._in_units_of_the_state(dpm_table(self, start, self.config.algorithm_type))


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
        sigma = self._fact_of_step(1, sample, timestep)
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
