"""What ``fastdiff.compile`` can be told; see there for the meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.compiler.cuda_graphs import MAX_BYTES

MODES = ("default", "max")
QUANTIZE = (None, "int8", "fp8")
LAYOUTS = ("auto", "channels_last", "contiguous")
DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Options:
    """ValueError or TypeError for values outside what is allowed."""

    mode: str = "default"
    freeze: bool = False
    max_graphs: int = 8
    cuda_graphs: bool = True
    max_graph_bytes: int = MAX_BYTES
    quantize: str | None = None
    skip: tuple[str, ...] = ()
    dtype: torch.dtype | None = None
    layout: str = "auto"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.quantize not in QUANTIZE:
            raise ValueError(f"quantize must be one of {_list(QUANTIZE)}, got {self.quantize!r}")
        if not all(isinstance(pattern, str) for pattern in self.skip):
            raise TypeError(f"skip must be names or patterns of modules, got {self.skip!r}")
        if self.skip and self.quantize is None:
            raise ValueError(f"skip must be empty without quantize, got {self.skip!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {_list(DTYPES)}, got {self.dtype!r}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        _at_least("max_graphs", self.max_graphs, 1)
        _at_least("max_graph_bytes", self.max_graph_bytes, 0)
        for name in ("freeze", "cuda_graphs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")


def _list(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
