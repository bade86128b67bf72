"""What the layouts share: the names of layers, and the entries of a ``config.json``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastdiff.checkpoints.family import Source


def layer(
    ours: str, *theirs: str, how: str = "same", rows: Iterable[int] = ()
) -> dict[str, Source]:
    """The weight and the bias of a layer."""
    return {
        f"{ours}.{kind}": Source(tuple(f"{name}.{kind}" for name in theirs), how, tuple(rows))
        for kind in ("weight", "bias")
    }


def check_entries(
    entries: Mapping[str, Any], read: Iterable[str], fixed: Mapping[str, Any]
) -> None:
    """ValueError naming an entry of a ``config.json`` that a model cannot represent.

    read: the entries that the configuration takes; fixed: the only value of others. An entry that
    is neither must be off (None, False, 0 or empty); a missing one is at its default.
    """
    known = set(read)
    for name, value in entries.items():
        if name.startswith("_") or name in known:
            continue
        if name in fixed:
            if value != fixed[name]:
                raise ValueError(f"{name} must be {fixed[name]!r}, got {value!r}")
        elif value:
            raise ValueError(f"{name} must be off: this model has no such entry, got {value!r}")


def count(names: Iterable[str], prefix: str) -> int:
    """How many numbered blocks ``<prefix>N.`` there are."""
    return len({n[len(prefix) :].split(".")[0] for n in names if n.startswith(prefix)})
