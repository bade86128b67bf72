"""diffusers' schedulers with fastdiff's step: the same classes, configuration and results.

>>> from fastdiff.integrations.diffusers import DPMSolverMultistepScheduler
>>> config = pipe.scheduler.config  # doctest: +SKIP
>>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)  # doctest: +SKIP

Each class is diffusers' own with ``step`` replaced: what a step needs is a row of a solver table,
computed in float64 when the run starts, and one fused pass over memory. A configuration the tables
do not cover (clipping, thresholding, learned variances) runs diffusers' own step, with one warning
that says why; ``fastdiff_reason`` holds it.

Compiled or captured
--------------------
``torch.compile(scheduler.step)``, a compiled loop body that calls ``step`` and
``scale_model_input``, and a CUDA graph of either: all of them run one and the same program in every
step. The number of the step is a tensor on the device, which the step itself increments, and it
picks the row out of a tensor of all rows. Nothing recompiles when the run goes on, and
``set_timesteps`` (which puts the counter back) may ask for another number of steps; only a run of
more than 2047 evaluations would compile once more. What differs from the eager step:

- A run begins at ``set_begin_index`` (0 unless it is called), whatever timestep is passed first,
  and ``step_index`` stays where the run began.
- All steps of a run are compiled or captured, or none: what mixes them raises ValueError.
- ``generator`` must be None under torch.compile (ValueError): the noise is PyTorch's global one.
  A CUDA graph takes a generator of its device that is registered with the graph.
- Before a capture, ``set_timesteps`` is given the CUDA device and one step runs uncaptured (the
  warm-up every capture needs).
- Where some steps of a run draw noise, all of them do.
- A step past the last gives NaN.
"""

from __future__ import annotations

from fastdiff.integrations.diffusers.distilled_classes import (
    CMStochasticIterativeScheduler,
    LCMScheduler,
    TCDScheduler,
)
from fastdiff.integrations.diffusers.inverse_classes import (
    DDIMInverseScheduler,
    DPMSolverMultistepInverseScheduler,
)
from fastdiff.integrations.diffusers.sigma_classes import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    UniPCMultistepScheduler,
)
from fastdiff.integrations.diffusers.timestep_classes import (
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
)

__all__ = [
    "CMStochasticIterativeScheduler",
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]
