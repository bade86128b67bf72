"""What ``fastdiff.compile`` can be told; see there for the meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdiff.compiler.cuda_graphs import MAX_BYTES

MODES = ("default", "max")


@dataclass(frozen=True)
class Options:
    """ValueError or TypeError for values outside what is allowed."""

    mode: str = "default"
    freeze: bool = False
    max_graphs: int = 8
    cuda_graphs: bool = True
    max_graph_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        _at_least("max_graphs", self.max_graphs, 1)
        _at_least("max_graph_bytes", self.max_graph_bytes, 0)
        for name in ("freeze", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
