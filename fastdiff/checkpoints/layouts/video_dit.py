"""Latte: diffusers' LatteTransformer3DModel, whose names are ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastdiff.checkpoints.family import Family, Layout, Shapes, Source
from fastdiff.checkpoints.layouts._entries import check_entries, count
from fastdiff.models.video_dit import CONFIGS, VideoDiT, VideoDiTConfig

FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
}
# diffusers' defaults of these are other ones; a folder without them has those.
DEFAULTS = {
    "activation_fn": "geglu",
    "attention_bias": False,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
}


def diffusers(config: VideoDiTConfig) -> Layout:
    with torch.device("meta"):
        return {name: Source((name,)) for name in VideoDiT(config).state_dict()}


def from_diffusers(entries: Mapping[str, Any]) -> VideoDiTConfig:
    read = {
        *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers", "norm_eps"),
        *("num_attention_heads", "attention_head_dim", "cross_attention_dim", "caption_channels"),
        *("video_length", "num_embeds_ada_norm", "dropout", "norm_num_groups"),
    }
    # The public folder still has entries of the class that diffusers' own was made from.
    check_entries({**DEFAULTS, **entries}, read, {**FIXED, "attention_type": "default"})
    for name in ("patch_size", "in_channels", "caption_channels"):
        if not entries.get(name):
            raise ValueError(f"{name} must be given, got {entries.get(name)!r}")
    heads = entries.get("num_attention_heads", 16)
    hidden = heads * entries.get("attention_head_dim", 88)
    if entries.get("cross_attention_dim") != hidden:
        raise ValueError(
            f"cross_attention_dim must be {hidden}, got {entries.get('cross_attention_dim')}"
        )
    return VideoDiTConfig(
        sample_size=entries.get("sample_size", 64),
        patch_size=entries["patch_size"],
        in_channels=entries["in_channels"],
        out_channels=entries.get("out_channels") or entries["in_channels"],
        hidden_size=hidden,
        depth=entries.get("num_layers", 1),
        num_heads=heads,
        context_size=entries["caption_channels"],
        frames=entries.get("video_length", 16),
        norm_eps=float(entries.get("norm_eps", 1e-5)),
    )


def to_diffusers(config: VideoDiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "LatteTransformer3DModel",
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.context_size,
        "video_length": config.frames,
        "num_embeds_ada_norm": 1000,
        "norm_eps": config.norm_eps,
        **FIXED,
    }


def recognise(shapes: Shapes) -> VideoDiTConfig | None:
    """A public configuration: frames, sides and heads are in no shape."""
    for config in CONFIGS.values():
        d = config.hidden_size
        theirs = {
            "pos_embed.proj.weight": (d, config.in_channels, config.patch_size, config.patch_size),
            "caption_projection.linear_1.weight": (d, config.context_size),
            "proj_out.weight": (config.patch_size**2 * config.out_channels, d),
        }
        depth = count(shapes, "temporal_transformer_blocks.")
        if depth == config.depth and theirs.items() <= dict(shapes).items():
            return config
    return None


FAMILY = Family(
    name="video_dit",
    configs=CONFIGS,
    build=VideoDiT,
    prefixes=("",),
    recognise=recognise,
    optional=frozenset({"pos_embed.pos_embed", "temp_pos_embed"}),
    classes=("LatteTransformer3DModel", "LatteT2V"),
    diffusers=diffusers,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    sampling={"schedule": "linear", "prediction": "eps", "guidance_scale": 7.5},
)
