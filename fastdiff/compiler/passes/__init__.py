"""The fusion passes, in the order in which they run: each replaces a pattern by one op.

A pass is a function from a graph to the number of places it has changed. What it replaces must give
the same result within the op's numerical contract.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fastdiff.compiler.passes.attention import fuse_attention
from fastdiff.compiler.passes.group_norm import fuse_group_norm
from fastdiff.compiler.passes.qkv import merge_projections

PASSES: dict[str, Callable[[fx.Graph], int]] = {
    "attention": fuse_attention,
    "qkv": merge_projections,
    "group_norm_silu": fuse_group_norm,
}

__all__ = ["PASSES"]
