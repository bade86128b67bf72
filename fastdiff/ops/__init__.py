"""The fused operators. Tests, benchmarks and the compile check loop over ``OPS``, the list."""

from __future__ import annotations

from fastdiff.ops._contract import Op
from fastdiff.ops.group_norm_silu import OP as _GROUP_NORM_SILU
from fastdiff.ops.group_norm_silu import group_norm_silu

OPS: tuple[Op, ...] = (_GROUP_NORM_SILU,)

__all__ = ["OPS", "Op", "group_norm_silu"]
