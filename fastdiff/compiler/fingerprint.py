"""Whether weights have changed, also where PyTorch does not count it.

A write through ``parameter.data`` leaves the address and the version of the parameter as they were,
and that is how peft and diffusers fuse a LoRA. Only the bits tell. Reading them all costs as much
as the layers themselves, so it is done when a sampling run begins.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff._ext import ext

# Words of 8 bytes that are hashed at a time: they and what is made of them stay in a cache.
BLOCK = 1 << 17
_multipliers: dict[torch.device, Tensor] = {}


def digest(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """64 bits of each tensor's contents; waits for the device once.

    A change of one word of 8 bytes always shows, a random change of more all but once in 2^64.
    """
    native = ext()
    result: list[int] = []
    found: list[Tensor] = []
    with torch.no_grad(), torch.inference_mode(False):
        for tensor in tensors:
            if native is not None and tensor.device.type == "cpu":
                flat = tensor.detach().contiguous()
                threads = torch.get_num_threads()
                result.append(native.digest(flat.data_ptr(), flat.nbytes, threads))
            else:
                found.append(_hash(tensor.detach()))
        for device in dict.fromkeys(value.device for value in found):
            result += torch.stack([v for v in found if v.device == device]).tolist()
    return tuple(result)


def _hash(tensor: Tensor) -> Tensor:
    """The same in PyTorch, for any device: words, their high halves mixed into the low ones, times
    odd random numbers, summed modulo 2^64."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    rest = flat.numel() % 8
    if rest:
        flat = torch.cat([flat, flat.new_zeros(8 - rest)])
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.view(torch.int64)
    odd = _multipliers.get(tensor.device)
    if odd is None:
        generator = torch.Generator().manual_seed(0)
        odd = torch.randint(-(1 << 63), (1 << 63) - 1, (2 * BLOCK,), generator=generator) | 1
        odd = _multipliers[tensor.device] = odd.to(tensor.device)
    total = words.new_zeros(())
    for number, block in enumerate(words.split(BLOCK)):
        # Other multipliers for each block: an exchange of two blocks shows.
        start = number * 7919 % BLOCK
        mixed = (block ^ (block >> 31)).mul_(odd[start : start + len(block)])
        total = (total ^ (total >> 29)) * odd[number % BLOCK] + mixed.sum()
    return total


class Watch:
    """When the weights behind kept results must be looked at again: whenever a run begins.

    A run begins where the condition is a new one, where ``token`` (a pipeline's list of timesteps)
    is another object, where a time comes back or turns round, or a call is repeated.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._token: Any = None
        self._conditions: set[Any] = set()
        self._seen: set[Any] = set()
        self._last: float | None = None
        self._direction = 0.0
        self._against = 0  # moves in a row in the other direction

    def begins(self, condition: Any, time: Any, value: float | None, token: Any) -> bool:
        """Whether this call begins a run.

        condition, time: what the inputs are known by; value: the time, where it is known.
        """
        with self._lock:
            begins = self._begins(condition, time, value, token)
            if begins:
                self._seen.clear()
            self._token, self._last = token, value
            self._seen.add((condition, time))
            self._conditions.add(condition)
            return begins

    def _begins(self, condition: Any, time: Any, value: float | None, token: Any) -> bool:
        turned = self._turned(value)
        if token is not self._token:
            self._conditions.clear()
            return True
        if condition not in self._conditions:
            if len(self._conditions) > 64:
                self._conditions.clear()
            return True
        return turned or (condition, time) in self._seen or len(self._seen) > 4096

    def _turned(self, value: float | None) -> bool:
        """Whether the time moved against the direction of runs so far: back to a first step."""
        if value is None or self._last is None or value == self._last:
            return False
        moved = 1.0 if value > self._last else -1.0
        if not self._direction:
            self._direction = moved
        if moved == self._direction:
            self._against = 0
            return False
        self._against += 1
        if self._against > 1:  # a run in the other direction
            self._direction, self._against = moved, 0
        return True
