"""The fused operators. Tests, benchmarks and the compile check loop over ``OPS``, the list."""

from __future__ import annotations

from fastdiff.ops._contract import Op
from fastdiff.ops.adaln_attention import OP as _ADALN_ATTENTION
from fastdiff.ops.adaln_attention import adaln_attention
from fastdiff.ops.add_group_norm_silu import OP as _ADD_GROUP_NORM_SILU
from fastdiff.ops.add_group_norm_silu import add_group_norm_silu
from fastdiff.ops.attention import OP as _ATTENTION
from fastdiff.ops.attention import attention
from fastdiff.ops.gate_residual import OP as _GATE_RESIDUAL
from fastdiff.ops.gate_residual import gate_residual
from fastdiff.ops.gate_residual_norm_modulate import OP as _GATE_RESIDUAL_NORM_MODULATE
from fastdiff.ops.gate_residual_norm_modulate import gate_residual_norm_modulate
from fastdiff.ops.geglu import OP as _GEGLU
from fastdiff.ops.geglu import geglu
from fastdiff.ops.group_norm_silu import OP as _GROUP_NORM_SILU
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.layer_norm_modulate import OP as _LAYER_NORM_MODULATE
from fastdiff.ops.layer_norm_modulate import layer_norm_modulate
from fastdiff.ops.linear_gate import OP as _LINEAR_GATE
from fastdiff.ops.linear_gate import linear_gate
from fastdiff.ops.linear_quantized import OP as _LINEAR_QUANTIZED
from fastdiff.ops.linear_quantized import linear_quantized, quantize_weight
from fastdiff.ops.rms_norm import OP as _RMS_NORM
from fastdiff.ops.rms_norm import rms_norm
from fastdiff.ops.solver_step import OP as _SOLVER_STEP
from fastdiff.ops.solver_step import solver_step
from fastdiff.ops.solver_step_indexed import OP as _SOLVER_STEP_INDEXED
from fastdiff.ops.solver_step_indexed import solver_step_indexed
from fastdiff.ops.swiglu import OP as _SWIGLU
from fastdiff.ops.swiglu import swiglu
from fastdiff.ops.timestep_embedding import OP as _TIMESTEP_EMBEDDING
from fastdiff.ops.timestep_embedding import timestep_embedding
from fastdiff.ops.timestep_mlp import OP as _TIMESTEP_MLP
from fastdiff.ops.timestep_mlp import timestep_mlp

OPS: tuple[Op, ...] = (
    _GROUP_NORM_SILU,
    _ADD_GROUP_NORM_SILU,
    _SOLVER_STEP,
    _SOLVER_STEP_INDEXED,
    _GEGLU,
    _SWIGLU,
    _TIMESTEP_EMBEDDING,
    _LINEAR_GATE,
    _TIMESTEP_MLP,
    _LINEAR_QUANTIZED,
    _ATTENTION,
    _GATE_RESIDUAL,
    _GATE_RESIDUAL_NORM_MODULATE,
    _LAYER_NORM_MODULATE,
    _RMS_NORM,
    _ADALN_ATTENTION,
)

__all__ = [
    "OPS",
    "Op",
    "adaln_attention",
    "add_group_norm_silu",
    "attention",
    "gate_residual",
    "gate_residual_norm_modulate",
    "geglu",
    "group_norm_silu",
    "layer_norm_modulate",
    "linear_gate",
    "linear_quantized",
    "quantize_weight",
    "rms_norm",
    "solver_step",
    "solver_step_indexed",
    "swiglu",
    "timestep_embedding",
    "timestep_mlp",
]
