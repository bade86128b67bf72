"""What a LoRA file (arXiv 2106.09685) changes, and in which of our parameters.

Three ways of naming are read, of kohya's scripts, of diffusers and PEFT, and of ComfyUI:

=====================================================  =====================================
``lora_unet_down_blocks_0_..._to_q.lora_down.weight``  kohya, diffusers' modules
``lora_unet_input_blocks_1_1_..._to_q.lora_up.weight`` kohya, the official modules
``unet.down_blocks.0...to_q.lora_A.weight``            diffusers and PEFT
``unet...attn1.processor.to_q_lora.down.weight``       older diffusers
``diffusion_model.double_blocks.0...lora_B.weight``    the official modules
=====================================================  =====================================

and ``lora_te_``, ``lora_te1_``, ``lora_te2_``, ``text_encoder.`` ... for text encoders. A module is
looked up in every layout of the model's family, so that what a file calls ``to_q`` is found in the
rows of a fused weight.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.family import Family, Source

METADATA_KEY = "lora_adapter_metadata"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# The beginning of a name, and whose it is; "" is the denoiser.
PREFIXES = (
    ("lora_unet_", ""),
    ("lora_transformer_", ""),
    ("lora_te1_", TEXT_ENCODERS[0]),
    ("lora_te2_", TEXT_ENCODERS[1]),
    ("lora_te3_", TEXT_ENCODERS[2]),
    ("lora_te_", TEXT_ENCODERS[0]),
    ("text_encoders.clip_l.transformer.", TEXT_ENCODERS[0]),
    ("text_encoders.clip_g.transformer.", TEXT_ENCODERS[1]),
    ("text_encoders.t5xxl.transformer.", TEXT_ENCODERS[2]),
    *((f"{name}.", name) for name in TEXT_ENCODERS),
    ("model.diffusion_model.", ""),
    ("diffusion_model.", ""),
    ("base_model.model.", ""),
    ("transformer.", ""),
    ("unet.", ""),
)
_FACTOR = re.compile(
    r"(?P<module>.+?)(?:\.lora_linear_layer\.|[._]lora[._])(?P<which>down|up|A|B)(?:\.\w+)?\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+?)(?:\.lora_linear_layer|[._]lora)?\.alpha")
HINTS = 20  # unknown names that get suggestions, in one error


@dataclass(frozen=True)
class Patch:
    """up @ down, times ``ratio`` and the scale, is added to rows of one parameter.

    parameter: its name. down: [r, columns], up: [rows, r], as they are in the file. first: the
    first of the rows. ratio: alpha / r.
    """

    parameter: str
    down: Tensor
    up: Tensor
    first: int = 0
    ratio: float = 1.0


def added(rows: Tensor, down: Tensor, up: Tensor, strength: Tensor) -> Tensor:
    """rows + strength * up @ down, in float32 or the wider dtype of ``rows``."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    down, up = (factor.to(rows.device, wide) for factor in (down, up))
    flat = rows.to(wide).flatten(1)
    return torch.addmm(flat, up * strength.to(up), down).view(rows.shape)


@dataclass(frozen=True)
class Place:
    """Where the weight of a file's module is: the rows from ``first`` on of our parameter, or, of
    how "part", the rows ``of`` the file's. shape: of the weight as the file has it."""

    parameter: str
    shape: tuple[int, ...]
    first: int = 0
    how: str = "same"
    of: tuple[int, int] = (0, 0)

    def patch(self, down: Tensor, up: Tensor, ratio: float) -> Patch:
        down, up = down.flatten(1), up.flatten(1)
        if self.how == "swap":
            up = torch.cat(up.chunk(2)[::-1])
        elif self.how == "part":
            up = up[slice(*self.of)]
        elif self.how == "transposed":
            down, up = up.t().contiguous(), down.t().contiguous()
        return Patch(self.parameter, down, up, self.first, ratio)


@dataclass(frozen=True)
class Model:
    """A model that a file is for: its name in a pipeline ("unet", "transformer", "text_encoder",
    ...), the module, its family and configuration."""

    name: str
    module: nn.Module
    family: Family
    config: Any

    @property
    def is_text(self) -> bool:
        return self.name in TEXT_ENCODERS

    def places(self) -> dict[str, tuple[str, list[Place]]]:
        """A module's name with "_" for every "." -> the name, and where its weight is."""
        state = dict(self.module.named_parameters())
        layouts: list[Mapping[str, Source]] = [{name: Source((name,)) for name in state}]
        for make in (self.family.official, self.family.diffusers):
            with contextlib.suppress(ValueError):  # a configuration without such a layout
                layouts += [] if make is None else [make(self.config)]
        found: dict[str, tuple[str, list[Place]]] = {}
        for layout in layouts:
            new: dict[str, tuple[str, list[Place]]] = {}
            for name, source in layout.items():
                if name in state and state[name].dim() >= 2:
                    for key, place in _places(name, source, tuple(state[name].shape)):
                        new.setdefault(key.replace(".", "_"), (key, []))[1].append(place)
            found = new | found
        if self.is_text:
            found = {f"text_model_{key}": value for key, value in found.items()} | found
        return found


def _places(parameter: str, source: Source, shape: tuple[int, ...]) -> Iterator[tuple[str, Place]]:
    """The modules of a file's layout that are in one parameter."""
    if source.how == "eye" or (source.how == "same" and len(source.keys) > 1):
        return  # in no file; or copies, of which a file may change each
    first = 0
    for key, theirs in zip(source.keys, source.shapes(shape), strict=True):
        place = Place(parameter, theirs, first, source.how, source.sizes[:2] or (0, 0))  # type: ignore[arg-type]
        if source.how == "rows":
            first += theirs[0]
        yield key.removesuffix(".weight"), place


def read(file: str | os.PathLike[str] | Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a safetensors file (or a mapping of them), and what its metadata says."""
    if isinstance(file, Mapping):
        return dict(file), {}
    from safetensors import SafetensorError, safe_open

    path = Path(file)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"file must be a .safetensors file, got {path.name!r}: others may run code when they "
            "are opened; convert it with safetensors.torch.save_file where you trust it"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            metadata = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"file must be a whole safetensors file, got {path}: {error}") from error


@dataclass
class _Module:
    """The tensors of one module of a file, by what they are, and their names there."""

    component: str
    name: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]


def resolve(
    file: str | os.PathLike[str] | Mapping[str, Tensor], models: list[Model], skip: frozenset[str]
) -> dict[str, list[Patch]]:
    """The patches for each model, by its name. ValueError listing everything that does not fit."""
    tensors, metadata = read(file)
    modules, problems = _group(tensors, models)
    places = {model.name: model.places() for model in models}
    known = {model.name: model for model in models}
    patches: dict[str, list[Patch]] = {model.name: [] for model in models}
    left_out: dict[str, int] = {}
    for module in modules:
        if module.component not in known:
            if module.component not in skip:
                left_out[module.component] = left_out.get(module.component, 0) + 1
            continue
        table = places[module.component]
        spelled = module.name.replace(".", "_")
        found = table.get(spelled) or table.get(f"{spelled}_0")  # older diffusers: to_out
        if found is None:
            hint = _nearest(module.name, table) if len(problems) < HINTS else ""
            problems += [f"{key} matches nothing{hint}" for key in module.keys.values()]
            continue
        wrong = _misfit(module, found[1][0].shape)
        if wrong:
            problems.append(wrong)
            continue
        ratio = _ratio(module, metadata)
        down, up = module.tensors["down"], module.tensors["up"]
        patches[module.component] += [place.patch(down, up, ratio) for place in found[1]]
    for component, count in left_out.items():
        given = ", ".join(known)
        problems.append(
            f"{count} modules of {component!r}, and the models given are {given}: give that one, "
            f"too ({{{component!r}: ...}}), or skip={{{component!r}}}"
        )
    if not problems and not any(patches.values()):
        problems.append("no tensor of the models given")
    if problems:
        listed = "\n  ".join(problems)
        where = "the LoRA" if isinstance(file, Mapping) else str(file)
        raise ValueError(f"{where} must fit the model, got {len(problems)} problems:\n  {listed}")
    return patches


def _group(tensors: Mapping[str, Tensor], models: list[Model]) -> tuple[list[_Module], list[str]]:
    """The tensors by module, and what is wrong with names."""
    found: dict[tuple[str, str], _Module] = {}
    problems = []
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key)
        alpha = None if match else _ALPHA.fullmatch(key)
        if match:
            which = {"A": "down", "B": "up"}.get(match["which"], match["which"])
        elif alpha:
            match, which = alpha, "alpha"
        else:
            problems.append(f"{key} is no LoRA's down, up or alpha (DoRA, LyCORIS: not read)")
            continue
        component, name = _component(match["module"], models)
        module = found.setdefault((component, name), _Module(component, name, {}, {}))
        module.tensors[which], module.keys[which] = tensor, key
    return list(found.values()), problems


def _component(module: str, models: list[Model]) -> tuple[str, str]:
    """Whose a module is, and its name without that."""
    denoiser = next((model.name for model in models if not model.is_text), None)
    name, component = module, models[0].name if len(models) == 1 else denoiser or "unet"
    for prefix, whose in PREFIXES:
        if module.startswith(prefix):
            name = module[len(prefix) :]
            if prefix != "base_model.model.":
                kind = "transformer" if "transformer" in prefix else "unet"
                component = whose or denoiser or kind
            break
    name = name.removeprefix("base_model.model.").replace(".processor.", ".")
    # FLUX's T5 is the second text encoder, SD3's the third.
    if component == TEXT_ENCODERS[2] and all(model.name != component for model in models):
        second = (model for model in models if model.name == TEXT_ENCODERS[1])
        component = next((m.name for m in second if m.family.name == "t5"), component)
    if component in TEXT_ENCODERS:
        name = re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return component, name


def _misfit(module: _Module, shape: tuple[int, ...]) -> str:
    """What is wrong with a module's tensors, or ""; shape: of its weight."""
    first = next(iter(module.keys.values()))
    lacking = [which for which in ("down", "up") if which not in module.tensors]
    if lacking:
        return f"{first} has no {' and no '.join(lacking)}"
    down, up = module.tensors["down"], module.tensors["up"]
    if not (down.is_floating_point() and up.is_floating_point()) or min(down.dim(), up.dim()) < 2:
        return f"{module.keys['down']} and {module.keys['up']} must be floating-point matrices"
    rank = down.shape[0]
    if rank == 0 or up.flatten(1).shape[1] != rank:
        return (
            f"{module.keys['up']} must have rank {rank} like {module.keys['down']}, "
            f"got {up.flatten(1).shape[1]}"
        )
    if down.flatten(1).shape[1] != math.prod(shape[1:]) or up.shape[0] != shape[0]:
        return (
            f"{module.keys['down']} {list(down.shape)} and up {list(up.shape)} must make a weight "
            f"of shape {list(shape)}"
        )
    alpha = module.tensors.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not math.isfinite(float(alpha))):
        return f"{module.keys['alpha']} must be one finite number, got {alpha}"
    return ""


def _ratio(module: _Module, metadata: Mapping[str, Any]) -> float:
    """alpha / r: of the file, else of the configuration that PEFT left in the metadata, else 1."""
    rank = module.tensors["down"].shape[0]
    if "alpha" in module.tensors:
        return float(module.tensors["alpha"]) / rank
    prefix = f"{module.component}."
    entries = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}
    alpha = entries.get("lora_alpha", rank)
    for pattern, value in (entries.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(?:.*\.)?{pattern}", module.name):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if entries.get("use_rslora") else rank)


def _nearest(name: str, table: Mapping[str, tuple[str, list[Place]]]) -> str:
    close = difflib.get_close_matches(name.replace(".", "_"), table, n=2, cutoff=0.5)
    names = dict.fromkeys(table[key][0] for key in close)
    return f" (did you mean {' or '.join(map(repr, names))}?)" if names else ""
