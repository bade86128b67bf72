"""fastdiff: a custom-kernel performance engine for diffusion models.

Public names::

    fastdiff.sample(model, ...)     draw samples with any solver, as one table-driven loop
    fastdiff.compile(model)         the same model, fused, without what a step does not change
    fastdiff.report(model)          what compile did to it, and what it could not do
    fastdiff.load(name_or_path)     a model of the zoo with its weights
    fastdiff.ops                    the fused operators, also as torch.ops.fastdiff.*
    fastdiff.sampling               guidance, hooks and what else a run can be given
    fastdiff.solvers                noise schedules, time grids, solver tables
    fastdiff.models                 the model zoo

Importing costs little beyond ``import torch``: no CUDA context, no Triton, nothing global edited.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastdiff._version import __version__

if TYPE_CHECKING:
    from fastdiff import models, ops, sampling, solvers
    from fastdiff.checkpoints.load import load
    from fastdiff.compiler import compile, report, uncompile
    from fastdiff.sampling import sample

__all__ = [
    "__version__",
    "compile",
    "load",
    "models",
    "ops",
    "report",
    "sample",
    "sampling",
    "solvers",
    "uncompile",
]

# name -> (module, attribute of it or None for the module itself); resolved on first use.
_LAZY: dict[str, tuple[str, str | None]] = {
    "compile": ("fastdiff.compiler", "compile"),
    "load": ("fastdiff.checkpoints.load", "load"),
    "models": ("fastdiff.models", None),
    "report": ("fastdiff.compiler", "report"),
    "sample": ("fastdiff.sampling", "sample"),
    "sampling": ("fastdiff.sampling", None),
    "solvers": ("fastdiff.solvers", None),
    "uncompile": ("fastdiff.compiler", "uncompile"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    module_name, attribute = _LAZY[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


# Last, so that torch.ops.fastdiff.* is registered by `import fastdiff` alone.
from fastdiff import ops  # noqa: E402
