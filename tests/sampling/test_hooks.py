"""Hooks against their papers and against diffusers, and image-to-image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import solvers
from fastdiff._ext import ext
from fastdiff.sampling import (
    Clip,
    ControlNet,
    DynamicThreshold,
    Guidance,
    Hook,
    Inpaint,
    Place,
    Preview,
)

SHAPE = (2, 3, 6, 6)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ENGINES = ["reference", *(["cpp"] if ext() is not None else [])]


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x) * (0.5 + t.reshape(-1, 1, 1, 1) / 2000)


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(network: Any = model, **kwargs: Any) -> Tensor:
    kwargs = {"x": noise(1), "steps": 8, "schedule": "scaled_linear", **kwargs}
    return fastdiff.sample(network, **kwargs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("quantile", "maximum"), [(0.995, 1.0), (0.8, 3.0), (0.9, 1.5)])
def test_thresholding_is_diffusers(quantile, maximum):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=maximum
    )
    x0 = 2.5 * noise(4)
    expected = scheduler._threshold_sample(x0)
    hook = DynamicThreshold(quantile, maximum=maximum)
    assert torch.equal(hook.predict(x0, Place(0, 0.0, None)), expected)
    assert (expected.abs().amax(dim=(1, 2, 3)) == 1).all()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("kind", ["ddim", "dpmpp_2m", "deis", "pndm"])
def test_a_hook_on_x0_is_a_model_whose_x0_is_that(prediction, kind):
    """Solvers that work with the noise, or with v, get the clipped clean sample too."""
    schedule = solvers.scaled_linear()

    def clipped(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = map(float, schedule.marginal(schedule.lambda_at(float(t[0]))))
        a, b = solvers.prediction.to_x0(prediction, alpha, sigma)
        x0 = (a * x + b * model(x, t)).clamp(-0.4, 0.4)
        return (x0 - a * x) / b

    common = {"solver": kind, "prediction": prediction}
    expected = draw(clipped, **common)
    assert not torch.allclose(draw(**common), expected)
    torch.testing.assert_close(draw(hooks=[Clip(0.4)], **common), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["ddpm", "unipc", "heun"])
def test_inpainting_keeps_the_known_part_and_draws_the_rest(engine, kind):
    known, mask = noise(5), torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    levels, states = [], []

    class Watch(Hook):
        def step(self, info: Any) -> None:
            levels.append(info.level)
            states.append(info.x.clone())

    z = noise(6)
    hooks = [Inpaint(known[:1], mask, noise=z), Watch()]
    result = draw(hooks=hooks, solver=kind, seed=2, engine=engine)
    assert torch.equal(result[..., 3:], known[:1, :, :, 3:].expand(2, -1, -1, -1))
    for (alpha, sigma), state in zip(levels, states, strict=True):
        close(state[..., 3:], (alpha * known[:1] + sigma * z)[..., 3:])
    assert levels[-1] == (1.0, 0.0)
    free = draw(solver=kind, seed=2, engine=engine)
    assert not torch.allclose(result[..., :3], free[..., 3:])


def test_inpainting_in_a_pipelines_loop():
    """diffusers' own loop: add_noise of the known latents with the initial noise at every step."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    known, mask = noise(5), (noise(7, (1, 1, 6, 6)) > 0).double()
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = z
    times = scheduler.timesteps
    for i, t in enumerate(times):
        x = scheduler.step(model(x, t.expand(2)), t, x).prev_sample
        proper = known
        if i + 1 < len(times):
            proper = scheduler.add_noise(known, z, times[i + 1 : i + 2])
        x = (1 - mask) * proper + mask * x
    result = fastdiff.sample(
        model,
        SHAPE,
        solver="ddim",
        steps=10,
        schedule=solvers.from_diffusers(scheduler),
        grid="leading",
        hooks=[Inpaint(known, mask)],
        generator=torch.Generator().manual_seed(3),
        dtype=torch.float64,
    )
    torch.testing.assert_close(result, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("kind", ["ddim", "dpmpp_2m", "unipc", "heun"])
def test_image_to_image_is_a_pipelines(strength, kind):
    diffusers = pytest.importorskip("diffusers")
    names = {
        "ddim": "DDIMScheduler",
        "dpmpp_2m": "DPMSolverMultistepScheduler",
        "unipc": "UniPCMultistepScheduler",
        "heun": "HeunDiscreteScheduler",
    }
    more = {"clip_sample": False} if kind == "ddim" else {}
    scheduler = getattr(diffusers, names[kind])(**SD, **more)
    steps, init = 12, noise(5).float()
    scheduler.set_timesteps(steps)
    start = steps - int(steps * strength)
    times = scheduler.timesteps[start * scheduler.order :]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    x = scheduler.add_noise(init, z, times[:1].expand(2))
    for t in times:
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(seen, t.expand(2)), t, x).prev_sample
    result = fastdiff.sample(
        model,
        init=init,
        strength=strength,
        solver=kind,
        steps=steps,
        schedule=solvers.from_diffusers(scheduler),
        generator=torch.Generator().manual_seed(3),
    )
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)


def test_strength_of_a_finished_table():
    table = solvers.make_table("ddim", "scaled_linear", 10)
    init = noise(5)
    expected = draw(x=None, init=init, strength=0.5, solver="ddim", steps=10, seed=4)
    assert torch.equal(draw(x=None, init=init, strength=0.5, solver=table, seed=4), expected)


@pytest.mark.parametrize("guidance", [None, Guidance(3.0), Guidance(3.0, batched=False)])
def test_controlnet_residuals_in_a_pipelines_loop(guidance):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **sizes,
    )
    control = diffusers.ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(4, 8),
        **sizes,
    )
    for parameter in control.parameters():  # its last layers are made of zeros
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(6)
    text, empty = torch.randn(2, 1, 5, 12)
    image = torch.rand(1, 3, 16, 16)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def loop(scale: float, last: int) -> Tensor:
        x = z
        both = guidance is not None
        words = torch.cat([empty, text]) if both else text
        for i, t in enumerate(scheduler.timesteps):
            seen = torch.cat([x, x]) if both else x
            extra = {}
            if i < last:
                down, mid = control(
                    seen, t, words, image.expand(len(seen), -1, -1, -1), scale, return_dict=False
                )
                extra = {
                    "down_block_additional_residuals": down,
                    "mid_block_additional_residual": mid,
                }
            output = unet(seen, t, words, return_dict=False, **extra)[0]
            if both:
                other, cond = output.chunk(2)
                output = other + 3.0 * (cond - other)
            x = scheduler.step(output, t, x).prev_sample
        return x

    for scale, end in ((0.8, 1.0), (0.8, 0.5)):
        result = fastdiff.sample(
            unet,
            x=z,
            solver="ddim",
            steps=6,
            schedule=solvers.from_diffusers(scheduler),
            cond={"encoder_hidden_states": text},
            uncond={"encoder_hidden_states": empty},
            guidance=guidance,
            hooks=[ControlNet(control, image, scale, end=end)],
        )
        with torch.no_grad():
            expected = loop(scale, 6 if end == 1 else 3)
            assert not torch.allclose(expected, loop(0.0, 6), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dpmpp_2m", "deis"])
def test_preview_shows_the_predicted_clean_sample(kind):
    seen = []
    schedule = solvers.scaled_linear()
    inputs = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, t)
        alpha, sigma = map(float, schedule.marginal(schedule.lambda_at(float(t[0]))))
        inputs.append((x - sigma * output) / alpha)
        return output

    previews = [Preview(lambda x0, i: seen.append((i, x0)), every=3)]
    result = draw(watched, hooks=previews, solver=kind)
    assert [i for i, _ in seen] == [0, 3, 6]
    for i, x0 in seen:
        close(x0, inputs[i])
    close(result, draw(solver=kind))


def test_hooks_run_in_the_order_of_the_list():
    seen = []

    class Named(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def predict(self, x0: Tensor, place: Place) -> Tensor:
            seen.append(self.name)
            return x0

    draw(hooks=[Named("a"), Named("b")], steps=2)
    assert seen == ["a", "b", "a", "b"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_callers_tensors_are_not_written(engine):
    x, known = noise(1), noise(2)
    kept = x.clone(), known.clone()
    mask = torch.ones(1, 1, 6, 6)
    draw(x=x, hooks=[Inpaint(known, mask, noise=known)], solver="ddim", engine=engine)
    draw(x=None, init=known, strength=0.5, hooks=[Clip()], engine=engine)
    assert torch.equal(x, kept[0])
    assert torch.equal(known, kept[1])


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "quantile must be", lambda: DynamicThreshold(1.5)),
        (ValueError, "minimum must be", lambda: DynamicThreshold(0.9, minimum=2.0, maximum=1.0)),
        (ValueError, "limit must be positive", lambda: Clip(0.0)),
        (ValueError, "start and end", lambda: ControlNet(model, noise(1), start=0.7, end=0.3)),
        (ValueError, "every must be", lambda: Preview(print, every=0)),
        (ValueError, "mask must be", lambda: draw(hooks=[Inpaint(noise(1), noise(2))])),
        (
            ValueError,
            "known must broadcast",
            lambda: draw(hooks=[Inpaint(noise(1)[..., :2], torch.ones(1))]),
        ),
        (TypeError, "hooks must be", lambda: draw(hooks=[print])),
        (TypeError, "hooks must be", lambda: draw(hooks=Clip())),
        (ValueError, "x must be None", lambda: draw(init=noise(2))),
        (ValueError, "strength must be 1 unless init", lambda: draw(strength=0.5)),
        (ValueError, "strength must be above 0", lambda: draw(x=None, init=noise(1), strength=0)),
        (
            ValueError,
            "strength must be at least 1/steps",
            lambda: draw(x=None, init=noise(1), strength=0.1),
        ),
        (TypeError, "strength must be a number", lambda: draw(strength="a")),
        (TypeError, "init must be a tensor", lambda: draw(x=None, init=[1.0])),
    ],
)
def test_bad_hooks_are_refused(error, message, make):
    with pytest.raises(error, match=message):
        make()
