"""U-Nets: official single files (the module's own names) and diffusers' UNet2DConditionModel."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import torch

from fastdiff.checkpoints.family import Family, Layout, Shapes, Source
from fastdiff.models.unet import UNet
from fastdiff.models.unet_configs import CONFIGS, EncoderConfig, UNetConfig
from fastdiff.solvers.schedules import cosine, linear

C = TypeVar("C", bound=EncoderConfig)

# Neither names nor shapes tell these; a known model's come from the table.
UNSEEN = ("num_heads", "num_groups", "size_dim", "split_first")

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

# What diffusers takes where its config.json has no entry.
DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "projection_class_embeddings_input_dim": None,
}
# Entries with the one value the module has (diffusers' default, too), and those without meaning.
_FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}
_FREE = frozenset({"sample_size", "dropout", "upcast_attention", "addition_embed_type_num_heads"})


@functools.lru_cache(maxsize=32)
def parameter_names(build: type[torch.nn.Module], config: EncoderConfig) -> tuple[str, ...]:
    with torch.device("meta"):
        return tuple(build(config).state_dict())  # type: ignore[call-arg]


def block_prefixes(config: EncoderConfig, decoder: bool) -> dict[str, str]:
    """The layers of the blocks, "input_blocks.1.0" and so on, and what diffusers calls them."""
    count, levels = config.num_res_blocks, len(config.channels)
    named = {"input_blocks.0.0": "conv_in"}
    for number in range(1, levels * (count + 1)):
        level, place = divmod(number - 1, count + 1)
        ours, theirs = f"input_blocks.{number}", f"down_blocks.{level}"
        if place == count:
            named[f"{ours}.0.op"] = f"{theirs}.downsamplers.0.conv"
        else:
            named[f"{ours}.0"] = f"{theirs}.resnets.{place}"
            named[f"{ours}.1"] = f"{theirs}.attentions.{place}"
    for number, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        named[f"middle_block.{number}"] = f"mid_block.{name}"
    for number in range(levels * (count + 1) if decoder else 0):
        back, place = divmod(number, count + 1)
        attends = int(config.depths[levels - 1 - back] > 0)
        ours, theirs = f"output_blocks.{number}", f"up_blocks.{back}"
        named[f"{ours}.0"] = f"{theirs}.resnets.{place}"
        if attends:
            named[f"{ours}.1"] = f"{theirs}.attentions.{place}"
        if place == count:
            named[f"{ours}.{1 + attends}.conv"] = f"{theirs}.upsamplers.0.conv"
    return named


def top_prefixes(config: EncoderConfig) -> dict[str, str]:
    label = "add_embedding" if config.vector_dim else "class_embedding"
    return {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "time_embed.cond_proj": "time_embedding.cond_proj",
        "label_emb.0.0": f"{label}.linear_1",
        "label_emb.0.2": f"{label}.linear_2",
        "label_emb": label,
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }


def renamed(names: Sequence[str], prefixes: Mapping[str, str]) -> Layout:
    """Our names in diffusers' layout, by the longest prefix and the parts of a resblock."""
    layout = {}
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
        head = next(head for head in heads if head in prefixes)
        rest = name[len(head) + 1 :]
        part, _, kind = rest.rpartition(".")
        rest = f"{_RESNET[part]}.{kind}" if part in _RESNET else rest
        layout[name] = Source((f"{prefixes[head]}.{rest}",))
    return layout


def diffusers(config: UNetConfig) -> Layout:
    refuse_official(config)
    prefixes = top_prefixes(config) | block_prefixes(config, decoder=True)
    return renamed(parameter_names(UNet, config), prefixes)


def refuse_official(config: EncoderConfig) -> None:
    """ValueError for what UNet2DConditionModel is not."""
    if config.context_dim is None or config.resblock_updown or config.model_channels is not None:
        raise ValueError(
            "config must be one of a model with text for diffusers' layout, got AttentionBlocks "
            f"or an own width of the time: {config}"
        )


def encoder_fields(given: Mapping[str, Any], extra: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of an EncoderConfig from a config.json; ValueError names what does not fit.

    extra: entries that the caller reads.
    """
    entry = {**DEFAULTS, **given}
    for name, value in given.items():
        known = name in DEFAULTS or name in _FREE or name in extra or name.startswith("_")
        if not known and (name not in _FIXED or value != _FIXED[name]):
            right = repr(_FIXED[name]) if name in _FIXED else "absent"
            raise ValueError(f"{name} must be {right} in a U-Net's config.json, got {value!r}")
    levels = len(entry["block_out_channels"])

    def spread(name: str) -> tuple[Any, ...]:
        value = entry[name]
        return tuple(value) if isinstance(value, (list, tuple)) else (value,) * levels

    def refuse(name: str, rule: str) -> None:
        raise ValueError(f"{name} must {rule}, got {entry[name]!r}")

    layers, contexts = spread("layers_per_block"), spread("cross_attention_dim")
    for name, values in (("layers_per_block", layers), ("cross_attention_dim", contexts)):
        if len(set(values)) != 1:
            refuse(name, "be the same in all levels")
    depths = spread("transformer_layers_per_block")
    if not all(isinstance(depth, int) for depth in depths):
        refuse("transformer_layers_per_block", "be an integer for each level")
    if entry["num_attention_heads"] is not None:
        refuse("num_attention_heads", "be None (attention_head_dim names the heads)")
    kinds = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    if any(kind not in kinds for kind in entry["down_block_types"]):
        refuse("down_block_types", f"be of {sorted(kinds)}")
    attends = [kinds[kind] for kind in entry["down_block_types"]]
    middles = {"UNetMidBlock2DCrossAttn": depths[-1], "UNetMidBlock2D": 0}
    if entry["mid_block_type"] not in middles:
        refuse("mid_block_type", f"be one of {sorted(middles)}")
    if entry["resnet_time_scale_shift"] not in ("default", "scale_shift"):
        refuse("resnet_time_scale_shift", "be 'default' or 'scale_shift'")
    if entry["addition_embed_type"] not in (None, "text_time"):
        refuse("addition_embed_type", "be None or 'text_time'")
    if entry["class_embed_type"] is not None:
        refuse("class_embed_type", "be None")
    sized = entry["addition_embed_type"] == "text_time"
    cross = spread("only_cross_attention")
    return {
        "in_channels": entry["in_channels"],
        "channels": tuple(entry["block_out_channels"]),
        "num_res_blocks": layers[0],
        "depths": tuple(d if here else 0 for d, here in zip(depths, attends, strict=True)),
        "middle_depth": middles[entry["mid_block_type"]],
        "num_heads": spread("attention_head_dim"),
        "context_dim": contexts[0],
        "cross_only": tuple(n for n in range(levels) if cross[n] and attends[n]),
        "linear_projections": bool(entry["use_linear_projection"]),
        "num_classes": entry["num_class_embeds"],
        "vector_dim": entry["projection_class_embeddings_input_dim"] if sized else None,
        "size_dim": entry["addition_time_embed_dim"] or EncoderConfig.size_dim,
        "guidance_dim": entry["time_cond_proj_dim"],
        "num_groups": entry["norm_num_groups"],
        "scale_shift": entry["resnet_time_scale_shift"] == "scale_shift",
    }


def from_diffusers(given: Mapping[str, Any]) -> UNetConfig:
    shared = encoder_fields(given)
    up = given.get("up_block_types", DEFAULTS["up_block_types"])
    right = [f"{'CrossAttn' if depth else ''}UpBlock2D" for depth in reversed(shared["depths"])]
    if list(up) != right:
        raise ValueError(f"up_block_types must mirror down_block_types, {right}, got {up!r}")
    return UNetConfig(**shared, out_channels=given.get("out_channels", DEFAULTS["out_channels"]))


def encoder_entries(config: EncoderConfig) -> dict[str, Any]:
    """The entries of a config.json that a U-Net and a ControlNet share."""
    refuse_official(config)
    depths = [depth or 1 for depth in config.depths]
    if config.middle_depth:
        if config.depths[-1] not in (0, config.middle_depth):
            raise ValueError(
                f"middle_depth must be the last level's {config.depths[-1]} in diffusers' layout, "
                f"got {config.middle_depth}"
            )
        depths[-1] = config.middle_depth
    cross = [level in config.cross_only for level in range(len(depths))]
    vector = config.vector_dim is not None
    return {
        "act_fn": "silu",
        "addition_embed_type": "text_time" if vector else None,
        "addition_time_embed_dim": config.size_dim if vector else None,
        "attention_head_dim": list(config.num_heads),
        "block_out_channels": list(config.channels),
        "cross_attention_dim": config.context_dim,
        "down_block_types": [
            "CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in config.depths
        ],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.middle_depth else "UNetMidBlock2D",
        "norm_eps": 1e-5,
        "norm_num_groups": config.num_groups,
        "num_class_embeds": config.num_classes,
        "only_cross_attention": cross if any(cross) else False,
        "projection_class_embeddings_input_dim": config.vector_dim,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "transformer_layers_per_block": depths,
        "use_linear_projection": config.linear_projections,
    }


def to_diffusers(config: UNetConfig) -> dict[str, Any]:
    up = ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(config.depths)]
    return {
        "_class_name": "UNet2DConditionModel",
        **encoder_entries(config),
        "out_channels": config.out_channels,
        "time_cond_proj_dim": config.guidance_dim,
        "up_block_types": up,
    }


def encoder_of(shapes: Shapes) -> dict[str, Any] | None:
    """The fields of an EncoderConfig that names and shapes tell; None if they are no U-Net's.

    A file that lacks some tensors is still recognised where others tell the same, so that the
    reader can name those. KeyError or IndexError where none does.
    """
    needed = ("time_embed.0", "input_blocks.0.0", "middle_block.0.in_layers.2")
    if any(f"{name}.weight" not in shapes for name in needed):
        return None

    def numbers(pattern: str) -> set[int]:
        found = (re.match(pattern, name) for name in shapes)
        return {int(match[1]) for match in found if match}

    blocks = len(numbers(r"input_blocks\.(\d+)\."))
    ups = numbers(r"output_blocks\.(\d+)\.[12]\.in_layers\.0\.weight")
    levels = 1 + (len(ups) or len(numbers(r"input_blocks\.(\d+)\.0\.op\.weight")))
    count, odd = divmod(blocks - levels, levels)
    if odd or count < 1:
        return None

    def depth(place: str) -> int:
        if f"{place}.qkv.weight" in shapes:
            return 1
        return len(numbers(rf"{re.escape(place)}\.transformer_blocks\.(\d+)\."))

    def shape(place: str, *names: str) -> tuple[int, ...]:
        """Of the first of the tensors that is there."""
        return next(iter(shapes[f"{place}.{n}"] for n in names if f"{place}.{n}" in shapes), ())

    firsts = [f"input_blocks.{1 + level * (count + 1)}" for level in range(levels)]
    widths = ("out_layers.3.weight", "out_layers.3.bias", "in_layers.2.weight", "in_layers.2.bias")
    channels = tuple(shape(f"{first}.0", *widths)[0] for first in firsts)
    depths = tuple(depth(f"{first}.1") for first in firsts)
    places = [f"{first}.1" for first in firsts] + ["middle_block.1"]
    keys = ("attn2.to_k.weight", "attn2.to_v.weight")
    with_text = [(p, found) for p in places if (found := shape(f"{p}.transformer_blocks.0", *keys))]
    context_dim, linear, cross = None, False, []
    if with_text:
        context_dim = with_text[0][1][1]
        linear = len(shape(with_text[0][0], "proj_in.weight", "proj_out.weight")) == 2
        for level, place in enumerate(places[:-1]):
            key = shape(f"{place}.transformer_blocks.0.attn1", "to_k.weight", "to_v.weight")
            if key and key[1] != channels[level] and key[1] == context_dim:
                cross.append(level)
    embed = shape("middle_block.0.emb_layers.1", "bias", "weight")
    vector, guided = shapes.get("label_emb.0.0.weight"), shapes.get("time_embed.cond_proj.weight")
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "channels": channels,
        "model_channels": shapes["time_embed.0.weight"][1],
        "num_res_blocks": count,
        "depths": depths,
        "middle_depth": depth("middle_block.1"),
        "context_dim": context_dim,
        "cross_only": tuple(cross),
        "linear_projections": linear,
        "num_classes": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
        "vector_dim": vector[1] if vector else None,
        "guidance_dim": guided[1] if guided else None,
        "scale_shift": embed[0] == 2 * channels[-1],
        "resblock_updown": bool(ups),
    }


def completed(seen: C, table: Mapping[str, C]) -> C:
    """``seen`` with what names and shapes do not tell: from the model of the table that is like it
    otherwise, else what the official code takes by default."""
    told = [field.name for field in fields(seen) if field.name not in UNSEEN]
    alike = (
        known
        for known in table.values()
        if all(getattr(known, name) == getattr(seen, name) for name in told)
    )
    return next(alike, seen)


def guessed(told: Mapping[str, Any]) -> dict[str, Any]:
    """Groups: 32, or the most that the widths allow. Heads: of 64 features with linear projections
    or AttentionBlocks, else 8."""
    channels = told["channels"]
    groups = next(n for n in (32, 16, 8, 4, 2, 1) if not any(c % n for c in channels))
    wide = told["linear_projections"] or told["context_dim"] is None
    wide = wide and not any(width % 64 for width in channels)
    heads = [width // 64 if wide else 8 for width in channels]
    heads = [h if width % h == 0 else 1 for h, width in zip(heads, channels, strict=True)]
    return {"num_groups": groups, "num_heads": tuple(heads)}


def recognise(shapes: Shapes) -> UNetConfig | None:
    try:
        told = encoder_of(shapes)
        if told is None or "out.2.weight" not in shapes:
            return None
        out = shapes["out.2.weight"][0]
        return completed(UNetConfig(**told, **guessed(told), out_channels=out), CONFIGS)
    except (IndexError, KeyError, ValueError):  # shapes that no U-Net has
        return None


def sampling(config: UNetConfig) -> dict[str, Any]:
    """The schedule the public models were trained on, as their repositories' flags say.

    Stable Diffusion's for models with a text, ADM's for the others; improved-diffusion has 4,000
    steps (its linear betas are then a quarter), and the small models are on the cosine schedule.
    """
    if config.context_dim is not None:
        return {"schedule": "scaled_linear", "prediction": "eps", "guidance_scale": 7.5}
    name = FAMILY.config_name(config) or ""
    schedule: Any = "linear"
    if name in ("improved-cifar10", "improved-imagenet64", "improved-imagenet64-cond"):
        schedule = cosine(4000)
    elif name == "improved-64-256-upsampler":
        schedule = linear(4000, 2.5e-5, 0.005)
    elif name == "adm-64":
        schedule = "cosine"
    return {"schedule": schedule, "prediction": "eps"}


FAMILY = Family(
    name="unet",
    configs=CONFIGS,
    build=UNet,
    prefixes=("model.diffusion_model.", ""),
    recognise=recognise,
    classes=("UNet2DConditionModel",),
    diffusers=diffusers,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    sampling=sampling,
)
