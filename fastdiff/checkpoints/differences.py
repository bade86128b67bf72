"""What keeps a checkpoint from being a module's: names, shapes, dtypes, from its header alone."""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fastdiff.checkpoints.family import Layout, Source
from fastdiff.checkpoints.files import Checkpoint

HINTS = 100  # names that are looked up among the others, in one error


@dataclass(frozen=True)
class Differences:
    """What a checkpoint has not, has besides, and has in another shape or dtype; one text each."""

    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.missing) + len(self.unknown) + len(self.wrong)

    def lines(self) -> list[str]:
        return [
            *(f"missing {text}" for text in self.missing),
            *(f"unknown {text}" for text in self.unknown),
            *self.wrong,
        ]

    def refuse(self, checkpoint: Checkpoint) -> None:
        """ValueError with all of them, where there are any."""
        if self:
            listed = "\n  ".join(self.lines())
            raise ValueError(
                f"{checkpoint.path} must hold the tensors of its configuration, got {len(self)} "
                f"difference{'s' if len(self) > 1 else ''}:\n  {listed}"
            )


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the known names closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, _alike(word, known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _alike(word: str, known: Iterable[str], count: int = 10) -> list[str]:
    """The names beside the word in the alphabet, read forwards and backwards: few for difflib."""
    known = list(known)
    if len(known) <= 4 * count:
        return known
    found: dict[str, None] = {}
    for step in (1, -1):
        names = sorted(name[::step] for name in known)
        place = bisect_left(names, word[::step])
        found |= dict.fromkeys(n[::step] for n in names[max(place - count, 0) : place + count])
    return list(found)


def identity(names: Iterable[str]) -> dict[str, Source]:
    """The layout of a file with a module's own names."""
    return {name: Source((name,)) for name in names}


def differences(
    module: nn.Module,
    checkpoint: Checkpoint,
    layout: Layout | None = None,
    optional: Collection[str] = (),
) -> Differences:
    """What keeps a checkpoint from being ``module``'s. Reads no data.

    layout: where each of the module's parameters is; default its own names. optional: names (with
    ``*``) that the file may have or lack.
    """
    return differences_of(module.state_dict(keep_vars=True), checkpoint, layout, optional)


def differences_of(
    state: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: Layout | None,
    optional: Collection[str],
) -> Differences:
    """:func:`differences` of a module's state dict (``keep_vars=True``: tied weights are one)."""
    layout = identity(state) if layout is None else layout
    wanted: set[str] = set()
    wrong, absent = [], []
    for name, ours in state.items():
        if name not in layout and _listed(name, optional):
            continue  # computed
        source = layout[name]
        wanted.update(source.keys)
        lacking = [key for key in source.keys if key not in checkpoint]
        if lacking:
            if not _has_twin(name, ours, state, layout, checkpoint):
                absent += [key for key in lacking if not _listed(key, optional)]
            continue
        shapes = source.shapes(tuple(ours.shape))
        for key, shape in zip(source.keys, shapes, strict=True):
            entry = checkpoint.entries[key]
            if _without_ones(entry.shape) != _without_ones(shape):
                wrong.append(f"{key} must have shape {shape}, got {entry.shape}")
            elif entry.dtype.is_floating_point != ours.dtype.is_floating_point:
                kind = "floating-point" if ours.dtype.is_floating_point else str(ours.dtype)
                wrong.append(f"{key} must be {kind}, got {entry.dtype}")
    absent = sorted(set(absent))
    unknown = sorted(key for key in checkpoint if key not in wanted and not _listed(key, optional))
    return Differences(
        tuple(_hinted(absent, unknown)), tuple(_hinted(unknown, absent)), tuple(sorted(set(wrong)))
    )


def _hinted(names: list[str], others: list[str]) -> list[str]:
    return [name + (nearest(name, others) if i < HINTS else "") for i, name in enumerate(names)]


def _listed(name: str, patterns: Collection[str]) -> bool:
    return name in patterns or any("*" in p and fnmatchcase(name, p) for p in patterns)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _has_twin(
    name: str, ours: Tensor, state: Mapping[str, Tensor], layout: Layout, checkpoint: Checkpoint
) -> bool:
    """Whether another name of the same parameter is in the file (tied weights are stored once)."""
    return any(
        other is ours and twin != name and held(layout.get(twin), checkpoint)
        for twin, other in state.items()
    )


def held(source: Source | None, checkpoint: Checkpoint) -> bool:
    return source is not None and all(key in checkpoint for key in source.keys)
