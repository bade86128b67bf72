"""AutoencoderKL: LDM's single files (the module's own names) and diffusers' folders.

What a file's shapes do not tell is the latents' scale: SD1 and SDXL have the same tensors, and so
have SD3 and FLUX. ``recognise`` takes a file of 4 channels for SD1's and one of 16 for FLUX's (SD3
has no file of its own for it); where a denoiser is in the same file, its family knows better:
``dataclasses.replace(config, scaling=..., shift=..., force_upcast=..., sample_size=...)`` with the
values of ``CONFIGS``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastdiff.checkpoints.family import Family, Layout, Shapes, Source
from fastdiff.models.autoencoder import CONFIGS, AutoencoderConfig, AutoencoderKL

# LDM's name for a part, and diffusers'; in this order.
_PARTS = (
    (r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"\bup\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"\bup\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\bmid\.block_1\.", "mid_block.resnets.0."),
    (r"\bmid\.block_2\.", "mid_block.resnets.1."),
    (r"\bmid\.attn_1\.norm\.", "mid_block.attentions.0.group_norm."),
    (r"\bmid\.attn_1\.proj_out\.", "mid_block.attentions.0.to_out.0."),
    (r"\bmid\.attn_1\.([qkv])\.", r"mid_block.attentions.0.to_\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def diffusers(config: AutoencoderConfig) -> Layout:
    with torch.device("meta"):
        names = AutoencoderKL(config).state_dict()
    layout = {}
    for name in names:
        # The decoder's resolutions are counted from the coarsest there.
        theirs = re.sub(
            r"\bup\.(\d+)\.", lambda m: f"up.{len(config.widths) - 1 - int(m[1])}.", name
        )
        for pattern, part in _PARTS:
            theirs = re.sub(pattern, part, theirs)
        layout[name] = Source((theirs,), flat=".attentions." in theirs)
    return layout


def recognise(shapes: Shapes) -> AutoencoderConfig | None:
    try:
        if not any(name.startswith("encoder.down.") for name in shapes):
            return None
        widths, level = [], 0
        while (name := f"encoder.down.{level}.block.0.conv1.weight") in shapes:
            widths.append(shapes[name][0])
            level += 1
        depth = 0
        while f"encoder.down.0.block.{depth}.conv1.weight" in shapes:
            depth += 1
        channels = shapes["decoder.conv_in.weight"][1]
        return replace(
            CONFIGS["flux" if channels == 16 else "sd1"],
            in_channels=shapes["encoder.conv_in.weight"][1],
            out_channels=shapes["decoder.conv_out.weight"][0],
            latent_channels=channels,
            widths=tuple(widths),
            num_res_blocks=depth,
            mid_attention="encoder.mid.attn_1.q.weight" in shapes,
            quant_conv="quant_conv.weight" in shapes,
            post_quant_conv="post_quant_conv.weight" in shapes,
        )
    except (KeyError, IndexError, ValueError):
        return None


# Entries of config.json that are ours by another name.
_ENTRIES = {
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "latent_channels": "latent_channels",
    "layers_per_block": "num_res_blocks",
    "norm_num_groups": "num_groups",
    "mid_block_add_attention": "mid_attention",
    "use_quant_conv": "quant_conv",
    "use_post_quant_conv": "post_quant_conv",
    "scaling_factor": "scaling",
    "shift_factor": "shift",
    "sample_size": "sample_size",
    "force_upcast": "force_upcast",
}
# diffusers' defaults for what a config.json leaves out, where they are not ours. But force_upcast:
# it is True there, and of the pipelines SDXL's ask for it; SDXL's config.json has the entry.
_DEFAULTS = {
    "layers_per_block": 1,
    "sample_size": 32,
    "shift_factor": 0.0,
    "force_upcast": False,
    "block_out_channels": [64],
}


def from_diffusers(config: Mapping[str, Any]) -> AutoencoderConfig:
    given = {**_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    widths = tuple(given["block_out_channels"])
    for name, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        types = list(given.get(name, [block]))
        if types != [block] * len(widths):
            raise ValueError(f"{name} must be {len(widths)} times {block}, got {types}")
    if given.get("act_fn", "silu") not in ("silu", "swish"):
        raise ValueError(f"act_fn must be 'silu', got {given['act_fn']!r}")
    for name in ("latents_mean", "latents_std"):
        if name in given:
            raise ValueError(f"{name} must be absent (one scale for all channels), got a value")
    known = {*_ENTRIES, "block_out_channels", "down_block_types", "up_block_types", "act_fn"}
    for name, value in given.items():
        if name not in known and not name.startswith("_"):
            raise ValueError(f"{name} must be absent: unknown to this model, got {value!r}")
    fields = {ours: given[name] for name, ours in _ENTRIES.items() if name in given}
    try:
        return AutoencoderConfig(widths=widths, **fields)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from None


def to_diffusers(config: AutoencoderConfig) -> dict[str, Any]:
    levels = len(config.widths)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **{name: getattr(config, ours) for name, ours in _ENTRIES.items()},
    }


FAMILY = Family(
    name="autoencoder",
    configs=CONFIGS,
    build=AutoencoderKL,
    prefixes=("first_stage_model.", "vae."),
    recognise=recognise,
    classes=("AutoencoderKL",),
    diffusers=diffusers,
    older={"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"},
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
)
