"""The model zoo: DiT, its configurations, and the loading and saving of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdiff.models.dit import CONFIGS, DiT, DiTConfig
from fastdiff.models.weights import EMBEDDED, Sampling, save

if TYPE_CHECKING:
    from fastdiff.checkpoints.load import load

__all__ = ["CONFIGS", "EMBEDDED", "DiT", "DiTConfig", "Sampling", "load", "save"]


def __getattr__(name: str) -> Any:
    """``load``, on first use: it knows every family, and each family's file imports its model."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastdiff.checkpoints.load import load

    return load
