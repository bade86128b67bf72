"""What ``fastdiff.compile`` can be told; see there for the meaning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastdiff.compiler.cuda_graphs import MAX_BYTES

MODES = ("default", "max")
QUANTIZE = (None, "int8", "fp8")
LAYOUTS = ("auto", "channels_last", "contiguous")
DTYPES = (None, "auto", torch.bfloat16, torch.float16, torch.float32)

# What each kind of step cache can be told, besides what all can.
CACHES = {"deepcache": ("interval", "branch"), "first_block": ("threshold",)}


@dataclass(frozen=True)
class CacheOptions:
    """Steps that are computed in part; see ``fastdiff.compile`` for the meaning.

    ValueError or TypeError, as `Options`.
    """

    kind: str
    interval: int = 3
    branch: int = 0
    threshold: float = 0.05
    first: int = 1
    last: int = 0
    steps: int | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        _at_least("cache['interval']", self.interval, 1)
        _at_least("cache['branch']", self.branch, 0)
        _at_least("cache['first']", self.first, 1)
        _at_least("cache['last']", self.last, 0)
        if self.steps is not None:
            _at_least("cache['steps']", self.steps, 1)
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold < float("inf"):
            raise ValueError(
                f"cache['threshold'] must be a number of at least 0, got {self.threshold!r}"
            )
        if not isinstance(self.measure, bool):
            raise TypeError(f"cache['measure'] must be True or False, got {self.measure!r}")

    @classmethod
    def of(cls, value: Any) -> CacheOptions | None:
        """What the user gave: None, a kind, or a dictionary with one and its parameters."""
        if value is None or isinstance(value, cls):
            return value
        given = dict(value) if isinstance(value, Mapping) else {"kind": value}
        kind = given.get("kind")
        if kind not in tuple(CACHES):
            got = value if isinstance(value, Mapping) else repr(value)
            raise ValueError(
                f"cache must be None, one of {', '.join(CACHES)}, or a dictionary with one of "
                f"them as 'kind', got {got}"
            )
        own = {name for names in CACHES.values() for name in names}
        known = [f.name for f in fields(cls) if f.name not in own or f.name in CACHES[kind]]
        for name in given:
            if name not in known:
                raise ValueError(
                    f"cache must have no keys but {', '.join(known)} for {kind}, got {name!r}"
                )
        return cls(**given)


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
    dtype: torch.dtype | str | None = None
    disk_cache: bool = True
    cache: CacheOptions | None = None
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
        for name in ("freeze", "cuda_graphs", "disk_cache"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")


def _list(values: tuple[Any, ...]) -> str:
    return ", ".join(map(str, values))


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
