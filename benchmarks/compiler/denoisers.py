"""Denoisers in their real layouts, with random weights, and the inputs of one step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def random_weights(model: nn.Module) -> nn.Module:
    """Weights with a variance of one over their fan-in, norms at one, biases at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return model.eval().requires_grad_(False)


def _empty(make: Any, dtype: torch.dtype) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = make()
    return model.to(dtype).to_empty(device="cpu")


def sd15(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion 1.5's U-Net, 512x512 images, a batch of 2 for guidance."""
    from diffusers import UNet2DConditionModel

    model = _empty(lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768), dtype)
    text = torch.randn(2, 77, 768).to(dtype)
    x = torch.randn(2, 4, 64, 64).to(dtype)
    return random_weights(model), {
        "sample": x,
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text,
    }


def small(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """A small U-Net of the same kind, for a quick look."""
    from diffusers import UNet2DConditionModel

    make = {"sample_size": 16, "block_out_channels": (32, 64), "cross_attention_dim": 32}
    make |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 8}
    make |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1}
    model = _empty(lambda: UNet2DConditionModel(**make), dtype)
    text, x = torch.randn(2, 7, 32).to(dtype), torch.randn(2, 4, 16, 16).to(dtype)
    return random_weights(model), {
        "sample": x,
        "timestep": torch.tensor(500),
        "encoder_hidden_states": text,
    }


def dit_xl(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """DiT-XL/2, 256x256 images, a batch of 2 for guidance."""
    from diffusers import DiTTransformer2DModel

    make = {"num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4}
    make |= {"out_channels": 8, "num_layers": 28, "sample_size": 32, "patch_size": 2}
    model: Any = DiTTransformer2DModel(**make)  # its table of positions is computed
    model = random_weights(model.to(dtype))
    x = torch.randn(2, 4, 32, 32).to(dtype)
    return model, {
        "hidden_states": x,
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([3, 1000]),
    }


def sdxl(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """SDXL's U-Net on 64x64 latents, a batch of 2 for guidance."""
    from diffusers import UNet2DConditionModel

    make: dict[str, Any] = {"sample_size": 64, "block_out_channels": (320, 640, 1280)}
    make |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")}
    make |= {"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
    make |= {"attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10)}
    make |= {"cross_attention_dim": 2048, "use_linear_projection": True}
    make |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    make |= {"projection_class_embeddings_input_dim": 2816}
    model = _empty(lambda: UNet2DConditionModel(**make), dtype)
    added = {"text_embeds": torch.randn(2, 1280).to(dtype), "time_ids": torch.full((2, 6), 512.0)}
    return random_weights(model), {
        "sample": torch.randn(2, 4, 64, 64).to(dtype),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 77, 2048).to(dtype),
        "added_cond_kwargs": added,
    }


class Decoder(nn.Module):
    """The half of an autoencoder that a picture needs."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.decoder = autoencoder.decoder
        self.conv = autoencoder.post_quant_conv

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.decoder(self.conv(sample)),)


def vae(dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    """Stable Diffusion's decoder, one 512x512 image."""
    from diffusers import AutoencoderKL

    make: dict[str, Any] = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    make |= {"down_block_types": ("DownEncoderBlock2D",) * 4}
    make |= {"up_block_types": ("UpDecoderBlock2D",) * 4}
    model = _empty(lambda: Decoder(AutoencoderKL(**make)), dtype)
    return random_weights(model), {"sample": torch.randn(1, 4, 64, 64).to(dtype)}


DENOISERS = {"sd15": sd15, "sdxl": sdxl, "dit-xl-2": dit_xl, "vae": vae, "small": small}


def result(output: Any) -> Tensor:
    """The one tensor that these models return."""
    found = output[0]
    assert isinstance(found, Tensor)
    return found
