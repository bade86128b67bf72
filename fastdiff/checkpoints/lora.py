"""LoRA: files of small changes to a model's weights, W + scale * (alpha / r) * up @ down.

``apply_lora`` adds them to the weights (fused in), or leaves the weights as they are and adds them
where the weights are read (see ``lora_live``). See ``lora_files`` for the names that are read.
"""

from __future__ import annotations

import itertools
import math
import os
import weakref
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import lora_live
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.layouts import families
from fastdiff.checkpoints.lora_files import TEXT_ENCODERS, Model, Patch, added, resolve

Models = nn.Module | Mapping[str, nn.Module]


@dataclass
class _Lora:
    """One that is in a model. live: (module, parameter, buffers' names) of each patch, if it is not
    fused; age: a later one's is larger."""

    scale: float
    patches: list[Patch]
    live: list[tuple[nn.Module, str, str]] | None
    age: int


@dataclass
class _State:
    """Of one model. originals: parameters as they were before the LoRAs younger than an age."""

    loras: dict[str, _Lora] = field(default_factory=dict)
    originals: dict[str, tuple[int, Tensor]] = field(default_factory=dict)


_STATES: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_ages = itertools.count()


def apply_lora(
    model: Models,
    file: str | os.PathLike[str] | Mapping[str, Tensor],
    scale: float = 1.0,
    *,
    family: Family | Mapping[str, Family] | None = None,
    name: str | None = None,
    fused: bool = True,
    keep_originals: bool = False,
    skip: Collection[str] = (),
) -> str:
    """Applies a LoRA file to a model of the zoo or a text encoder, or to several; returns its name.

    model: a module, or modules by their names in a pipeline: "unet" or "transformer",
        "text_encoder", "text_encoder_2", "text_encoder_3".
    file: a .safetensors file, or its tensors by name.
    scale: 1 is as trained; 0 nothing; any finite number.
    family: of the model (or of each, by name); default: found by the module's class.
    name: what ``remove_lora`` and ``set_lora_scale`` call it; default the file's name without its
        ending, with a number where that is taken.
    fused: adds to the weights in place, once, computed in float32 and rounded to their dtype. Not
        fused: the weights stay; the same sum is computed whenever they are read. In eager mode that
        costs each call; after ``fastdiff.compile`` only the first one and those after a change of
        the scale, and the memory of the changed weights.
    keep_originals: copies the weights before they are changed, so that ``remove_lora`` gives back
        their bits; without it they come back within rounding. For fused ones.
    skip: names of models for which the file may have tensors that are left out.

    ValueError listing every tensor that matches nothing (with the nearest names), does not fit or
    is for a model that is neither given nor skipped; nothing is changed then. A deepcopy of a model
    has its weights, and does not know of its LoRAs.
    """
    _check_scale(scale)
    models = _models(model, family)
    name = _free_name(models, file, name)
    patches = resolve(file, models, frozenset(skip))
    for each in models:
        _check_weights(each, patches[each.name])
    done: list[tuple[nn.Module, _Lora]] = []
    try:
        for each in models:
            if patches[each.name]:
                lora = _Lora(float(scale), [], None if fused else [], next(_ages))
                done.append((each.module, lora))
                if fused and keep_originals:
                    _keep(each.module, patches[each.name], lora.age)
                _apply(each.module, lora, patches[each.name])
    except BaseException:
        for module, lora in reversed(done):
            _take_back(module, lora)
        raise
    for module, lora in done:
        _state(module).loras[name] = lora
    return name


def remove_lora(model: Models, name: str) -> None:
    """Takes a LoRA out again: the bits of before where originals were kept (or it was not fused),
    else within the rounding of the weights. ValueError for an unknown name."""
    for module in _with(model, name):
        lora = _state(module).loras.pop(name)
        _take_back(module, lora)


def set_lora_scale(model: Models, name: str, scale: float) -> None:
    """Another scale. Of one that is not fused, no weight is touched."""
    _check_scale(scale)
    for module in _with(model, name):
        state = _state(module)
        lora = state.loras[name]
        before, lora.scale = lora.scale, float(scale)
        if lora.live is None:
            for patch in lora.patches:
                parameter = own(module, patch.parameter)
                age, original = state.originals.get(patch.parameter, (0, None))
                if original is not None and lora.age >= age:
                    _restore(parameter, patch.parameter, state)
                    continue
                for tensor in (parameter, original):
                    if tensor is not None:
                        _shift(tensor, patch, scale - before)
        else:
            for (owner, _, buffers), patch in zip(lora.live, lora.patches, strict=True):
                strength = owner.get_buffer(f"{buffers}_strength")
                with torch.inference_mode(strength.is_inference()):
                    strength.fill_(scale * patch.ratio)


def loras(model: Models) -> dict[str, float]:
    """The LoRAs of a model and their scales, in the order in which they came."""
    modules = model.values() if isinstance(model, Mapping) else (model,)
    found: dict[str, float] = {}
    for module in modules:
        found |= {name: lora.scale for name, lora in _state(module).loras.items()}
    return found


def _apply(module: nn.Module, lora: _Lora, patches: Iterable[Patch]) -> None:
    for patch in patches:
        if lora.live is None:
            _shift(own(module, patch.parameter), patch, lora.scale)
        else:
            path, _, parameter = patch.parameter.rpartition(".")
            owner, strength = module.get_submodule(path), lora.scale * patch.ratio
            buffers = lora_live.add(owner, parameter, lora.age, patch, strength)
            lora.live.append((owner, parameter, buffers))
        lora.patches.append(patch)


def _take_back(module: nn.Module, lora: _Lora) -> None:
    """Undoes what ``_apply`` did, all of it or as far as it came; the state holds the others."""
    if lora.live is not None:
        for owner, name, buffers in reversed(lora.live):
            lora_live.drop(owner, name, buffers)
        return
    state = _state(module)
    restored = set()
    for patch in reversed(lora.patches):
        if patch.parameter in restored:
            continue
        parameter = own(module, patch.parameter)
        age, original = state.originals.get(patch.parameter, (0, None))
        if original is None or lora.age < age:
            _shift(parameter, patch, -lora.scale)
            if original is not None:
                _shift(original, patch, -lora.scale)
        else:
            restored.add(patch.parameter)
            _restore(parameter, patch.parameter, state)


def _restore(parameter: Tensor, name: str, state: _State) -> None:
    """The original, and what else was added to it since, in order."""
    age, original = state.originals[name]
    with torch.no_grad(), torch.inference_mode(parameter.is_inference()):
        parameter.detach().copy_(original)
    since = [x for x in state.loras.values() if x.live is None and x.age >= age]
    later = [(x, p) for x in since for p in x.patches if p.parameter == name]
    for lora, patch in later:
        _shift(parameter, patch, lora.scale)
    if not later:
        del state.originals[name]


def _keep(module: nn.Module, patches: Iterable[Patch], age: int) -> None:
    originals = _state(module).originals
    for name in {patch.parameter for patch in patches}:
        if name not in originals:
            originals[name] = age, own(module, name).detach().clone()


def _shift(parameter: Tensor, patch: Patch, scale: float) -> None:
    """Adds a patch in place."""
    with torch.no_grad(), torch.inference_mode(parameter.is_inference()):
        rows = parameter.detach().narrow(0, patch.first, patch.up.shape[0])
        strength = torch.tensor(scale * patch.ratio, dtype=torch.float64)
        rows.copy_(added(rows, patch.down, patch.up, strength))


def own(module: nn.Module, name: str) -> Tensor:
    """A parameter itself, whatever is added when it is read."""
    path, _, parameter = name.rpartition(".")
    value = module.get_submodule(path)._parameters[parameter]
    assert value is not None
    return value


def _state(module: nn.Module) -> _State:
    return _STATES.setdefault(module, _State())


def _with(model: Models, name: str) -> list[nn.Module]:
    modules = list(model.values()) if isinstance(model, Mapping) else [model]
    found = [module for module in modules if name in _state(module).loras]
    if not found:
        there = ", ".join(map(repr, loras(model))) or "none"
        raise ValueError(f"name must be one of the model's LoRAs ({there}), got {name!r}")
    return found


def _free_name(models: list[Model], file: Any, name: str | None) -> str:
    taken = {other for model in models for other in _state(model.module).loras}
    if name is not None:
        if name in taken:
            raise ValueError(f"name must be one that no LoRA of the model has, got {name!r}")
        return name
    stem = "lora" if isinstance(file, Mapping) else Path(file).stem
    numbered = (f"{stem}_{number}" for number in itertools.count(2))
    return next(free for free in itertools.chain([stem], numbered) if free not in taken)


def _models(model: Models, family: Family | Mapping[str, Family] | None) -> list[Model]:
    found = []
    for name, module in model.items() if isinstance(model, Mapping) else [("", model)]:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model must be a module or modules by name, got {module!r}")
        given = family.get(name) if isinstance(family, Mapping) else family
        kind = given or _family_of(module)
        text = type(module).__name__ in ("CLIPTextModel", "CLIPTextModelWithProjection")
        text = text or type(module).__name__ == "T5EncoderModel"
        if not name:
            name = TEXT_ENCODERS[0] if text else "unet" if kind.name == "unet" else "transformer"
        found.append(Model(name, module, kind, _config_of(module, kind)))
    denoisers = [each.name for each in found if not each.is_text]
    if len(denoisers) > 1 or not found:
        raise ValueError(
            f"model must have one denoiser at most, and {', '.join(TEXT_ENCODERS)}, "
            f"got {[each.name for each in found]}"
        )
    return found


def _family_of(module: nn.Module) -> Family:
    kind = type(module)
    for family in families():
        if isinstance(family.build, type) and isinstance(module, family.build):
            return family
    for family in families():
        if kind.__name__ in family.classes and kind.__module__.startswith("transformers."):
            return family
    raise ValueError(
        f"model must be a model of the zoo or a text encoder of transformers, got a "
        f"{kind.__module__}.{kind.__qualname__}: name its family"
    )


def _config_of(module: nn.Module, family: Family) -> Any:
    """The configuration: the zoo's own, or from transformers'."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "to_dict") or family.from_diffusers is None:
        return config
    return family.from_diffusers({**config.to_dict(), "architectures": [type(module).__name__]})


def _check_scale(scale: float) -> None:
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}")


def _check_weights(model: Model, patches: Iterable[Patch]) -> None:
    for name in {patch.parameter for patch in patches}:
        parameter = own(model.module, name)
        if parameter.is_meta or not parameter.is_floating_point() or parameter.itemsize < 2:
            raise ValueError(
                f"{name} must have floating-point values of two bytes or more to add to, got "
                f"{parameter.dtype} on {parameter.device}"
            )
