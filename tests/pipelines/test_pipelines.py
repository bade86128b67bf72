"""What a user of a pipeline relies on: seeds, prompts of any length, errors, settings, tasks."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import folders
import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import images
from fastdiff.checkpoints.layouts.text import ClipConfig, T5Config
from fastdiff.checkpoints.random import PIPELINES, write_pipeline
from fastdiff.checkpoints.tokenizers import write_clip_tokenizer
from fastdiff.models.autoencoder import CONFIGS as VAES
from fastdiff.models.autoencoder import AutoencoderConfig
from fastdiff.models.mmdit import MMDiTConfig
from fastdiff.models.unet_configs import UNetConfig
from fastdiff.pipelines import Control, components, enlarge, interpolate, invert, slerp
from fastdiff.pipelines.recipes import Recipe
from fastdiff.sampling import sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
LATENT: dict[str, Any] = {"steps": 4, "output": "latent"}


def picture(size: int = 32) -> Image.Image:
    drawn = np.random.default_rng(0).random((size, size, 3)) * 255
    return Image.fromarray(drawn.astype("uint8"))


def test_a_seed_is_a_picture_whatever_the_batch(loaded: Any) -> None:
    pipe = loaded("sd")
    prompts = ["a cat", "a dog", "a cat"]
    for solver in ("best_linear", "euler_ancestral"):
        options = {**LATENT, "solver": solver}
        together = pipe(prompts, seed=[5, 6, 7], **options).latents
        pieces = pipe(prompts, seed=[5, 6, 7], batch_size=2, **options).latents
        alone = pipe("a dog", seed=6, **options).latents
        scale = float(together.abs().max())
        assert float((together - pieces).abs().max()) < 1e-5 * scale
        assert float((together[1:2] - alone).abs().max()) < 1e-5 * scale
        assert float((together[0] - together[2]).abs().max()) > 0.1 * scale
    # Pictures to draw over are noised from the same streams.
    given = {"image": picture(), "strength": 0.5}
    together = pipe(["x", "a dog"], seed=[1, 6], **given, **LATENT).latents
    alone = pipe("a dog", seed=6, **given, **LATENT).latents
    assert float((together[1:] - alone).abs().max()) < 1e-5 * float(alone.abs().max())


def test_images_per_prompt_and_seeds_that_are_told(loaded: Any) -> None:
    result = loaded("sd")(["a", "b"], images_per_prompt=2, **LATENT)
    seeds = [entry["seed"] for entry in result.settings]
    assert seeds == list(range(seeds[0], seeds[0] + 4))
    assert [entry["prompt"] for entry in result.settings] == ["a", "a", "b", "b"]


def test_the_settings_in_a_png_make_it_again(loaded: Any, tmp_path: Path) -> None:
    pipe = loaded("sd")
    result = pipe(["a cat", "a dog"], negative="bad", steps=3, guidance_scale=3.0, width=40)
    paths = result.save(str(tmp_path / "out.png"))
    assert [Path(path).name for path in paths] == ["out-000.png", "out-001.png"]
    settings = images.read_settings(paths[1])
    assert settings["prompt"] == "a dog"
    names = ("prompt", "negative", "steps", "guidance_scale", "width", "height", "seed", "solver")
    again = pipe(**{name: settings[name] for name in names})
    first = np.asarray(Image.open(paths[1])).astype(int)
    assert np.abs(first - np.asarray(again.images[0])).max() <= 1
    picture().save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="fastdiff's settings"):
        images.read_settings(tmp_path / "plain.png")


def test_prompts_of_many_windows(loaded: Any) -> None:
    pipe = loaded("sd")
    encoder = pipe.conditioner.encoders["text_encoder"]
    ids = encoder.tokenizer("a cat on a tree").input_ids
    (window,) = encoder.windows(["a cat on a tree"], "error")
    assert encoder.tokens(window).tolist()[0][: len(ids)] == ids
    long = "a cat on a tree " * 20
    (split,) = encoder.windows([long], "windows")
    assert [len(part) for part in split[:-1]] == [75] * (len(split) - 1)
    flat = [token for part in split for token in part]
    assert flat == encoder.tokenizer(long, add_special_tokens=False).input_ids
    context, _ = encoder([long], layer=None, long="windows")
    assert context.shape[1] == 77 * len(split)
    # The first window is what the cut prompt is.
    with pytest.warns(UserWarning, match="cut off"):
        cut, _ = encoder([long], layer=None, long="cut")
    torch.testing.assert_close(context[:, :77], cut)
    with pytest.raises(ValueError, match="prompt must be of at most 75 tokens"):
        pipe(long, long="error", **LATENT)
    # With guidance, the negative prompt is encoded in as many windows.
    assert pipe([long, "a cat"], negative="bad", **LATENT).latents.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt must hold at least one prompt"),
        ({"prompt": "a", "width": 33}, "width must be a multiple of 2, got 33"),
        ({"prompt": "a", "height": 0}, "height must be at least 2"),
        ({"prompt": "a", "steps": 0}, "steps must be at least 1"),
        ({"prompt": "a", "strength": 0.5}, "strength must be 1 unless image is given"),
        ({"prompt": "a", "mask": picture()}, "image must be given with a mask"),
        ({"prompt": "a", "image": picture(), "strength": 0.0}, "strength must be above 0"),
        ({"prompt": "a", "image": 3}, "image must be a PIL image"),
        ({"prompt": "a", "negative": ["a", "b"]}, "negative must be one or one per prompt"),
        ({"prompt": "a", "seed": [1, 2]}, "seed must be one or one per picture"),
        ({"prompt": "a", "seed": 1, "generator": torch.Generator()}, "seed and generator"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 3, 3)[:, :3]}, "latents must have shape"),
        ({"prompt": "a", "output": "jpg"}, "output must be one of"),
        ({"prompt": "a", "part": (0.5, 1.0)}, "latents must be given for a part"),
        ({"prompt": "a", "part": (0.5, 0.4)}, "part must be"),
        ({"prompt": "a", "true_cfg_scale": 2.0}, "true_cfg_scale must be 1"),
        ({"prompt": "a", "solver": "dpmpp2m"}, "solver must be one of"),
        ({"prompt": "a", "control": [3]}, "control must be of Control"),
        ({"cond": {"context": torch.zeros(1, 7, 32)}}, "uncond must be given"),
        ({"prompt": "a", "cond": {"context": torch.zeros(1, 7, 32)}}, "prompt and negative"),
        ({"prompt": "a", "image": picture(), "image_": 1}, "image_"),
    ],
)
def test_wrong_arguments_are_named_before_any_work(
    arguments: dict[str, Any], message: str, loaded: Any
) -> None:
    pipe = loaded("sd")
    pipe.denoiser.forward = pipe.denoiser.step = None  # nothing may run
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{**LATENT, **arguments})


def test_embeddings_instead_of_prompts(loaded: Any) -> None:
    pipe = loaded("sd")
    with torch.no_grad():
        context, _ = pipe.conditioner.encoders["text_encoder"](["a", ""], layer=None, long="cut")
    given = pipe(cond={"context": context[:1]}, uncond={"context": context[1:]}, seed=1, **LATENT)
    prompted = pipe("a", seed=1, **LATENT)
    torch.testing.assert_close(given.latents, prompted.latents, rtol=1e-4, atol=1e-4)


def test_previews_and_callbacks(loaded: Any) -> None:
    pipe, seen = loaded("sd"), []
    result = pipe(
        "a", seed=1, preview=lambda shown, index: seen.append((index, shown[0])), **LATENT
    )
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    assert all(shown.size == (16, 16) and shown.mode == "RGB" for _, shown in seen)
    plain = pipe("a", seed=1, **LATENT)
    torch.testing.assert_close(result.latents, plain.latents, rtol=1e-4, atol=1e-4)


def small(name: str) -> dict[str, Any]:
    """Configurations of the public files' names, in sizes that shapes tell again."""
    unet = UNetConfig(channels=(32, 64), depths=(1, 0), num_heads=(8, 8), num_res_blocks=1)
    parts: dict[str, Any] = {
        "unet": unet,
        "vae": AutoencoderConfig(widths=(32, 32), num_res_blocks=1),
        "text_encoder": ClipConfig(inner=64, layers=2),
    }
    if name == "sdxl":
        more = {"num_heads": (1, 1), "linear_projections": True, "vector_dim": 1280 + 6 * 256}
        parts["unet"] = replace(unet, channels=(64, 64), context_dim=2048, **more)
        parts["text_encoder_2"] = ClipConfig(1280, 64, 2, 20, "gelu", projection=1280)
    if name == "sd3":
        more = {"context_size": 2048, "pooled_size": 2048, "position_size": 16}
        return {
            "transformer": MMDiTConfig(hidden_size=128, depth=2, num_heads=2, **more),
            "vae": replace(VAES["sd3"], widths=(32, 32), num_res_blocks=1),
            "text_encoder": ClipConfig(inner=64, layers=2, projection=768),
            "text_encoder_2": ClipConfig(1280, 64, 2, 20, "gelu", projection=1280),
            "text_encoder_3": T5Config(width=2048, inner=64, layers=1, heads=2, head_dim=16),
        }
    return parts


@pytest.mark.parametrize("name", PIPELINES)
def test_a_single_file_is_the_folder(name: str, tmp_path: Path) -> None:
    configs = small(name)
    single, folder = write_pipeline(name, tmp_path, dtype=torch.float32, configs=configs)
    first = fastdiff.load(single, tokenizers=folder)
    second = fastdiff.load(folder)
    assert first.modules().keys() == second.modules().keys() >= {"denoiser", "autoencoder"}
    for part, module in second.modules().items():
        state = first.modules()[part].state_dict()
        for tensor, value in module.state_dict().items():
            assert torch.equal(state[tensor], value), (part, tensor)
    solver = "euler" if name == "sd3" else "ddim"
    channels = second.autoencoder.config.latent_channels
    start = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes = {"height": 32, "width": 32, "latents": start, "guidance_scale": 5.0}
    a, b = (pipe("a cat", **sizes, solver=solver, **LATENT).latents for pipe in (first, second))
    torch.testing.assert_close(a, b)
    kind = diffusers.DiffusionPipeline.from_pretrained(folder)
    kind.set_progress_bar_config(disable=True)
    if name != "sd3":
        said = {"set_alpha_to_one": True, "timestep_spacing": "leading", "clip_sample": False}
        kind.scheduler = diffusers.DDIMScheduler.from_config(kind.scheduler.config, **said)
    expected = kind("a cat", num_inference_steps=4, output_type="latent", **sizes).images
    scale = max(1.0, float(expected.abs().max()))
    assert float((b - expected).abs().max()) <= 1e-4 * scale


def test_a_tokenizer_that_is_missing_is_not_made_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers makes a tokenizer of two tokens where it finds no files.
    monkeypatch.setattr(components, "TOKENIZERS", dict.fromkeys(components.TOKENIZERS, "no/such"))
    single, _ = write_pipeline("sd15", tmp_path, configs=small("sd15"))
    with pytest.raises(ValueError, match="prompts need the tokenizer of no/such"):
        fastdiff.load(single)("a cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold"):
        fastdiff.load(single, tokenizers=tmp_path / "empty")
    write_clip_tokenizer(tmp_path / "small", 600)
    with pytest.raises(ValueError, match="a text encoder of 49408 tokens, got one of 600"):
        fastdiff.load(single, tokenizers=tmp_path / "small")


def test_compiled_pipelines_draw_the_same(loaded: Any, saved: Any) -> None:
    control = folders.controlnet(4)
    control.save_pretrained(saved("sd").parent / "control")
    net = fastdiff.load(saved("sd").parent / "control")
    plain, compiled = loaded("sd"), loaded("sd").compile()
    assert compiled is not plain
    call = {"image": picture(), "mask": picture().convert("L"), "seed": 1, "solver": "ddim"}
    call |= {"control": [Control(net, picture(), 0.7)], **LATENT, "steps": 2}
    expected = plain("a cat", **call).latents
    result = compiled("a cat", **call).latents
    scale = float(expected.abs().max())
    assert float((result - expected).abs().max()) < 1e-4 * scale
    (wrapped,) = compiled._wrapped.values()
    assert fastdiff.report(wrapped).captures == 1


def test_inversion_finds_the_noise_of_a_picture(loaded: Any) -> None:
    pipe = loaded("sd")
    x0 = pipe("a cat", steps=20, solver="ddim", seed=1, guidance_scale=1.0, output="latent")
    errors = []
    for steps in (20, 80):
        noise = invert(
            _Latents(pipe, x0.latents), picture(), "a cat", steps=steps, guidance_scale=1.0
        )
        back = pipe(
            "a cat", latents=noise, steps=steps, solver="ddim", guidance_scale=1.0, output="latent"
        )
        difference = (back.latents - x0.latents).norm() / x0.latents.norm()
        errors.append(float(difference))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 2  # the error of the inversion is of first order


class _Latents:
    """A pipeline whose picture encodes to given latents: the autoencoder is not what is tested."""

    def __init__(self, pipe: Any, latents: torch.Tensor) -> None:
        self._pipe, self._latents = pipe, latents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)

    def encode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._latents


def test_interpolation_begins_and_ends_on_the_prompts(loaded: Any) -> None:
    pipe = loaded("sd")
    result = interpolate(pipe, ["a cat", "a dog"], frames=3, seed=[4, 9], **LATENT)
    assert len(result.latents) == 3
    for index, (prompt, seed) in ((0, ("a cat", 4)), (2, ("a dog", 9))):
        alone = pipe(prompt, seed=seed, **LATENT).latents
        scale = float(alone.abs().max())
        assert float((result.latents[index] - alone[0]).abs().max()) < 1e-4 * scale


def test_slerp_goes_along_the_arc() -> None:
    a, b = torch.randn(2, 3, 4, 16, 16, dtype=torch.float64)
    a, b = (v / v.flatten(1).norm(dim=1)[:, None, None, None] for v in (a, b))

    def angle(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left * right).flatten(1).sum(1).clamp(-1, 1).acos()

    for fraction in (0.0, 0.25, 0.5, 1.0):
        between = slerp(a, b, fraction)
        one = torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(between.flatten(1).norm(dim=1), one)
        torch.testing.assert_close(angle(a, between), fraction * angle(a, b), rtol=0, atol=1e-6)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a * 2, 0.5), a * 1.5)
    with pytest.raises(ValueError, match="b must have a's shape"):
        slerp(a, b[:1], 0.5)


def test_an_upsampler_sees_the_enlarged_picture() -> None:
    from fastdiff.models.unet import UNet

    config = UNetConfig(
        in_channels=6, out_channels=6, channels=(32, 32), depths=(0, 0), middle_depth=1,
        num_heads=(4, 4), num_res_blocks=1, context_dim=None,
    )  # fmt: skip
    model = folders.randomise(UNet(config)).requires_grad_(False)
    small = torch.rand(2, 3, 8, 8) * 2 - 1
    recipe = Recipe(fastdiff.solvers.get_schedule("linear"), "eps", "ddim")
    result = enlarge(model, small, recipe, size=(16, 16), steps=3, seed=1)
    large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear")
    expected = sample(
        lambda x, t: model(torch.cat([x, large], dim=1), t)[:, :3],
        (2, 3, 16, 16),
        solver="ddim",
        steps=3,
        schedule="linear",
        seed=1,
    )
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    other = enlarge(model, small, recipe, size=(16, 16), steps=3, seed=1, noise=0.5)
    assert float((other - result).abs().max()) > 1e-3
    with pytest.raises(ValueError, match="model must take 8 channels"):
        enlarge(model, torch.zeros(1, 4, 8, 8), recipe, size=(16, 16))


def test_a_lora_of_a_pipeline(loaded: Any) -> None:
    pipe = loaded("sd")
    before = pipe("a cat", seed=1, **LATENT).latents
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {
        f"{key}.lora_A.weight": torch.randn(2, 64) * 0.3,
        f"{key}.lora_B.weight": torch.randn(64, 2) * 0.3,
    }
    name = pipe.load_lora(tensors, keep_originals=True)
    assert float((pipe("a cat", seed=1, **LATENT).latents - before).abs().max()) > 1e-3
    pipe.set_lora_scale(name, 0.0)
    torch.testing.assert_close(pipe("a cat", seed=1, **LATENT).latents, before)
    pipe.remove_lora(name)
    assert torch.equal(pipe("a cat", seed=1, **LATENT).latents, before)


def test_the_readmes_pictures(saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    text = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = (one for one in re.findall(r"```python\n(.*?)```", text, re.S) if "Control(" in one)
    shutil.copytree(saved("sd"), tmp_path / "stable-diffusion-v1-5")
    folders.controlnet(4).save_pretrained(tmp_path / "canny")
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {f"{key}.lora_A.weight": torch.ones(2, 64), f"{key}.lora_B.weight": torch.ones(64, 2)}
    save_file(lora, tmp_path / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"mask": picture().convert("L"), "edges": picture()}
    exec(compile(code, "README.md", "exec"), names)
    assert images.read_settings("sea-001.png")["prompt"] == "a harbour"
    assert names["pipe"].denoiser._compiled_call_impl is not None


def test_a_refiner_draws_other_noise_than_its_base(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdiff.pipelines import pipeline, refine

    plain, seeds = pipeline.sample, []

    def spying(*args: Any, **kwargs: Any) -> Any:
        seeds.append(kwargs["seed"])
        return plain(*args, **kwargs)

    monkeypatch.setattr(pipeline, "sample", spying)
    options = {"seed": 7, "solver": "euler_ancestral", "height": 32, "width": 32, **LATENT}
    result = refine(loaded("sdxl"), loaded("refiner"), "a cat", switch=0.5, **options)
    assert seeds[0] == [7]
    assert seeds[1] != seeds[0]
    assert result.settings[0]["seed"] == 7


def test_settings_repeat_what_a_solver_was_told(loaded: Any) -> None:
    options = {**LATENT, "solver": "ddim", "solver_options": {"eta": 0.5}, "seed": 1}
    scales = [3.0, 2.0, 2.0, 1.5]
    result = loaded("sd")(["a"] * 4, guidance_scale=scales, batch_size=2, **options)
    for entry in result.settings:
        assert entry["solver_options"] == {"eta": 0.5}
        assert list(entry["guidance_scale"]) == scales
