"""DiT: facebookresearch's names, and diffusers' DiTTransformer2DModel.

The public diffusers folders hold the official weights, unchanged, but diffusers spreads the
timestep's frequencies over 127 intervals instead of 128 and has an eps of 1e-5 in every second
norm. Its pipeline's pictures are those of that model, and what is trained with diffusers is trained
as that model, so a folder gives a configuration with ``frequency_shift=1``; a file in the official
layout is the paper's. ``dataclasses.replace(config, frequency_shift=0.0, mlp_norm_eps=1e-6)`` runs
a folder with official weights as the paper does. A folder written here for the paper's frequencies
says so in an entry ``frequency_shift`` of its ``config.json``, which diffusers ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdiff.checkpoints.family import Family, Layout, Shapes, Source
from fastdiff.checkpoints.layouts._entries import check_entries, count, layer
from fastdiff.models.dit import CONFIGS, DiT, DiTConfig

FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "attention_type": "default",
}
DIFFUSERS_SHIFT = 1.0


def diffusers(config: DiTConfig) -> Layout:
    """The embedders of time and label are repeated in every block; the position is computed."""
    blocks = [f"transformer_blocks.{i}" for i in range(config.depth)]
    embedders = [f"{block}.norm1.emb" for block in blocks]
    time = [f"{name}.timestep_embedder" for name in embedders]
    tables = tuple(f"{name}.class_embedder.embedding_table.weight" for name in embedders)
    found = {
        **layer("x_embedder.proj", "pos_embed.proj"),
        **layer("t_embedder.mlp.0", *(f"{name}.linear_1" for name in time)),
        **layer("t_embedder.mlp.2", *(f"{name}.linear_2" for name in time)),
        "y_embedder.embedding_table.weight": Source(tables),
        **layer("final_layer.adaLN_modulation.1", "proj_out_1"),
        **layer("final_layer.linear", "proj_out_2"),
    }
    for i, theirs in enumerate(blocks):
        ours, parts = f"blocks.{i}", [f"{theirs}.attn1.to_{part}" for part in "qkv"]
        found |= layer(f"{ours}.attn.qkv", *parts, how="rows", rows=[config.hidden_size] * 3)
        found |= layer(f"{ours}.attn.proj", f"{theirs}.attn1.to_out.0")
        found |= layer(f"{ours}.mlp.fc1", f"{theirs}.ff.net.0.proj")
        found |= layer(f"{ours}.mlp.fc2", f"{theirs}.ff.net.2")
        found |= layer(f"{ours}.adaLN_modulation.1", f"{theirs}.norm1.linear")
    return found


def from_diffusers(entries: Mapping[str, Any]) -> DiTConfig:
    """``num_embeds_ada_norm`` is the number of classes, ``sample_size`` the latent's side."""
    read = {
        *("sample_size", "patch_size", "in_channels", "out_channels", "num_layers"),
        *("num_attention_heads", "attention_head_dim", "num_embeds_ada_norm", "norm_eps"),
        *("frequency_shift", "dropout", "norm_num_groups"),
    }
    check_entries(entries, read, FIXED)
    heads = entries.get("num_attention_heads", 16)
    channels = entries.get("in_channels", 4)
    out = entries.get("out_channels") or channels
    if out not in (channels, 2 * channels):
        raise ValueError(f"out_channels must be {channels} or {2 * channels}, got {out}")
    return DiTConfig(
        input_size=entries.get("sample_size", 32),
        patch_size=entries.get("patch_size", 2),
        in_channels=channels,
        hidden_size=heads * entries.get("attention_head_dim", 72),
        depth=entries.get("num_layers", 28),
        num_heads=heads,
        num_classes=entries.get("num_embeds_ada_norm", 1000),
        learn_sigma=out == 2 * channels,
        frequency_shift=float(entries.get("frequency_shift", DIFFUSERS_SHIFT)),
        mlp_norm_eps=float(entries.get("norm_eps", 1e-5)),
    )


def to_diffusers(config: DiTConfig) -> dict[str, Any]:
    """ValueError for another ratio of the feed-forward than 4, which diffusers cannot have."""
    if config.mlp_ratio != 4:
        raise ValueError(f"mlp_ratio must be 4 in diffusers' layout, got {config.mlp_ratio}")
    entries = {
        "_class_name": "DiTTransformer2DModel",
        "sample_size": config.input_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.mlp_norm_eps,
        **{name: FIXED[name] for name in FIXED if name != "attention_type"},
    }
    if config.frequency_shift != DIFFUSERS_SHIFT:
        entries["frequency_shift"] = config.frequency_shift
    return entries


def recognise(shapes: Shapes) -> DiTConfig | None:
    """The public size of a file; 256 x 256 where it holds no position embedding."""
    patches = shapes.get("x_embedder.proj.weight", ())
    labels = shapes.get("y_embedder.embedding_table.weight", ())
    out = shapes.get("final_layer.linear.weight", ())
    if len(patches) != 4 or len(labels) != 2 or not out:
        return None
    depth, tokens = count(shapes, "blocks."), shapes.get("pos_embed", (1, 0))[1]
    for config in CONFIGS.values():
        theirs = (
            (config.hidden_size, config.in_channels, config.patch_size, config.patch_size),
            (config.num_classes + 1, config.hidden_size),
            config.patch_size**2 * config.out_channels,
            config.depth,
        )
        if theirs == (patches, labels, out[0], depth) and tokens in (0, config.num_tokens):
            return config
    return None


FAMILY = Family(
    name="dit",
    configs=CONFIGS,
    build=DiT,
    prefixes=("",),
    recognise=recognise,
    optional=frozenset({"pos_embed"}),
    classes=("DiTTransformer2DModel", "Transformer2DModel"),
    diffusers=diffusers,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    sampling={"schedule": "linear", "prediction": "eps", "guidance_scale": 4.0},
)
