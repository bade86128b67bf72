"""The families of models whose checkpoints are read, one file each.

A file has ``FAMILY``, or ``FAMILIES`` where it has several; it is imported when a checkpoint is
looked at, in this order, and the first family that recognises a file is its.
"""

from __future__ import annotations

import importlib
from functools import cache

from fastdiff.checkpoints.family import Family

MODULES = (
    "unet",
    "controlnet",
    "autoencoder",
    "text",
    "dit",
    "mmdit",
    "flux",
    "video_dit",
    "edm",
)


@cache
def families() -> tuple[Family, ...]:
    """Every family, in the order of MODULES."""
    found: list[Family] = []
    for name in MODULES:
        module = importlib.import_module(f"{__name__}.{name}")
        found += getattr(module, "FAMILIES", None) or (module.FAMILY,)
    return tuple(found)
