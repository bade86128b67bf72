"""How weights are meant to be sampled: noise schedule, prediction and solver, as data.

A diffusers folder says it in ``scheduler_config.json``; :func:`from_scheduler` reads one into a
:class:`Recipe`, which makes the tables of that scheduler class (tests compare them with it) and
those of any other solver on the same schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdiff.sampling.hooks import Clip, DynamicThreshold, Hook
from fastdiff.solvers import NoiseSchedule, SolverTable, make_table
from fastdiff.solvers.continuous import Flow, dynamic_shift
from fastdiff.solvers.schedules import (
    cosine,
    from_betas,
    linear,
    scaled_linear,
    sigmoid,
    zero_terminal_snr,
)

PREDICTIONS = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
MULTISTEP = {
    ("dpmsolver++", 1): "dpmpp_1",
    ("dpmsolver++", 2): "dpmpp_2m",
    ("dpmsolver++", 3): "dpmpp_3m",
    ("sde-dpmsolver++", 2): "dpmpp_2m_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3m_sde",
    ("dpmsolver", 1): "dpm_1",
    ("dpmsolver", 2): "dpm_2m",
    ("dpmsolver", 3): "dpm_3m",
    ("sde-dpmsolver", 2): "dpm_2m_sde",
}
SINGLESTEP = {
    ("dpmsolver++", 2): "dpmpp_2s",
    ("dpmsolver++", 3): "dpmpp_3s",
    ("sde-dpmsolver++", 2): "dpmpp_2s_sde",
    ("sde-dpmsolver++", 3): "dpmpp_3s_sde",
    ("dpmsolver", 2): "dpm_2s",
    ("dpmsolver", 3): "dpm_3s",
}
# Distilled models are made for one solver; others give noise.
DISTILLED = ("lcm", "tcd", "consistency")


@dataclass(frozen=True)
class Recipe:
    """One way of sampling.

    schedule: the noise schedule. prediction: what the model predicts ("eps", "v", "x0", "flow").
    solver, grid, options: the solver the weights come with, its grid and its options; see
        :func:`fastdiff.solvers.make_table`. steps_offset: of grids of whole timesteps, for any
        solver. hooks: what else its steps do (clipping of x0 in pixel space).
    warp: for rectified flow, how the times of a grid are made: "sd3" (uniform from the first to the
        last shifted training time, and shifted again, as diffusers does), "flux" (uniform from 1 to
        1/N, shifted by what :func:`dynamic_shift` gives for the tokens of the picture, when
        ``dynamic`` is its arguments, else by the schedule's shift), or "" elsewhere.
    """

    schedule: NoiseSchedule
    prediction: str = "eps"
    solver: str = "best_linear"
    grid: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps_offset: int = 0
    hooks: tuple[Hook, ...] = ()
    warp: str = ""
    dynamic: Mapping[str, float] | None = None

    def table(
        self,
        steps: int,
        *,
        solver: str | SolverTable | None = None,
        grid: Any = None,
        strength: float = 1.0,
        tokens: int | None = None,
        **options: Any,
    ) -> SolverTable:
        """The table of a run.

        solver: another solver than the recipe's, with that solver's own grid and options unless
        ``grid`` and ``options`` give them. tokens: of the picture, for FLUX's schedule.
        """
        if isinstance(solver, SolverTable):
            if options or grid is not None:
                raise TypeError(f"solver is a finished table and takes no options, got {options}")
            return solver
        name = self.solver if solver is None else solver
        own = name == self.solver
        if own:
            options = {**self.options, **options}
            grid = self.grid if grid is None else grid
        if self.warp and grid is None:
            grid = self.times(steps, tokens)
        if self.steps_offset and grid in (None, "leading", "quadratic") and "lcm" not in name:
            options = {"steps_offset": self.steps_offset, **options}
        return make_table(
            name,
            self.schedule,
            steps,
            grid=grid,
            prediction=self.prediction,
            strength=strength,
            **options,
        )

    def times(self, steps: int, tokens: int | None = None) -> tuple[float, ...]:
        """The times of a rectified flow's steps, descending, in 0..1000."""
        assert isinstance(self.schedule, Flow)
        shift, scale = self.schedule.shift, self.schedule.time_scale
        if self.warp == "sd3":
            s = np.linspace(1.0, shifted(1.0 / scale, shift), steps)
        else:
            s = np.linspace(1.0, 1.0 / steps, steps)
            if self.dynamic is not None:
                if tokens is None:
                    raise ValueError("tokens must be given for a schedule that depends on them")
                shift = dynamic_shift(tokens, **self.dynamic)  # type: ignore[arg-type]
        return tuple((shifted(s, shift) * scale).tolist())


def shifted(s: Any, shift: float) -> Any:
    """s -> shift s/(1 + (shift - 1) s) (arXiv 2403.03206, equation 23)."""
    return shift * s / (1.0 + (shift - 1.0) * s)


def from_scheduler(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a ``scheduler_config.json`` of diffusers.

    Raises ValueError for a class or an entry that no table here stands for.
    """
    name = str(config.get("_class_name", ""))
    if name not in _READERS:
        raise ValueError(
            f"_class_name must be one of {', '.join(sorted(_READERS))}, got {name!r}; "
            "give solver=, or edit scheduler_config.json"
        )
    return _READERS[name](config)


def schedule_of(config: Mapping[str, Any], start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
    """The discrete noise schedule of a configuration, in float64; start, end: the class's own."""
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", start)), float(config.get("beta_end", end))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        made = from_betas(np.asarray(config["trained_betas"], dtype=np.float64))
    elif kind == "linear":
        made = linear(count, start, end)
    elif kind == "scaled_linear":
        made = scaled_linear(count, start, end)
    elif kind == "squaredcos_cap_v2":
        made = cosine(count)
    elif kind == "sigmoid":
        made = sigmoid(count, start, end)
    else:
        raise ValueError(
            "beta_schedule must be linear, scaled_linear, squaredcos_cap_v2 or sigmoid, "
            f"got {kind!r}"
        )
    return zero_terminal_snr(made) if config.get("rescale_betas_zero_snr") else made


def _grid_of(config: Mapping[str, Any], spacing: str) -> str:
    """The grid's name; spacing: the class's own."""
    kinds = {
        "use_karras_sigmas": "karras",
        "use_exponential_sigmas": "exponential",
        "use_beta_sigmas": "beta",
        "use_lu_lambdas": "lambda",
    }
    asked = [grid for key, grid in kinds.items() if config.get(key)]
    if len(asked) > 1:
        raise ValueError(f"scheduler must use one of {', '.join(kinds)}, got {', '.join(asked)}")
    return asked[0] if asked else str(config.get("timestep_spacing", spacing))


def _options_of(config: Mapping[str, Any], *names: str, **defaults: Any) -> dict[str, Any]:
    """The configuration's entries that are a solver's options under the same name."""
    given = {name: config[name] for name in (*names, *defaults) if name in config}
    return {**defaults, **given}


def _hooks_of(config: Mapping[str, Any], clip: bool = False) -> tuple[Hook, ...]:
    if config.get("thresholding"):
        return (
            DynamicThreshold(
                float(config.get("dynamic_thresholding_ratio", 0.995)),
                1.0,
                float(config.get("sample_max_value", 1.0)),
            ),
        )
    if config.get("clip_sample", clip):
        return (Clip(float(config.get("clip_sample_range", 1.0))),)
    return ()


def _recipe(
    config: Mapping[str, Any],
    solver: str,
    options: Mapping[str, Any],
    *,
    spacing: str,
    clip: bool = False,
    betas: tuple[float, float] = (1e-4, 0.02),
    grid: str | None = None,
) -> Recipe:
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {kind!r}")
    return Recipe(
        schedule_of(config, *betas),
        PREDICTIONS[kind],
        solver,
        grid or _grid_of(config, spacing),
        options,
        int(config.get("steps_offset", 0)),
        _hooks_of(config, clip),
    )


def _ddim(config: Mapping[str, Any]) -> Recipe:
    options = _options_of(config, set_alpha_to_one=True)
    return _recipe(config, "ddim", options, spacing="leading", clip=True)


def _ddpm(config: Mapping[str, Any]) -> Recipe:
    options = _options_of(config, variance_type="fixed_small")
    return _recipe(config, "ddpm", options, spacing="leading", clip=True)


def _pndm(config: Mapping[str, Any]) -> Recipe:
    if not config.get("skip_prk_steps", False):
        raise ValueError("skip_prk_steps must be true (PLMS), got false")
    options = _options_of(config, set_alpha_to_one=False)
    return _recipe(config, "pndm", options, spacing="leading")


def _euler(config: Mapping[str, Any]) -> Recipe:
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type must be 'discrete', got {config['timestep_type']!r}")
    name = "euler_ancestral" if "Ancestral" in config["_class_name"] else "euler"
    return _recipe(config, name, _options_of(config, "final_sigmas_type"), spacing="linspace")


def _two(name: str) -> Any:
    def read(config: Mapping[str, Any]) -> Recipe:
        betas = (0.00085, 0.012)
        return _recipe(config, name, {}, spacing="linspace", betas=betas)

    return read


def _lms(config: Mapping[str, Any]) -> Recipe:
    return _recipe(config, "lms", {}, spacing="linspace")


def _dpm(config: Mapping[str, Any]) -> Recipe:
    known = SINGLESTEP if "Singlestep" in config["_class_name"] else MULTISTEP
    if config.get("use_flow_sigmas"):
        raise ValueError("use_flow_sigmas must be false, got true")
    key = (config.get("algorithm_type", "dpmsolver++"), config.get("solver_order", 2))
    if key not in known:
        raise ValueError(f"(algorithm_type, solver_order) must be one of {[*known]}, got {key}")
    own = {"final_sigmas_type": "zero"}
    options = _options_of(config, "solver_type", "lower_order_final", **own)
    if known is MULTISTEP:
        options |= _options_of(config, "euler_at_final")
    return _recipe(config, known[key], options, spacing="linspace")


def _unipc(config: Mapping[str, Any]) -> Recipe:
    if config.get("use_flow_sigmas"):
        raise ValueError("use_flow_sigmas must be false, got true")
    names = ("solver_type", "predict_x0", "lower_order_final", "final_sigmas_type")
    options = _options_of(config, *names)
    options["order"] = int(config.get("solver_order", 2))
    options["disable_corrector"] = tuple(config.get("disable_corrector", ()))
    return _recipe(config, "unipc", options, spacing="linspace")


def _deis(config: Mapping[str, Any]) -> Recipe:
    options = _options_of(config, "lower_order_final")
    options["order"] = int(config.get("solver_order", 2))
    return _recipe(config, "deis", options, spacing="linspace")


def _distilled(config: Mapping[str, Any]) -> Recipe:
    name = "lcm" if config["_class_name"] == "LCMScheduler" else "tcd"
    if config.get("original_inference_steps", 50) != 50:
        raise ValueError(
            f"original_inference_steps must be 50, got {config['original_inference_steps']}"
        )
    options = _options_of(config, "timestep_scaling") if name == "lcm" else {}
    # Their own betas are scaled-linear ones; a configuration always says so.
    merged = {"beta_schedule": "scaled_linear", **config}
    betas = (0.00085, 0.012)
    return _recipe(merged, name, options, spacing="leading", grid="lcm", betas=betas)


def _flow(config: Mapping[str, Any]) -> Recipe:
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config.get(name):
            raise ValueError(f"{name} must be false, got true")
    for name in ("invert_sigmas", "shift_terminal", "stochastic_sampling"):
        if config.get(name):
            raise ValueError(f"{name} must be off, got {config[name]}")
    dynamic = None
    if config.get("use_dynamic_shifting"):
        if config.get("time_shift_type", "exponential") != "exponential":
            kind = config["time_shift_type"]
            raise ValueError(f"time_shift_type must be 'exponential', got {kind!r}")
        dynamic = {
            "base_tokens": int(config.get("base_image_seq_len", 256)),
            "max_tokens": int(config.get("max_image_seq_len", 4096)),
            "base_shift": float(config.get("base_shift", 0.5)),
            "max_shift": float(config.get("max_shift", 1.15)),
        }
    schedule = Flow(
        shift=float(config.get("shift", 1.0)),
        time_scale=float(config.get("num_train_timesteps", 1000)),
    )
    return Recipe(schedule, "flow", "euler", None, warp="sd3", dynamic=dynamic)


_READERS: dict[str, Any] = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": _pndm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler,
    "HeunDiscreteScheduler": _two("heun"),
    "LMSDiscreteScheduler": _lms,
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _dpm,
    "UniPCMultistepScheduler": _unipc,
    "DEISMultistepScheduler": _deis,
    "LCMScheduler": _distilled,
    "TCDScheduler": _distilled,
    "FlowMatchEulerDiscreteScheduler": _flow,
}
