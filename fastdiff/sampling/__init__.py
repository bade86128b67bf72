"""Drawing samples: ``sample`` and what can be given to it.

>>> from fastdiff.sampling import Guidance, Inpaint, RunState, sample
"""

from __future__ import annotations

from fastdiff.sampling.adaptive import AdaptiveSample, sample_adaptive
from fastdiff.sampling.api import sample
from fastdiff.sampling.guidance import Guidance, classifier_gradient
from fastdiff.sampling.hooks import (
    Clip,
    ControlNet,
    DynamicThreshold,
    Hook,
    Inpaint,
    Place,
    Preview,
    RunFacts,
)
from fastdiff.sampling.likelihood import Likelihood, log_likelihood
from fastdiff.sampling.state import RunState
from fastdiff.solvers.engine import StepInfo

__all__ = [
    "AdaptiveSample",
    "Clip",
    "ControlNet",
    "DynamicThreshold",
    "Guidance",
    "Hook",
    "Inpaint",
    "Likelihood",
    "Place",
    "Preview",
    "RunFacts",
    "RunState",
    "StepInfo",
    "classifier_gradient",
    "log_likelihood",
    "sample",
    "sample_adaptive",
]
