"""FLUX.1: Black Forest Labs' names, and diffusers' FluxTransformer2DModel.

diffusers has scale and shift of the last norm the other way round, and counts channels of packed
2 x 2 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastdiff.checkpoints.family import Family, Layout, Shapes, Source
from fastdiff.checkpoints.layouts._entries import check_entries, count, layer
from fastdiff.models.flux import CONFIGS, PATCH, Flux, FluxConfig

PACKED = PATCH**2


def _double(i: int, d: int) -> Layout:
    ours, theirs = f"double_blocks.{i}", f"transformer_blocks.{i}"
    found: dict[str, Source] = {}
    # (ours: stream; theirs: q, k, v, projection, norms, modulation, feed-forward)
    for stream, parts, out, qk, norm, ff in (
        ("img", ("to_q", "to_k", "to_v"), "to_out.0", "norm_", "norm1", "ff"),
        (
            "txt",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            *("to_add_out", "norm_added_", "norm1_context", "ff_context"),
        ),
    ):
        qkv = [f"{theirs}.attn.{part}" for part in parts]
        found |= layer(f"{ours}.{stream}_attn.qkv", *qkv, how="rows", rows=[d] * 3)
        found |= layer(f"{ours}.{stream}_attn.proj", f"{theirs}.attn.{out}")
        found |= _norms(f"{ours}.{stream}_attn.norm", f"{theirs}.attn.{qk}")
        found |= layer(f"{ours}.{stream}_mod.lin", f"{theirs}.{norm}.linear")
        found |= layer(f"{ours}.{stream}_mlp.0", f"{theirs}.{ff}.net.0.proj")
        found |= layer(f"{ours}.{stream}_mlp.2", f"{theirs}.{ff}.net.2")
    return found


def _single(i: int, d: int) -> Layout:
    ours, theirs = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
    first = [f"{theirs}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    return {
        **layer(f"{ours}.linear1", *first, how="rows", rows=[d, d, d, 4 * d]),
        **layer(f"{ours}.linear2", f"{theirs}.proj_out"),
        **layer(f"{ours}.modulation.lin", f"{theirs}.norm.linear"),
        **_norms(f"{ours}.norm", f"{theirs}.attn.norm_"),
    }


def _norms(ours: str, theirs: str) -> Layout:
    return {
        f"{ours}.query_norm.scale": Source((f"{theirs}q.weight",)),
        f"{ours}.key_norm.scale": Source((f"{theirs}k.weight",)),
    }


def diffusers(config: FluxConfig) -> Layout:
    found = {
        **layer("img_in", "x_embedder"),
        **layer("txt_in", "context_embedder"),
        **layer("final_layer.adaLN_modulation.1", "norm_out.linear", how="swap"),
        **layer("final_layer.linear", "proj_out"),
    }
    embedders = {"time_in": "timestep_embedder", "vector_in": "text_embedder"}
    if config.guidance:
        embedders["guidance_in"] = "guidance_embedder"
    for ours, theirs in embedders.items():
        found |= layer(f"{ours}.in_layer", f"time_text_embed.{theirs}.linear_1")
        found |= layer(f"{ours}.out_layer", f"time_text_embed.{theirs}.linear_2")
    for i in range(config.depth):
        found |= _double(i, config.hidden_size)
    for i in range(config.single_depth):
        found |= _single(i, config.hidden_size)
    return found


def from_diffusers(entries: Mapping[str, Any]) -> FluxConfig:
    read = {
        *("in_channels", "out_channels", "num_layers", "num_single_layers", "guidance_embeds"),
        *("num_attention_heads", "attention_head_dim", "axes_dims_rope"),
        *("joint_attention_dim", "pooled_projection_dim"),
    }
    check_entries(entries, read, {"patch_size": 1})
    heads, packed = entries.get("num_attention_heads", 24), entries.get("in_channels", 64)
    out = entries.get("out_channels") or packed
    for name, value in (("in_channels", packed), ("out_channels", out)):
        if value % PACKED:
            raise ValueError(f"{name} must be a multiple of {PACKED}, got {value}")
    return FluxConfig(
        in_channels=packed // PACKED,
        out_channels=out // PACKED,
        hidden_size=heads * entries.get("attention_head_dim", 128),
        depth=entries.get("num_layers", 19),
        single_depth=entries.get("num_single_layers", 38),
        num_heads=heads,
        context_size=entries.get("joint_attention_dim", 4096),
        pooled_size=entries.get("pooled_projection_dim", 768),
        axes=tuple(entries.get("axes_dims_rope", (16, 56, 56))),
        guidance=bool(entries.get("guidance_embeds", False)),
    )


def to_diffusers(config: FluxConfig) -> dict[str, Any]:
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": PACKED * config.in_channels,
        "out_channels": PACKED * config.out_channels,
        "num_layers": config.depth,
        "num_single_layers": config.single_depth,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_size,
        "pooled_projection_dim": config.pooled_size,
        "guidance_embeds": config.guidance,
        "axes_dims_rope": list(config.axes),
    }


def recognise(shapes: Shapes) -> FluxConfig | None:
    """Heads of the public size: the split of their columns over the axes is in no shape."""
    names = (
        "img_in.weight",
        "txt_in.weight",
        "vector_in.in_layer.weight",
        "final_layer.linear.weight",
    )
    image, text, pooled, out = (shapes.get(name, ()) for name in names)
    head = shapes.get("single_blocks.0.norm.query_norm.scale", ())
    axes = CONFIGS["FLUX.1-dev"].axes
    if any(len(shape) != 2 for shape in (image, text, pooled, out)) or head != (sum(axes),):
        return None
    return FluxConfig(
        in_channels=image[1] // PACKED,
        out_channels=out[0] // PACKED,
        hidden_size=image[0],
        depth=count(shapes, "double_blocks."),
        single_depth=count(shapes, "single_blocks."),
        num_heads=image[0] // head[0],
        context_size=text[1],
        pooled_size=pooled[1],
        axes=axes,
        guidance="guidance_in.in_layer.weight" in shapes,
    )


FAMILY = Family(
    name="flux",
    configs=CONFIGS,
    build=Flux,
    prefixes=("model.diffusion_model.", ""),
    recognise=recognise,
    classes=("FluxTransformer2DModel",),
    diffusers=diffusers,
    from_diffusers=from_diffusers,
    to_diffusers=to_diffusers,
    sampling={"schedule": "flow", "prediction": "flow"},
)
