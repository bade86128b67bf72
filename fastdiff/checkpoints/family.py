"""What a checkpoint's reader knows of a family of models: data, one ``Family`` in each file of
``layouts``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Source:
    """Where one parameter of ours is in a file of another layout.

    keys: the file's tensors. how: what makes ours of them:

    * "same": the one tensor, reshaped to ours where that only adds or drops dimensions of 1 (a
      1x1 convolution that is a linear layer there); of several keys every one holds a copy of it,
      and a file whose copies differ is no file of ours (ValueError);
    * "rows": several, one behind the other along dimension 0 (Q, K and V of a fused projection);
      sizes: the rows of each, equal ones when not given;
    * "swap": the two halves of dimension 0 exchanged (scale and shift of a last modulation);
    * "part": some rows of the one tensor (Q alone, of a fused projection there); sizes: the first
      row, the one past the last, and the rows of the whole;
    * "transposed": the one matrix, transposed;
    * "eye": the identity, of the dtype of the one tensor, a vector of as many elements: for a
      matrix that is in no file.

    flat: the file is written without our last dimensions of 1 (a linear layer there).
    """

    keys: tuple[str, ...]
    how: str = "same"
    sizes: tuple[int, ...] = ()
    flat: bool = False

    def shapes(self, ours: tuple[int, ...]) -> list[tuple[int, ...]]:
        """The shape of each of the file's tensors, up to dimensions of 1."""
        if self.how == "part":
            return [(self.sizes[2], *ours[1:])]
        if self.how in ("transposed", "eye"):
            return [ours[::-1] if self.how == "transposed" else ours[:1]]
        if self.how != "rows":
            return [ours] * len(self.keys)
        return [(rows, *ours[1:]) for rows in self._rows(ours)]

    def read(self, tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Our parameter from the file's tensors; a view where it can be."""
        if self.how == "rows":
            return torch.cat([tensor.reshape(-1, *shape[1:]) for tensor in tensors])
        tensor = tensors[0]
        if self.how == "part":
            return tensor[self.sizes[0] : self.sizes[1]].reshape(shape)
        if self.how == "transposed":
            return tensor.t()
        if self.how == "eye":
            return torch.eye(*shape, dtype=tensor.dtype, device=tensor.device)
        for key, copy in zip(self.keys, tensors, strict=True):
            if copy is not tensor and not torch.equal(copy, tensor):
                raise ValueError(f"{key} must be a copy of {self.keys[0]}, got other values")
        if self.how == "swap":
            tensor = torch.cat(tensor.chunk(2)[::-1])
        return tensor.reshape(shape)

    def write(self, ours: Tensor) -> dict[str, Tensor]:
        """The file's tensors from our parameter.

        Of "part" it is the part alone: see :func:`written`.
        """
        if self.how == "eye":
            return {}
        if self.how == "transposed":
            ours = ours.t()
        while self.flat and ours.dim() > 1 and ours.shape[-1] == 1:
            ours = ours.squeeze(-1)
        if self.how == "rows":
            rows = self._rows(tuple(ours.shape))
            return dict(zip(self.keys, ours.split(rows), strict=True))
        if self.how == "swap":
            ours = torch.cat(ours.chunk(2)[::-1])
        return dict.fromkeys(self.keys, ours)

    def _rows(self, ours: tuple[int, ...]) -> list[int]:
        return list(self.sizes) or [ours[0] // len(self.keys)] * len(self.keys)


# Our parameter's name -> where it is; a layout covers every parameter and persistent buffer, but
# for those among Family.optional that the layout does not hold.
Layout = Mapping[str, Source]


def written(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors in ``layout`` from our parameters."""
    file: dict[str, Tensor] = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, source in layout.items():
        if source.how == "part":
            parts.setdefault(source.keys[0], {})[source.sizes[0]] = state[name]
        else:
            file |= source.write(state[name])
    joined = {key: [rows[first] for first in sorted(rows)] for key, rows in parts.items()}
    return file | {key: torch.cat(rows) for key, rows in joined.items()}


@dataclass(frozen=True)
class Family:
    """One architecture, its configurations and its layouts.

    name: "unet", "dit", ... configs: the public models by name. build: the module of a
        configuration, without its weights when called under ``torch.device("meta")``.
    prefixes: what the names of a single file may start with, such as "model.diffusion_model.".
    recognise: the configuration of a file in the official layout, from the names (their prefix
        removed) and shapes of its tensors; None for another family's.
    official: the official layout where the module's own names are not it, else None.
    optional: official names a file may hold that are no parameters of ours (buffers that are
        computed), or that it may lack: ``build`` computes those; ``*`` stands for anything.
    classes: ``_class_name`` in the ``config.json`` of a diffusers folder.
    diffusers: the diffusers layout of a configuration. older: parts of the names (between two dots)
        in folders of other versions of diffusers, and what they are now; "": the part is left out.
    from_diffusers: the configuration of a ``config.json``; ValueError naming the entry for what the
        module cannot do. to_diffusers: the ``config.json`` of a configuration.
    sampling: what ``Sampling`` is made of, where it is not the default; under the name of a
        configuration, a mapping with what is different for that one. Or a function of the
        configuration that returns such a mapping.
    """

    name: str
    configs: Mapping[str, Any]
    build: Callable[[Any], nn.Module]
    prefixes: tuple[str, ...]
    recognise: Callable[[Shapes], Any]
    official: Callable[[Any], Layout] | None = None
    optional: frozenset[str] = frozenset()
    classes: tuple[str, ...] = ()
    diffusers: Callable[[Any], Layout] | None = None
    older: Mapping[str, str] = field(default_factory=dict)
    from_diffusers: Callable[[Mapping[str, Any]], Any] | None = None
    to_diffusers: Callable[[Any], dict[str, Any]] | None = None
    sampling: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = field(default_factory=dict)

    def layout(self, name: str, config: Any) -> Layout | None:
        """The layout called "official" or "diffusers"; None where it is the module's own names."""
        make = self.official if name == "official" else self.diffusers
        if make is None and name != "official":
            raise ValueError(f"layout must be 'official' for {self.name}, got {name!r}")
        return None if make is None else make(config)

    def config_name(self, config: Any) -> str | None:
        """The name of a public configuration, None for another one."""
        return next((name for name, known in self.configs.items() if known == config), None)

    def sampling_of(self, config: Any) -> dict[str, Any]:
        """The entries of ``sampling`` for a configuration."""
        if callable(self.sampling):
            return dict(self.sampling(config))
        common = {k: v for k, v in self.sampling.items() if not isinstance(v, Mapping)}
        own = self.sampling.get(self.config_name(config) or "", {})
        return {**common, **own}
