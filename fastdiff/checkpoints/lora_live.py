"""Weights with a LoRA that is added where they are read, and not stored.

The module's class is exchanged for a subclass of the same name: the parameter stays what and where
it is (its name, its values, the state dict), and reading the attribute gives the parameter plus
``strength * up @ down``, whoever reads it: the layer's own ``forward``, or an op that is handed
``linear.weight``, which a wrapper around the layer would miss. The factors and the strength are
buffers that no state dict holds.

Each eager call makes the weights anew. ``fastdiff.compile`` finds that they depend on nothing but
weights: it makes them once and again when a strength has changed, and a step costs what it costs
without a LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.lora_files import Patch, added

# The attribute with what is added: parameter -> [(the buffers' first part, first row), ...].
ADDED = "lora_added"


def effective(module: nn.Module, parameter: str) -> Tensor:
    """The parameter with everything that is added to it."""
    weight = module._parameters[parameter]
    assert weight is not None
    result = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for name, first in getattr(module, ADDED)[parameter]:
        down, up = module._buffers[f"{name}_down"], module._buffers[f"{name}_up"]
        strength = module._buffers[f"{name}_strength"]
        assert down is not None
        assert up is not None
        assert strength is not None
        end = first + up.shape[0]
        rows = added(result[first:end], down, up, strength)
        whole = rows.shape == result.shape
        result = rows if whole else torch.cat([result[:first], rows, result[end:]])
    return result.to(weight.dtype)


@cache
def _kind(base: type[nn.Module], parameters: frozenset[str]) -> type[nn.Module]:
    """A class like ``base`` whose ``parameters`` are read as :func:`effective`."""

    def reader(parameter: str) -> property:
        return property(lambda module: effective(module, parameter))

    def _apply(self: Any, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the factors; a change of the weights' dtype is not theirs."""
        buffers = [
            n
            for names in getattr(self, ADDED).values()
            for name, _ in names
            for n in (f"{name}_down", f"{name}_up", f"{name}_strength")
        ]
        before = {name: self._buffers[name] for name in buffers}
        base._apply(self, function, recurse)
        for name, value in before.items():
            self._buffers[name] = value.to(self._buffers[name].device)
        return self

    space: dict[str, Any] = {name: reader(name) for name in sorted(parameters)}
    space |= {"_apply": _apply, "lora_base": base, "__doc__": base.__doc__}
    return type(base.__name__, (base,), space)


def add(module: nn.Module, parameter: str, number: int, patch: Patch, strength: float) -> str:
    """Adds a patch to a module's own parameter; returns the first part of its buffers' names."""
    weight = module._parameters[parameter]
    assert weight is not None
    table = {key: list(value) for key, value in getattr(module, ADDED, {}).items()}
    name = f"lora_{number}_{parameter}_{len(table.get(parameter, ()))}"
    tensors = {
        "down": patch.down,
        "up": patch.up,
        "strength": torch.tensor(strength, dtype=torch.float64),
    }
    with torch.inference_mode(False):
        for part, tensor in tensors.items():
            value = tensor.detach().to(weight.device, copy=True).contiguous()
            module.register_buffer(f"{name}_{part}", value, persistent=False)
    table.setdefault(parameter, []).append((name, patch.first))
    _set(module, table)
    return name


def drop(module: nn.Module, parameter: str, name: str) -> None:
    """Takes one patch away again."""
    table = {key: list(value) for key, value in getattr(module, ADDED).items()}
    table[parameter] = [(other, first) for other, first in table[parameter] if other != name]
    _set(module, {key: value for key, value in table.items() if value})
    for part in ("down", "up", "strength"):
        delattr(module, f"{name}_{part}")


def _set(module: nn.Module, table: dict[str, list[tuple[str, int]]]) -> None:
    base: Any = getattr(type(module), "lora_base", type(module))
    if table:
        setattr(module, ADDED, table)
        module.__class__ = _kind(base, frozenset(table))
    else:
        module.__class__ = base
        delattr(module, ADDED)
