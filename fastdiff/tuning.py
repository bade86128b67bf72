"""Launches measured on the user's GPU: the table that `python -m fastdiff.tune` writes.

An op's `select` chooses a launch from the shape alone, and that is what runs everywhere: no table
is shipped. Where a table exists and has an entry for (op, GPU, architecture, dtype, shape bucket),
the op takes that candidate instead. A table holds choices by name and number, never code; one that
is not among the op's candidates for the shape at hand is passed over and `select` decides.

The file is `tuning.json` in `fastdiff.environment.cache_folder()`:

    {"version": 1, "entries": {op: {key: {"choice": {...}, "us": ..., "default_us": ..., ...}}}}

It is read once per process, at the first launch that asks. Writers read it again under a lock file,
merge their entries into it and replace it in one step, so none loses what another wrote.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from fastdiff.environment import cache_folder

VERSION = 1
FILE = "tuning.json"
Choice = dict[str, Any]
Entries = dict[str, dict[str, dict[str, Any]]]
Plan = TypeVar("Plan")


class Key(NamedTuple):
    """What a launch depends on.

    sizes: (name, size) pairs that fall into buckets, each size up to the next power of two.
    exact: (name, value) pairs that do not, such as the number of groups or the memory layout.
    """

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[tuple[str, int], ...]
    exact: tuple[tuple[str, int], ...] = ()

    def text(self) -> str:
        """The key in the file: GPU, architecture, dtype and bucket."""
        bucket = [f"{name}<={1 << max(0, size - 1).bit_length()}" for name, size in self.sizes]
        exact = [f"{name}={int(value)}" for name, value in self.exact]
        dtype = str(self.dtype).removeprefix("torch.")
        return " | ".join((*_device(self.device), dtype, " ".join((*bucket, *exact))))


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return device.type, "sm_0"
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"sm_{major}{minor}"


class TableError(ValueError):
    """Why a file cannot be used. newer: a later fastdiff wrote it."""

    def __init__(self, message: str, newer: bool = False) -> None:
        super().__init__(message)
        self.newer = newer


def table_path() -> Path:
    """Where the table is, or would be."""
    return cache_folder() / FILE


def read(path: Path) -> Entries:
    """The entries of a table; none where there is no file. TableError for what is no table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TableError(f"{path} cannot be read ({error})") from error
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise TableError(f"{path} is not a tuning table")
    if version > VERSION:
        raise TableError(f"{path} has version {version}, this fastdiff reads {VERSION}", newer=True)
    entries = content.get("entries")
    if not _well_formed(entries):
        raise TableError(f"{path} has entries that are none")
    return entries if version == VERSION else {}


def _well_formed(entries: Any) -> bool:
    return isinstance(entries, dict) and all(
        isinstance(keys, dict)
        and all(isinstance(e, dict) and isinstance(e.get("choice"), dict) for e in keys.values())
        for keys in entries.values()
    )


# --- looking up -----------------------------------------------------------------------------------

_forced: dict[str, Choice] = {}
_plans: dict[tuple[str, Key], Any] = {}


@functools.lru_cache(maxsize=1)
def _entries() -> Entries:
    """The table of this process, read once; a file that cannot be used is one warning."""
    try:
        return read(table_path())
    except FileNotFoundError:  # no folder that could hold one
        return {}
    except TableError as error:
        warnings.warn(f"tuned launches are not used: {error}", RuntimeWarning, stacklevel=2)
        return {}


def reload() -> None:
    """Forgets the table in memory: the next look-up reads the file again."""
    _entries.cache_clear()
    _plans.clear()


def active() -> bool:
    """Whether a look-up can find anything. Where not, an op builds no key."""
    return bool(_forced or _entries())


def lookup(op: str, key: Key) -> Choice | None:
    """The choice measured as best for this key on this device, or None."""
    if op in _forced:
        return _forced[op]
    entry = _entries().get(op, {}).get(key.text()) if active() else None
    return None if entry is None else entry["choice"]


def plan(op: str, key: Key, candidates: Callable[[], Iterable[tuple[Choice, Plan]]]) -> Plan | None:
    """The candidate that the table chose, or None: then `select` decides.

    candidates: gives (choice, plan) pairs for the shape at hand. A choice that is not among them
    is not executed. The answer is kept for the key, whose sizes are exact here.
    """
    if _forced:
        return _matching(lookup(op, key), candidates)
    if (op, key) not in _plans:
        _plans[op, key] = _matching(lookup(op, key), candidates)
    return _plans[op, key]


def _matching(
    choice: Choice | None, candidates: Callable[[], Iterable[tuple[Choice, Plan]]]
) -> Plan | None:
    if choice is None:
        return None
    return next((launch for known, launch in candidates() if known == choice), None)


@contextlib.contextmanager
def forced(op: str, choice: Choice) -> Iterator[None]:
    """Within it, the op takes this choice (a candidate, else `select`'s). For measuring."""
    before = dict(_forced)
    _forced[op] = choice
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


# --- writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, also across processes. The lock file stays: removing it would let two
    writers lock two files of one name."""
    import fcntl

    with open(path.with_suffix(".lock"), "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            warnings.warn(
                f"{file.name} cannot be locked ({error}); another writer's entries may be lost",
                RuntimeWarning,
                stacklevel=3,
            )
        yield


def check_writable() -> Path:
    """The table's path, its folder made. OSError where it cannot be written, TableError for a
    newer version's file, which saving would destroy."""
    path = table_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path), contextlib.suppress(FileNotFoundError):
        os.unlink(_write(path.parent, ""))
    _mergeable(path)
    return path


def _mergeable(path: Path) -> Entries:
    """What a writer keeps of the file: nothing of a corrupted one, which it says."""
    try:
        return read(path)
    except TableError as error:
        if error.newer:
            raise
        warnings.warn(f"the table is written anew: {error}", RuntimeWarning, stacklevel=3)
        return {}


def _write(folder: Path, text: str) -> str:
    """A new file with this text, on the disk, in the folder; its name."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=folder, prefix=f".{FILE}.", delete=False
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return file.name


def save(op: str, measured: Mapping[str, Mapping[str, Any]]) -> Path:
    """Merges entries (key text -> {"choice": ..., ...}) of an op into the table; gives its path.

    The newest measurement of a key wins. OSError where the folder cannot be written; TableError
    when the file is of a newer version; ValueError for an entry without a choice.
    """
    path = table_path()
    added: dict[str, dict[str, Any]] = {
        key: {**entry, "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        for key, entry in measured.items()
    }
    if not _well_formed({op: added}):
        raise ValueError(f"measured must hold a choice for each key, got {dict(measured)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        entries = _mergeable(path)
        entries[op] = {**entries.get(op, {}), **added}
        text = json.dumps({"version": VERSION, "entries": entries}, indent=1, sort_keys=True)
        new = _write(path.parent, text + "\n")
        try:
            os.replace(new, path)
        except OSError:
            os.unlink(new)
            raise
    reload()
    return path
