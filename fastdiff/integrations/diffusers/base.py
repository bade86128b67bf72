"""What all of the scheduler classes share: a step through a table instead of diffusers' own."""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.solvers.stepper import Stepper, TracedStepper, place_rows
from fastdiff.solvers.table import SolverTable
from fastdiff.solvers.trajectory import pick_row


def is_traced(sample: Tensor) -> bool:
    """Whether a compiler or a CUDA graph records what runs now."""
    if torch.compiler.is_compiling():
        return True
    return sample.is_cuda and torch.cuda.is_current_stream_capturing()


def as_constant(value: float) -> float:
    """The same number; where a compiler has made it symbolic, its value, which it then guards."""
    return float.fromhex(float(value).hex()) if torch.compiler.is_compiling() else float(value)


class TableStep:
    """Mixed into a scheduler of diffusers: its ``step`` through a table.

    A subclass gives ``_table(start)``: the table of the timesteps from ``start`` on, and
    ``_unsupported()``: "" or why the configuration needs diffusers' own step. Its ``step`` asks
    ``_runs_own_step`` and calls ``_advance``.
    """

    if TYPE_CHECKING:  # what the other base brings
        config: Any
        timesteps: Any
        sigmas: Any
        num_inference_steps: Any
        step_index: Any
        alphas_cumprod: Any
        final_alpha_cumprod: Any
        counter: Any
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
    _begin_index: int | None = None
    _reason: str | None = None
    _stepper: Stepper | None = None
    # Arguments of step that the table depends on.
    _options: tuple[Any, ...] = ()
    _built: tuple[tuple[int, tuple[Any, ...]], SolverTable] | None = None

    # Of eager steps: what _step_facts gives.
    _known_facts: np.ndarray | None = None

    # Of traced steps: the number of the next, the facts of each (what _step_facts gives), and
    # the rows for each of the options. A run is traced or eager, from its first step on.
    _counter: Tensor | None = None
    _facts: Tensor | None = None
    _rows: dict[tuple[Any, ...], TracedStepper] | None = None
    _traced_run: bool = False
    _eager_run: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Pipelines ask for the arguments of ``set_timesteps`` (timesteps, sigmas)."""
        super().__init_subclass__(**kwargs)
        of_bases = (vars(base).get("set_timesteps") for base in cls.__mro__ if base is not cls)
        theirs = next((f for f in of_bases if f and not hasattr(f, "_of_table_step")), None)
        if theirs is None or "set_timesteps" in vars(cls):
            return

        @functools.wraps(theirs)
        def set_timesteps(self: TableStep, *args: Any, **kwargs: Any) -> None:
            theirs(self, *args, **kwargs)
            self._restart()

        set_timesteps._of_table_step = True  # type: ignore[attr-defined]
        cls.set_timesteps = set_timesteps  # type: ignore[attr-defined]

    def _restart(self) -> None:
        """After set_timesteps: what was compiled or captured begins again."""
        self._stepper = self._known_facts = None
        self._timesteps_set = True
        self._reason = None
        self._built = None
        self._begin_index = None
        self._traced_run = self._eager_run = False
        if self._rows is not None:
            self._begin_traced()
        elif self.timesteps.device.type == "cuda":
            # A step may be captured, and then it is too late to copy anything to the device.
            with contextlib.suppress(ValueError):  # which step will raise
                self._begin_traced()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run begins at that entry of ``timesteps``, as in diffusers."""
        before = self._begin_index or 0
        self._begin_index = begin_index
        if self._rows is not None and begin_index != before:
            self._begin_traced()

    @property
    def fastdiff_reason(self) -> str:
        """Why diffusers' own step runs, or ""; decided, and warned of, once per set_timesteps."""
        if self._reason is None:
            self._reason = self._unsupported()
            if self._reason:
                warnings.warn(
                    f"{type(self).__name__}: diffusers' own step runs, because {self._reason}",
                    stacklevel=4,
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

    def _table_from(self, start: int, options: tuple[Any, ...]) -> SolverTable:
        """The table from ``start`` on, made once for the eager and for the traced step."""
        if self._built is None or self._built[0] != (start, options):
            self._options = options
            self._built = (start, options), self._table(start)
        return self._built[1]

    def _index(self, timestep: Any) -> int:
        """The number of the step; counted, so that no GPU is waited for."""
        if self.step_index is None:
            self._init_step_index(timestep)
        return int(self.step_index)

    def _count(self, index: int) -> None:
        """Step ``index`` is done."""
        self._step_index = index + 1

    def _runs_own_step(self, sample: Tensor, options: tuple[Any, ...] = ()) -> bool:
        """Whether diffusers' own step runs. In a trace, makes what no trace can make."""
        if is_traced(sample):
            shape: tuple[int, ...] = ()
            if self._has_history:
                # What a compiler has made symbolic becomes a number: registers have a shape.
                shape = tuple(len(range(size)) for size in sample.shape)
            self._prepare(options, shape, sample.dtype, sample.device)
            return bool(self._reason)
        if not self._timesteps_set:
            raise ValueError("set_timesteps must be called before step")
        return bool(self.fastdiff_reason)

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
        if is_traced(sample):
            results = self._traced_step(model_output, sample, generator, noise, options)
        else:
            if self._traced_run:
                raise ValueError(
                    "step must be compiled or captured in every step of a run or in none, got an "
                    "eager step after a traced one: call set_timesteps"
                )
            index = self._index(timestep)
            stepper = self._stepper
            if stepper is None or options != self._options or not stepper.follows(index):
                stepper = self._new_stepper(index, sample, options, model_output.dtype)
            if noise is None and stepper.draws(index):
                noise = self._draw(model_output, generator)
            results = stepper.step(index, sample, model_output, noise)
            self._count(index)
        if sample.dtype is not results[0].dtype:
            return results[0].to(sample.dtype), results[1].to(sample.dtype)
        return results

    def _new_stepper(
        self, index: int, sample: Tensor, options: tuple[Any, ...], output_dtype: torch.dtype
    ) -> Stepper:
        self._eager_run = True
        self._stepper = Stepper(self._table_from(index, options), index)
        # For a capture: memory and kernels must be there before it.
        for rows in (self._rows or {}).values():
            rows.warm_up(sample.shape, sample.dtype, output_dtype)
        return self._stepper

    def _draw(self, model_output: Tensor, generator: Any) -> Tensor:
        return randn_tensor(
            model_output.shape,
            generator=generator,
            device=model_output.device,
            dtype=self._noise_dtype or model_output.dtype,
        )

    def _output(self, return_dict: bool, following: Tensor, prediction: Tensor) -> Any:
        """What diffusers' class returns: its output object, or a tuple."""
        results = (following, prediction) if self._gives_x0 else (following,)
        return self._result(*results) if return_dict else results

    def _step_facts(self) -> np.ndarray | None:
        """[len(timesteps), any]: numbers of each step besides its row."""
        return None

    def _fact_of_step(self, column: int, sample: Tensor, timestep: Any) -> Tensor | float:
        """Of the step that is about to run, traced or eager: a number of ``_step_facts``."""
        if is_traced(sample):
            return self._fact(column)
        if self._known_facts is None:
            self._known_facts = self._step_facts()
        assert self._known_facts is not None
        return float(self._known_facts[self._index(timestep), column])

    # Traced steps

    def _traced_step(
        self,
        model_output: Tensor,
        sample: Tensor,
        generator: Any,
        noise: Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor]:
        compiling = torch.compiler.is_compiling()
        if compiling and self._eager_run:
            raise ValueError(
                "step must be compiled in every step of a run or in none, got a compiled step "
                "after an eager one: call set_timesteps"
            )
        self._traced_run = True
        assert self._rows is not None
        rows = self._rows[options]
        if noise is None and rows.draws:
            if compiling:
                if generator is not None:
                    raise ValueError(
                        "generator must be None under torch.compile, which draws from PyTorch's "
                        "global one (torch.manual_seed), got a generator"
                    )
                noise = torch.randn(
                    model_output.shape,
                    dtype=self._noise_dtype or model_output.dtype,
                    device=model_output.device,
                )
            else:
                noise = self._draw(model_output, generator)
        if not compiling:
            rows.captured = True
        return rows.step(sample, model_output, noise)

    # Whether a table of the class may look back.
    _has_history: ClassVar[bool] = True

    def _fact(self, column: int) -> Tensor:
        """Of the next traced step: a number of ``_step_facts``, 0-dim."""
        assert self._facts is not None
        assert self._counter is not None
        return pick_row(self._facts, self._counter)[column]

    def _begin_traced(self) -> None:
        """The run begins again: its rows into the tensors that graphs already hold."""
        if self.fastdiff_reason:
            return
        start = self._begin_index or 0
        device = self.timesteps.device if self._counter is None else self._counter.device
        if self._counter is None:
            with torch.inference_mode(False):
                self._counter = torch.zeros((), dtype=torch.int64, device=device)
        self._counter.fill_(start)
        facts = self._step_facts()
        if facts is not None:
            self._facts = place_rows(self._facts, facts, 0, device)
        if self._rows is None:
            self._rows = {}
        for options, rows in self._rows.items():
            rows.load(self._table_from(start, options), start)
        if self._options not in self._rows:
            table = self._table_from(start, self._options)
            self._rows[self._options] = TracedStepper(table, start, self._counter)

    @torch.compiler.assume_constant_result
    def _prepare(
        self,
        options: tuple[Any, ...] | None,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
    ) -> bool:
        """Makes what a traced step reads: tables, counter, registers.

        A compiler runs this on the host while it traces, and never in the compiled program.
        """
        if not self._timesteps_set:
            raise ValueError("set_timesteps must be called before step")
        if self.fastdiff_reason:
            return False
        placed = self._counter is not None and self._counter.device == device
        rows = None if self._rows is None or options is None else self._rows.get(options)
        ready = rows is not None and (rows.num_registers == 1 or rows.reserved(shape, dtype))
        if placed and (ready or options is None):
            return True
        if not torch.compiler.is_compiling() and not _host_may_work(device):
            raise ValueError(
                "step must run once on the device given to set_timesteps before it is captured "
                "(the warm-up of a CUDA graph), got a capture without"
            )
        if not placed:
            with torch.inference_mode(False):
                self._counter = torch.zeros((), dtype=torch.int64, device=device)
            self._facts = self._rows = None
            self._begin_traced()
        if options is not None:
            assert self._rows is not None
            assert self._counter is not None
            start = self._begin_index or 0
            if options not in self._rows:
                table = self._table_from(start, options)
                self._rows[options] = TracedStepper(table, start, self._counter)
            if shape:
                self._rows[options].reserve(shape, dtype)
        return True


def _host_may_work(device: torch.device) -> bool:
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


class PlainStep(TableStep):
    """``step`` of the classes that draw no noise."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        if self._runs_own_step(sample):
            return super().step(model_output, timestep, sample, return_dict=return_dict)
        return self._output(return_dict, *self._advance(model_output, timestep, sample))


class NoisyStep(TableStep):
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
        if self._runs_own_step(sample):
            return super().step(model_output, timestep, sample, generator, return_dict=return_dict)
        results = self._advance(model_output, timestep, sample, generator)
        return self._output(return_dict, *results)


class GivenNoiseStep(TableStep):
    """``step`` of the multistep DPM-Solvers, which take the noise, too."""

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


class ChurnStep(TableStep):
    """``step`` of the classes with EDM's churn; any ``s_churn`` > 0 is for diffusers' own step."""

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """As diffusers' own."""
        if self._runs_own_step(sample) or s_churn > 0:
            return super().step(
                model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator,
                return_dict,
            )  # fmt: skip
        return self._output(return_dict, *self._advance(model_output, timestep, sample))
