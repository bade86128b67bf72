"""The fusion passes, in the order in which they run: each replaces a pattern by one op.

A pass is a function from a graph to the number of places it has changed. What it replaces must give
the same result within the op's numerical contract; where it refuses a call that one looks for,
`graph.leave` notes why. A gated residual that is joined with the norm after it counts three times:
under the name of each part and of both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from fastdiff.compiler.options import Options
from fastdiff.compiler.passes.attention import fuse_attention
from fastdiff.compiler.passes.gate_residual import fuse_gate_residual, fuse_gate_residual_norm
from fastdiff.compiler.passes.gated import fuse_geglu, fuse_swiglu
from fastdiff.compiler.passes.group_norm import fuse_add_group_norm, fuse_group_norm
from fastdiff.compiler.passes.layer_norm import fuse_layer_norm
from fastdiff.compiler.passes.layout import channels_last
from fastdiff.compiler.passes.prepack import prepack
from fastdiff.compiler.passes.qkv import merge_projections
from fastdiff.compiler.passes.rms_norm import fuse_rms_norm
from fastdiff.compiler.passes.timestep import fuse_timestep_embedding

PASSES: dict[str, Callable[[fx.Graph], int]] = {
    "add_group_norm_silu": fuse_add_group_norm,
    "group_norm_silu": fuse_group_norm,
    # Before attention: they take the norms of queries and keys before heads change places.
    "rms_norm": fuse_rms_norm,
    "layer_norm_modulate": fuse_layer_norm,
    "gate_residual": fuse_gate_residual,
    # Joins what the two before it have made.
    "gate_residual_norm_modulate": fuse_gate_residual_norm,
    "geglu": fuse_geglu,
    "swiglu": fuse_swiglu,
    "timestep_embedding": fuse_timestep_embedding,
    "attention": fuse_attention,
    "qkv": merge_projections,
    "prepack": prepack,
    # After all that looks at strides.
    "channels_last": channels_last,
}


def passes_for(
    options: Options, quantize: Callable[[fx.Graph], int] | None = None
) -> dict[str, Callable[[fx.Graph], int]]:
    """Those that these options ask for, and the one that knows the model's layers, if any."""
    # Two look at real memory, which Inductor does not show; it has its own ways for all three.
    left = {"qkv", "prepack", "channels_last"} if options.mode == "max" else set()
    if not options.freeze:
        left.add("prepack")
    passes = {name: fuse for name, fuse in PASSES.items() if name not in left}
    if quantize is not None:
        # After the merged projections; what it leaves may be packed.
        last = [name for name in ("prepack", "channels_last") if name in passes]
        passes |= {"quantize": quantize} | {name: passes.pop(name) for name in last}
    if "channels_last" in passes:
        passes["channels_last"] = partial(channels_last, layout=options.layout)
    return passes


__all__ = ["PASSES", "passes_for"]
