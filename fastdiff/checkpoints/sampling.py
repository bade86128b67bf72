"""How to sample a loaded denoiser: its family's data, the configuration, the pipeline's scheduler.

The data of U-Nets is here: they are one family trained in many ways. Sources: the schedules of
CompVis/stable-diffusion and Stability-AI/generative-models' configurations; the run flags in the
READMEs of openai/guided-diffusion and openai/improved-diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fastdiff.checkpoints.family import Family
from fastdiff.models.weights import Sampling
from fastdiff.solvers.prediction import canonical

# Of guided- and improved-diffusion: the picture's side and the schedule.
_PIXELS = {
    "adm-64": (64, "cosine"),
    "adm-128": (128, "linear"),
    "adm-256": (256, "linear"),
    "adm-256-uncond": (256, "linear"),
    "adm-512": (512, "linear"),
    "adm-64-256-upsampler": (256, "linear"),
    "adm-128-512-upsampler": (512, "linear"),
    "improved-cifar10": (32, "cosine"),
    "improved-imagenet64": (64, "cosine"),
    "improved-imagenet64-cond": (64, "cosine"),
    "improved-64-256-upsampler": (256, "linear"),
    "improved-lsun": (256, "linear"),
}
SIDE = ("input_size", "sample_size", "img_resolution")


def sampling_of(
    family: Family, config: Any, scheduler: Mapping[str, Any], prediction: str | None = None
) -> Sampling:
    """A denoiser's Sampling; ``prediction`` and then the scheduler's entries come before the rest.

    scheduler: entries of scheduler_config.json. ValueError for an unknown prediction.
    """
    entries = dict(_unet(family, config)) if family.name == "unet" else family.sampling_of(config)
    if family.name in ("edm", "edm2"):
        entries = {"schedule": "edm", "prediction": "x0", "grid": "karras", **entries}
    side = next((getattr(config, name) for name in SIDE if hasattr(config, name)), None)
    channels = getattr(config, "in_channels", None) or getattr(config, "img_channels", None)
    if family.name == "flux":
        side, channels = 128, config.out_channels
    if "shape" not in entries and side is not None:
        frames = getattr(config, "frames", None)
        entries["shape"] = (channels, *([frames] if frames else []), side, side)
    entries.setdefault("num_classes", getattr(config, "num_classes", None) or 0)
    said = prediction or scheduler.get("prediction_type")
    if isinstance(said, str):
        entries["prediction"] = canonical(said)
    known = {field.name for field in fields(Sampling)}
    return Sampling(**{key: value for key, value in entries.items() if key in known})


def _unet(family: Family, config: Any) -> dict[str, Any]:
    name = family.config_name(config)
    if config.context_dim is None:
        side, schedule = _PIXELS.get(name or "", (64, "linear"))
        return {"schedule": schedule, "shape": (3, side, side)}
    side = 128 if config.vector_dim or name == "sd-x4-upscaler" else 64
    return {
        "schedule": "scaled_linear",
        "prediction": "v" if name == "sd-x4-upscaler" else "eps",
        "shape": (config.out_channels, side, side),
        "guidance_scale": 1.0 if config.guidance_dim else 7.5,
    }
