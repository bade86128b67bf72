"""The fused operators. Tests, benchmarks and the compile check loop over ``OPS``, the list."""

from __future__ import annotations

from fastdiff.ops._contract import Op
from fastdiff.ops.gate_residual import OP as _GATE_RESIDUAL
from fastdiff.ops.gate_residual import gate_residual
from fastdiff.ops.gate_residual_norm_modulate import OP as _GATE_RESIDUAL_NORM_MODULATE
from fastdiff.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from fastdiff.ops.group_norm_silu import OP as _GROUP_NORM_SILU
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.layer_norm_modulate import OP as _LAYER_NORM_MODULATE
from fastdiff.ops.layer_norm_modulate import layer_norm_modulate
from fastdiff.ops.rms_norm import OP as _RMS_NORM
from fastdiff.ops.rms_norm import rms_norm
from fastdiff.ops.solver_step import OP as _SOLVER_STEP
from fastdiff.ops.solver_step import solver_step

OPS: tuple[Op, ...] = (
    _GATE_RESIDUAL,
    _GATE_RESIDUAL_NORM_MODULATE,
    _GROUP_NORM_SILU,
    _LAYER_NORM_MODULATE,
    _RMS_NORM,
    _SOLVER_STEP,
)

__all__ = [
    "OPS",
    "Op",
    "gate_residual",
    "gate_residual_norm_modulate",
    "group_norm_silu",
    "layer_norm_modulate",
    "rms_norm",
    "solver_step",
]
