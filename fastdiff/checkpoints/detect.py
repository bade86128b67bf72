"""What a path holds: ``describe`` finds the components, their families and their configurations.

It reads headers and small JSON files, never a tensor; ``load``, ``inspect`` and ``convert`` start
from the same :class:`Description`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.checkpoints import roles
from fastdiff.checkpoints.differences import Differences, differences
from fastdiff.checkpoints.empty import build_empty
from fastdiff.checkpoints.family import Family, Layout
from fastdiff.checkpoints.files import Checkpoint, find_weights
from fastdiff.checkpoints.header import plain_file_name, read_json, refuse_pickle
from fastdiff.checkpoints.layouts import families
from fastdiff.models.weights import METADATA_KEY, Sampling, read_own

INDEX = "model_index.json"
CONFIG = "config.json"
# What an autoencoder's tensors do not tell.
SCALE = ("scaling", "shift", "force_upcast", "sample_size")
LARGEST = 2**20  # of the numbers in a config.json
# Folders of a pipeline that must be models of the zoo.
NEEDED = ("unet", "transformer", "prior", "vae", "text_encoder", "controlnet")


@dataclass(frozen=True)
class Component:
    """One model: what it is called in a pipeline, what it is, and where its tensors are.

    layout: "official" or "diffusers". checkpoint: its tensors alone, ``prefix`` removed from their
    names. sampling: of its own, where the file says it.
    """

    name: str
    family: Family
    config: Any
    layout: str
    checkpoint: Checkpoint
    prefix: str = ""
    sampling: Sampling | None = None

    def build(self) -> nn.Module:
        """The module without its weights; ValueError for sizes that no module can have."""
        try:
            return build_empty(self.family.build, self.config)
        except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:
            raise ValueError(
                f"{self.checkpoint.path} must be of a {self.family.name} that can be built, got "
                f"{self.config}: {error}"
            ) from error

    def sources(self) -> Layout | None:
        """Where the module's parameters are in the checkpoint; None: under their own names."""
        return self.family.layout(self.layout, self.config)

    def differences(self) -> Differences:
        return differences(self.build(), self.checkpoint, self.sources(), self.family.optional)


@dataclass(frozen=True)
class Description:
    """What a path holds.

    kind: "pipeline" (a diffusers folder), "component" (one of its folders), "file" (a single file
    of one or several models) or "fastdiff" (written by ``fastdiff.models.save``).
    components: the models by their name in a pipeline. others: the pipeline's other folders
    (tokenizers, scheduler). index: the entries of model_index.json. scheduler: those of
    scheduler_config.json. ignored: tensors that training left. problems: what is not understood.
    """

    path: Path
    kind: str
    components: Mapping[str, Component]
    others: Mapping[str, Path] = field(default_factory=dict)
    index: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def describe(path: str | os.PathLike[str], variant: str | None = None) -> Description:
    """What the file or folder at ``path`` holds; see :class:`Description`.

    variant: of the weights in folders, as "fp16". Raises ValueError for what is damaged, of another
    format or of no known family; OSError for what cannot be read.
    """
    path = Path(path)
    refuse_pickle(path)
    if path.is_dir():
        if (path / INDEX).exists():
            return _pipeline(path, variant)
        if (path / CONFIG).exists():
            component = _component(path, variant)
            return Description(path, "component", {component.name: component})
    checkpoint = Checkpoint.open(path, variant)
    if METADATA_KEY in checkpoint.metadata:
        return Description(path, "fastdiff", {"model": _own(checkpoint)})
    found = _single_file(path, checkpoint)
    if not found.components:
        if path.is_file() and (path.parent / CONFIG).exists():
            component = replace(_component(path.parent, variant), checkpoint=checkpoint)
            return Description(path, "component", {component.name: component})
        raise _unrecognised(checkpoint)
    return found


def _own(checkpoint: Checkpoint) -> Component:
    config, sampling = read_own(checkpoint)
    family = next(family for family in families() if family.name == "dit")
    return Component("model", family, config, "official", checkpoint, sampling=sampling)


def _pipeline(folder: Path, variant: str | None) -> Description:
    index = read_json(folder / INDEX, "the index of a diffusers pipeline")
    components, others, problems = {}, {}, []
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list) or value[:1] == [None]:
            continue
        if len(value) != 2 or not all(isinstance(part, str) for part in value):
            problems.append(f"{INDEX}: {name} must be [library, class], got {value!r:.60}")
            continue
        place = folder / name
        if not plain_file_name(name) or not place.is_dir():
            problems.append(f"{INDEX}: {name!r:.60} must be a folder beside it")
        elif _family_of(value[1]) is not None:
            components[name] = replace(_component(place, variant), name=name)
        elif name.startswith(NEEDED):
            problems.append(f"{INDEX}: {name} must be one of {_known_classes()}, got {value[1]}")
        else:
            others[name] = place
    if not components and not problems:
        problems.append(f"{INDEX}: it must name a model, got {', '.join(index)}")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    entries = read_json(scheduler, "a scheduler's configuration") if scheduler.exists() else {}
    return Description(
        folder, "pipeline", components, others, index, entries, problems=tuple(problems)
    )


def _component(folder: Path, variant: str | None) -> Component:
    file = folder / CONFIG
    entries = read_json(file, "a model's configuration")
    architectures = entries.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    name = entries.get("_class_name", first)
    family = _family_of(name)
    if family is None or family.from_diffusers is None:
        raise ValueError(
            f"{file} must name a class of {_known_classes()} (_class_name or architectures), "
            f"got {name!r:.60}"
        )
    checkpoint = Checkpoint.open(find_weights(folder, variant))
    try:
        _check_counts(entries, len(checkpoint))
        config = family.from_diffusers(entries)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} must be a {name} of this version, got: {text}") from error
    renewed = {_renewed(key, family.older): key for key in checkpoint}
    if len(renewed) < len(checkpoint):
        twice = sorted(set(checkpoint) - set(renewed.values()))
        raise ValueError(f"{checkpoint.path} must have each tensor once, got also {twice[0]}")
    return Component(
        roles.role_of(family, ""), family, config, "diffusers", checkpoint.part(renewed)
    )


def _check_counts(entries: Mapping[str, Any], tensors: int) -> None:
    """A model has not more layers than its file has tensors, nor sizes of millions: a check before
    anything is built of them."""
    for name, value in entries.items():
        most = tensors if "layers" in name else LARGEST
        for count in value if isinstance(value, list) else [value]:
            if isinstance(count, int) and count > most:
                raise ValueError(f"{name} must be at most {most:,}, got {count:,}")


def _renewed(name: str, older: Mapping[str, str]) -> str:
    """A name of another version of diffusers, in this one's."""
    parts = (older.get(part, part) for part in name.split("."))
    return ".".join(part for part in parts if part) if older else name


def _single_file(path: Path, checkpoint: Checkpoint) -> Description:
    """The parts of a file, by the beginnings of the names; a name is of its longest beginning."""
    ignored = [name for name in checkpoint if any(fnmatchcase(name, p) for p in roles.LEFTOVERS)]
    left = dict.fromkeys(name for name in checkpoint if name not in set(ignored))
    known = {prefix for family in families() for prefix in family.prefixes} | {""}
    components: dict[str, Component] = {}
    for prefix in sorted(known, key=len, reverse=True):
        names = {name[len(prefix) :]: name for name in left if name.startswith(prefix)}
        if not names:
            continue
        part = checkpoint.part(names)
        for family in families():
            if prefix and prefix not in family.prefixes:
                continue
            config = _recognise(family, part)
            if config is not None:
                role = roles.role_of(family, prefix)
                components[role] = Component(role, family, config, "official", part, prefix)
                for name in names.values():
                    del left[name]
                break
    problems = tuple(f"unknown {name}" for name in left)
    components = _with_scale(
        {role: components[role] for role in sorted(components, key=roles.order)}
    )
    return Description(path, "file", components, ignored=tuple(ignored), problems=problems)


def _with_scale(components: dict[str, Component]) -> dict[str, Component]:
    """An autoencoder beside a denoiser has the latents' scale that the denoiser was trained with.

    No shape tells it: the tensors of SD1's and of SDXL's autoencoder are alike, SD3's and FLUX's.
    """
    vae = components.get("vae")
    denoiser = components.get("unet") or components.get("transformer")
    if vae is None or denoiser is None:
        return components
    kind = {"mmdit": "sd3", "flux": "flux"}.get(denoiser.family.name, "sd1")
    if getattr(denoiser.config, "vector_dim", None):
        kind = "sdxl"
    known = vae.family.configs[kind]
    scale = {name: getattr(known, name) for name in SCALE}
    return {**components, "vae": replace(vae, config=replace(vae.config, **scale))}


def _recognise(family: Family, part: Checkpoint) -> Any:
    try:
        return family.recognise(part.shapes)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError):
        return None  # shapes that are no model's


def _family_of(class_name: Any) -> Family | None:
    found = (family for family in families() if class_name in family.classes)
    return next(found, None) if isinstance(class_name, str) else None


def _known_classes() -> str:
    return ", ".join(sorted({name for family in families() for name in family.classes}))


def _unrecognised(checkpoint: Checkpoint) -> ValueError:
    if any(".lora_" in name or "lora_down" in name for name in checkpoint):
        return ValueError(f"{checkpoint.path} must be a model, got a LoRA, which goes into one")
    sizes = ", ".join(name for family in families() for name in family.configs)
    return ValueError(
        f"{checkpoint.path} must carry its configuration (the metadata key {METADATA_KEY!r}, "
        f"written by fastdiff.models.save) or have the shapes of one of {sizes}, got neither"
    )
