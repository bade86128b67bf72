"""Checkpoints of the public models' layout and size, with random weights: for tests, benchmarks and
trying a machine without downloading anything.

    python -m fastdiff.checkpoints.random sd15 --out weights --dtype bfloat16

writes ``weights/sd15.safetensors`` (the single file) and ``weights/sd15/`` (diffusers' folder) with
the same numbers, which are drawn so that signals keep their size on the way through a network.
"""

from __future__ import annotations

import argparse
import functools
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.convert import convert
from fastdiff.checkpoints.empty import build_empty
from fastdiff.checkpoints.family import Family, Layout, written
from fastdiff.checkpoints.layouts import families
from fastdiff.checkpoints.tokenizers import write_clip_tokenizer, write_t5_tokenizer
from fastdiff.checkpoints.writing import serialised, write_atomically

T5 = "T5"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Part:
    """One model of a pipeline: its folder, family and configuration, and the class a pipeline's
    index names."""

    folder: str
    family: str
    config: str
    prefix: str
    classes: tuple[str, str]


@dataclass(frozen=True)
class Pipe:
    """A pipeline's parts, its scheduler's configuration and its tokenizers by folder: what CLIP's
    pads with, or T5."""

    kind: str
    parts: tuple[Part, ...]
    scheduler: Mapping[str, Any]
    tokenizers: Mapping[str, str]


_UNET = ("diffusers", "UNet2DConditionModel")
_VAE = ("diffusers", "AutoencoderKL")
_CLIP = ("transformers", "CLIPTextModel")
_CLIP_PROJECTED = ("transformers", "CLIPTextModelWithProjection")
PIPELINES = {
    "sd15": Pipe(
        "StableDiffusionPipeline",
        (
            Part("unet", "unet", "sd1", "model.diffusion_model.", _UNET),
            Part("vae", "autoencoder", "sd1", "first_stage_model.", _VAE),
            Part("text_encoder", "clip", "clip-l", "cond_stage_model.transformer.", _CLIP),
        ),
        {"_class_name": "PNDMScheduler", "skip_prk_steps": True, **_BETAS},
        {"tokenizer": "<|endoftext|>"},
    ),
    "sdxl": Pipe(
        "StableDiffusionXLPipeline",
        (
            Part("unet", "unet", "sdxl", "model.diffusion_model.", _UNET),
            Part("vae", "autoencoder", "sdxl", "first_stage_model.", _VAE),
            Part("text_encoder", "clip", "clip-l", "conditioner.embedders.0.transformer.", _CLIP),
            Part(
                *("text_encoder_2", "openclip_g", "openclip-g", "conditioner.embedders.1.model."),
                _CLIP_PROJECTED,
            ),
        ),
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", **_BETAS},
        {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
    ),
    "sd3": Pipe(
        "StableDiffusion3Pipeline",
        (
            Part(
                *("transformer", "mmdit", "SD3-medium", "model.diffusion_model."),
                ("diffusers", "SD3Transformer2DModel"),
            ),
            Part("vae", "autoencoder", "sd3", "first_stage_model.", _VAE),
            Part(
                *("text_encoder", "clip_sd3_l", "clip-l-sd3", "text_encoders.clip_l.transformer."),
                _CLIP_PROJECTED,
            ),
            Part(
                *("text_encoder_2", "clip_sd3_g", "clip-g", "text_encoders.clip_g.transformer."),
                _CLIP_PROJECTED,
            ),
            Part(
                *("text_encoder_3", "t5", "t5-xxl", "text_encoders.t5xxl.transformer."),
                ("transformers", "T5EncoderModel"),
            ),
        ),
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"tokenizer": "<|endoftext|>", "tokenizer_2": "!", "tokenizer_3": T5},
    ),
}


def write_pipeline(
    name: str,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    configs: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Writes (the single file, diffusers' folder) of a pipeline of PIPELINES into ``folder``.

    configs: other configurations by the parts' folders, for small ones. Memory holds about one
    tensor at a time, and a text encoder. ValueError for an unknown name; OSError where it cannot
    write.
    """
    if name not in PIPELINES:
        raise ValueError(f"name must be one of {', '.join(PIPELINES)}, got {name!r}")
    pipe, target = PIPELINES[name], Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    single = target / f"{name}.safetensors"
    _write_single(single, pipe, dtype, seed, configs or {})
    place = target / name
    index: dict[str, Any] = {"_class_name": pipe.kind, "_diffusers_version": "0.35.0"}
    place.mkdir(exist_ok=True)
    for part in pipe.parts:
        convert(single, place / part.folder, component=part.folder)
        index[part.folder] = list(part.classes)
    for tokenizer, pad in pipe.tokenizers.items():
        if pad == T5:
            write_t5_tokenizer(place / tokenizer)
        else:
            write_clip_tokenizer(place / tokenizer, pad=pad)
        kind = "PreTrainedTokenizerFast" if pad == T5 else "CLIPTokenizer"
        index[tokenizer] = ["transformers", kind]
    (place / "scheduler").mkdir(exist_ok=True)
    scheduler = place / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(dict(pipe.scheduler), indent=2))
    index["scheduler"] = ["diffusers", pipe.scheduler["_class_name"]]
    if name == "sd15":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        index["requires_safety_checker"] = False
    (place / "model_index.json").write_text(json.dumps(index, indent=2))
    return single, place


def _family(name: str) -> Family:
    return next(family for family in families() if family.name == name)


def _write_single(
    path: Path, pipe: Pipe, dtype: torch.dtype, seed: int, configs: Mapping[str, Any]
) -> None:
    about: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    for part in pipe.parts:
        family = _family(part.family)
        config = configs.get(part.folder, family.configs[part.config])
        module = build_empty(family.build, config)
        layout = family.layout("official", config)
        state = {k: v for k, v in module.state_dict().items() if v.is_floating_point()}
        if layout is None:
            shapes = {name: tuple(value.shape) for name, value in state.items()}
            made = {name: partial(drawn, name, shape, seed) for name, shape in shapes.items()}
        else:
            blank = {name: torch.empty_like(state[name], device="meta") for name in layout}
            shapes = {name: tuple(v.shape) for name, v in written(layout, blank).items()}
            whole = functools.cache(partial(_in_layout, layout, blank, seed, dtype))
            made = {name: partial(_take, whole, name) for name in shapes}
        about |= {part.prefix + name: (dtype, shape) for name, shape in shapes.items()}
        makers |= {part.prefix + name: make for name, make in made.items()}

    def tensor(key: str) -> Tensor:
        return makers[key]().to(dtype).contiguous()

    write_atomically(path, serialised(about, tensor, {"format": "pt"}))


def _in_layout(
    layout: Layout, blank: Mapping[str, Tensor], seed: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    state = {name: drawn(name, value.shape, seed).to(dtype) for name, value in blank.items()}
    return written(layout, state)


def _take(whole: Callable[[], dict[str, Tensor]], name: str) -> Tensor:
    return whole()[name]


def drawn(name: str, shape: Sequence[int], seed: int = 0) -> Tensor:
    """The random float32 parameter of that name: the same for the same name, shape and seed."""
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    value = torch.randn(tuple(shape), generator=generator)
    if value.dim() > 1:
        return value * (0.7 * value[0].numel() ** -0.5)
    return 1 + 0.1 * value if name.endswith("weight") else 0.1 * value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m fastdiff.checkpoints.random")
    parser.add_argument("name", choices=sorted(PIPELINES))
    parser.add_argument("--out", default="weights", help="a folder (default %(default)s)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for path in write_pipeline(args.name, args.out, dtype=DTYPES[args.dtype], seed=args.seed):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
