"""diffusers' schedulers with fastdiff's step: the same classes, configuration and results.

>>> from fastdiff.integrations.diffusers import DPMSolverMultistepScheduler
>>> config = pipe.scheduler.config  # doctest: +SKIP
>>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)  # doctest: +SKIP

Each class is diffusers' own with ``step`` replaced: what a step needs is a row of a solver table,
computed in float64 when the run starts, and one fused pass over memory. A configuration the tables
do not cover (clipping, thresholding, learned variances) runs diffusers' own step, with one warning
that says why; ``fastdiff_reason`` holds it.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import numpy as np
import torch
from diffusers.schedulers import (
    scheduling_ddim,
    scheduling_ddpm,
    scheduling_deis_multistep,
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_heun_discrete,
    scheduling_lcm,
    scheduling_lms_discrete,
    scheduling_unipc_multistep,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.solvers.adams import deis, lms
from fastdiff.solvers.consistency import lcm
from fastdiff.solvers.continuous import Flow, ve
from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.ddpm import VARIANCES, ddpm
from fastdiff.solvers.dpm_solver import SOLVER_TYPES, dpm_multistep
from fastdiff.solvers.grids import TimeGrid
from fastdiff.solvers.runge_kutta import heun
from fastdiff.solvers.schedules import NoiseSchedule, linear
from fastdiff.solvers.stepper import Stepper
from fastdiff.solvers.table import SolverTable
from fastdiff.solvers.unipc import unipc

# Only where alpha and sigma come from matters to a table whose grid is given in lambda.
_VP, _SIGMA_SPACE, _FLOW = linear(), ve(), Flow()


class _TableStep:
    """Mixed into a scheduler of diffusers: its ``step`` through a table.

    A subclass gives ``_table(start)``: the table of the timesteps from ``start`` on, and
    ``_unsupported()``: "" or why the configuration needs diffusers' own step.
    """

    if TYPE_CHECKING:  # what the other base brings
        config: Any
        timesteps: Any
        sigmas: Any
        num_inference_steps: Any
        step_index: Any
        alphas_cumprod: Any
        final_alpha_cumprod: Any
        previous_timestep: Any
        _init_step_index: Any
        step: Any

    # The output class, and whether it has the predicted x0.
    _result: ClassVar[Any]
    _gives_x0: ClassVar[bool] = True

    # What diffusers draws noise in; None: the model output's dtype.
    _noise_dtype: ClassVar[torch.dtype | None] = None

    # Some classes may step through their training timesteps without set_timesteps.
    _timesteps_set: bool = False
    _reason: str | None = None
    _stepper: Stepper | None = None
    _options: tuple[Any, ...] = ()

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers' own."""
        super().set_timesteps(*args, **kwargs)  # type: ignore[misc]
        self._stepper = None
        self._timesteps_set = True
        self._reason = None

    @property
    def fastdiff_reason(self) -> str:
        """Why diffusers' own step runs, or ""; decided, and warned of, once per set_timesteps."""
        if self._reason is None:
            self._reason = self._unsupported()
            if self._reason:
                warnings.warn(
                    f"{type(self).__name__}: diffusers' own step runs, because {self._reason}",
                    stacklevel=3,
                )
        return self._reason

    def _unsupported(self) -> str:
        config = self.config
        if getattr(config, "thresholding", False):
            return "thresholding is not linear in the state"
        if getattr(config, "clip_sample", False):
            return "clip_sample is not linear in the state"
        if "learned" in (getattr(config, "variance_type", None) or ""):
            return "the variance is learned"
        return ""

    def _table(self, start: int) -> SolverTable:
        raise NotImplementedError

    def _index(self, timestep: Any) -> int:
        """The number of the step; counted, so that no GPU is waited for."""
        if self.step_index is None:
            self._init_step_index(timestep)
        return int(self.step_index)

    def _advance(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        noise: Tensor | None = None,
        options: tuple[Any, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """(the next sample, the prediction) in the sample's dtype."""
        if not self._timesteps_set:
            raise ValueError("set_timesteps must be called before step")
        index = self._index(timestep)
        stepper = self._stepper
        if stepper is None or options != self._options or not stepper.follows(index):
            self._options = options
            stepper = self._stepper = Stepper(self._table(index), index)
        if noise is None and stepper.draws(index):
            noise = randn_tensor(
                model_output.shape,
                generator=generator,
                device=model_output.device,
                dtype=self._noise_dtype or model_output.dtype,
            )
        following, prediction = stepper.step(index, sample, model_output, noise)
        self._step_index = index + 1
        if sample.dtype is not following.dtype:
            return following.to(sample.dtype), prediction.to(sample.dtype)
        return following, prediction

    def _output(self, return_dict: bool, following: Tensor, prediction: Tensor) -> Any:
        """What diffusers' class returns: its output object, or a tuple."""
        results = (following, prediction) if self._gives_x0 else (following,)
        return self._result(*results) if return_dict else results


class _PlainStep(_TableStep):
    """``step`` of the classes that draw no noise."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        if self.fastdiff_reason:
            return super().step(model_output, timestep, sample, return_dict=return_dict)
        return self._output(return_dict, *self._advance(model_output, timestep, sample))


class _NoisyStep(_TableStep):
    """``step`` of the classes that draw noise in every step."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        if self.fastdiff_reason:
            return super().step(model_output, timestep, sample, generator, return_dict=return_dict)
        results = self._advance(model_output, timestep, sample, generator)
        return self._output(return_dict, *results)


class _SigmaList(_TableStep):
    """Classes that step through ``self.sigmas``."""

    _variance_preserving: ClassVar[bool] = True  # else the state is x/alpha

    def _unsupported(self) -> str:
        levels = self._levels()[1][:-1]
        with np.errstate(invalid="ignore"):
            decreasing = np.all(np.diff(levels) < 0)
        if not decreasing:
            return "noise levels repeat; use fewer steps"
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


class DPMSolverMultistepScheduler(_SigmaList, diffusers.DPMSolverMultistepScheduler):
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
        return dpm_multistep(
            self._schedule(),
            self._grid(start),
            prediction=self._kind(),
            order=self.config.solver_order,
            algorithm_type=self.config.algorithm_type,
            solver_type=self.config.solver_type,
            lower_order_final=self.config.lower_order_final,
            euler_at_final=self.config.euler_at_final,
        )

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
        if self.fastdiff_reason:
            return super().step(
                model_output, timestep, sample, generator, variance_noise, return_dict
            )
        results = self._advance(model_output, timestep, sample, generator, variance_noise)
        return self._output(return_dict, *results)


class UniPCMultistepScheduler(_PlainStep, _SigmaList, diffusers.UniPCMultistepScheduler):
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


class DEISMultistepScheduler(_PlainStep, _SigmaList, diffusers.DEISMultistepScheduler):
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


class EulerDiscreteScheduler(_SigmaList, diffusers.EulerDiscreteScheduler):
    """diffusers' class of this name; churn (``s_churn`` > 0) runs its own step."""

    _result = scheduling_euler_discrete.EulerDiscreteSchedulerOutput

    _timesteps_set = True
    _variance_preserving = False

    def _table(self, start: int) -> SolverTable:
        return ddim(self._schedule(), self._grid(start), prediction=self._kind())

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
    ) -> Any:
        """As diffusers' own."""
        if self.fastdiff_reason or s_churn > 0:
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                return_dict,
            )  # fmt: skip
        return self._output(return_dict, *self._advance(model_output, timestep, sample))


class EulerAncestralDiscreteScheduler(
    _NoisyStep, _SigmaList, diffusers.EulerAncestralDiscreteScheduler
):
    """diffusers' class of this name."""

    _result = scheduling_euler_ancestral_discrete.EulerAncestralDiscreteSchedulerOutput

    _timesteps_set = True
    _variance_preserving = False

    def _table(self, start: int) -> SolverTable:
        return ddim(self._schedule(), self._grid(start), prediction=self._kind(), eta=1.0)


class HeunDiscreteScheduler(_PlainStep, _SigmaList, diffusers.HeunDiscreteScheduler):
    """diffusers' class of this name."""

    _result = scheduling_heun_discrete.HeunDiscreteSchedulerOutput

    _variance_preserving = False

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times, sigmas = super()._levels()  # all but the ends are there twice
        return np.append(times[:1], times[1::2]), np.append(sigmas[:1], sigmas[1::2])

    def _table(self, start: int) -> SolverTable:
        # A start between the two evaluations of a step has no table: begin with the step.
        table = heun(self._schedule(), self._grid(start // 2), prediction=self._kind())
        if start % 2:
            raise ValueError(f"the first step must be an even number in the list, got {start}")
        return table


class LMSDiscreteScheduler(_SigmaList, diffusers.LMSDiscreteScheduler):
    """diffusers' class of this name, started with order 1 wherever in the list it starts.

    diffusers', started part of the way, takes the weights of order 4 for the one evaluation it has.
    """

    _result = scheduling_lms_discrete.LMSDiscreteSchedulerOutput

    _variance_preserving = False

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
        if self.fastdiff_reason:
            return super().step(model_output, timestep, sample, order, return_dict)
        sigma = self.sigmas[self._index(timestep)]
        following, eps = self._advance(model_output, timestep, sample, options=(order,))
        return self._output(return_dict, following, sample - sigma * eps)


class FlowMatchEulerDiscreteScheduler(_SigmaList, diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' class of this name; stochastic sampling and per-token times run its own step."""

    _result = scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput
    _gives_x0 = False

    def _unsupported(self) -> str:
        return "stochastic_sampling is set" if self.config.stochastic_sampling else ""

    def _kind(self) -> str:
        return "flow"

    def _schedule(self) -> NoiseSchedule:
        return _FLOW

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
        if self.fastdiff_reason or per_token_timesteps is not None:
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                per_token_timesteps, return_dict,
            )  # fmt: skip
        return self._output(return_dict, *self._advance(model_output, timestep, sample))


class _TimestepList(_TableStep):
    """Classes that look everything up by the timestep."""

    def _lambda(self, times: np.ndarray, beyond: float = math.inf) -> np.ndarray:
        """lambda of whole timesteps; ``beyond`` for those before the first."""
        return np.where(times >= 0, _lambda(self.alphas_cumprod, times), beyond)

    def _index(self, timestep: Any) -> int:
        times = self.timesteps
        if isinstance(timestep, Tensor) and timestep.device == times.device:
            # An entry of the list itself says by its address which it is: no value is read.
            offset, rest = divmod(timestep.data_ptr() - times.data_ptr(), times.element_size())
            same_type = timestep.dtype == times.dtype and timestep.numel() == 1
            if same_type and rest == 0 and 0 <= offset < len(times):
                return offset
        found = (times == int(timestep)).nonzero()
        if not len(found):
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {int(timestep)}")
        return int(found[0])


class DDIMScheduler(_TimestepList, diffusers.DDIMScheduler):
    """diffusers' class of this name (with ``clip_sample=False``, as Stable Diffusion has it)."""

    _result = scheduling_ddim.DDIMSchedulerOutput

    def _table(self, start: int) -> SolverTable:
        (eta,) = self._options
        times = self.timesteps.double().cpu().numpy()
        previous = times - self.config.num_train_timesteps // self.num_inference_steps
        last = float(self.final_alpha_cumprod)
        end = math.inf if last == 1 else math.log(last / (1 - last)) / 2
        targets = self._lambda(previous, end)
        grid = TimeGrid("diffusers", times, self._lambda(times), targets, len(times))
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
        if self.fastdiff_reason:
            return super().step(
                model_output, timestep, sample, eta, use_clipped_model_output, generator,
                variance_noise, return_dict,
            )  # fmt: skip
        options = (float(eta),)
        results = self._advance(model_output, timestep, sample, generator, variance_noise, options)
        return self._output(return_dict, *results)


class DDPMScheduler(_NoisyStep, _TimestepList, diffusers.DDPMScheduler):
    """diffusers' class of this name (with ``clip_sample=False``)."""

    _result = scheduling_ddpm.DDPMSchedulerOutput

    _timesteps_set = True

    def _unsupported(self) -> str:
        if self.config.variance_type not in VARIANCES:
            return f"variance_type is {self.config.variance_type!r}"
        return super()._unsupported()

    def _table(self, start: int) -> SolverTable:
        times = self.timesteps.double().cpu().numpy()
        following = np.array([float(self.previous_timestep(int(t))) for t in times])
        targets = self._lambda(following)
        grid = TimeGrid("diffusers", times, self._lambda(times), targets, len(times))
        return ddpm(
            _VP,
            grid.from_step(start),
            prediction=self.config.prediction_type,
            variance_type=self.config.variance_type,
        )


class LCMScheduler(_NoisyStep, _SigmaList, diffusers.LCMScheduler):
    """diffusers' class of this name (with ``clip_sample=False``, its default)."""

    _result = scheduling_lcm.LCMSchedulerOutput

    def _levels(self) -> tuple[np.ndarray, np.ndarray]:
        times = self.timesteps.double().cpu().numpy()
        return times, np.append(np.exp(-_lambda(self.alphas_cumprod, times)), 0.0)

    def _table(self, start: int) -> SolverTable:
        return lcm(
            _VP,
            self._grid(start),
            prediction=self.config.prediction_type,
            timestep_scaling=self.config.timestep_scaling,
        )


def _lambda(alphas_cumprod: Tensor, times: np.ndarray) -> np.ndarray:
    """ln(alpha/sigma) at whole timesteps, those below 0 taken as 0; -inf where nothing is left."""
    a = alphas_cumprod.double().cpu().numpy()[np.maximum(times, 0).astype(np.int64)]
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(np.maximum(a, 0.0)) - np.log1p(-a))
