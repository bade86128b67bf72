"""``Checkpoint``: the tensors of one safetensors file or of a folder's shards, mapped lazily.

``tensor(name)`` is a view of the mapped file: private, so writing to it never reaches the file,
and read from the disk when it is touched. While such a tensor lives, the file may be replaced (a
rename over it, which is how fastdiff and most downloaders write: the mapping keeps the old one),
but must not be changed in place: pages not touched yet would have the new content, and a file
that became shorter ends the process when they are read (SIGBUS), as with every mapped file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.header import (
    Entry,
    plain_file_name,
    read_header,
    read_json,
    refuse_pickle,
)

INDEX = re.compile(
    r"(?P<stem>[^.]+)(\.(?P<before>\w+))?\.safetensors\.index(\.(?P<after>\w+))?\.json"
)
SHARD = re.compile(r"-\d{5}-of-\d{5}")


class Checkpoint:
    """The named tensors of a file or of shards.

    entries: name -> where it is. metadata: the header's strings (the first shard's). path: what
    was opened. Names, shapes and dtypes are known without touching the data.
    """

    def __init__(
        self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.entries = dict(entries)
        self.metadata = dict(metadata or {})
        self._handles: dict[Path, Any] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str], variant: str | None = None) -> Checkpoint:
        """A .safetensors file, an index of shards (.json), or a folder with one of the two.

        variant: of a folder's files, "fp16" for ``model.fp16.safetensors``; None takes the plain
        file, or the only variant there is. Raises ValueError for everything that is not whole or
        not safetensors, OSError for what cannot be read.
        """
        path = Path(path)
        refuse_pickle(path, "path")
        if path.is_dir():
            path = find_weights(path, variant)
        if path.name.endswith(".json"):
            return cls(path, *_read_shards(path))
        return cls(path, *read_header(path))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(entry.file for entry in self.entries.values()))

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {self.nbytes:,} bytes)"

    def part(self, names: Mapping[str, str]) -> Checkpoint:
        """The tensors ``names`` has as values, under the names it has as keys."""
        entries = {new: self.entries[old] for new, old in names.items()}
        return Checkpoint(self.path, entries, self.metadata)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor, a view of the mapped file on the CPU; KeyError for an unknown name.

        ValueError when the file is no longer what its header said when it was opened.
        """
        entry = self.entries[name]
        try:
            value = self._handle(entry.file).get_tensor(entry.name)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise _changed(entry, str(error)) from error
        if value.dtype != entry.dtype or tuple(value.shape) != entry.shape:
            raise _changed(entry, f"{value.dtype} {tuple(value.shape)}")
        # A header of an odd length puts numbers where no processor would have them.
        return value.clone() if value.data_ptr() % value.itemsize else value

    def release(self) -> None:
        """Lets go of the mappings, so that the pages read so far leave memory.

        Tensors that are still in use keep theirs. The next ``tensor`` maps the file again.
        """
        self._handles.clear()

    def _handle(self, file: Path) -> Any:
        from safetensors import safe_open

        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt", device="cpu")
        return self._handles[file]


def _changed(entry: Entry, found: str) -> ValueError:
    return ValueError(
        f"{entry.file} must not change while it is read: {entry.name} was {entry.dtype} "
        f"{entry.shape}, got {found}"
    )


def find_weights(folder: Path, variant: str | None = None) -> Path:
    """The weights of a folder: its index of shards, or its one .safetensors file.

    Raises ValueError naming what is there when that is none or several.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        index = INDEX.fullmatch(path.name)
        if index is not None:
            kind = index["before"] or index["after"] or ""
            found[index["stem"], kind] = path
        elif path.suffix == ".safetensors" and not SHARD.search(path.name):
            stem, _, kind = path.name.removesuffix(".safetensors").partition(".")
            found.setdefault((stem, kind), path)
    kinds = {kind for _, kind in found}
    wanted = variant if variant is not None else ("" if "" in kinds else next(iter(kinds), ""))
    chosen = [path for (_, kind), path in found.items() if kind == wanted]
    if len(chosen) == 1 and (variant is not None or "" in kinds or len(kinds) == 1):
        return chosen[0]
    there = ", ".join(sorted(path.name for path in found.values())) or "none"
    asked = "" if variant is None else f" of the variant {variant!r}"
    raise ValueError(
        f"name_or_path must be a folder with exactly one .safetensors file{asked} (or index of "
        f"shards), got {str(folder)!r} with {there}"
    )


def _read_shards(index: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of all shards; each is in exactly the shard that the index says."""
    table = read_json(index, "an index of shards")
    where = table.get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} must have a weight_map, name -> file, got {where!r:.60}")
    problems: list[str] = []
    files: dict[str, Path] = {}
    for name in dict.fromkeys(map(_hashable, where.values())):
        problem = _shard_problem(index.parent, name)
        if problem:
            problems.append(problem)
        else:
            files[name] = index.parent / name
    _refuse_index(index, problems)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for name, file in files.items():
        held, about = read_header(file)
        metadata = metadata or about
        said = {key for key, shard in where.items() if shard == name}
        problems += [f"{key} is not in {name}" for key in sorted(said - held.keys())]
        problems += [
            f"{key} is in {name}, "
            + ("which the index does not say" if key not in where else f"not in {where[key]}")
            for key in sorted(held.keys() - said)
        ]
        entries |= held
    _refuse_index(index, problems)
    return {key: entries[key] for key in where}, metadata


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) else repr(value)[:60] + " (not a name)"


def _shard_problem(folder: Path, name: str) -> str:
    if not plain_file_name(name) or not name.endswith(".safetensors"):
        return f"a shard must be the name of a .safetensors file in the folder, got {name!r:.100}"
    file = folder / name
    if not file.is_file():
        return f"the shard {name} is not there"
    if not inside(file, folder):
        return f"the shard {name} is a link that leaves the folder, to {file.resolve()}"
    return ""


def inside(file: Path, folder: Path) -> bool:
    """Whether a file is in the folder, links followed.

    The hub's cache is let through: there ``snapshots/<revision>/...`` are links to ``blobs/``
    beside ``snapshots``, and nothing else.
    """
    target, home = file.resolve(), folder.resolve()
    if home in target.parents:
        return True
    blobs = [p.parent / "blobs" for p in (home, *home.parents) if p.name == "snapshots"]
    return any(target.parent == place for place in blobs)


def _refuse_index(index: Path, problems: Iterable[str]) -> None:
    problems = list(problems)
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{index} must fit its shards, got {len(problems)} wrong:\n  {listed}")
