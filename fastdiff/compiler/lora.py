"""The scales of peft's LoRA layers as tensors: another scale is no other graph.

peft keeps them as numbers, which a captured graph would hold as constants, one graph for each. What
is known of peft here: a layer has dictionaries ``scaling`` and ``lora_A`` by the adapter's name, a
model with such layers has ``peft_config``, and setting a scale writes a number into ``scaling``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of diffusers' models with the scale of one call in them.
CARRIERS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


class Scales:
    """Of one model: each number replaced by a tensor that holds it, the same one every time."""

    def __init__(self) -> None:
        self._configs: list[Any] = []
        self._layers: list[weakref.ref[Any]] = []
        self._tensors: dict[tuple[int, str], Tensor] = {}
        self._numbers: dict[tuple[int, str], float] = {}

    def __bool__(self) -> bool:
        """Whether the model has LoRA layers."""
        return bool(self._layers)

    def place(self, model: nn.Module, scale: float = 1.0) -> None:
        """Tensors in the place of numbers, those of active adapters times ``scale``."""
        configs = list((getattr(model, "peft_config", None) or {}).values())
        if len(configs) != len(self._configs) or any(
            a is not b for a, b in zip(configs, self._configs, strict=True)
        ):
            self._find(model, configs)
        for number, reference in enumerate(self._layers):
            layer = reference()
            if layer is None:
                continue
            active = layer.active_adapters if scale != 1 else ()
            for name, value in layer.scaling.items():
                key = number, name
                tensor = self._tensors.get(key)
                if value is not tensor:
                    self._numbers[key] = float(value)
                    if tensor is None:
                        with torch.inference_mode(False):
                            tensor = torch.tensor(float(value), dtype=torch.float64)
                        self._tensors[key] = tensor
                    else:
                        tensor.fill_(float(value))
                    layer.scaling[name] = tensor
                if name in active:
                    self._numbers[key] = float(tensor)
                    tensor.mul_(scale)

    def restore(self, numbers: bool = False) -> None:
        """After a call with a scale of its own; ``numbers``: puts plain numbers back for good."""
        for number, reference in enumerate(self._layers):
            layer = reference()
            if layer is None:
                continue
            for name, value in layer.scaling.items():
                key = number, name
                tensor = self._tensors.get(key)
                if tensor is None or value is not tensor:
                    continue
                if numbers:
                    layer.scaling[name] = float(tensor)
                else:
                    tensor.fill_(self._numbers[key])

    def _find(self, model: nn.Module, configs: list[Any]) -> None:
        self.restore(numbers=True)
        self._configs = configs
        self._tensors.clear()
        self._numbers.clear()
        self._layers = [
            weakref.ref(module)
            for module in (model.modules() if configs else ())
            if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "lora_A")
        ]


def take_scale(inputs: dict[str, Any]) -> float:
    """Takes the scale of one call out of the arguments; 1 where there is none.

    Models multiply the scales in place with it and divide again, which no graph should hold.
    """
    for name in CARRIERS:
        carried = inputs.get(name)
        if isinstance(carried, dict) and isinstance(carried.get("scale"), (int, float)):
            inputs[name] = {key: value for key, value in carried.items() if key != "scale"}
            return float(carried["scale"])
    return 1.0
