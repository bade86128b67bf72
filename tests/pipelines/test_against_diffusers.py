"""Final latents of diffusers' pipelines and ours, over 10 steps, from the same folders (float32).

The states of random models grow; the bound, 1e-4, is for latents of unit size, so differences are
divided by the largest latent where that is above 1.
"""

from __future__ import annotations

from typing import Any

import diffusers
import folders
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastdiff
from fastdiff.pipelines import Control, refine

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
B = folders.BETAS
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler(**B, clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    "ddim_old": diffusers.DDIMScheduler(**B),  # as old folders have it; pipelines correct it
    "pndm": folders.pndm(),
    "euler": folders.euler(),
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler(**B),
    "dpmpp_2m_karras": diffusers.DPMSolverMultistepScheduler(**B, use_karras_sigmas=True),
    "unipc": diffusers.UniPCMultistepScheduler(**B),
    "heun": diffusers.HeunDiscreteScheduler(**B),
    "lcm": diffusers.LCMScheduler(**B),
}
PROMPTS = ["a cat", "the dog, on a tree"]


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    drawn = np.random.default_rng(seed).random((size, size, 3)) * 255
    return Image.fromarray(drawn.astype("uint8"))


def mask(size: int = 32) -> Image.Image:
    drawn = np.zeros((size, size), dtype="uint8")
    drawn[8:24, 8:] = 255
    return Image.fromarray(drawn)


def assert_same(ours: Tensor, theirs: Tensor, bound: float = 1e-4) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    difference = float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max()))
    assert difference <= bound, f"latents differ by {difference:.2e}"


def reference(kind: Any, folder: Any, **parts: Any) -> Any:
    pipe = kind.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


THEIRS = {"num_inference_steps": 10, "guidance_scale": 5.0, "output_type": "latent"}
OURS = {"steps": 10, "guidance_scale": 5.0, "output": "latent"}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_stable_diffusion_with_every_kind_of_scheduler(scheduler: str, tmp_path: Any) -> None:
    folder = folders.saved(folders.sd(scheduler=SCHEDULERS[scheduler]), tmp_path / "sd")
    pipe = fastdiff.load(folder)
    ours: dict[str, Any] = {**OURS, "solver": pipe.recipe.solver, "negative": "bad"}
    theirs = {**THEIRS, "negative_prompt": "bad"}
    other = reference(diffusers.StableDiffusionPipeline, folder)
    expected = other("a cat", height=32, width=32, generator=generator(), **theirs).images
    assert_same(pipe("a cat", generator=generator(), **ours).latents, expected)
    given = {"image": picture(), "strength": 0.7}
    other = reference(diffusers.StableDiffusionImg2ImgPipeline, folder)
    expected = other("a cat", **given, generator=generator(), **theirs).images
    assert_same(pipe("a cat", **given, generator=generator(), **ours).latents, expected)
    other = reference(diffusers.StableDiffusionInpaintPipeline, folder)
    for strength in (0.6, 1.0):
        given = {"image": picture(), "strength": strength, "generator": generator()}
        expected = other("a cat", mask_image=mask(), height=32, width=32, **given, **theirs).images
        given["generator"] = generator()
        assert_same(pipe("a cat", mask=mask(), **given, **ours).latents, expected)


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_an_inpainting_unet(strength: float, tmp_path: Any) -> None:
    folder = folders.saved(folders.sd(unet=folders.unet(9)), tmp_path / "sd")
    pipe = fastdiff.load(folder)
    other = reference(diffusers.StableDiffusionInpaintPipeline, folder)
    given = {"image": picture(), "strength": strength}
    expected = other(
        PROMPTS, mask_image=mask(), height=32, width=32, **given, generator=generator(), **THEIRS
    ).images
    result = pipe(PROMPTS, mask=mask(), **given, solver="pndm", generator=generator(), **OURS)
    assert_same(result.latents, expected)


@pytest.mark.parametrize("negative", [None, "bad"])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_prompts_and_pictures(name: str, negative: str | None, saved: Any, loaded: Any) -> None:
    kind = {
        "sd": diffusers.StableDiffusionPipeline,
        "sdxl": diffusers.StableDiffusionXLPipeline,
        "sd3": diffusers.StableDiffusion3Pipeline,
    }[name]
    pipe, other = loaded(name), reference(kind, saved(name))
    wrong = None if negative is None else [negative] * 2
    theirs = {**THEIRS, "negative_prompt": wrong, "height": 48, "width": 32}
    expected = other(PROMPTS, generator=generator(), **theirs).images
    ours = {**OURS, "height": 48, "width": 32, "solver": pipe.recipe.solver}
    result = pipe(PROMPTS, negative=negative, generator=generator(), **ours)
    assert_same(result.latents, expected)
    shown = other(PROMPTS, generator=generator(), **{**theirs, "output_type": "np"}).images
    images = pipe(PROMPTS, negative=negative, generator=generator(), **{**ours, "output": "pil"})
    for image, theirs_image in zip(images.images or [], shown, strict=True):
        assert np.abs(np.asarray(image) / 255.0 - theirs_image).max() <= 0.6 / 255


@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_flux(guidance: bool, tmp_path: Any) -> None:
    folder = folders.saved(folders.flux(guidance), tmp_path / "flux")
    pipe, other = fastdiff.load(folder), reference(diffusers.FluxPipeline, folder)
    theirs = {**THEIRS, "height": 32, "width": 48, "generator": generator()}
    expected = other._unpack_latents(other("a cat", **theirs).images, 32, 48, 2)
    ours = {**OURS, "guidance_scale": 5.0 if guidance else None, "height": 32, "width": 48}
    assert_same(pipe("a cat", generator=generator(), **ours).latents, expected)


def test_flux_image_to_image(saved: Any, loaded: Any) -> None:
    pipe, other = loaded("flux"), reference(diffusers.FluxImg2ImgPipeline, saved("flux"))
    given = {"image": picture(), "strength": 0.6}
    theirs = other("a cat", height=32, width=32, **given, **THEIRS, generator=generator()).images
    expected = other._unpack_latents(theirs, 32, 32, 2)
    assert_same(pipe("a cat", **given, generator=generator(), **OURS).latents, expected)


def test_sd3_image_to_image(saved: Any, loaded: Any) -> None:
    pipe = loaded("sd3")
    other = reference(diffusers.StableDiffusion3Img2ImgPipeline, saved("sd3"))
    given = {"image": picture(), "strength": 0.6}
    expected = other("a cat", **given, **THEIRS, generator=generator()).images
    assert_same(pipe("a cat", **given, generator=generator(), **OURS).latents, expected)


def test_several_controlnets_with_ranges(saved: Any, loaded: Any) -> None:
    nets = [folders.controlnet(4), folders.controlnet(5)]
    pipe, folder = loaded("sd"), saved("sd")
    other = reference(diffusers.StableDiffusionControlNetPipeline, folder, controlnet=nets)
    shown = [picture(), mask().convert("RGB")]
    expected = other(
        "a cat",
        image=shown,
        controlnet_conditioning_scale=[0.7, 1.0],
        control_guidance_end=[1.0, 0.5],
        height=32,
        width=32,
        generator=generator(),
        **THEIRS,
    ).images
    ours = []
    for index, net in enumerate(nets):
        net.save_pretrained(folder.parent / f"control-{index}")
        ours.append(fastdiff.load(folder.parent / f"control-{index}"))
    control = [Control(ours[0], shown[0], 0.7), Control(ours[1], shown[1], 1.0, 0.0, 0.5)]
    result = pipe("a cat", control=control, solver="pndm", generator=generator(), **OURS)
    assert_same(result.latents, expected)


def test_a_refiner(saved: Any, loaded: Any) -> None:
    base = reference(diffusers.StableDiffusionXLPipeline, saved("sdxl"))
    second = reference(diffusers.StableDiffusionXLImg2ImgPipeline, saved("refiner"))
    sized = {"height": 32, "width": 32}
    half = base("a cat", **sized, denoising_end=0.6, generator=generator(), **THEIRS).images
    expected = second(
        "a cat", image=half, denoising_start=0.6, generator=generator(4), **THEIRS
    ).images
    result = refine(
        loaded("sdxl"),
        loaded("refiner"),
        "a cat",
        switch=0.6,
        solver="euler",
        generator=generator(),
        **sized,
        **OURS,
    )
    assert_same(result.latents, expected)
    assert result.settings[0]["switch"] == 0.6


def test_class_conditional(saved: Any, loaded: Any) -> None:
    pipe, other = loaded("dit"), reference(diffusers.DiTPipeline, saved("dit"))
    arguments = {"num_inference_steps": 10, "guidance_scale": 4.0, "output_type": "np"}
    shown = other([3, 5], generator=generator(), **arguments).images
    result = pipe([3, 5], steps=10, guidance_scale=4.0, solver="ddim", generator=generator())
    for image, expected in zip(result.images or [], shown, strict=True):
        assert np.abs(np.asarray(image) / 255.0 - expected).max() <= 0.6 / 255
    with pytest.raises(ValueError, match=r"prompt must be in 0\.\.999, got 1000"):
        pipe([1000])


def test_bfloat16_is_as_close_to_float32_as_diffusers(saved: Any) -> None:
    folder = saved("sd")
    arguments = {**THEIRS, "height": 32, "width": 32}
    exact = reference(diffusers.StableDiffusionPipeline, folder)
    rough = reference(diffusers.StableDiffusionPipeline, folder, torch_dtype=torch.bfloat16)
    pipe = fastdiff.load(folder, dtype=torch.bfloat16)
    start = torch.randn(1, 4, 16, 16, generator=generator())
    expected = exact("a cat", latents=start, **arguments).images
    theirs = rough("a cat", latents=start.bfloat16(), **arguments).images.float()
    ours = pipe("a cat", latents=start.bfloat16(), solver="pndm", **OURS).latents.float()
    error = [float((value - expected).square().mean().sqrt()) for value in (ours, theirs)]
    assert error[0] <= 2 * error[1], error
