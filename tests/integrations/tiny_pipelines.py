"""Pipelines of diffusers with tiny random components; a call of each, without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

# (the pipeline, arguments of a call; size: of the picture, batch: how many).
Made = tuple[Any, Callable[..., dict[str, Any]]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def vae(channels: int = 4, **more: Any) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=32,
        **more,
    )


def unet(in_channels: int = 4, **more: Any) -> Any:
    settings = {
        "sample_size": 16,
        "in_channels": in_channels,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **more})


def xl_unet(sizes: int) -> Any:
    return unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 8 * sizes,
    )


def controlnet() -> Any:
    net = diffusers.ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        norm_num_groups=8,
        conditioning_embedding_out_channels=(4, 8),
    )
    for module in net.modules():  # the last layers are made of zeros
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.1)
    return net


def euler() -> Any:
    return diffusers.EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
    )


def stable() -> dict[str, Any]:
    """What the Stable Diffusion 1 pipelines share."""
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return {"vae": vae(), "scheduler": pndm(), **nothing, "requires_safety_checker": False}


def text_encoder() -> Any:
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    return transformers.CLIPTextModel(config)


def pndm() -> Any:
    return diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True
    )


def text(batch: int, seed: int = 0, width: int = 32) -> dict[str, Tensor]:
    return {
        "prompt_embeds": random(batch, 7, width, seed=seed),
        "negative_prompt_embeds": random(batch, 7, width, seed=seed + 100),
    }


def pooled(batch: int, width: int = 32, seed: int = 0) -> dict[str, Tensor]:
    return {
        "pooled_prompt_embeds": random(batch, width, seed=seed + 1),
        "negative_pooled_prompt_embeds": random(batch, width, seed=seed + 2),
    }


def _call(**more: Any) -> dict[str, Any]:
    return {"output_type": "latent", "num_inference_steps": 5, **more}


def _sized(size: int, **more: Any) -> dict[str, Any]:
    return _call(height=size, width=size, **more)


def picture(batch: int, size: int) -> Tensor:
    return random(batch, 3, size, size).sigmoid()


def sd() -> Made:
    pipe = diffusers.StableDiffusionPipeline(unet=unet(), **stable())
    return pipe, lambda size=32, batch=1: _sized(size, **text(batch))


def sd_img2img() -> Made:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(unet=unet(), **stable())

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        return _call(image=picture(batch, size), strength=0.9, **text(batch))

    return pipe, call


def sd_inpaint() -> Made:
    """The U-Net of 9 channels: latents, mask and masked picture."""
    pipe = diffusers.StableDiffusionInpaintPipeline(unet=unet(9), **stable())

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        mask = torch.zeros(batch, 1, size, size)
        mask[..., : size // 2] = 1
        return _sized(size, image=picture(batch, size), mask_image=mask, **text(batch))

    return pipe, call


def sd_controlnet() -> Made:
    pipe = diffusers.StableDiffusionControlNetPipeline(
        unet=unet(), controlnet=controlnet(), **stable()
    )

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        end = {"control_guidance_end": 0.7, "controlnet_conditioning_scale": 0.8}
        return _sized(size, image=picture(batch, size), **end, **text(batch))

    return pipe, call


def sd_two_controlnets() -> Made:
    pipe = diffusers.StableDiffusionControlNetPipeline(
        unet=unet(), controlnet=[controlnet(), controlnet()], **stable()
    )

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        two = {"image": [picture(batch, size)] * 2, "controlnet_conditioning_scale": [0.5, 0.8]}
        return _sized(size, **two, **text(batch))

    return pipe, call


def _xl(**more: Any) -> dict[str, Any]:
    names = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    nothing = {**dict.fromkeys(names), "add_watermarker": False}
    return {"vae": vae(), "scheduler": euler(), **nothing, **more}


def sdxl() -> Made:
    pipe = diffusers.StableDiffusionXLPipeline(unet=xl_unet(6), **_xl())
    return pipe, lambda size=32, batch=1: _sized(size, **text(batch), **pooled(batch))


def sdxl_refiner() -> Made:
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        unet=xl_unet(5), requires_aesthetics_score=True, **_xl()
    )

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        both = {**text(batch), **pooled(batch)}
        return {**_call(image=picture(batch, size), strength=0.9, **both), "num_inference_steps": 6}

    return pipe, call


def sd3() -> Made:
    transformer = diffusers.SD3Transformer2DModel(
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
    numbered = [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        **dict.fromkeys(numbered),
    )
    return pipe, lambda size=32, batch=1: _sized(size, **text(batch), **pooled(batch, 64))


def flux() -> Made:
    transformer = diffusers.FluxTransformer2DModel(
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
    pipe = diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256
        ),
        vae=vae(1, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        given = {name: v for name, v in (text(batch) | pooled(batch)).items() if "neg" not in name}
        return _sized(size, **given)

    return pipe, call


def pixart() -> Made:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16,
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
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtAlphaPipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        tokenizer=None,
        text_encoder=None,
    )

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        mask = torch.ones(batch, 7)
        mask[:, 5:] = 0
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        unset = {"negative_prompt": None, "use_resolution_binning": False}
        return _sized(size, **unset, **masks, **text(batch))

    return pipe, call


def dit() -> Made:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=vae(), scheduler=scheduler)

    def call(size: int = 32, batch: int = 1) -> dict[str, Any]:
        labels = list(range(batch))  # of one size only
        return {"class_labels": labels, "num_inference_steps": 5, "output_type": "np"}

    return pipe, call


PIPELINES: dict[str, Callable[[], Made]] = {
    make.__name__: make
    for make in (
        sd, sd_img2img, sd_inpaint, sd_controlnet, sd_two_controlnets, sdxl, sdxl_refiner, sd3,
        flux, pixart, dit,
    )
}  # fmt: skip


def made(name: str) -> Made:
    """The pipeline, with the same weights every time."""
    torch.manual_seed(0)
    pipe, call = PIPELINES[name]()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def draw(pipe: Any, arguments: dict[str, Any], seed: int = 0) -> Tensor:
    """The first thing that a call returns, as a tensor."""
    generator = torch.Generator().manual_seed(seed)
    result = pipe(generator=generator, return_dict=False, **arguments)[0]
    return result if isinstance(result, Tensor) else torch.as_tensor(result)
