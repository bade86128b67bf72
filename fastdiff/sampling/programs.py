"""A model of the zoo in a run: its prompt once, its schedule for all steps, then step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Times whose schedules are computed at once: all steps of an ordinary run of a few images, and a
# bound on the memory of one with a thousand steps.
CHUNK = 256


@dataclass
class _Prompt:
    """The results for one set of arguments, which are held so that no other can take their ids."""

    leaves: list[Any]
    spec: Any
    versions: tuple[int, ...]
    values: Any
    chunks: dict[int, tuple[int, Any]] = field(default_factory=dict)


class ThreePrograms:
    """Called like the model, within one run.

    times: the runs' times, for each batch size the model may be given: [B] of each row. A call with
    one of them (the same tensor) computes the schedule of its row and of those that follow, CHUNK
    times in all; another time is computed by itself. Arguments are known by identity and version;
    weights that are written to in the middle of a run are seen here from the next run on.
    """

    def __init__(self, model: Any, *times: Sequence[Tensor]) -> None:
        self.model = model
        self._rows = [list(rows) for rows in times]
        self._place = {
            id(t): (batch, row)
            for batch, rows in enumerate(self._rows)
            for row, t in enumerate(rows)
        }
        self._prompts: list[_Prompt] = []

    def __call__(self, x: Tensor, t: Tensor, **arguments: Any) -> Any:
        prompt = self._prompt(arguments)
        schedule = self._schedule(t, prompt)
        return self.model.step(x, schedule, prompt.values)

    def _prompt(self, arguments: dict[str, Any]) -> _Prompt:
        leaves, spec = pytree.tree_flatten(arguments)
        versions = _versions(leaves)
        for known in self._prompts:
            same = len(known.leaves) == len(leaves) and known.spec == spec
            if same and all(a is b for a, b in zip(known.leaves, leaves, strict=True)):
                if known.versions == versions:
                    return known
                self._prompts.remove(known)
                break
        made = _Prompt(leaves, spec, versions, self.model.prompt(**arguments))
        # A call with the condition, one without it, one with both; hooks may bring new ones.
        self._prompts = [*self._prompts[-3:], made]
        return made

    def _schedule(self, t: Tensor, prompt: _Prompt) -> Any:
        place = self._place.get(id(t))
        if place is None:
            return self.model.schedule(t, prompt.values)
        batch, row = place
        first, values = prompt.chunks.get(batch, (0, None))
        if values is None or not first <= row < first + self._length(batch, first):
            first = row
            rows = self._rows[batch][row : row + self._length(batch, row)]
            values = self.model.schedule(torch.stack(rows), prompt.values)
            prompt.chunks[batch] = (first, values)
        return pytree.tree_map_only(Tensor, lambda value: value[row - first], values)

    def _length(self, batch: int, first: int) -> int:
        rows = self._rows[batch]
        return min(len(rows) - first, max(1, CHUNK // max(1, rows[0].numel())))


def _versions(leaves: Sequence[Any]) -> tuple[int, ...]:
    return tuple(
        value._version for value in leaves if isinstance(value, Tensor) and not value.is_inference()
    )


def in_programs(model: Callable[..., Any], *times: Sequence[Tensor]) -> Callable[..., Any]:
    """The model in its three programs where it has them; else, or where a compiler or a hook has
    to see its calls, the model itself."""
    from fastdiff.models.denoiser import Denoiser

    if not isinstance(model, Denoiser) or not _forward_is_programs(type(model)):
        return model
    hooked = model._forward_hooks or model._forward_pre_hooks or "forward" in vars(model)
    if hooked or model._compiled_call_impl is not None or _globally_hooked():
        return model
    return ThreePrograms(model, *times)


def _forward_is_programs(kind: type) -> bool:
    """Whether ``forward`` comes with the programs: a subclass that overrides it alone is called."""
    owner = next(one for one in kind.__mro__ if "forward" in vars(one))
    return "step" in vars(owner)


def _globally_hooked() -> bool:
    module = nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
