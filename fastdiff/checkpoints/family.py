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
      sizes: the rows of each, which a file is written with;
    * "swap": the two halves of dimension 0 exchanged (scale and shift of a last modulation).
    """

    keys: tuple[str, ...]
    how: str = "same"
    sizes: tuple[int, ...] = ()

    def read(self, tensors: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Our parameter from the file's tensors."""
        if self.how == "rows":
            return torch.cat(tensors)
        tensor = tensors[0]
        for key, copy in zip(self.keys, tensors, strict=True):
            if not torch.equal(copy, tensor):
                raise ValueError(f"{key} must be a copy of {self.keys[0]}, got other values")
        if self.how == "swap":
            return torch.cat(tensor.chunk(2)[::-1])
        return tensor.reshape(shape) if tuple(tensor.shape) != shape else tensor

    def write(self, ours: Tensor) -> dict[str, Tensor]:
        """The file's tensors from our parameter (dimensions of 1 are the caller's)."""
        if self.how == "rows":
            return dict(zip(self.keys, ours.split(self.sizes), strict=True))
        if self.how == "swap":
            return {self.keys[0]: torch.cat(ours.chunk(2)[::-1])}
        return dict.fromkeys(self.keys, ours)


# Our parameter's name -> where it is; a layout covers every parameter and persistent buffer, but
# for those among Family.optional that the layout does not hold.
Layout = Mapping[str, Source]


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
        computed), or that it may lack: ``build`` computes those, on the CPU even under meta.
    classes: ``_class_name`` in the ``config.json`` of a diffusers folder.
    diffusers: the diffusers layout of a configuration. older: parts of the names (between two dots)
        in folders of older versions of diffusers, and what they are now.
    from_diffusers: the configuration of a ``config.json``; ValueError naming the entry for what the
        module cannot do. to_diffusers: the ``config.json`` of a configuration.
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
    sampling: Mapping[str, Any] = field(default_factory=dict)
