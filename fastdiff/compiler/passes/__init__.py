"""The fusion passes, in the order in which they run: each replaces a pattern by one op.

A pass is a function from a graph to the number of places it has changed. What it replaces must give
the same result within the op's numerical contract.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fastdiff.compiler.passes.group_norm import fuse_add_group_norm, fuse_group_norm

PASSES: dict[str, Callable[[fx.Graph], int]] = {
    "add_group_norm_silu": fuse_add_group_norm,
    "group_norm_silu": fuse_group_norm,
}

__all__ = ["PASSES"]
