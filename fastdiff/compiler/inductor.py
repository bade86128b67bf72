"""``mode="max"``: what is left between fastdiff's ops goes to Inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from fastdiff.compiler.split import Program


def compile_program(program: Program) -> Callable[..., Any]:
    """The program as Inductor compiles it: fastdiff's ops are opaque, the rest is fused.

    Needs a C++ compiler (CPU) or Triton (CUDA); products are tuned on CUDA devices. Inductor's own
    CUDA graphs stay off: the programs are recorded whole.
    """
    from torch._inductor.compile_fx import compile_fx

    nodes = [node for node in program.module.graph.nodes if node.op == "placeholder"]
    examples = [node.meta["example_value"] for node in nodes]
    if not all(isinstance(value, Tensor) for value in examples):
        return program.module  # a tuple from another program: Inductor takes tensors
    on_cuda = any(getattr(value, "is_cuda", False) for value in examples)
    patches = {"max_autotune": on_cuda, "triton.cudagraphs": False}
    compiled: Any = compile_fx(program.module, examples, config_patches=patches)
    return cast(Callable[..., Any], compiled)
