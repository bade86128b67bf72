"""Tiny U-Nets and ControlNets with the same weights here and in diffusers; public config.json."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from formulas import fill
from torch import Tensor, nn

from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.layouts import controlnet as controlnet_layout
from fastdiff.checkpoints.layouts import unet as unet_layout

UNET, CONTROL = unet_layout.FAMILY, controlnet_layout.FAMILY

TINY: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "norm_num_groups": 8,
}
TINY_UNET = {**TINY, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
TINY_CONTROL = {**TINY, "conditioning_embedding_out_channels": (4, 8)}

_LINEAR = {"use_linear_projection": True}
_SD2 = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, **_LINEAR}
_XL_DOWN = {
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "class_embed_type": None,
    "num_class_embeds": None,
    "upcast_attention": None,
    **_LINEAR,
}
_XL = {
    **_XL_DOWN,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "sample_size": 128,
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "mid_block_only_cross_attention": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "attention_type": "default",
}
_SD1 = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "sample_size": 64,
}
_REFINER = {
    **_XL,
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
}
_X4 = {
    "in_channels": 7,
    "attention_head_dim": 8,
    "block_out_channels": [256, 512, 512, 1024],
    "cross_attention_dim": 1024,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "num_class_embeds": 1000,
    "only_cross_attention": [True, True, True, False],
    "sample_size": 128,
    **_LINEAR,
}
# What the config.json of the public folders says, where it is not diffusers' default.
FOLDERS: dict[str, dict[str, Any]] = {
    "sd1": _SD1,
    "sd1-inpainting": {**_SD1, "in_channels": 9},
    "sd2": {**_SD1, **_SD2, "sample_size": 96, "upcast_attention": True},
    "sd2-inpainting": {**_SD1, **_SD2, "in_channels": 9, "dual_cross_attention": False},
    "sd-x4-upscaler": _X4,
    "sdxl": _XL,
    "sdxl-inpainting": {**_XL, "in_channels": 9},
    "sdxl-refiner": _REFINER,
    "lcm-sd1": {**_SD1, "time_cond_proj_dim": 256},
    "lcm-sdxl": {**_XL, "time_cond_proj_dim": 256},
}
CONTROL_FOLDERS = {
    "controlnet-sd1": {"cross_attention_dim": 768, "controlnet_conditioning_channel_order": "rgb"},
    "controlnet-sd2": {**_SD2, "conditioning_embedding_out_channels": [16, 32, 96, 256]},
    "controlnet-sdxl": {**_XL_DOWN, "global_pool_conditions": False},
}


def theirs(family: Family, settings: Mapping[str, Any]) -> Any:
    return getattr(diffusers, family.classes[0])(**settings)


def pair(family: Family, settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """(ours, diffusers') with the same weights, float32, read through the layout."""
    other = fill(theirs(family, settings))
    config = family.from_diffusers(dict(other.config))
    model = family.build(config).eval().requires_grad_(False)
    model.load_state_dict(read(family, config, other.state_dict()))
    return model, other


def read(family: Family, config: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict from diffusers'; KeyError for a name that is not there."""
    with torch.device("meta"):
        shapes = {name: tuple(v.shape) for name, v in family.build(config).state_dict().items()}
    layout = family.diffusers(config)
    return {
        name: layout[name].read([state[key] for key in layout[name].keys], shape)
        for name, shape in shapes.items()
    }


def single_file(family: Family, model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ours as an official single file names it. Neither names nor shapes of such
    a file tell groups and heads; with 32 groups and 8 heads a tiny model is recognised."""
    return {family.prefixes[0] + name: value for name, value in model.state_dict().items()}


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A copy of a module, or a tensor or nest of them, with its floating-point numbers in dtype."""
    if isinstance(value, nn.Module):
        # Not ``to`` of diffusers' class, which warns.
        return nn.Module.to(copy.deepcopy(value), dtype)
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: as_dtype(each, dtype) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_dtype(each, dtype) for each in value]
    return value
