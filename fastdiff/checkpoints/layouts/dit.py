"""DiT: facebookresearch's names, which are the module's own."""

from __future__ import annotations

from fastdiff.checkpoints.family import Family, Shapes
from fastdiff.models.dit import CONFIGS, DiT, DiTConfig


def recognise(shapes: Shapes) -> DiTConfig | None:
    """The public size of a file, from its patches, its depth and its output."""
    patches = shapes.get("x_embedder.proj.weight", ())
    out = shapes.get("final_layer.linear.weight", ())
    if len(patches) != 4 or len(out) != 2:
        return None
    depth = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    for config in CONFIGS.values():
        sizes = (config.hidden_size, config.in_channels, config.patch_size, config.patch_size)
        if patches == sizes and depth == config.depth and config.learn_sigma:
            return config
    return None


FAMILY = Family(
    name="dit",
    configs=CONFIGS,
    build=DiT,
    prefixes=("",),
    recognise=recognise,
    sampling={"schedule": "linear", "guidance_scale": 4.0},
)
