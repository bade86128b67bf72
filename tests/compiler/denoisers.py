"""Tiny models of real architectures, with the inputs of one step of a sampling run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# (model, inputs(step)): the condition is the same objects in every step.
Made = tuple[nn.Module, Callable[[int], dict[str, Any]]]
TIMES = (901.0, 501.0, 101.0)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _steps(sample: str, shape: tuple[int, ...], time: Any, **condition: Any) -> Any:
    def inputs(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(shape, generator=generator)
        return {sample: x, **time(torch.tensor(TIMES[step % 3])), **condition}

    return inputs


def _scalar(t: Tensor) -> dict[str, Tensor]:
    return {"timestep": t}


def _each(t: Tensor) -> dict[str, Tensor]:
    return {"timestep": t.expand(2)}


def unet() -> Made:
    """Stable Diffusion 1.x."""
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
    )
    text = _random(2, 7, 32)
    return model, _steps("sample", (2, 4, 16, 16), _scalar, encoder_hidden_states=text)


def sdxl() -> Made:
    """SDXL: linear projections, pooled text and sizes added to the embedding of the time."""
    import diffusers

    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        norm_num_groups=8,
    )
    added = {"text_embeds": _random(2, 32), "time_ids": _random(2, 6)}
    condition = {"encoder_hidden_states": _random(2, 7, 64), "added_cond_kwargs": added}
    return model, _steps("sample", (2, 4, 16, 16), _scalar, **condition)


def scale_shift() -> Made:
    """A pixel-space U-Net with the time as scale and shift (guided diffusion), and classes."""
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
    )
    labels = torch.tensor([1, 2])
    return model, _steps("sample", (2, 3, 16, 16), _scalar, class_labels=labels)


def controlnet() -> Made:
    """ControlNet: the hint's encoder depends on the condition alone."""
    import diffusers

    model = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        norm_num_groups=4,
        conditioning_embedding_out_channels=(4, 8),
    )
    for parameter in model.parameters():  # its last layers are made of zeros
        nn.init.normal_(parameter, std=0.1)
    hint = _random(2, 3, 16, 16)
    condition = {"encoder_hidden_states": _random(2, 7, 32), "controlnet_cond": hint}
    return model, _steps("sample", (2, 4, 8, 8), _scalar, **condition)


def autoencoder() -> Made:
    """The VAE of Stable Diffusion, encoder and decoder."""
    import diffusers

    model = diffusers.AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        norm_num_groups=8,
    )
    return model, _steps("sample", (1, 3, 32, 32), lambda t: {})


def dit() -> Made:
    """DiT with adaLN-zero."""
    import diffusers

    model = diffusers.DiTTransformer2DModel(
        sample_size=16,
        num_layers=2,
        patch_size=4,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=100,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )

    def time(t: Tensor) -> dict[str, Tensor]:
        return {"timestep": t.long().expand(2)}

    return model, _steps("hidden_states", (2, 4, 16, 16), time, class_labels=torch.tensor([3, 4]))


def sd3() -> Made:
    """SD3's MMDiT, with QK-norm."""
    import diffusers

    model = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        qk_norm="rms_norm",
    )
    condition = {"encoder_hidden_states": _random(2, 11, 32), "pooled_projections": _random(2, 64)}
    return model, _steps("hidden_states", (2, 4, 16, 16), _each, **condition)


def flux() -> Made:
    """FLUX: double and single blocks, rotary embedding, distilled guidance."""
    import diffusers

    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    places = torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], dim=1)
    condition = {
        "encoder_hidden_states": _random(2, 11, 32),
        "pooled_projections": _random(2, 32),
        "img_ids": places,
        "txt_ids": torch.zeros(11, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }

    def time(t: Tensor) -> dict[str, Tensor]:
        return {"timestep": t.expand(2) / 1000}

    return model, _steps("hidden_states", (2, 16, 4), time, **condition)


def pixart() -> Made:
    """PixArt-alpha: adaLN-single and cross-attention."""
    import diffusers

    model = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=8,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    text = _random(2, 11, 32)
    return model, _steps("hidden_states", (2, 4, 8, 8), _each, encoder_hidden_states=text)


def wan() -> Made:
    """Wan: norms, modulation and residuals in float32 whatever the dtype of the model."""
    import diffusers

    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )

    def time(t: Tensor) -> dict[str, Tensor]:
        return {"timestep": t.long().expand(2)}

    text = _random(2, 7, 16)
    return model, _steps("hidden_states", (2, 4, 2, 8, 8), time, encoder_hidden_states=text)


def flux2() -> Made:
    """FLUX.2: SwiGLU, one modulation for all blocks, parallel single blocks."""
    import diffusers

    model = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=256,
        axes_dims_rope=[4, 4, 4, 4],
    )
    condition = {
        "encoder_hidden_states": _random(2, 7, 32),
        "img_ids": torch.zeros(16, 4),
        "txt_ids": torch.zeros(7, 4),
        "guidance": torch.tensor([3.5, 3.5]),
    }

    def time(t: Tensor) -> dict[str, Tensor]:
        return {"timestep": t.expand(2) / 1000}

    return model, _steps("hidden_states", (2, 16, 4), time, **condition)


def zoo_dit() -> Made:
    """This package's own DiT."""
    import fastdiff

    model = fastdiff.load("digits")

    def time(t: Tensor) -> dict[str, Tensor]:
        return {"t": t.expand(2)}

    return model, _steps("x", (2, 1, 8, 8), time, y=torch.tensor([3, 4]))


DENOISERS: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        unet, sdxl, scale_shift, controlnet, autoencoder, dit, sd3, flux, pixart, wan, flux2,
        zoo_dit,
    )
}  # fmt: skip

# Places where the row-wise passes find their op, in every dtype. A gated residual and a norm that
# are joined count in all three.
JOINED = "gate_residual_norm_modulate"
MATCHES: dict[str, dict[str, int]] = {
    "unet": {"geglu": 6, "timestep_embedding": 1},
    "sdxl": {"geglu": 12, "timestep_embedding": 2},
    "scale_shift": {"timestep_embedding": 1},
    "controlnet": {"geglu": 2, "timestep_embedding": 1},
    "autoencoder": {},
    "dit": {"layer_norm_modulate": 5, "gate_residual": 4, JOINED: 4, "timestep_embedding": 3},
    "sd3": {"rms_norm": 8, "layer_norm_modulate": 8, "gate_residual": 6, JOINED: 6},
    "flux": {"rms_norm": 6, "layer_norm_modulate": 6, "gate_residual": 5, JOINED: 2},
    "pixart": {"layer_norm_modulate": 5, "gate_residual": 4, JOINED: 2, "timestep_embedding": 1},
    # In float32 two of its norms have no casts to take along.
    "wan": {"rms_norm": 8, "gate_residual": 4, JOINED: 2, "timestep_embedding": 1},
    "flux2": {"layer_norm_modulate": 6, "gate_residual": 5, JOINED: 2, "swiglu": 3},
    # It calls the ops itself; the parts of what is joined are not counted as found.
    "zoo_dit": {JOINED: 8},
}


def made(name: str) -> Made:
    """The model, the same weights every time, in evaluation mode."""
    torch.manual_seed(0)
    model, inputs = DENOISERS[name]()
    return model.eval().requires_grad_(False), inputs


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output."""
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]
