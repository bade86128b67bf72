"""Parameters that lie one after another in memory, so that one product serves several layers.

Each stays what it is for everybody else: the same object, shape, dtype and name, with a storage of
its own that holds nothing else (so that it is saved and copied as before). Only the addresses of
those storages are consecutive. Nothing is copied, so that a write by any way is seen.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

ALIGNMENT = 16  # bytes; products of rows that start elsewhere are slower
MOST_MOVES = 64  # of one parameter: something else moves it all the time

_lock = threading.Lock()
_blocks: dict[tuple[int, ...], _Block] = {}  # by the addresses of the parts
_moves: WeakIdKeyDictionary = WeakIdKeyDictionary()


class _Block:
    """The memory of some parameters; it does not keep it alive."""

    def __init__(self, whole: Tensor) -> None:
        self._storage = StorageWeakRef(whole.untyped_storage())
        self._shape, self._strides = whole.shape, whole.stride()
        self._dtype, self._device = whole.dtype, whole.device

    @property
    def alive(self) -> bool:
        return not self._storage.expired()

    def whole(self, parts: Sequence[Tensor]) -> Tensor | None:
        """The parts as one tensor, or None when they are no longer this memory."""
        rows = sum(len(part) for part in parts)
        same = (rows, *parts[0].shape[1:]) == self._shape and parts[0].dtype == self._dtype
        if not same:
            return None
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        return empty.set_(storage, 0, self._shape, self._strides)


def stacked(*parts: Tensor) -> Tensor:
    """``torch.cat(parts)``: the memory itself where :func:`pack` can have it so, else a copy."""
    if isinstance(parts[0], torch._subclasses.FakeTensor):
        return torch.cat(parts)
    with torch.inference_mode(False), torch.no_grad():
        whole = _known(parts)
        if whole is None and not why_not(parts):
            pack(parts)
            whole = _known(parts)
        return torch.cat(parts) if whole is None else whole


def _known(parts: Sequence[Tensor]) -> Tensor | None:
    block = _blocks.get(tuple(part.data_ptr() for part in parts))
    return None if block is None else block.whole(parts)


def pack(parts: Sequence[Tensor]) -> None:
    """Moves parameters into one block of memory. :func:`why_not` must have given ""."""
    with _lock, torch.inference_mode(False), torch.no_grad():
        if _known(parts) is not None:
            return
        for key in [key for key, block in _blocks.items() if not block.alive]:
            del _blocks[key]
        whole = torch.cat([part.detach() for part in parts])
        start = 0
        for part in parts:
            _moves[part] = _moves.get(part, 0) + 1
            # A storage of its own over this memory: a mere view would be saved as the whole block.
            part.data = torch.from_dlpack(whole[start : start + len(part)])
            start += len(part)
        _blocks[tuple(part.data_ptr() for part in parts)] = _Block(whole)


def why_not(parts: Sequence[Tensor]) -> str:
    """Why parameters cannot be moved into one block, or ""."""
    first = parts[0]
    if len({id(part) for part in parts}) != len(parts):
        return "a weight is used twice"
    for part in parts:
        if type(part) is not nn.Parameter or part.is_inference():
            return "a weight is no plain parameter"
        if part.layout != torch.strided or first.device.type not in ("cpu", "cuda"):
            return f"a weight is {part.layout} on {part.device}"
        if (part.shape[1:], part.dtype, part.device) != (
            first.shape[1:],
            first.dtype,
            first.device,
        ):
            return "weights differ in width, dtype or device"
        if not part.is_contiguous() or part.numel() * part.element_size() % ALIGNMENT:
            return f"a weight is not contiguous or no multiple of {ALIGNMENT} bytes"
        if _moves.get(part, 0) >= MOST_MOVES:
            return "something else moves a weight all the time"
        storage = part.untyped_storage()
        if storage.nbytes() != part.numel() * part.element_size() or _users(part) > _users(_LONE):
            return "another tensor shares the memory of a weight"
    return ""


_LONE = torch.empty(1)


def _users(tensor: Tensor) -> int:
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))
