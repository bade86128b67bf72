"""The fused operators. Tests, benchmarks and the compile check loop over ``OPS``, the list."""

from __future__ import annotations

from fastdiff.ops._contract import Op
from fastdiff.ops.geglu import OP as _GEGLU
from fastdiff.ops.geglu import geglu
from fastdiff.ops.group_norm_silu import OP as _GROUP_NORM_SILU
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.solver_step import OP as _SOLVER_STEP
from fastdiff.ops.solver_step import solver_step
from fastdiff.ops.swiglu import OP as _SWIGLU
from fastdiff.ops.swiglu import swiglu

OPS: tuple[Op, ...] = (_GROUP_NORM_SILU, _SOLVER_STEP, _GEGLU, _SWIGLU)

__all__ = ["OPS", "Op", "geglu", "group_norm_silu", "solver_step", "swiglu"]
