"""The header of a safetensors file, read and checked before anything else touches the file.

A file is 8 bytes of length N (little endian), N bytes of JSON {name: {"dtype", "shape",
"data_offsets": [begin, end]}} with an optional "__metadata__" of strings, then the tensors' bytes
(https://huggingface.co/docs/safetensors). Reading it executes nothing and needs memory in
proportion to the header, which may have at most MAX_HEADER bytes.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

MAX_HEADER = 16 * 2**20
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What a file of another kind begins with, and what it then is.
SIGNATURES = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes"),
    *((bytes([0x80, version]), "a pickle") for version in range(2, 6)),
    (b"GGUF", "a GGUF file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
    (b"<!DOCTYPE", "a web page"),
    (b"<html", "a web page"),
)


@dataclass(frozen=True)
class Entry:
    """One tensor: the file it is in, its name there, and what the header says of it."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


def refuse_pickle(path: Path, argument: str = "name_or_path") -> None:
    """ValueError with the way to convert for a name that says pickle; the file is not opened."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{argument} must be a .safetensors file, got {str(path)!r}: a {path.suffix} file is a "
            "pickle, which can run any code when opened. Convert it once where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata that a file's header declares.

    Every tensor's bytes are within the file, in no other tensor's, and together they are all of
    it. Raises ValueError for anything else, OSError where the system cannot read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} must be a regular file, got another kind")
    size = status.st_size
    with open(path, "rb") as file:
        start = file.read(24)
        length = int.from_bytes(start[:8], "little")
        room = min(MAX_HEADER, size - 8)
        if len(start) < 8 or not 2 <= length <= room:
            kind = next((kind for mark, kind in SIGNATURES if start.startswith(mark)), "")
            reason = f"it is {kind}" if kind else f"the header would have {length:,} bytes"
            _damaged(path, size, reason if len(start) >= 8 or kind else "no header")
        file.seek(8)
        text = file.read(length)
    if len(text) < length:
        _damaged(path, size, f"the header ends after {len(text):,} of {length:,} bytes")
    try:
        table = _json_object(text)
        return _entries(path, table, size - 8 - length), _metadata(table)
    except _Wrong as error:
        _damaged(path, size, str(error))


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a small JSON file (a config, an index); ValueError for anything else."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} must be a regular file, got another kind")
    if status.st_size > MAX_HEADER:
        raise ValueError(
            f"{path} must be {what} of at most {MAX_HEADER:,} bytes, got {status.st_size:,}"
        )
    try:
        return _json_object(path.read_bytes())
    except _Wrong as error:
        raise ValueError(f"{path} must be {what}, got a file that is not ({error})") from error


class _Wrong(Exception):
    """What is wrong with a header or a JSON file, without the file's name."""


def _damaged(path: Path, size: int, reason: str) -> NoReturn:
    raise ValueError(
        f"{path} must be a whole safetensors file, got {size} bytes that are not ({reason}); "
        "copy or download it again"
    )


def _json_object(text: bytes) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _Wrong(f"the key {twice!r} is there twice")
        return found

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise _Wrong("the JSON is nested too deeply") from None
    except ValueError as error:  # also bad UTF-8 and integers of thousands of digits
        raise _Wrong(f"not JSON: {error}") from None
    if not isinstance(table, dict):
        raise _Wrong(f"a JSON object was expected, got {type(table).__name__}")
    return table


def _metadata(table: dict[str, Any]) -> dict[str, str]:
    metadata = table.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Wrong("__metadata__ must be an object of strings")
    return metadata


def _entries(path: Path, table: dict[str, Any], room: int) -> dict[str, Entry]:
    entries, spans = {}, []
    for name, about in table.items():
        if name == "__metadata__":
            continue
        if not plain(name):
            raise _Wrong(f"a tensor's name must be printable text, got {name!r}")
        dtype, shape, begin, end = _fields(name, about)
        if end > room:
            raise _Wrong(f"{name} ends at byte {end:,} of {room:,}")
        nbytes = prod(shape) * dtype.itemsize
        if end - begin != nbytes:
            raise _Wrong(f"{name} has {end - begin:,} bytes, its shape and dtype {nbytes:,}")
        if not nbytes and max(shape, default=0) > room:
            raise _Wrong(f"{name} has no bytes, and a size of {max(shape):,}")
        entries[name] = Entry(path, name, dtype, shape, nbytes)
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            kind = "overlaps another tensor" if begin < place else "leaves a hole before it"
            raise _Wrong(f"{name} at byte {begin:,} {kind}")
        place = end
    if place != room:
        raise _Wrong(f"the tensors have {place:,} bytes, the file {room:,} for them")
    return entries


def _fields(name: str, about: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Wrong(f"{name} must have a dtype, a shape and data_offsets")
    dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Wrong(f"the dtype of {name} must be one of {', '.join(DTYPES)}, got {dtype!r:.60}")
    if not (isinstance(shape, list) and len(shape) <= 32 and all(map(_size, shape))):
        raise _Wrong(f"the shape of {name} must be at most 32 sizes, got {shape!r:.60}")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_size, offsets))):
        raise _Wrong(f"the data_offsets of {name} must be two sizes, got {offsets!r:.60}")
    if offsets[0] > offsets[1]:
        raise _Wrong(f"the data_offsets of {name} must not go down, got {offsets}")
    return DTYPES[dtype], tuple(shape), offsets[0], offsets[1]


def _size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def plain(name: str) -> bool:
    """Whether a name is text without control characters, and not empty."""
    return bool(name) and name.isprintable()


def plain_file_name(name: Any) -> bool:
    """Whether a name is a file's own: no folders, nothing that the system reads otherwise."""
    return (
        isinstance(name, str)
        and plain(name)
        and not set(name) & set('/\\:*?"<>|')
        and name not in (os.curdir, os.pardir)
        and not name.startswith("~")
        and len(name) < 256
    )
