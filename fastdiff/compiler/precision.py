"""``dtype=``: a model in another precision, for callers that keep theirs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cast:
    """before, after: the model's dtypes. sample: the argument whose dtype results have. kept:
    arguments that stay what they are: times, which 8 bits do not tell apart."""

    before: torch.dtype
    after: torch.dtype
    sample: str
    kept: tuple[str, ...]

    def inputs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors in the model's old dtype in the new one, also within lists and dictionaries.

        Not what is called ...ids: positions and sizes. Part of captured graphs, so that what a
        condition is cast to is kept.
        """
        return {
            name: value if name in self.kept or name.endswith("ids") else self._cast(value)
            for name, value in values.items()
        }

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.after) if value.dtype == self.before else value
        if type(value) is dict:
            return self.inputs(value)
        if type(value) is list:
            return [self._cast(item) for item in value]
        if type(value) is tuple:
            return tuple([self._cast(item) for item in value])
        return value

    def bound(self, bound: inspect.BoundArguments) -> inspect.BoundArguments:
        """The same for the arguments of a call."""
        rest = [p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        arguments = self.inputs(bound.arguments)
        arguments |= {name: self.inputs(arguments[name]) for name in rest if name in arguments}
        bound.arguments.clear()
        bound.arguments.update(arguments)
        return bound

    def result(self, result: Any, given: Mapping[str, Any]) -> Any:
        """What a model returned, for a caller whose sample is in the old dtype: in that one."""
        sample = given.get(self.sample)
        if not isinstance(sample, Tensor) or sample.dtype != self.before:
            return result
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.to(self.before) if t.dtype == self.after else t, result
        )


def cast(
    model: nn.Module, dtype: torch.dtype | None, roles: Mapping[str, str], known: Cast | None
) -> Cast | None:
    """Casts a model in place; None where there is nothing to cast.

    The parts that a model of diffusers keeps in float32 stay so. known: what an earlier call did.
    ValueError for a model that another library has quantised.
    """
    if dtype is None:
        return None
    if getattr(model, "is_quantized", False):
        raise ValueError(f"dtype must be None for a model that is quantised, got {dtype}")
    before = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    own = getattr(model, "_keep_in_fp32_modules", None) or ()
    own = {own} if isinstance(own, str) else set(own)
    if dtype == torch.float32:
        own = set()
    tensors = (*model.named_parameters(), *model.named_buffers())
    stay = {id(tensor) for name, tensor in tensors if own & set(name.split("."))}

    def one(tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point() and id(tensor) not in stay
        return tensor.to(dtype) if floating else tensor

    # Not `.to`: the one of diffusers casts what is to stay in float32, and warns.
    nn.Module._apply(model, one)
    if before == dtype:
        return known if known is not None and known.after == dtype else None
    samples = [name for name, role in roles.items() if role == "sample"]
    times = tuple(name for name, role in roles.items() if role == "time")
    return Cast(before, dtype, samples[0] if samples else "", times)
