"""The families of models whose checkpoints are read, one file each."""

from __future__ import annotations

from fastdiff.checkpoints.family import Family

FAMILIES: dict[str, Family] = {}
