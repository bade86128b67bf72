"""A module without its weights: what a checkpoint is read into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` without a device gives meta tensors; everything else is as it was.

    Layers make their weights with ``torch.empty``; tables that are computed (positions, sinusoids)
    are made of numbers. So a module is built without memory or initialisation for the first, and
    with the second, which no checkpoint holds.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build_empty(build: Callable[[Any], nn.Module], config: Any) -> nn.Module:
    """``build(config)`` with weights on the meta device; the random state is left as it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _EmptyOnMeta():
        return build(config)
