"""A checkpoint's tensors into a module: everything is checked first, then streamed.

The check knows only the header, so a file that does not fit costs nothing and changes nothing.
Streaming keeps little of the file in memory: tensors that are converted or joined, or go to
another device, are read through a mapping that is dropped every WINDOW bytes; those that stay on
the CPU as they are stay views of the file (see ``files`` for what that means).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.differences import differences_of, held, identity
from fastdiff.checkpoints.family import Layout, Source
from fastdiff.checkpoints.files import Checkpoint

WINDOW = 256 * 2**20


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
        to. layout, optional: as in ``differences``.
    device: default CPU. dtype: of floating-point tensors, default the file's own.
    mapped: False copies tensors that would stay views of the file.
    progress: a bar, in bytes.

    Raises ValueError with everything that differs, before anything is read or changed; what goes
    wrong while reading leaves the module as it was, too.
    """
    state = module.state_dict(keep_vars=True)
    differences_of(state, checkpoint, layout, optional).refuse(checkpoint)
    layout = identity(state) if layout is None else layout
    place = torch.device("cpu" if device is None else device)
    jobs: dict[int, _Job] = {}
    for name, ours in state.items():
        source = layout.get(name)
        if source is not None and held(source, checkpoint):
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
    since = 0
    checkpoint.release()
    with tqdm(
        total=sum(job.nbytes for job in jobs.values()),
        desc=checkpoint.path.name,
        unit="B",
        unit_scale=True,
        disable=not progress,
    ) as bar:
        for key, job in sorted(jobs.items(), key=lambda item: item[1].view):
            if since > (0 if job.view else window):
                checkpoint.release()  # also before the views: theirs is a mapping still untouched
                since = 0
            placed[key] = job.make(checkpoint, place)
            since += 0 if job.view else job.nbytes
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
