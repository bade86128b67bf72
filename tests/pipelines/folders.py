"""Tiny pipelines of diffusers with random weights, and the folders they save."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from fastdiff.checkpoints.tokenizers import write_clip_tokenizer, write_t5_tokenizer

VOCABULARY = 600
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@functools.cache
def tokenizer(pad: str = "<|endoftext|>") -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(folder, VOCABULARY, pad)
        return transformers.CLIPTokenizer.from_pretrained(folder)


@functools.cache
def t5_tokenizer() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        write_t5_tokenizer(folder, 64, 24)
        return transformers.AutoTokenizer.from_pretrained(folder)


def randomise(module: nn.Module, seed: int = 0) -> Any:
    """Weights without zeros, of a size that keeps the signal."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not value.is_floating_point() or name.endswith("pos_embed"):
            continue
        drawn = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            value.copy_(drawn * (0.7 * value[0].numel() ** -0.5))
        elif name.endswith(("weight", "scale")):
            value.copy_(1 + 0.1 * drawn)
        else:
            value.copy_(0.1 * drawn)
    return module.eval()


def clip(width: int = 32, projected: bool = False, layers: int = 3, seed: int = 1) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=layers,
        projection_dim=width,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
        hidden_act="gelu" if projected else "quick_gelu",
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return randomise(kind(config), seed)


def t5(width: int = 32) -> Any:
    config = transformers.T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return randomise(transformers.T5EncoderModel(config), 5)


def vae(channels: int = 4, scaling: float = 0.18215, **more: Any) -> Any:
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=[8, 16],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=channels,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=scaling,
            **more,
        ),
        2,
    )


def unet(in_channels: int = 4, **more: Any) -> Any:
    settings = {
        "sample_size": 16,
        "in_channels": in_channels,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    }
    return randomise(diffusers.UNet2DConditionModel(**{**settings, **more}), 3)


def controlnet(seed: int = 4) -> Any:
    return randomise(
        diffusers.ControlNetModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            norm_num_groups=8,
            conditioning_embedding_out_channels=(4, 8),
        ),
        seed,
    )


def pndm() -> Any:
    return diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1)


def sd(**parts: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        **{
            "unet": unet(),
            "vae": vae(),
            "text_encoder": clip(),
            "tokenizer": tokenizer(),
            "scheduler": pndm(),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
            **parts,
        }
    )


def xl_unet(numbers: int, context: int) -> Any:
    return unet(
        cross_attention_dim=context,
        use_linear_projection=True,
        transformer_layers_per_block=(2, 1),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 8 * numbers,
    )


def sdxl() -> Any:
    return diffusers.StableDiffusionXLPipeline(
        unet=xl_unet(6, 64),
        vae=vae(scaling=0.13025),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True, seed=6),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        scheduler=euler(),
        add_watermarker=False,
    )


def refiner() -> Any:
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=xl_unet(5, 32),
        vae=vae(scaling=0.13025),
        text_encoder=None,
        text_encoder_2=clip(projected=True, seed=6),
        tokenizer=None,
        tokenizer_2=tokenizer("!"),
        scheduler=euler(),
        add_watermarker=False,
        requires_aesthetics_score=True,
    )


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomise(transformer, 7),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(projected=True, seed=8),
        text_encoder_2=clip(projected=True, seed=9),
        text_encoder_3=t5(96),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer("!"),
        tokenizer_3=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance: bool = True) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=guidance,
    )
    return diffusers.FluxPipeline(
        transformer=randomise(transformer, 7),
        vae=vae(shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(seed=8),
        text_encoder_2=t5(32),
        tokenizer=tokenizer(),
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=guidance
        ),
    )


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,  # DiTPipeline's label for none
        norm_eps=1e-6,
    )
    randomise(transformer, 7)
    for block in transformer.transformer_blocks:  # in DiT's own files there is one for all
        block.norm1.emb.load_state_dict(transformer.transformer_blocks[0].norm1.emb.state_dict())
    return diffusers.DiTPipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
    )


def saved(pipe: Any, folder: Path) -> Path:
    """The pipeline's folder, as diffusers writes it."""
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
