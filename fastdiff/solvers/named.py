"""The noise schedules that have a name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from fastdiff.solvers.continuous import ContinuousVP, Flow, cm, edm, ve
from fastdiff.solvers.schedules import (
    NoiseSchedule,
    cosine,
    linear,
    scaled_linear,
    sigmoid,
    unknown,
)

SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "squaredcos_cap_v2": cosine,
    "sigmoid": sigmoid,
    "vp": ContinuousVP,
    "ve": ve,
    "edm": edm,
    "cm": cm,
    "flow": Flow,
}


def get_schedule(schedule: str | NoiseSchedule) -> NoiseSchedule:
    """A schedule by name, or the one given; ValueError for an unknown name."""
    if isinstance(schedule, NoiseSchedule):
        return schedule
    if not isinstance(schedule, str):
        raise TypeError(
            f"schedule must be a name or a NoiseSchedule, got {type(schedule).__name__}"
        )
    if schedule not in SCHEDULES:
        raise ValueError(unknown("schedule", schedule, list(SCHEDULES)))
    return _named(schedule)


@functools.cache
def _named(name: str) -> NoiseSchedule:
    """One object per name, so that what is cached by schedule is found again."""
    return SCHEDULES[name]()
