"""A checkpoint's tensors into a module: everything is checked first, then streamed.

The check knows only the header, so a file that does not fit costs nothing and changes nothing.
Streaming keeps little of the file in memory: tensors that are converted or joined, or go to
another device, are read through a mapping that is dropped every WINDOW bytes; those that stay on
the CPU as they are stay views of the file (see ``files`` for what that means).
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.family import Layout, Source
from fastdiff.checkpoints.files import Checkpoint

WINDOW = 256 * 2**20
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
    return _differences(module.state_dict(keep_vars=True), checkpoint, layout, optional)


def _differences(
    state: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    layout: Layout | None,
    optional: Collection[str],
) -> Differences:
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
        other is ours and twin != name and _held(layout.get(twin), checkpoint)
        for twin, other in state.items()
    )


def _held(source: Source | None, checkpoint: Checkpoint) -> bool:
    return source is not None and all(key in checkpoint for key in source.keys)


def assign(
    module: nn.Module,
    checkpoint: Checkpoint,
    layout: Layout | None = None,
    *,
    optional: Collection[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    mapped: bool = True,
    progress: bool = False,
) -> None:
    """Puts the checkpoint's tensors in place of the module's parameters and buffers.

    module: on the meta device (``build_empty``) or not; its own tensors are replaced, not written
        to. layout, optional: as in :func:`differences`.
    device: default CPU. dtype: of floating-point tensors, default the file's own.
    mapped: False copies tensors that would stay views of the file.
    progress: a bar, in bytes.

    Raises ValueError with everything that differs, before anything is read or changed; what goes
    wrong while reading leaves the module as it was, too.
    """
    state = module.state_dict(keep_vars=True)
    _differences(state, checkpoint, layout, optional).refuse(checkpoint)
    layout = identity(state) if layout is None else layout
    place = torch.device("cpu" if device is None else device)
    jobs: dict[int, _Job] = {}
    for name, ours in state.items():
        source = layout.get(name)
        if source is not None and _held(source, checkpoint):
            jobs.setdefault(id(ours), _Job.of(ours, source, checkpoint, place, dtype, mapped))
    placed = _stream(jobs, checkpoint, place, progress)
    _replace(module, placed, place, checkpoint)


@dataclass(frozen=True)
class _Job:
    """One parameter: where it is, what becomes of it, whether it is a slice of the file, and
    whether it stays one."""

    source: Source
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    sliced: bool
    view: bool

    @classmethod
    def of(
        cls,
        ours: Tensor,
        source: Source,
        checkpoint: Checkpoint,
        place: torch.device,
        dtype: torch.dtype | None,
        mapped: bool,
    ) -> _Job:
        entries = [checkpoint.entries[key] for key in source.keys]
        theirs = entries[0].dtype
        wanted = theirs if dtype is None or not theirs.is_floating_point else dtype
        sliced = source.how in ("same", "part") and len(entries) == 1
        nbytes = sum(entry.nbytes for entry in entries)
        if source.how == "part":
            nbytes = nbytes // source.sizes[2] * (source.sizes[1] - source.sizes[0])
        view = mapped and sliced and wanted == theirs and place.type == "cpu"
        return cls(source, tuple(ours.shape), wanted, nbytes, sliced, view)

    def make(self, checkpoint: Checkpoint, place: torch.device) -> Tensor:
        tensors = [checkpoint.tensor(key) for key in self.source.keys]
        if not self.sliced:
            # On the way to a device the file's own precision travels, and is converted there.
            moved = [tensor.to(place).to(self.dtype) for tensor in tensors]
            return self.source.read(moved, self.shape).contiguous()
        value = self.source.read(tensors, self.shape)
        if self.view:
            return value
        moved_value = value.to(place).to(self.dtype)
        return moved_value.clone() if moved_value is value else moved_value


def window_of(checkpoint: Checkpoint) -> int:
    """After how many bytes read the mapping is dropped."""
    return min(WINDOW, max(checkpoint.nbytes // 16, 2**24))


def _stream(
    jobs: Mapping[int, _Job], checkpoint: Checkpoint, place: torch.device, progress: bool
) -> dict[int, Tensor]:
    """The tensors; those that are made of read ones first, so that their pages can be dropped."""
    from tqdm import tqdm

    placed: dict[int, Tensor] = {}
    window = window_of(checkpoint)
    held = 0
    checkpoint.release()
    with tqdm(
        total=sum(job.nbytes for job in jobs.values()),
        desc=checkpoint.path.name,
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for key, job in sorted(jobs.items(), key=lambda item: item[1].view):
            if held > (0 if job.view else window):
                checkpoint.release()  # also before the views: theirs is a mapping still untouched
                held = 0
            placed[key] = job.make(checkpoint, place)
            held += 0 if job.view else job.nbytes
            bar.update(job.nbytes)
    checkpoint.release()
    return placed


def _replace(
    module: nn.Module, placed: Mapping[int, Tensor], place: torch.device, checkpoint: Checkpoint
) -> None:
    """Every parameter and buffer by its new tensor; tied ones stay tied, computed ones move."""
    owners = [
        (owner, table, key, value)
        for owner in module.modules()
        for table in (owner._parameters, owner._buffers)
        for key, value in table.items()
        if value is not None
    ]
    empty = [key for _, _, key, value in owners if value.is_meta and id(value) not in placed]
    if empty:
        raise RuntimeError(
            f"{type(module).__name__} must compute what {checkpoint.path.name} does not hold, "
            f"got no values for {', '.join(empty)}"
        )
    new: dict[int, Tensor] = {}
    for _, _, _, value in owners:
        if id(value) not in new:
            tensor = placed.get(id(value))
            tensor = value.detach().to(place) if tensor is None else tensor
            is_parameter = isinstance(value, nn.Parameter)
            new[id(value)] = (
                nn.Parameter(tensor, requires_grad=value.requires_grad) if is_parameter else tensor
            )
    for _, table, key, value in owners:
        table[key] = new[id(value)]  # type: ignore[assignment]


def dominant_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The floating-point dtype that most bytes have; bfloat16 for one that is only for storage.

    None without floating-point tensors.
    """
    counts: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        if entry.dtype.is_floating_point:
            counts[entry.dtype] = counts.get(entry.dtype, 0) + prod(entry.shape)
    if not counts:
        return None
    dtype = max(counts, key=lambda key: counts[key])
    return dtype if dtype.itemsize > 1 else torch.bfloat16
