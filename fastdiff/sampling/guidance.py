"""Guidance: how predictions with and without the condition become one.

With ``cond`` the model's output under the condition and ``other`` the one without it (or a worse
model's), every form is ``other + scale*(cond - other)``:

* classifier-free guidance (arXiv 2207.12598): ``other`` has no condition, or a negative prompt.
  The paper's weight w is ``scale = 1 + w``.
* a guidance interval (arXiv 2404.07724): scale 1 outside a range of noise levels.
* autoguidance (arXiv 2406.02507): ``other`` is a smaller or less trained model's.
* CFG++ (arXiv 2406.08070, algorithm 2): x' = alpha' x0[guided by s] + sigma' eps[other], with s in
  0..1. For x' = a x + b x0 that is the scale ``s alpha'/b`` of the step: DDIM's is s/(1 - e^-h).

Two are not a scale: the rescaling of arXiv 2305.08891 (section 3.4), which brings the guided
output's standard deviation back to that of ``cond``, and classifier guidance (arXiv 2105.05233),
which adds ``gradient_scale * d log p(y|x)/dx`` to the score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.solvers.table import SolverTable

Scale = float | Sequence[float]
# What of guidance a table holds: (scale, interval, plus_plus).
TableGuidance = tuple[float | tuple[float, ...], tuple[float, float] | None, bool]


@dataclass(frozen=True)
class Guidance:
    """How ``fastdiff.sample`` guides; see the top of this file for the papers.

    scale: one number, or one per row of the table. weight: instead of scale, ``scale - 1``.
    interval: (low, high) of sigma/alpha: guidance acts where ``low < sigma/alpha <= high``;
        outside, the model is evaluated once.
    rescale: 0..1, how much of the standard deviation's growth is taken back (per image).
    plus_plus: CFG++; scale is in 0..1, and the solver must be of one register (DDIM, Euler, DDPM).
    batched: both outputs from one call with the batch [other, cond], or from two calls, which needs
        half the activation memory.
    guide: the other model of autoguidance, called like the model, with ``uncond`` if that is
        given, else with ``cond``.
    gradient: called as ``gradient(x, t, **cond)`` with the state [B, ...] and the times [B];
        returns d log p(y|x)/dx like x. :func:`classifier_gradient` makes one of a classifier.

    Raises ValueError or TypeError for values outside these.
    """

    scale: Scale = 1.0
    weight: Scale | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    plus_plus: bool = False
    batched: bool = True
    guide: Callable[..., Any] | None = None
    gradient: Callable[..., Tensor] | None = None
    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        scale = check_scale("guidance_scale", self.scale)
        if self.weight is not None:
            if scale != 1:
                raise ValueError(f"weight must be None when scale is given, got {self.weight}")
            weight = check_scale("weight", self.weight)
            scale = tuple(1 + w for w in weight) if isinstance(weight, tuple) else 1 + weight
        object.__setattr__(self, "scale", scale)
        if self.interval is not None:
            low, high = map(float, self.interval)
            if not 0 <= low < high:
                raise ValueError(
                    f"interval must be (low, high), 0 <= low < high, got {(low, high)}"
                )
            object.__setattr__(self, "interval", (low, high))
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in 0..1, got {self.rescale}")
        if not math.isfinite(self.gradient_scale):
            raise ValueError(f"gradient_scale must be finite, got {self.gradient_scale}")
        for name in ("guide", "gradient"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable, got {type(value).__name__}")

    @property
    def in_table(self) -> TableGuidance:
        """The part that a table's rows hold; hashable."""
        assert not isinstance(self.scale, list)
        return self.scale, self.interval, self.plus_plus  # type: ignore[return-value]

    def plain(self, table: SolverTable) -> bool:
        """Whether the loop's own kernels do all of it: one batch of 2B in every row, or of B."""
        return not self.beyond(table)

    def beyond(self, table: SolverTable) -> str:
        """What of it :meth:`plain` does not cover, in words; "" where that is true."""
        parts = {
            "rescale": self.rescale,
            "guide": self.guide,
            "gradient": self.gradient,
            "batched=False": is_guided(table) and not self.batched,
            "rows without guidance": is_guided(table) and 1.0 in table.scales,
        }
        return ", ".join(name for name, given in parts.items() if given)


def check_scale(name: str, value: object) -> float | tuple[float, ...]:
    """A finite number, or a tuple of them; TypeError or ValueError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        values: tuple[Any, ...] = (value,)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        values = tuple(value)
    else:
        raise TypeError(f"{name} must be a number or one per step, got {type(value).__name__}")
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value) if isinstance(value, (int, float)) else tuple(map(float, values))


def is_guided(table: SolverTable) -> bool:
    """Whether any row needs the other output."""
    return not table.scales <= {1.0}


def guided_table(table: SolverTable, guidance: TableGuidance) -> SolverTable:
    """The table with the guidance scale of each row.

    Raises ValueError for a list of another length, an interval where the table does not know its
    noise levels, and CFG++ with a solver that keeps a history.
    """
    scale, interval, plus_plus = guidance
    if interval is None and not plus_plus:
        return table if scale == 1 else table.with_guidance(scale)
    scales = list(scale) if isinstance(scale, tuple) else [scale] * len(table)
    table = table.with_guidance(scales)  # checks their number
    if plus_plus:
        scales = [_plus_plus(table, i, value) for i, value in enumerate(scales)]
    if interval is not None:
        low, high = interval
        for i, row in enumerate(table.rows):
            if row.level is None:
                raise ValueError(
                    f"interval must be None for a table without noise levels, got {interval}"
                )
            alpha, sigma = row.level
            if not low * alpha < sigma <= high * alpha:
                scales[i] = 1.0
    return table.with_guidance(scales)


def _plus_plus(table: SolverTable, i: int, scale: float) -> float:
    row, after = table.rows[i], table.level_after(i)
    update = row.updates[0]
    if table.prediction != "x0" or table.num_registers != 1 or after is None:
        raise ValueError(
            f"plus_plus must be False for a solver that keeps more than the state, got {table.name}"
        )
    if update.from_prediction == 0:
        return 1.0
    return scale * after[0] / update.from_prediction


def rescaled(guided: Tensor, cond: Tensor, amount: float) -> Tensor:
    """``guided`` with its standard deviation per image moved towards ``cond``'s by ``amount``."""
    dims = tuple(range(1, guided.dim()))
    ratio = cond.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
    return guided * (amount * ratio + (1 - amount))


def classifier_gradient(classifier: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gradient of log p(y|x) of ``classifier(x, t) -> logits [B, K]`` (arXiv 2105.05233).

    The result is called as ``gradient(x, t, y=labels)`` with ``y`` [B]; other keyword arguments of
    the condition are not passed on.
    """

    def gradient(x: Tensor, t: Tensor, *, y: Tensor, **_: Any) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = torch.log_softmax(classifier(x, t), dim=-1).gather(1, y[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]

    return gradient
