"""``inspect``: what a checkpoint is, in a report, from its headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from fastdiff.checkpoints.detect import Component, describe
from fastdiff.checkpoints.differences import Differences

SHOWN = 20  # differences of one component in the text


@dataclass(frozen=True)
class Part:
    """One model in a report: bytes and parameters are those of its tensors in the file."""

    name: str
    family: str
    config: str | None
    layout: str
    prefix: str
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    files: tuple[str, ...]
    differences: Differences
    unchecked: str = ""

    @classmethod
    def of(cls, part: Component) -> Part:
        entries = part.checkpoint.entries.values()
        dtypes: dict[str, int] = {}
        for entry in entries:
            kind = str(entry.dtype).removeprefix("torch.")
            dtypes[kind] = dtypes.get(kind, 0) + prod(entry.shape)
        differences, unchecked = Differences(), ""
        try:
            differences = part.differences()
        except ImportError as error:  # a text encoder, without transformers
            unchecked = str(error)
        return cls(
            name=part.name,
            family=part.family.name,
            config=part.family.config_name(part.config),
            layout=part.layout,
            prefix=part.prefix,
            tensors=len(entries),
            parameters=sum(dtypes.values()),
            nbytes=part.checkpoint.nbytes,
            dtypes=dtypes,
            files=tuple(file.name for file in part.checkpoint.files),
            differences=differences,
            unchecked=unchecked,
        )

    def lines(self) -> list[str]:
        """The part's text; the first line is its heading."""
        total = max(self.parameters, 1)
        dtypes = ", ".join(
            kind if count == total else f"{kind} {count / total:.1%}"
            for kind, count in sorted(self.dtypes.items(), key=lambda item: -item[1])
        )
        kind = f"{self.family} {self.config or '(no public size)'}, {self.layout} names"
        if self.prefix:
            kind += f" after {self.prefix}"
        size = f"{_count(self.parameters)} parameters, {_count(self.nbytes)}B, {dtypes}"
        lines = [
            f"{self.name}: {kind}",
            f"  {size}",
            f"  {self.tensors} tensors in {_few(self.files)}",
        ]
        found = self.differences
        if self.unchecked:
            return [*lines, f"  not checked: {self.unchecked}"]
        if not found:
            return [*lines, "  complete: every tensor is there, and fits"]
        counts = (
            f"{len(found.missing)} missing, {len(found.unknown)} unknown, {len(found.wrong)} wrong"
        )
        shown = [f"    {line}" for line in found.lines()[:SHOWN]]
        more = len(found) - len(shown)
        return [*lines, f"  {counts}:", *shown, *([f"    and {more} more"] if more else [])]


@dataclass(frozen=True)
class Report:
    """What a path holds; ``str()`` is a text of a few lines for each model.

    kind: as ``Description.kind``. others: a pipeline's other folders. ignored: how many tensors
    training left. problems: what is not understood. ok: everything is, and fits.
    """

    path: str
    kind: str
    parts: tuple[Part, ...]
    others: tuple[str, ...]
    ignored: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        wrong = any(part.differences or part.unchecked for part in self.parts)
        return not self.problems and not wrong

    def __str__(self) -> str:
        kinds = {
            "pipeline": "a diffusers pipeline",
            "component": "one model in diffusers' layout",
            "file": "a single file",
            "fastdiff": "a file of fastdiff's own",
        }
        lines = [f"{self.path}: {kinds[self.kind]}"]
        for part in self.parts:
            lines += part.lines()
        if self.others:
            lines.append(f"also: {', '.join(self.others)}")
        if self.ignored:
            lines.append(
                f"not read: {self.ignored} tensors that training left (averages, schedule)"
            )
        if self.problems:
            lines.append(f"not understood: {len(self.problems)}")
            lines += [f"  {problem}" for problem in self.problems[:SHOWN]]
            if len(self.problems) > SHOWN:
                lines.append(f"  and {len(self.problems) - SHOWN} more")
        return "\n".join(lines)


def inspect(path: str | os.PathLike[str], variant: str | None = None) -> Report:
    """What the checkpoint at ``path`` is; reads headers only, so it is quick at any size.

    Missing, unknown and mis-shaped tensors are in the report. Raises as ``detect.describe`` for
    what is no checkpoint at all.
    """
    found = describe(path, variant)
    return Report(
        path=str(path),
        kind=found.kind,
        parts=tuple(Part.of(part) for part in found.components.values()),
        others=tuple(found.others),
        ignored=len(found.ignored),
        problems=found.problems,
    )


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} files"


def _count(number: int) -> str:
    """1234567 as "1.23 M"."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} "
