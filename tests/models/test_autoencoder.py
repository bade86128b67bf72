"""AutoencoderKL against diffusers' with the same weights: names, numbers, tiles, upcasting."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import fastdiff
from fastdiff.checkpoints.layouts.autoencoder import FAMILY
from fastdiff.models.autoencoder import CONFIGS, AutoencoderConfig, AutoencoderKL, Gaussian
from fastdiff.models.tiling import apply_tiled
from fastdiff.testing import assert_within_2x

diffusers = pytest.importorskip("diffusers")

TINY = AutoencoderConfig(latent_channels=4, widths=(32, 64, 64), num_res_blocks=1, sample_size=32)
# SD3's and FLUX's kind, without attention, of other channels.
BARE = replace(
    TINY,
    in_channels=2,
    out_channels=5,
    latent_channels=3,
    widths=(8, 16, 16),
    num_groups=4,
    num_res_blocks=2,
    mid_attention=False,
    quant_conv=False,
    post_quant_conv=False,
    scaling=1.5,
    shift=0.25,
)


def theirs_of(config: AutoencoderConfig):
    return diffusers.AutoencoderKL.from_config(FAMILY.to_diffusers(config))


def pair(config: AutoencoderConfig):
    """Ours and diffusers' of the same random weights, float32."""
    torch.manual_seed(0)
    model = AutoencoderKL(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = theirs_of(config).eval()
    shapes = {name: value.shape for name, value in other.state_dict().items()}
    layout = FAMILY.diffusers(config)
    state = {
        key: value.reshape(shapes[key])
        for name, ours in model.state_dict().items()
        for key, value in layout[name].write(ours).items()
    }
    other.load_state_dict(state)
    return model, other


@pytest.mark.parametrize("name", [*CONFIGS, "tiny", "bare"])
def test_names_and_shapes_are_diffusers(name: str) -> None:
    config = {**CONFIGS, "tiny": TINY, "bare": BARE}[name]
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config).state_dict(), theirs_of(config).state_dict()
    layout = FAMILY.diffusers(config)
    assert list(layout) == list(ours)
    assert {key for source in layout.values() for key in source.keys} == set(theirs)
    for key, source in layout.items():
        other = theirs[source.keys[0]]
        assert source.read([other], tuple(ours[key].shape)).shape == ours[key].shape, key
        if ours[key].shape != other.shape:
            assert ".attn_1." in key
    shapes = {key: tuple(value.shape) for key, value in ours.items()}
    found = FAMILY.recognise(shapes)
    untold = ("scaling", "shift", "sample_size", "force_upcast", "num_groups")
    if config.num_groups != 32:  # not in the file: LDM's are 32
        assert found is None
        return
    assert replace(found, **{field: getattr(config, field) for field in untold}) == config
    assert FAMILY.from_diffusers(FAMILY.to_diffusers(config)) == config


def test_a_single_file_is_what_diffusers_converts() -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model, other = pair(TINY)
    single = {f"first_stage_model.{name}": value for name, value in model.state_dict().items()}
    converted = convert_ldm_vae_checkpoint(single, FAMILY.to_diffusers(TINY))
    state = other.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)


def test_older_names_are_those_diffusers_renames() -> None:
    _, other = pair(TINY)
    inverse = {now: before for before, now in FAMILY.older.items()}
    state = other.state_dict()
    older = {}
    for name, value in state.items():
        for now, before in inverse.items():
            name = name.replace(f".{now}.", f".{before}.")
        older[name] = value
    assert sum(name not in state for name in older) == 16
    other._fix_state_dict_keys_on_load(older)
    assert older.keys() == state.keys()


@pytest.mark.parametrize("config", [TINY, BARE], ids=["tiny", "bare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_encodes_and_decodes_as_diffusers(config: AutoencoderConfig, dtype: torch.dtype) -> None:
    model, other = pair(config)
    oracle = copy.deepcopy(other).double()
    images = torch.randn(2, config.in_channels, 24, 40).to(dtype)
    latents = torch.randn(2, config.latent_channels, 6, 10).to(dtype)
    model, other = model.to(dtype), other.to(dtype)
    for weights in (oracle.parameters(), other.parameters()):
        assert all(p.isfinite().all() for p in weights)
    oracle.load_state_dict({k: v.double() for k, v in other.state_dict().items()})

    mine, right = model.encode(images), oracle.encode(images.double()).latent_dist
    same = other.encode(images).latent_dist
    assert_within_2x(mine.mode(), right.mode(), same.mode(), "mean")
    assert_within_2x(mine.logvar, right.logvar, same.logvar, "logvar")
    exact = oracle.decode(latents.double()).sample
    assert_within_2x(model.decode(latents), exact, other.decode(latents).sample, "images")
    assert torch.equal(model(latents), model.decode(latents))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_tiles_and_slices_are_diffusers(dtype: torch.dtype) -> None:
    model, other = pair(TINY)
    model, other = model.to(dtype), other.to(dtype)
    oracle = copy.deepcopy(other).double()
    for vae in (other, oracle):
        vae.enable_tiling()
        vae.enable_slicing()
    # Three tiles and a rest one way; a rest smaller than the blended strip the other.
    images = torch.randn(2, 3, 80, 52).to(dtype)
    latents = torch.randn(2, 4, 20, 13).to(dtype)
    mine = model.encode(images, tiled=True, sliced=True)
    right = oracle.encode(images.double()).latent_dist.mode()
    assert_within_2x(mine.mode(), right, other.encode(images).latent_dist.mode(), "mean")
    result = model.decode(latents, tiled=True, sliced=True)
    exact = oracle.decode(latents.double()).sample
    assert_within_2x(result, exact, other.decode(latents).sample, "images")
    assert (result - model.decode(latents)).abs().max() > 1e-3  # tiles do change the numbers
    # No larger than a tile: whole.
    small = latents[:, :, :8, :8]
    assert torch.equal(model.decode(small, tiled=True), model.decode(small))
    assert_within_2x(
        model.decode(small, sliced=True),
        oracle.decode(small.double()).sample,
        other.decode(small).sample,
        "slices",
    )


def test_tiles_of_a_copy_are_the_image() -> None:
    image = torch.randn(1, 2, 37, 50)
    assert torch.allclose(apply_tiled(lambda x: x, image, (16, 16), False), image, atol=1e-6)


def test_a_sample_is_diffusers_and_that_of_its_generator() -> None:
    moments = torch.randn(3, 8, 4, 4) * 30
    other = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments)
    mean, logvar = moments.chunk(2, 1)
    mine = Gaussian(mean, logvar.clamp(-30, 20))

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    assert torch.equal(mine.sample(generator(1)), other.sample(generator(1)))
    seeds = [5, 6, 7]
    each = mine.sample([generator(seed) for seed in seeds])
    assert torch.equal(each, other.sample([generator(seed) for seed in seeds]))
    alone = Gaussian(mean[2:], mine.logvar[2:]).sample(generator(7))
    assert torch.equal(each[2:], alone)
    assert torch.equal(mine.sample(noise=torch.zeros_like(mean)), mean)
    assert torch.equal(mine.mode(), mean)
    with pytest.raises(ValueError, match=r"noise must have shape \[3, 4, 4, 4\]"):
        mine.sample(noise=torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match="one for each of 3 images, got 2"):
        mine.sample([generator(0)] * 2)
    with pytest.raises(ValueError, match="got both"):
        mine.sample(generator(0), noise=mean)


@torch.no_grad()
def test_float16_weights_that_overflow_run_in_float32() -> None:
    """SDXL's activations pass float16's largest number, as these do."""
    model, _ = pair(replace(TINY, force_upcast=True))
    model.decoder.conv_in.weight.mul_(3e5 / 8)
    model, latents = model.half(), torch.randn(1, 4, 4, 4).half()
    plain = AutoencoderKL(TINY).half()
    plain.load_state_dict(model.state_dict())
    assert not plain.decode(latents).isfinite().all()
    result = model.decode(latents)
    right = copy.deepcopy(model).float()
    assert result.dtype == torch.float32
    assert result.isfinite().all()
    assert torch.equal(result, right.decode(latents.float()))
    assert model.dtype == torch.float16
    encoded = model.encode(torch.randn(1, 3, 8, 8))
    assert encoded.mean.dtype == torch.float32
    # bfloat16 has the range: it stays.
    assert model.bfloat16().decode(latents.bfloat16()).dtype == torch.bfloat16


def test_scaling_is_diffusers_pipelines() -> None:
    model, _ = pair(BARE)
    latents = torch.randn(1, 3, 4, 4)
    assert torch.equal(model.scale(latents), (latents - 0.25) * 1.5)
    assert torch.allclose(model.unscale(model.scale(latents)), latents, atol=1e-6)
    assert {name: (c.scaling, c.shift) for name, c in CONFIGS.items()} == {
        "sd1": (0.18215, 0.0),
        "sdxl": (0.13025, 0.0),
        "sd3": (1.5305, 0.0609),
        "flux": (0.3611, 0.1159),
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_previews(name: str) -> None:
    with torch.device("meta"):
        model = AutoencoderKL(CONFIGS[name])
    channels = model.config.latent_channels
    grey = model.preview(torch.zeros(2, channels, 3, 5, dtype=torch.bfloat16))
    assert grey.shape == (2, 3, 3, 5)
    assert grey.dtype == torch.float32
    assert grey.abs().max() < 0.25
    wild = model.preview(100 * torch.randn(1, channels, 8, 8))
    assert wild.min() == -1
    assert wild.max() == 1
    # The matrix itself, from one channel at a time.
    units = 0.5 * torch.eye(channels)[:, :, None, None]
    rows = (model.preview(units)[:, :, 0, 0] - grey[0, :, 0, 0]) * 2
    assert rows.shape == (channels, 3)
    brightness = {"sd1": 0.3512, "sdxl": 0.3651, "sd3": -0.0922, "flux": -0.0346}
    assert float(rows[0, 0]) == pytest.approx(brightness[name], abs=1e-6)
    other = AutoencoderKL(BARE)
    with pytest.raises(ValueError, match=r"3 channels with scaling 1.5 and shift 0.25"):
        other.preview(torch.zeros(1, 3, 2, 2))


@torch.no_grad()
def test_compiled_is_eager() -> None:
    model, _ = pair(TINY)
    compiled = fastdiff.compile(model)
    latents = torch.randn(2, 4, 6, 6)
    exact = copy.deepcopy(model).double()(latents.double())
    assert_within_2x(compiled(latents), exact, model(latents))


def test_gradients_reach_every_weight() -> None:
    model, _ = pair(TINY)
    images = torch.randn(1, 3, 8, 8, requires_grad=True)
    latents = model.encode(images)
    model.decode(latents.sample()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert images.grad is not None


def test_bad_input_is_named() -> None:
    model = AutoencoderKL(TINY)
    for call, error, message in (
        (lambda: model.encode(torch.zeros(1, 4, 8, 8)), ValueError, r"images .*\[B, 3, H, W\]"),
        (lambda: model.encode(torch.zeros(3, 8, 8)), ValueError, r"images must have shape"),
        (lambda: model.encode(torch.zeros(1, 3, 8, 6)), ValueError, r"multiples of 4.*\[8, 6\]"),
        (lambda: model.decode(torch.zeros(1, 3, 2, 2)), ValueError, r"latents .*\[B, 4, H, W\]"),
        (lambda: model.decode(torch.zeros(1, 4, 2, 2).half()), TypeError, "float32 .*float16"),
        (lambda: AutoencoderKL({}), TypeError, "AutoencoderConfig"),
        (lambda: AutoencoderConfig(widths=(48,)), ValueError, r"multiples of num_groups 32.*48"),
        (lambda: AutoencoderConfig(widths=()), ValueError, "widths"),
        (lambda: AutoencoderConfig(scaling=0.0), ValueError, "scaling must be positive"),
        (lambda: AutoencoderConfig(shift="1"), ValueError, "shift must be a number"),
        (lambda: AutoencoderConfig(quant_conv=1), ValueError, "quant_conv must be a bool"),
        (lambda: AutoencoderConfig(latent_channels=0), ValueError, "latent_channels"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_config_json_that_cannot_be_is_named() -> None:
    good = FAMILY.to_diffusers(TINY)
    for change, message in (
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 3}, "down_block_types must be 3 times"),
        ({"act_fn": "relu"}, "act_fn must be 'silu', got 'relu'"),
        ({"latents_mean": [0.0] * 4}, "latents_mean must be absent"),
        ({"something_new": 3}, "something_new must be absent"),
        ({"norm_num_groups": 5}, r"config.json: widths must be positive multiples"),
    ):
        with pytest.raises(ValueError, match=message):
            FAMILY.from_diffusers({**good, **change})
    # The oldest public folder says this much.
    old = FAMILY.from_diffusers(
        {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.6.0",
            "act_fn": "silu",
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "in_channels": 3,
            "latent_channels": 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "out_channels": 3,
            "sample_size": 512,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        }
    )
    assert old == CONFIGS["sd1"]
    assert FAMILY.recognise({"x_embedder.weight": (1,)}) is None
