"""What values are known by: by the identity of its inputs a kept result is found again."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Tensors are compared by value up to this many elements where reading them costs nothing.
SMALL = 64


def key_of(value: Any) -> Any:
    """What an input is known by; None where a write to it could not be seen."""
    if not isinstance(value, Tensor):
        return value
    if value.device.type == "cpu" and value.numel() <= SMALL:
        return (value.dtype, value.shape, *value.reshape(-1).tolist())
    if value.is_inference():
        return None
    return (value.data_ptr(), value._version, value.shape, value.stride(), value.dtype)


def weight_key(tensor: Tensor) -> tuple[Any, Any]:
    """(where it is, its version): None where writes are not counted (under inference_mode)."""
    if is_number(tensor):  # the scale of a LoRA
        return tensor.item(), 0
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def is_number(tensor: Tensor) -> bool:
    """Whether it is one number on the CPU."""
    return tensor.dim() == 0 and tensor.device.type == "cpu"
