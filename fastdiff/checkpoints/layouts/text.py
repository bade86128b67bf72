"""Text encoders: transformers' CLIP and T5, from single files and from diffusers' folders.

A single file has them in one of three ways: with transformers' names (CLIP-L of SD1, SDXL and SD3,
CLIP-G of SD3, T5), as OpenCLIP (ViT-H of SD2, ViT-bigG of SDXL: Q, K and V in one), or not (FLUX).
``build`` makes transformers' module, whatever names that version of it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints.family import Family, Layout, Shapes, Source


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP text encoder. projection: the features of its pooled output, None without one.

    The last two tokens of the vocabulary are begin and end of the text.
    """

    width: int = 768
    inner: int = 3072
    layers: int = 12
    heads: int = 12
    activation: str = "quick_gelu"
    projection: int | None = None
    vocab_size: int = 49408
    positions: int = 77
    eps: float = 1e-5
    eos_token_id: int | None = None


@dataclass(frozen=True)
class T5Config:
    """T5's encoder, of version 1.1 (a gated GELU)."""

    width: int = 4096
    inner: int = 10240
    layers: int = 24
    heads: int = 64
    head_dim: int = 64
    vocab_size: int = 32128
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


CLIP_L = ClipConfig()
CLIP_G = ClipConfig(1280, 5120, 32, 20, "gelu", projection=1280)
# The last of its 24 layers is in the files, and unused.
CLIP_H = ClipConfig(1024, 4096, 23, 16, "gelu")
UNUSED_IN_H = 23


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "text encoders need transformers, which is not installed: pip install transformers"
        ) from error
    return transformers


def build_clip(config: ClipConfig) -> nn.Module:
    """transformers' CLIPTextModel, or CLIPTextModelWithProjection where there is one."""
    library = _transformers()
    last = config.vocab_size - 1
    theirs = library.CLIPTextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        intermediate_size=config.inner,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        hidden_act=config.activation,
        layer_norm_eps=config.eps,
        projection_dim=config.projection or config.width,
        bos_token_id=last - 1,
        eos_token_id=last if config.eos_token_id is None else config.eos_token_id,
    )
    kind = "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    model = getattr(library, kind)(theirs)
    for module in model.modules():
        if "position_ids" in module._buffers:  # computed, also where weights are on meta
            module.position_ids = torch.arange(config.positions, device="cpu")[None]
    return model.eval()


def build_t5(config: T5Config) -> nn.Module:
    """transformers' T5EncoderModel; its two embeddings are one module."""
    library = _transformers()
    model = library.T5EncoderModel(
        library.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.width,
            d_kv=config.head_dim,
            d_ff=config.inner,
            num_layers=config.layers,
            num_heads=config.heads,
            relative_attention_num_buckets=config.buckets,
            relative_attention_max_distance=config.max_distance,
            layer_norm_epsilon=config.eps,
            feed_forward_proj="gated-gelu",
        )
    )
    model.encoder.set_input_embeddings(model.shared)
    return model.eval()


def _names(build: Callable[[Any], nn.Module], config: Any) -> dict[str, str]:
    """The installed module's names -> the same without a "text_model." before them."""
    with torch.device("meta"):
        return {name: name.removeprefix("text_model.") for name in build(config).state_dict()}


def clip_official(config: ClipConfig) -> Layout:
    """transformers' names of long ago: all but the projection in ``text_model``."""
    return {
        name: Source((bare if bare.startswith("text_projection.") else f"text_model.{bare}",))
        for name, bare in _names(build_clip, config).items()
    }


def clip_sd3_l(config: ClipConfig) -> Layout:
    """SD3's CLIP-L: the projection of its pooled output is the identity."""
    eye = Source(("text_model.final_layer_norm.weight",), "eye")
    return {**clip_official(config), "text_projection.weight": eye}


def clip_diffusers(config: ClipConfig) -> Layout:
    """The names that transformers writes; without a projection there is no ``text_model``."""
    if config.projection:
        return clip_official(config)
    return {name: Source((bare,)) for name, bare in _names(build_clip, config).items()}


_OPENCLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPENCLIP_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def openclip_official(config: ClipConfig) -> Layout:
    layout = {}
    for name, bare in _names(build_clip, config).items():
        if bare == "text_projection.weight":
            layout[name] = Source(("text_projection",), "transposed")
        elif bare in _OPENCLIP:
            layout[name] = Source((_OPENCLIP[bare],))
        else:
            layer, part, kind = re.fullmatch(  # type: ignore[union-attr]
                r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", bare
            ).groups()
            block = f"transformer.resblocks.{layer}"
            if part in _OPENCLIP_PARTS:
                layout[name] = Source((f"{block}.{_OPENCLIP_PARTS[part]}.{kind}",))
            else:
                first = ("q_proj", "k_proj", "v_proj").index(part.rpartition(".")[2]) * config.width
                rows = (first, first + config.width, 3 * config.width)
                layout[name] = Source((f"{block}.attn.in_proj_{kind}",), "part", rows)
    return layout


def t5_official(config: T5Config) -> Layout:
    return {
        name: Source(("shared.weight" if name == "encoder.embed_tokens.weight" else name,))
        for name in _names(build_t5, config)
    }


def _count(shapes: Shapes, pattern: str) -> int:
    found = (re.match(pattern, name) for name in shapes)
    return len({match[1] for match in found if match})


def recognise_clip(shapes: Shapes) -> ClipConfig | None:
    """A CLIP of OpenAI's (quick_gelu) or, wider than 768, of OpenCLIP's (gelu)."""
    token = shapes.get("text_model.embeddings.token_embedding.weight")
    position = shapes.get("text_model.embeddings.position_embedding.weight")
    inner = shapes.get("text_model.encoder.layers.0.mlp.fc1.weight")
    if token is None or position is None or inner is None:
        return None
    projection = shapes.get("text_projection.weight")
    return ClipConfig(
        width=token[1],
        inner=inner[0],
        layers=_count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
        heads=max(token[1] // 64, 1),
        activation="quick_gelu" if token[1] <= CLIP_L.width else "gelu",
        projection=projection[0] if projection else None,
        vocab_size=token[0],
        positions=position[0],
    )


def _recognise_l(shapes: Shapes) -> ClipConfig | None:
    found = recognise_clip(shapes)
    if found is None or found.activation != "quick_gelu":
        return None
    return replace(found, projection=None)


def _recognise_sd3_l(shapes: Shapes) -> ClipConfig | None:
    found = _recognise_l(shapes)
    return None if found is None else replace(found, projection=found.width)


def _recognise_sd3_g(shapes: Shapes) -> ClipConfig | None:
    found = recognise_clip(shapes)
    if found is None or found.projection is None:
        return None
    return replace(found, activation="gelu")


def recognise_openclip(shapes: Shapes) -> ClipConfig | None:
    token, position = shapes.get("token_embedding.weight"), shapes.get("positional_embedding")
    inner = shapes.get("transformer.resblocks.0.mlp.c_fc.weight")
    if token is None or position is None or inner is None:
        return None
    projection = shapes.get("text_projection")
    return ClipConfig(
        width=token[1],
        inner=inner[0],
        layers=_count(shapes, r"transformer\.resblocks\.(\d+)\."),
        heads=max(token[1] // 64, 1),
        activation="gelu",
        projection=projection[1] if projection else None,
        vocab_size=token[0],
        positions=position[0],
    )


def _recognise_h(shapes: Shapes) -> ClipConfig | None:
    found = recognise_openclip(shapes)
    if found is None or found.layers > UNUSED_IN_H + 1:
        return None
    return replace(found, projection=None, layers=min(found.layers, UNUSED_IN_H))


def _recognise_openclip_g(shapes: Shapes) -> ClipConfig | None:
    found = recognise_openclip(shapes)
    return found if found is not None and found.projection else None


def recognise_t5(shapes: Shapes) -> T5Config | None:
    block = "encoder.block.0.layer"
    shared = shapes.get("shared.weight")
    bias = shapes.get(f"{block}.0.SelfAttention.relative_attention_bias.weight")
    query = shapes.get(f"{block}.0.SelfAttention.q.weight")
    inner = shapes.get(f"{block}.1.DenseReluDense.wi_0.weight")
    if shared is None or bias is None or query is None or inner is None:
        return None
    return T5Config(
        width=shared[1],
        inner=inner[0],
        layers=_count(shapes, r"encoder\.block\.(\d+)\."),
        heads=bias[1],
        head_dim=query[0] // bias[1],
        vocab_size=shared[0],
        buckets=bias[0],
    )


# Entries of transformers' config.json, and ours.
_CLIP_ENTRIES = {
    "hidden_size": "width",
    "intermediate_size": "inner",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "hidden_act": "activation",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "positions",
    "layer_norm_eps": "eps",
    "eos_token_id": "eos_token_id",
}
_CLIP_DEFAULTS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "projection_dim": 512,
    "eos_token_id": 49407,
}
_T5_ENTRIES = {
    "d_model": "width",
    "d_ff": "inner",
    "num_layers": "layers",
    "num_heads": "heads",
    "d_kv": "head_dim",
    "vocab_size": "vocab_size",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "eps",
}
_PROJECTED = "CLIPTextModelWithProjection"


def clip_from_diffusers(entries: Mapping[str, Any]) -> ClipConfig:
    given = {**_CLIP_DEFAULTS, **{k: v for k, v in entries.items() if v is not None}}
    if given.get("hidden_act", "quick_gelu") not in ("quick_gelu", "gelu"):
        raise ValueError(f"hidden_act must be quick_gelu or gelu, got {given['hidden_act']!r}")
    projected = _PROJECTED in given.get("architectures", ())
    fields = {ours: given[name] for name, ours in _CLIP_ENTRIES.items() if name in given}
    return ClipConfig(**fields, projection=given["projection_dim"] if projected else None)


def clip_to_diffusers(config: ClipConfig) -> dict[str, Any]:
    entries = {name: getattr(config, ours) for name, ours in _CLIP_ENTRIES.items()}
    last = config.vocab_size - 1
    return {
        **entries,
        "architectures": [_PROJECTED if config.projection else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": last - 1,
        "eos_token_id": last if config.eos_token_id is None else config.eos_token_id,
        "projection_dim": config.projection or config.width,
    }


def t5_from_diffusers(entries: Mapping[str, Any]) -> T5Config:
    kind = entries.get("feed_forward_proj", "relu")
    if kind != "gated-gelu":
        raise ValueError(f"feed_forward_proj must be 'gated-gelu' (T5 1.1), got {kind!r}")
    return T5Config(
        **{ours: entries[name] for name, ours in _T5_ENTRIES.items() if name in entries}
    )


def t5_to_diffusers(config: T5Config) -> dict[str, Any]:
    return {
        **{name: getattr(config, ours) for name, ours in _T5_ENTRIES.items()},
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
    }


_POSITIONS = "text_model.embeddings.position_ids"
_CLIP = Family(
    name="clip",
    configs={"clip-l": CLIP_L},
    build=build_clip,
    prefixes=("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    recognise=_recognise_l,
    official=clip_official,
    # A file of its own has what its pooled output is projected with, which SD1 and FLUX do not use.
    optional=frozenset({_POSITIONS, "text_projection.weight", "logit_scale"}),
    classes=("CLIPTextModel",),
    diffusers=clip_diffusers,
    older={"text_model": ""},
    from_diffusers=clip_from_diffusers,
    to_diffusers=clip_to_diffusers,
)
_CLIP_SD3_L = replace(
    _CLIP,
    name="clip_sd3_l",
    configs={"clip-l-sd3": replace(CLIP_L, projection=768)},
    prefixes=("text_encoders.clip_l.transformer.",),
    recognise=_recognise_sd3_l,
    official=clip_sd3_l,
    classes=(),
    older={},
)
_CLIP_SD3_G = replace(
    _CLIP,
    name="clip_sd3_g",
    configs={"clip-g": CLIP_G},
    prefixes=("text_encoders.clip_g.transformer.",),
    recognise=_recognise_sd3_g,
    optional=frozenset({_POSITIONS, "logit_scale"}),
    classes=(_PROJECTED,),
    older={},
)
_OPENCLIP_H = replace(
    _CLIP,
    name="openclip_h",
    configs={"openclip-h": CLIP_H},
    prefixes=("cond_stage_model.model.",),
    recognise=_recognise_h,
    official=openclip_official,
    optional=frozenset(
        {
            "attn_mask",
            "logit_scale",
            "text_projection",
            f"transformer.resblocks.{UNUSED_IN_H}.*",
        }
    ),
    classes=(),
)
_OPENCLIP_G = replace(
    _OPENCLIP_H,
    name="openclip_g",
    configs={"openclip-g": CLIP_G},
    # The second is SDXL's refiner's.
    prefixes=("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
    recognise=_recognise_openclip_g,
    optional=frozenset({"attn_mask", "logit_scale"}),
    older={},
)
_T5 = Family(
    name="t5",
    configs={"t5-xxl": T5Config()},
    build=build_t5,
    prefixes=("text_encoders.t5xxl.transformer.",),
    recognise=recognise_t5,
    official=t5_official,
    optional=frozenset({"encoder.embed_tokens.weight"}),
    classes=("T5EncoderModel",),
    diffusers=t5_official,
    from_diffusers=t5_from_diffusers,
    to_diffusers=t5_to_diffusers,
)
FAMILIES = (_CLIP, _CLIP_SD3_L, _CLIP_SD3_G, _OPENCLIP_H, _OPENCLIP_G, _T5)
