"""Writes data/adm.json from the public code of openai/guided-diffusion and improved-diffusion.

Run by hand: ``python tests/models/make_adm_data.py GUIDED IMPROVED``, the folders that hold the
packages guided_diffusion and improved_diffusion. Their code is in float32 at some places; here
``Tensor.float`` is what leaves float64 alone, so that the same code gives the oracle, and in
bfloat16 the embedding of the time is cast and norms run natively, as in PyTorch.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pathlib
import sys
from typing import Any
from unittest import mock

import torch
from formulas import fill, numbers
from torch import Tensor, nn

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "guided": (
        "guided",
        {
            "model_channels": 64, "channel_mult": (0.5, 1), "num_res_blocks": 1,
            "attention_resolutions": (2,), "num_head_channels": 32, "num_classes": 10,
            "use_scale_shift_norm": True, "resblock_updown": True,
            "use_new_attention_order": True, "out_channels": 6,
        },
    ),
    "guided-heads": (
        "guided",
        {
            "model_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1,
            "attention_resolutions": (2, 4), "num_heads": 4, "out_channels": 3,
            "use_scale_shift_norm": True, "resblock_updown": True,
        },
    ),
    "improved": (
        "improved",
        {
            "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 2,
            "attention_resolutions": (1, 2), "num_heads": 2, "num_classes": 10,
            "out_channels": 6, "use_scale_shift_norm": True,
        },
    ),
    "improved-plain": (
        "improved",
        {
            "model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1,
            "attention_resolutions": (2,), "num_heads": 1, "out_channels": 3,
        },
    ),
}  # fmt: skip

# The flags of the READMEs, and of an upsampler ("large_size").
GUIDED = {"learn_sigma": True, "use_scale_shift_norm": True, "resblock_updown": True}
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "adm-64": ("guided", {**GUIDED, "image_size": 64, "num_channels": 192, "num_head_channels": 64,
        "num_res_blocks": 3, "attention_resolutions": "32,16,8", "class_cond": True,
        "use_new_attention_order": True}),
    "adm-128": ("guided", {**GUIDED, "image_size": 128, "num_channels": 256, "num_heads": 4,
        "attention_resolutions": "32,16,8", "class_cond": True}),
    "adm-256": ("guided", {**GUIDED, "image_size": 256, "num_channels": 256,
        "num_head_channels": 64, "attention_resolutions": "32,16,8", "class_cond": True}),
    "adm-256-uncond": ("guided", {**GUIDED, "image_size": 256, "num_channels": 256,
        "num_head_channels": 64, "attention_resolutions": "32,16,8"}),
    "adm-512": ("guided", {**GUIDED, "image_size": 512, "num_channels": 256,
        "num_head_channels": 64, "attention_resolutions": "32,16,8", "class_cond": True}),
    "adm-64-256-upsampler": ("guided", {**GUIDED, "large_size": 256, "small_size": 64,
        "num_channels": 192, "num_heads": 4, "attention_resolutions": "32,16,8",
        "class_cond": True}),
    "adm-128-512-upsampler": ("guided", {**GUIDED, "large_size": 512, "small_size": 128,
        "num_channels": 192, "num_head_channels": 64, "attention_resolutions": "32,16",
        "class_cond": True}),
    "improved-cifar10": ("improved", {"image_size": 32, "num_channels": 128, "num_res_blocks": 3,
        "learn_sigma": True}),
    "improved-imagenet64": ("improved", {"image_size": 64, "num_channels": 128,
        "num_res_blocks": 3, "learn_sigma": True}),
    "improved-imagenet64-cond": ("improved", {"image_size": 64, "num_channels": 192,
        "num_res_blocks": 3, "learn_sigma": True, "class_cond": True}),
    "improved-64-256-upsampler": ("improved", {"large_size": 256, "small_size": 64,
        "num_channels": 192, "num_res_blocks": 2, "learn_sigma": True, "class_cond": True}),
    "improved-lsun": ("improved", {"image_size": 256, "num_channels": 128, "num_res_blocks": 2,
        "num_heads": 1, "learn_sigma": True, "use_scale_shift_norm": False,
        "attention_resolutions": "16"}),
}  # fmt: skip


def digest(model: nn.Module) -> dict[str, Any]:
    lines = [f"{name} {list(value.shape)}" for name, value in sorted(model.state_dict().items())]
    text = "\n".join(lines)
    return {"tensors": len(lines), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def public(package: str, flags: dict[str, Any]) -> dict[str, Any]:
    script = importlib.import_module(f"{package}_diffusion.script_util")
    upsampler = "large_size" in flags
    defaults = getattr(script, f"{'sr_' if upsampler else ''}model_and_diffusion_defaults")()
    make = getattr(script, f"{'sr_' if upsampler else ''}create_model")
    given = {**defaults, **flags}
    names = make.__code__.co_varnames[: make.__code__.co_argcount]
    with torch.device("meta"):
        model = make(**{name: given[name] for name in names})
    heads = [
        (module.num_heads, module.channels)
        for module in model.modules()
        if type(module).__name__ == "AttentionBlock"
    ]
    return {**digest(model), "heads": heads}


def small(package: str, settings: dict[str, Any]) -> dict[str, Any]:
    code = importlib.import_module(f"{package}_diffusion.unet")
    more = {"image_size": 16} if package == "guided" else {}
    x, t = numbers("x", 2, 3, 16, 16).bfloat16(), torch.tensor([7, 803])
    y = {"y": torch.tensor([3, 9])} if "num_classes" in settings else {}
    embedding, wide = code.timestep_embedding, Tensor.float

    def run(dtype: torch.dtype) -> list[float]:
        model = fill(code.UNetModel(in_channels=3, **more, **settings), dtype=dtype)
        native = dtype != torch.float32

        def norm(self: nn.GroupNorm, value: Tensor) -> Tensor:
            return nn.GroupNorm.forward(self, value)

        def kept(self: Tensor) -> Tensor:
            return self if self.dtype == torch.float64 else wide(self)

        def embedded(*args: Any) -> Tensor:
            return embedding(*args).to(dtype)

        with (
            mock.patch.object(Tensor, "float", kept),
            mock.patch.object(code, "timestep_embedding", embedded),
            mock.patch.object(type(code.normalization(32)), "forward", norm) if native
            else mock.patch.object(model, "training", False),
            torch.no_grad(),
        ):  # fmt: skip
            model.dtype = dtype
            out = model(x.to(dtype), t, **y)
        return [float(value) for value in out.flatten()[::17].double()]

    dtypes = (torch.float64, torch.float32, torch.bfloat16)
    return {str(dtype).removeprefix("torch."): run(dtype) for dtype in dtypes}


def main() -> None:
    for folder in sys.argv[1:]:
        sys.path.insert(0, folder)
    result = {
        "public": {name: public(*given) for name, given in PUBLIC.items()},
        "small": {name: small(*given) for name, given in SMALL.items()},
    }
    path = pathlib.Path(__file__).parent / "data" / "adm.json"
    path.write_text(json.dumps(result, indent=None, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
