"""ControlNets: official single files (the module's own names) and diffusers' ControlNetModel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdiff.checkpoints.family import Family, Layout, Shapes
from fastdiff.checkpoints.layouts.unet import (
    block_prefixes,
    completed,
    encoder_entries,
    encoder_fields,
    encoder_of,
    guessed,
    parameter_names,
    refuse_official,
    renamed,
    top_prefixes,
)
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.unet_configs import CONTROLS, ControlNetConfig

_OWN = {
    "conditioning_channels": 3,
    "conditioning_embedding_out_channels": (16, 32, 96, 256),
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
}


def diffusers(config: ControlNetConfig) -> Layout:
    refuse_official(config)
    prefixes = top_prefixes(config) | block_prefixes(config, decoder=False)
    blocks = 2 * (len(config.hint_channels) - 1)
    hint = ["conv_in", *(f"blocks.{n}" for n in range(blocks)), "conv_out"]
    for number, name in enumerate(hint):
        prefixes[f"input_hint_block.{2 * number}"] = f"controlnet_cond_embedding.{name}"
    for number in range(len(config.channels) * (config.num_res_blocks + 1)):
        prefixes[f"zero_convs.{number}.0"] = f"controlnet_down_blocks.{number}"
    prefixes["middle_block_out.0"] = "controlnet_mid_block"
    return renamed(parameter_names(ControlNet, config), prefixes)


def from_diffusers(given: Mapping[str, Any]) -> ControlNetConfig:
    own = {**_OWN, **{name: given[name] for name in _OWN if name in given}}
    order = own["controlnet_conditioning_channel_order"]
    if order != "rgb":
        raise ValueError(f"controlnet_conditioning_channel_order must be 'rgb', got {order!r}")
    return ControlNetConfig(
        **encoder_fields(given, frozenset(_OWN)),
        hint_in=own["conditioning_channels"],
        hint_channels=tuple(own["conditioning_embedding_out_channels"]),
        global_pool=bool(own["global_pool_conditions"]),
    )


def to_diffusers(config: ControlNetConfig) -> dict[str, Any]:
    entries = encoder_entries(config)
    if config.guidance_dim is not None:
        raise ValueError(
            f"guidance_dim must be None in diffusers' layout of a ControlNet, "
            f"got {config.guidance_dim}"
        )
    return {
        "_class_name": "ControlNetModel",
        **entries,
        **_OWN,
        "conditioning_channels": config.hint_in,
        "conditioning_embedding_out_channels": list(config.hint_channels),
        "global_pool_conditions": config.global_pool,
    }


def recognise(shapes: Shapes) -> ControlNetConfig | None:
    try:
        told = encoder_of(shapes)
        if told is None or "input_hint_block.0.weight" not in shapes:
            return None
        outer, inner = shapes["input_hint_block.0.weight"][:2]
        # Every second layer halves; the last one gives the state's width.
        halving = (f"input_hint_block.{number}.weight" for number in range(4, 100, 4))
        widths = (outer, *(shapes[name][0] for name in halving if name in shapes))
        own: dict[str, Any] = {"hint_in": inner, "hint_channels": widths}
        return completed(ControlNetConfig(**told, **guessed(told), **own), CONTROLS)
    except (IndexError, KeyError, ValueError):  # shapes that no ControlNet has
        return None


FAMILY = Family(
    name="controlnet",
    configs=CONTROLS,
    build=ControlNet,
    prefixes=("control_model.", ""),
    recognise=recognise,
    classes=("ControlNetModel",),
    diffusers=diffusers,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
)
