"""What a model predicts, and how a solver gets x0 or eps from it.

With ``x = alpha x0 + sigma eps`` and n^2 = alpha^2 + sigma^2 (1 for variance-preserving schedules):

=======  ===================================  ============================  =======================
name     the model's output                   x0                            eps
=======  ===================================  ============================  =======================
"eps"    eps                                  (x - sigma output)/alpha      output
"v"      (alpha eps - sigma x0)/n             (alpha x - sigma n output)/n^2  (sigma x + alpha n output)/n^2
"x0"     x0                                   output                        (x - alpha output)/sigma
"flow"   eps - x0                             (x - sigma output)/(alpha + sigma)  (x + alpha output)/(alpha + sigma)
"score"  the gradient of log p, -eps/sigma    (x + sigma^2 output)/alpha    -sigma output
"edm"    F of a preconditioned model, below   c_skip x/alpha + c_out output   from x0
=======  ===================================  ============================  =======================

"v" is from arXiv 2202.00512 (appendix D), "flow" from rectified flow (arXiv 2209.03003). "edm" is
D = c_skip x + c_out F(c_in x) of arXiv 2206.00364 (table 1), with sigma_data 0.5; only there the
model's input is scaled.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastdiff.solvers.grids import TimeGrid
from fastdiff.solvers.schedules import NoiseSchedule, unknown
from fastdiff.solvers.table import Row, SolverTable, Update

_NAMES = {
    "eps": "eps",
    "epsilon": "eps",
    "v": "v",
    "v_prediction": "v",
    "x0": "x0",
    "sample": "x0",
    "flow": "flow",
    "flow_prediction": "flow",
    "score": "score",
    "edm": "edm",
}
EDM_SIGMA_DATA = 0.5


def canonical(prediction: str) -> str:
    """ "eps", "v", "x0", "flow", "score" or "edm"; takes diffusers' names too.

    ValueError for any other.
    """
    if not isinstance(prediction, str):
        raise TypeError(f"prediction must be a string, got {type(prediction).__name__}")
    if prediction not in _NAMES:
        raise ValueError(unknown("prediction", prediction, list(_NAMES)))
    return _NAMES[prediction]


def input_scale(prediction: str, alpha: float, sigma: float) -> float:
    """What the state is multiplied with before the model sees it."""
    if prediction != "edm":
        return 1.0
    return 1.0 / math.hypot(sigma, alpha * EDM_SIGMA_DATA)


def to_x0(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(from_state, from_output) such that ``x0 = from_state*x + from_output*output``.

    Raises ValueError for an eps or score model where alpha is 0 (zero terminal SNR): the noise
    alone says nothing about x0.
    """
    if prediction == "x0":
        return 0.0, 1.0
    if prediction == "v":
        n2 = alpha * alpha + sigma * sigma
        return alpha / n2, -sigma / math.sqrt(n2)
    if prediction == "flow":
        return 1.0 / (alpha + sigma), -sigma / (alpha + sigma)
    if prediction == "edm":
        n = math.hypot(sigma, alpha * EDM_SIGMA_DATA)
        return alpha * EDM_SIGMA_DATA**2 / (n * n), sigma * EDM_SIGMA_DATA / n
    if alpha == 0:
        raise ValueError(
            "prediction must be v or x0 for a schedule with zero terminal SNR (alpha = 0 at the "
            f"first step), got {prediction}"
        )
    if prediction == "score":
        return 1.0 / alpha, sigma * sigma / alpha
    return 1.0 / alpha, -sigma / alpha


def to_model(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(from_state, from_x0) such that ``output = from_state*x + from_x0*x0``: to_x0's inverse.

    Raises ValueError where the output says nothing about x0 (an eps model at sigma = 0).
    """
    from_state, from_output = to_x0(prediction, alpha, sigma)
    if from_output == 0:
        raise ValueError(f"sigma must be above 0 for a {prediction} model, got {sigma:g}")
    return -from_state / from_output, 1.0 / from_output


def to_eps(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(from_state, from_output) such that ``eps = from_state*x + from_output*output``.

    Raises ValueError where sigma is 0: a clean sample says nothing about the noise.
    """
    if prediction == "eps":
        return 0.0, 1.0
    if prediction == "score":
        return 0.0, -sigma
    if prediction == "v":
        n2 = alpha * alpha + sigma * sigma
        return sigma / n2, alpha / math.sqrt(n2)
    if prediction == "flow":
        return 1.0 / (alpha + sigma), alpha / (alpha + sigma)
    if sigma == 0:
        raise ValueError("sigma must be above 0 where eps is asked of a model, got 0")
    if prediction == "x0":
        return 1.0 / sigma, -alpha / sigma
    n = math.hypot(sigma, alpha * EDM_SIGMA_DATA)
    return sigma / (n * n), -alpha * EDM_SIGMA_DATA / n


def to_score(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(from_state, from_output) such that ``score = from_state*x + from_output*output``.

    The score is -eps/sigma. Raises ValueError where sigma is 0.
    """
    if prediction == "score":
        return 0.0, 1.0
    if sigma == 0:
        raise ValueError("sigma must be above 0 where the score is asked of a model, got 0")
    from_state, from_output = to_eps(prediction, alpha, sigma)
    return -from_state / sigma, -from_output / sigma


_CONVERSIONS = {"x0": to_x0, "eps": to_eps, "score": to_score}


@dataclass(frozen=True)
class Step:
    """What the coefficients of one step are made of, all float64.

    lam, alpha, sigma: of the state the model sees. target, alpha_to, sigma_to: after the step.
    input_scale, from_state, from_output: the fields of a :class:`Row` of those names.
    """

    index: int
    time: float
    lam: float
    target: float
    alpha: float
    sigma: float
    alpha_to: float
    sigma_to: float
    input_scale: float
    from_state: float
    from_output: float

    @property
    def h(self) -> float:
        """target - lam, 0..inf."""
        return self.target - self.lam

    def row(self, *updates: Update, draw: int = -1) -> Row:
        """The row that evaluates the model at this step's state, in register 0."""
        return Row(
            feed=0,
            time=self.time,
            input_scale=self.input_scale,
            from_state=self.from_state,
            from_output=self.from_output,
            updates=updates,
            draw=draw,
            level=(self.alpha, self.sigma),
        )


def step_between(
    schedule: NoiseSchedule,
    kind: str,
    wanted: str,
    index: int,
    time: float,
    lam: float,
    target: float,
) -> Step:
    """The step from lambda to ``target`` with the model evaluated at ``time``.

    kind: a canonical prediction. wanted: what the solver works with, "x0", "eps" or "score".
    """
    alpha, sigma = map(float, schedule.marginal(lam))
    alpha_to, sigma_to = map(float, schedule.marginal(target))
    return Step(
        index,
        time,
        lam,
        target,
        alpha,
        sigma,
        alpha_to,
        sigma_to,
        input_scale(kind, alpha, sigma),
        *_CONVERSIONS[wanted](kind, alpha, sigma),
    )


def steps_of(
    schedule: NoiseSchedule, grid: TimeGrid, prediction: str, wanted: str = "x0"
) -> Iterator[Step]:
    """The steps of a grid, for a solver that works with "x0", "eps" or "score" (``wanted``)."""
    kind = canonical(prediction)
    triples = zip(grid.times.tolist(), grid.lambdas.tolist(), grid.targets.tolist(), strict=True)
    for index, (time, lam, target) in enumerate(triples):
        yield step_between(schedule, kind, wanted, index, time, lam, target)


def table_of(
    name: str,
    schedule: NoiseSchedule,
    grid: TimeGrid,
    rows: Sequence[Row],
    *,
    registers: int = 1,
    prediction: str = "x0",
    description: str = "",
) -> SolverTable:
    """The table of a run over a grid: how it starts and ends follows from schedule and grid."""
    alpha, sigma = map(float, schedule.marginal(float(grid.targets[-1])))
    return SolverTable(
        name=name,
        num_registers=registers,
        rows=tuple(rows),
        num_draws=sum(row.draw >= 0 for row in rows),
        init_scale=schedule.init_scale(float(grid.lambdas[0])),
        prediction=prediction,
        description=f"{description}, {grid.name} grid",
        end_level=(alpha, sigma),
    )
