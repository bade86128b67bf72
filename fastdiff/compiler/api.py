"""``fastdiff.compile(model)`` and its opposite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from fastdiff.compiler.compiled import Compiled
from fastdiff.compiler.report import Report

Module = TypeVar("Module", bound=nn.Module)


def compile(
    model: Module, *, roles: Mapping[str, str] | None = None, max_graphs: int = 8
) -> Module:
    """The same model, whose calls run fused and without repeating what a step does not change.

    The model is changed in place and returned: its class, attributes, weights, ``state_dict``,
    ``save_pretrained`` and ``.to()`` stay what they were; in-place changes of weights are seen.
    The first call with a new set of shapes captures a graph (``torch.compile``'s front end, without
    Inductor). Calls that need gradients, and training mode, run the model's own code.

    roles: for arguments of ``forward`` that do not have a usual name: "sample" (different in every
        step), "time", or "condition" (the same over a run, the default).
    max_graphs: how many sets of shapes are kept.

    Raises TypeError for something else than a module, ValueError for bad roles. ``report(model)``
    says what was done.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(max_graphs, bool) or not isinstance(max_graphs, int) or max_graphs < 1:
        raise ValueError(f"max_graphs must be an integer of at least 1, got {max_graphs}")
    # nn.Module keeps this out of copies and pickles.
    model._compiled_call_impl = Compiled(model, roles, max_graphs)  # type: ignore[assignment]
    return model


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
