"""Engines beside PyTorch's own that a denoiser is timed against."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

tree = torch.utils._pytree


class _Flat(nn.Module):
    """A model as a function of tensors alone, as converters want it."""

    def __init__(self, model: nn.Module, spec: Any) -> None:
        super().__init__()
        self.model, self.spec = model, spec

    def forward(self, *tensors: Tensor) -> Any:
        return self.model(**tree.tree_unflatten(list(tensors), self.spec))[0]


class OpenVino:
    """The float32 model converted, with OpenVINO's hint to compute in bfloat16; results in that.

    ImportError where it is not installed.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        import openvino

        leaves, spec = tree.tree_flatten(wide(inputs))
        flat = _Flat(copy.deepcopy(model).float(), spec)
        converted = openvino.convert_model(flat, example_input=tuple(leaves))
        for place, leaf in zip(converted.inputs, leaves, strict=True):
            place.get_node().set_partial_shape(openvino.PartialShape(list(leaf.shape)))
        converted.validate_nodes_and_infer_types()
        hints = {
            "INFERENCE_PRECISION_HINT": "bf16",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        self._compiled = openvino.Core().compile_model(converted, "CPU", hints)

    def __call__(self, **inputs: Any) -> tuple[Tensor]:
        leaves = [leaf.numpy() for leaf in tree.tree_leaves(wide(inputs))]
        found = next(iter(self._compiled(leaves).values()))
        return (torch.from_numpy(found.copy()).bfloat16(),)


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs in float32."""

    def one(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    found: dict[str, Any] = tree.tree_map(one, inputs)
    return found
