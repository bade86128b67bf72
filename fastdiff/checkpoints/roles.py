"""The parts of single files: what each is called in a pipeline, and what is no part of a model."""

from __future__ import annotations

from fastdiff.checkpoints.family import Family

# The names of a single file's parts in diffusers' pipelines, by the beginning of their tensors'
# names, else by the family.
ROLES_BY_PREFIX = (
    ("cond_stage_model.", "text_encoder"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),  # SDXL's refiner has only that one
    ("conditioner.embedders.0.", "text_encoder"),
    ("conditioner.embedders.1.", "text_encoder_2"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_3"),
)
ROLES = {
    **dict.fromkeys(("unet", "edm", "edm2"), "unet"),
    "controlnet": "controlnet",
    "autoencoder": "vae",
    **dict.fromkeys(("clip", "clip_sd3_l", "openclip_h"), "text_encoder"),
    **dict.fromkeys(("clip_sd3_g", "openclip_g"), "text_encoder_2"),
    "t5": "text_encoder_3",
}
# What training leaves in a single file besides the model.
LEFTOVERS = (
    "model_ema.*",
    "first_stage_model.loss.*",
    "loss.*",
    "betas",
    "alphas_cumprod*",
    "sqrt_*alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "posterior_*",
    "lvlb_weights",
    "logvar",
    "scale_factor",
    "global_step",
    "denoiser.sigmas",
    "*.logit_scale",
)


def order(role: str) -> tuple[bool, bool, str]:
    """Denoisers, then the autoencoder, then the text encoders."""
    return role.startswith("text"), role == "vae", role


def role_of(family: Family, prefix: str) -> str:
    """The name of a part, by the beginning of its tensors' names, else by its family."""
    by_prefix = next((role for start, role in ROLES_BY_PREFIX if prefix.startswith(start)), None)
    return by_prefix or ROLES.get(family.name, "transformer")
