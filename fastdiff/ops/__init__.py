"""The fused operators. Tests, benchmarks and the compile check loop over ``OPS``, the list."""

from __future__ import annotations

from fastdiff.ops._contract import Op
from fastdiff.ops.attention import OP as _ATTENTION
from fastdiff.ops.attention import attention
from fastdiff.ops.group_norm_silu import OP as _GROUP_NORM_SILU
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.solver_step import OP as _SOLVER_STEP
from fastdiff.ops.solver_step import solver_step

OPS: tuple[Op, ...] = (_ATTENTION, _GROUP_NORM_SILU, _SOLVER_STEP)

__all__ = ["OPS", "Op", "attention", "group_norm_silu", "solver_step"]
