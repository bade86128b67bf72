"""``fastdiff.compile(model)`` and its opposite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fastdiff.compiler.compiled import Compiled
from fastdiff.compiler.cuda_graphs import MAX_BYTES, Pool
from fastdiff.compiler.report import Report

MODES = ("default", "max")
Module = TypeVar("Module", bound=nn.Module)


def compile(
    model: Module,
    *,
    roles: Mapping[str, str] | None = None,
    mode: str = "default",
    max_graphs: int = 8,
    cuda_graphs: bool = True,
    max_graph_bytes: int = MAX_BYTES,
) -> Module:
    """The same model, whose calls run fused and without repeating what a step does not change.

    The model is changed in place and returned: its class, attributes, weights, ``state_dict``,
    ``save_pretrained`` and ``.to()`` stay what they were; in-place changes of weights are seen.
    The first call with a new set of shapes captures a graph (``torch.compile``'s front end, without
    Inductor). Calls that need gradients, and training mode, run the model's own code.

    roles: for arguments of ``forward`` that do not have a usual name: "sample" (different in every
        step), "time", or "condition" (the same over a run, the default).
    mode: "default", or "max": what is left between fastdiff's ops is compiled by Inductor, which
        takes minutes for a large model.
    max_graphs: how many sets of shapes are kept.
    cuda_graphs: on a CUDA device, replay the programs as CUDA graphs, from the second call on; the
        results have memory of their own.
    max_graph_bytes: what the CUDA graphs of the model may take together; the least recently used
        are recorded again when they are needed.

    Raises TypeError for something else than a module, ValueError for bad roles and bounds.
    ``report(model)`` says what was done.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    _at_least("max_graphs", max_graphs, 1)
    _at_least("max_graph_bytes", max_graph_bytes, 0)
    pool = Pool(max_bytes=max_graph_bytes) if cuda_graphs else None
    # nn.Module keeps this out of copies and pickles.
    model._compiled_call_impl = Compiled(model, roles, max_graphs, pool, mode)  # type: ignore[assignment]
    return model


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def uncompile(model: Module) -> Module:
    """Undoes :func:`compile`; the model's own code runs again."""
    if compiled(model) is not None:
        model._compiled_call_impl = None
    return model


def compiled(model: nn.Module) -> Compiled | None:
    """What :func:`compile` put in the model."""
    found = getattr(model, "_compiled_call_impl", None)
    return found if isinstance(found, Compiled) else None


def report(model: nn.Module) -> Report:
    """What was captured, fused and hoisted so far, and why calls ran the model's own code.

    Raises ValueError for a model that is not compiled.
    """
    found = compiled(model)
    if found is None:
        raise ValueError(f"model must be compiled by fastdiff.compile, got {type(model).__name__}")
    return found.report()
