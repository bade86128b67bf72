"""Stands in for CUDA graphs where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Again:
    """Replays by running the function again and writing its results where the first ones are.

    That is on the same memory, as a CUDA graph does it.
    """

    def __init__(self, size: int = 1000) -> None:
        self.size, self.recorded, self.fail = size, 0, False
        self.launches: list[int] = []

    def why_not(self, values: Sequence[Any]) -> str:
        return ""

    def constant(self, value: Tensor) -> bool:
        return value.dtype == torch.float64 and value.dim() == 0

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[int], None], Any, int]:
        if self.fail:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        results = torch.utils._pytree.tree_map_only(Tensor, torch.clone, function())
        leaves = torch.utils._pytree.tree_leaves(results)
        for leaf in leaves:
            leaf.fill_(float("nan"))  # recording computes nothing
        self.recorded += 1

        def replay(times: int) -> None:
            self.launches.append(times)
            for _ in range(times):
                new = torch.utils._pytree.tree_leaves(function())
                for old, value in zip(leaves, new, strict=True):
                    old.copy_(value)

        return replay, results, self.size

    def wait(self) -> None: ...

    def done(self) -> None: ...
