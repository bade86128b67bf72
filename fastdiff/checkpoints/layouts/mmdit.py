"""Stable Diffusion 3 and 3.5: Stability's names, and diffusers' SD3Transformer2DModel.

diffusers has scale and shift of the last norms (the image's and the last text block's) the other
way round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastdiff.checkpoints.family import Family, Layout, Shapes, Source
from fastdiff.checkpoints.layouts._entries import check_entries, count, layer
from fastdiff.models.mmdit import CONFIGS, MMDiT, MMDiTConfig

HEAD_SIZE = 64  # of every public checkpoint; their names do not tell it without QK-norm


def _block(config: MMDiTConfig, i: int) -> Layout:
    last, dual = i == config.depth - 1, i in config.dual_blocks
    image, text, theirs = (
        f"joint_blocks.{i}.x_block",
        f"joint_blocks.{i}.context_block",
        f"transformer_blocks.{i}",
    )
    # (ours, theirs: q, k, v, projection, norms)
    attentions = [
        (f"{image}.attn", "attn", ("to_q", "to_k", "to_v"), "to_out.0", "norm_"),
        (
            f"{text}.attn",
            "attn",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "" if last else "to_add_out",
            "norm_added_",
        ),
    ]
    if dual:
        attentions.append((f"{image}.attn2", "attn2", *attentions[0][2:]))
    found: dict[str, Source] = {}
    for ours, name, parts, out, norm in attentions:
        qkv = [f"{theirs}.{name}.{part}" for part in parts]
        found |= layer(f"{ours}.qkv", *qkv, how="rows", rows=[config.hidden_size] * 3)
        if out:
            found |= layer(f"{ours}.proj", f"{theirs}.{name}.{out}")
        if config.qk_norm:
            for part in "qk":
                key = f"{theirs}.{name}.{norm}{part}.weight"
                found[f"{ours}.ln_{part}.weight"] = Source((key,))
    for ours, ff, norm in ((image, "ff", "norm1"), (text, "ff_context", "norm1_context")):
        ends = last and ours == text
        how = "swap" if ends else "same"
        found |= layer(f"{ours}.adaLN_modulation.1", f"{theirs}.{norm}.linear", how=how)
        if not ends:
            found |= layer(f"{ours}.mlp.fc1", f"{theirs}.{ff}.net.0.proj")
            found |= layer(f"{ours}.mlp.fc2", f"{theirs}.{ff}.net.2")
    return found


def diffusers(config: MMDiTConfig) -> Layout:
    found = {
        "pos_embed": Source(("pos_embed.pos_embed",)),
        **layer("x_embedder.proj", "pos_embed.proj"),
        **layer("context_embedder", "context_embedder"),
        **layer("final_layer.adaLN_modulation.1", "norm_out.linear", how="swap"),
        **layer("final_layer.linear", "proj_out"),
    }
    for ours, theirs in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        for number, name in ((0, "linear_1"), (2, "linear_2")):
            found |= layer(f"{ours}.mlp.{number}", f"time_text_embed.{theirs}.{name}")
    for i in range(config.depth):
        found |= _block(config, i)
    return found


def from_diffusers(entries: Mapping[str, Any]) -> MMDiTConfig:
    read = {
        *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers"),
        *("num_attention_heads", "attention_head_dim", "joint_attention_dim", "qk_norm"),
        *("caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size"),
        "dual_attention_layers",
    }
    check_entries(entries, read, {})
    heads = entries.get("num_attention_heads", 18)
    hidden = heads * entries.get("attention_head_dim", 64)
    channels = entries.get("in_channels", 16)
    for name, default, value in (
        ("out_channels", 16, channels),
        ("caption_projection_dim", 1152, hidden),
    ):
        if entries.get(name, default) not in (value, None):
            raise ValueError(f"{name} must be {value}, got {entries.get(name, default)}")
    if entries.get("qk_norm") not in (None, "rms_norm"):
        raise ValueError(f"qk_norm must be None or 'rms_norm', got {entries['qk_norm']!r}")
    return MMDiTConfig(
        sample_size=entries.get("sample_size", 128),
        patch_size=entries.get("patch_size", 2),
        in_channels=channels,
        hidden_size=hidden,
        depth=entries.get("num_layers", 18),
        num_heads=heads,
        context_size=entries.get("joint_attention_dim", 4096),
        pooled_size=entries.get("pooled_projection_dim", 2048),
        position_size=entries.get("pos_embed_max_size", 96),
        qk_norm=entries.get("qk_norm") is not None,
        dual_blocks=tuple(entries.get("dual_attention_layers") or ()),
    )


def to_diffusers(config: MMDiTConfig) -> dict[str, Any]:
    return {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "joint_attention_dim": config.context_size,
        "caption_projection_dim": config.hidden_size,
        "pooled_projection_dim": config.pooled_size,
        "pos_embed_max_size": config.position_size,
        "dual_attention_layers": list(config.dual_blocks),
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def recognise(shapes: Shapes) -> MMDiTConfig | None:
    names = ("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight")
    patches, context, pooled, table = (shapes.get(name, ()) for name in (*names, "pos_embed"))
    if [len(shape) for shape in (patches, context, pooled, table)] != [4, 2, 2, 3]:
        return None
    depth = count(shapes, "joint_blocks.")
    if not depth:
        return None
    norm = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight", ())
    second = "joint_blocks.{}.x_block.attn2.qkv.weight"
    return MMDiTConfig(
        patch_size=patches[2],
        in_channels=patches[1],
        hidden_size=patches[0],
        depth=depth,
        num_heads=patches[0] // (norm[0] if norm else HEAD_SIZE),
        context_size=context[1],
        pooled_size=pooled[1],
        position_size=math.isqrt(table[1]),
        qk_norm=bool(norm),
        dual_blocks=tuple(i for i in range(depth) if second.format(i) in shapes),
    )


FAMILY = Family(
    name="mmdit",
    configs=CONFIGS,
    build=MMDiT,
    prefixes=("model.diffusion_model.", ""),
    recognise=recognise,
    classes=("SD3Transformer2DModel",),
    diffusers=diffusers,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    sampling={"schedule": "flow", "prediction": "flow"},
)
