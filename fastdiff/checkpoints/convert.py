"""``convert``: a model from one layout's file to the other's, tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.assign import window_of
from fastdiff.checkpoints.detect import CONFIG, Component, describe
from fastdiff.checkpoints.differences import identity
from fastdiff.checkpoints.family import Layout, Source
from fastdiff.checkpoints.writing import NAMES, serialised, write_atomically

LAYOUTS = ("diffusers", "official")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layout: str = "diffusers",
    dtype: torch.dtype | None = None,
    component: str | None = None,
    prefix: str = "",
    max_shard_size: int | str = "10GB",
) -> Path:
    """Writes one model in another layout; ``target`` is whole or untouched. Returns its path.

    source: what ``fastdiff.load`` takes from the disk. component: which model, where there are
        several.
    target: with layout "diffusers" a folder that is new or empty (config.json, and one file or
        shards of at most max_shard_size bytes, "500MB", with their index); with "official" a
        .safetensors file, its names beginning with ``prefix``, such as "model.diffusion_model.".
    dtype: of floating-point tensors, default the file's own.

    Memory holds about one tensor at a time. Raises ValueError for what ``load`` refuses, pickles
    among it, and for another layout, target or dtype than these; OSError where it cannot write.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if dtype is not None and (dtype not in NAMES or not dtype.is_floating_point):
        raise ValueError(f"dtype must be floating-point, as torch.bfloat16, got {dtype}")
    limit = _bytes(max_shard_size)
    goal = Path(target)
    if layout == "official" and goal.suffix != ".safetensors":
        raise ValueError(f"target must end in .safetensors, got {str(goal)!r}")
    if layout == "diffusers" and (prefix or goal.suffix == ".safetensors"):
        raise ValueError(f"target must be a folder, without a prefix, got {str(goal)!r}")
    if layout == "diffusers" and goal.exists() and not (goal.is_dir() and not any(goal.iterdir())):
        raise ValueError(f"target must be a new or an empty folder, got {str(goal)!r}")
    part = _one(source, component)
    if any(goal.exists() and goal.samefile(file) for file in part.checkpoint.files):
        raise ValueError(f"target must be another file than source, got {str(goal)!r}")
    if layout == "diffusers" and part.family.to_diffusers is None:
        raise ValueError(f"layout must be 'official' for {part.family.name}, got {layout!r}")
    module = part.build()
    part.differences().refuse(part.checkpoint)
    rewritten = _Rewritten(part, module, part.family.layout(layout, part.config), prefix, dtype)
    if layout == "official":
        write_atomically(goal, serialised(rewritten.about, rewritten.tensor, {"format": "pt"}))
        return goal
    _write_folder(goal, part, rewritten, limit)
    return goal


def _one(source: str | os.PathLike[str], component: str | None) -> Component:
    found = describe(source)
    there = ", ".join(found.components)
    if component is not None and component not in found.components:
        raise ValueError(f"component must be one of {there}, got {component!r}")
    if component is None and len(found.components) > 1:
        raise ValueError(f"component must name one of {there}: source has several, got None")
    return found.components[component or next(iter(found.components))]


class _Rewritten:
    """The tensors of a component under the names of another layout, made when asked for."""

    def __init__(
        self,
        part: Component,
        module: nn.Module,
        layout: Layout | None,
        prefix: str,
        dtype: torch.dtype | None,
    ) -> None:
        self.part, self.dtype = part, dtype
        self.state = module.state_dict()
        self.read = part.sources() or identity(self.state)
        self.write = layout or identity(self.state)
        self.held = 0
        self.made: tuple[str, dict[str, Tensor]] = ("", {})
        # New name -> its name in the layout and ours; several of ours where they are its rows.
        self.owners: dict[str, tuple[str, list[str]]] = {}
        self.about: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in self.state:
            source = self.write.get(name)
            if source is None or not self._known(name):
                continue
            for key, value in source.write(self._blank(name)).items():
                rows = source.sizes[2] if source.how == "part" else None
                shape = tuple(value.shape) if rows is None else (rows, *value.shape[1:])
                self.owners.setdefault(prefix + key, (key, []))[1].append(name)
                self.about[prefix + key] = (value.dtype, shape)
        for _, ours in self.owners.values():
            ours.sort(key=lambda name: self.write[name].sizes[:1])

    def _known(self, name: str) -> bool:
        return self._read_from(name) is not None or not self.state[name].is_meta

    def _read_from(self, name: str) -> Source | None:
        source = self.read.get(name)
        whole = source is not None and all(key in self.part.checkpoint for key in source.keys)
        return source if whole else None

    def _blank(self, name: str) -> Tensor:
        """A tensor like the one to come, without its data."""
        source, ours = self._read_from(name), self.state[name]
        kind = ours.dtype if source is None else self.part.checkpoint.dtypes[source.keys[0]]
        kind = self.dtype if self.dtype is not None and kind.is_floating_point else kind
        return torch.empty(ours.shape, dtype=kind, device="meta")

    def tensor(self, name: str) -> Tensor:
        """The tensor of a new name, its parameter read from the file."""
        key, ours = self.owners[name]
        if self.write[ours[0]].how == "part":
            return torch.cat([self._value(one).to(self.about[name][0]) for one in ours])
        if self.made[0] != ours[0]:
            self.made = ("", {})
            value = self._value(ours[0]).to(self.about[name][0])
            self.made = (ours[0], self.write[ours[0]].write(value))
        return self.made[1][key]

    def _value(self, name: str) -> Tensor:
        source = self._read_from(name)
        if source is None:
            return self.state[name]
        if self.held > window_of(self.part.checkpoint):
            self.part.checkpoint.release()
            self.held = 0
        self.held += sum(self.part.checkpoint.entries[key].nbytes for key in source.keys)
        tensors = [self.part.checkpoint.tensor(key) for key in source.keys]
        return source.read(tensors, tuple(self.state[name].shape))


def _write_folder(goal: Path, part: Component, rewritten: _Rewritten, limit: int) -> None:
    """Everything into a new folder beside the target, which then takes its name."""
    assert part.family.to_diffusers is not None
    entries = part.family.to_diffusers(part.config)
    stem = "diffusion_pytorch_model" if "_class_name" in entries else "model"
    sizes = {
        name: torch.Size(shape).numel() * dtype.itemsize
        for name, (dtype, shape) in rewritten.about.items()
    }
    shards = _shards(sizes, limit)
    folder = Path(tempfile.mkdtemp(prefix=f".{goal.name}.", dir=goal.parent))
    try:
        text = json.dumps(entries, indent=2, sort_keys=True) + "\n"
        write_atomically(folder / CONFIG, text.encode())
        where: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            count = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
            file = f"{stem}{count}.safetensors"
            about = {name: rewritten.about[name] for name in names}
            write_atomically(folder / file, serialised(about, rewritten.tensor, {"format": "pt"}))
            where |= dict.fromkeys(names, file)
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            write_atomically(folder / f"{stem}.safetensors.index.json", text.encode())
        folder.chmod(0o777 & ~_umask())  # mkdtemp makes folders that only the owner reads
        os.replace(folder, goal)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names in files of at most ``limit`` bytes; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(sizes):
        if shards[-1] and held + sizes[name] > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += sizes[name]
    return shards


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB)?", str(size).upper())
    count = int(match[1]) * UNITS.get(match[2] or "", 1) if match else 0
    if isinstance(size, bool) or count < 1:
        raise ValueError(f"max_shard_size must be bytes, or as '500MB', got {size!r}")
    return count
