"""From the components of a checkpoint to its pipeline."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdiff.checkpoints.detect import Description
from fastdiff.checkpoints.header import read_json
from fastdiff.models.dit import DiT
from fastdiff.models.flux import Flux
from fastdiff.models.mmdit import MMDiT
from fastdiff.models.unet import UNet
from fastdiff.pipelines.pipeline import Defaults, Pipeline
from fastdiff.pipelines.prompts import (
    ClassLabels,
    Conditioner,
    FluxText,
    StableDiffusion3Text,
    StableDiffusionText,
    StableDiffusionXLText,
    TextEncoder,
    Unconditional,
)
from fastdiff.pipelines.recipes import DISTILLED, Recipe, from_scheduler
from fastdiff.solvers.continuous import Flow
from fastdiff.solvers.named import get_schedule

DENOISERS = ("unet", "transformer", "model")
# The repositories that hold the tokenizers of single files, which have none, by the folder's name.
TOKENIZERS = {
    "tokenizer": "openai/clip-vit-large-patch14",
    "tokenizer_2": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "tokenizer_3": "google/t5-v1_1-xxl",
}
# T5's windows: what the models were trained with.
T5_TOKENS = {MMDiT: 256, Flux: 512}
FLUX_DYNAMIC = {"base_tokens": 256, "max_tokens": 4096, "base_shift": 0.5, "max_shift": 1.15}


def assemble(
    components: Mapping[str, Any],
    found: Description,
    *,
    tokenizers: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """The pipeline of a checkpoint's components, by the names of diffusers' folders.

    tokenizers: a folder with the folders tokenizer, tokenizer_2, tokenizer_3 (or itself the only
        tokenizer); default the checkpoint's own, and for a single file, which has none, the hub's
        cache. Where a tokenizer is missing the pipeline takes ``cond`` and not prompts, and says
        which one when it is given a prompt.

    Raises ValueError for components that make no pipeline here.
    """
    denoiser = next((components[name] for name in DENOISERS if name in components), None)
    if not isinstance(denoiser, (UNet, MMDiT, Flux, DiT)):
        kind = "no denoiser" if denoiser is None else type(denoiser).__name__
        raise ValueError(
            f"{found.path} must hold a U-Net, DiT, SD3 or FLUX transformer for a pipeline, "
            f"got {kind} in {', '.join(components)}; component= loads one part"
        )
    autoencoder = components.get("vae")
    recipe = _recipe(denoiser, found, latent=autoencoder is not None)
    encoders, missing = _encoders(components, found, denoiser, tokenizers)
    conditioner = None if missing else _conditioner(denoiser, encoders, found)
    return Pipeline(
        denoiser,
        autoencoder,
        conditioner,
        recipe,
        _defaults(denoiser, autoencoder, recipe, found),
        name=str(found.path),
        missing=missing,
        controlnets=[v for k, v in components.items() if k.startswith("controlnet")],
    )


def _recipe(denoiser: Any, found: Description, latent: bool) -> Recipe:
    if found.scheduler:
        recipe = from_scheduler(found.scheduler)
        if latent:  # a configuration that says nothing means clipping, which is for pixels
            recipe = replace(recipe, hooks=())
        if isinstance(denoiser, UNet) and denoiser.config.vector_dim is None and latent:
            recipe = replace(recipe, steps_offset=1)  # as diffusers' pipelines correct it
    elif isinstance(denoiser, (MMDiT, Flux)):
        recipe = Recipe(Flow(shift=3.0 if isinstance(denoiser, MMDiT) else 1.0), "flow", "euler")
        recipe = replace(recipe, warp="sd3")
        if isinstance(denoiser, Flux) and denoiser.config.guidance:
            recipe = replace(recipe, dynamic=FLUX_DYNAMIC)
    else:
        sampling = denoiser.sampling
        # Stable Diffusion's own grids of whole timesteps begin at 1.
        offset = int(getattr(denoiser.config, "context_dim", None) is not None)
        schedule = get_schedule(sampling.schedule)
        recipe = Recipe(schedule, sampling.prediction, steps_offset=offset)
    return replace(recipe, warp="flux") if isinstance(denoiser, Flux) else recipe


def _encoders(
    components: Mapping[str, Any],
    found: Description,
    denoiser: Any,
    tokenizers: str | os.PathLike[str] | None,
) -> tuple[dict[str, TextEncoder], str]:
    """The text encoders with their tokenizers, and what is missing for prompts, or ""."""
    made: dict[str, TextEncoder] = {}
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        if name not in components:
            continue
        encoder = components[name]
        folder = name.replace("text_encoder", "tokenizer")
        t5 = type(encoder).__name__.startswith("T5")
        tokenizer = _tokenizer(folder, t5, found, tokenizers, encoder.config.vocab_size)
        if isinstance(tokenizer, str):
            return {}, tokenizer
        length = T5_TOKENS.get(type(denoiser), 256) if t5 else None
        made[name] = TextEncoder(encoder, tokenizer, length)
    needed = {UNet: 1, MMDiT: 2, Flux: 2}.get(type(denoiser), 0)
    if isinstance(denoiser, UNet) and denoiser.config.context_dim is None:
        needed = 0
    if len(made) < needed:
        return {}, f"{needed} text encoders, of which {found.path} holds {len(made)}"
    return made, ""


def _tokenizer(
    name: str,
    t5: bool,
    found: Description,
    tokenizers: str | os.PathLike[str] | None,
    vocabulary: int,
) -> Any:
    """A tokenizer of transformers, or in words what is missing.

    transformers makes one of two tokens where it finds no files, and says nothing; so it must have
    at least half of the encoder's vocabulary, and no more than all of it.
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        return "transformers (pip install transformers)"
    place: str | Path | None = found.others.get(name)
    if tokenizers is not None:
        inner = Path(tokenizers) / name
        place = inner if inner.is_dir() else Path(tokenizers)
        if not place.is_dir():
            raise ValueError(f"tokenizers must be a folder, got {str(tokenizers)!r}")
    kind = transformers.AutoTokenizer if t5 else transformers.CLIPTokenizer
    if place is not None:
        try:
            made = kind.from_pretrained(place, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(f"{place} must hold a tokenizer, got none ({first})") from error
        if not vocabulary / 2 <= len(made) <= vocabulary:
            raise ValueError(
                f"{place} must hold the tokenizer of a text encoder of {vocabulary} tokens, "
                f"got one of {len(made)}"
            )
        return made
    repository = TOKENIZERS["tokenizer_3" if t5 else name]
    try:
        made = kind.from_pretrained(repository, local_files_only=True)
    except (OSError, ValueError):
        made = ()
    if vocabulary / 2 <= len(made) <= vocabulary:
        return made
    return (
        f"the tokenizer of {repository}: give load(tokenizers=) a folder with it, or download "
        "it into the hub's cache"
    )


def _conditioner(
    denoiser: Any, encoders: dict[str, TextEncoder], found: Description
) -> Conditioner:
    config = denoiser.config
    if isinstance(denoiser, DiT):
        return ClassLabels(config.num_classes, config.null_label)
    if isinstance(denoiser, MMDiT):
        return StableDiffusion3Text(encoders, width=config.context_size)
    if isinstance(denoiser, Flux):
        return FluxText(encoders)
    if config.context_dim is None:
        if config.num_classes is None:
            return Unconditional({})
        return ClassLabels(config.num_classes, None)
    if "text_encoder_2" not in encoders:
        return StableDiffusionText(encoders)
    refiner = bool(found.index.get("requires_aesthetics_score", "text_encoder" not in encoders))
    zeros = bool(found.index.get("force_zeros_for_empty_prompt", True))
    return StableDiffusionXLText(encoders, denoiser.vector, zeros=zeros, refiner=refiner)


def _defaults(denoiser: Any, autoencoder: Any, recipe: Recipe, found: Description) -> Defaults:
    factor = 1 if autoencoder is None else autoencoder.config.factor
    config = denoiser.config
    distilled = recipe.solver in DISTILLED
    solver = None if distilled or recipe.warp else "best_linear"
    side = _side(denoiser, autoencoder, found)
    size = (side, side)
    if isinstance(denoiser, Flux):
        dev = bool(config.guidance)
        scale, steps = (3.5, 28) if dev else (1.0, 4)
        return Defaults(size, 2 * factor, steps, scale, dev, solver)
    if isinstance(denoiser, MMDiT):
        return Defaults(size, config.patch_size * factor, 28, 7.0, False, solver)
    if isinstance(denoiser, DiT):
        return Defaults(size, side, 50, 4.0, False, solver)
    embedded = config.guidance_dim is not None
    if config.context_dim is None:
        return Defaults(size, factor, 50, 1.0, False, solver)
    steps = 4 if distilled else 20
    scale = 8.5 if embedded else 5.0 if config.vector_dim else 7.5
    return Defaults(size, factor, steps, scale, embedded, solver)


def _side(denoiser: Any, autoencoder: Any, found: Description) -> int:
    """Of the pictures that the weights are for, in pixels."""
    factor = 1 if autoencoder is None else autoencoder.config.factor
    if isinstance(denoiser, DiT):
        return int(denoiser.config.input_size * factor)
    if isinstance(denoiser, MMDiT):
        return int(denoiser.config.sample_size * factor)
    file = found.path / "unet" / "config.json"
    if found.kind == "pipeline" and file.exists():
        said = read_json(file, "a model's configuration").get("sample_size")
        if isinstance(said, int) and not isinstance(said, bool) and said > 0:
            return said * factor
    wide = isinstance(denoiser, Flux) or denoiser.config.vector_dim
    return 1024 if wide else 512
