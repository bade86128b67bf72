"""U-Nets with text against diffusers' UNet2DConditionModel, names, shapes and outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from formulas import fill, numbers
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils  # noqa: E402
from unets import FOLDERS, TINY_UNET, UNET, as_dtype, pair, single_file, theirs  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.compiler import report  # noqa: E402
from fastdiff.models.unet import CONFIGS, UNet, UNetConfig  # noqa: E402
from fastdiff.testing import assert_within_2x  # noqa: E402

_ALL = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
_XL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 8 * 6,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
}
# Together they take every branch that diffusers' U-Net has in common with ours.
CASES: dict[str, dict[str, Any]] = {
    "sd": {},
    "xl": _XL,
    "lcm": {"time_cond_proj_dim": 16, "block_out_channels": (32, 48, 64), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    "upscaler": {"num_class_embeds": 10, "in_channels": 7, "only_cross_attention": (True, False),
        "use_linear_projection": True, "resnet_time_scale_shift": "scale_shift",
        "down_block_types": _ALL[0], "up_block_types": _ALL[1]},
    "short": {"mid_block_type": "UNetMidBlock2D"},
}  # fmt: skip


def inputs(name: str, channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ours, diffusers'), with numbers that bfloat16 can represent and a picture of odd size."""
    x, context = numbers("x", 2, channels, 11, 14), numbers("context", 2, 7, 32)
    x, context = 2 * x.bfloat16().float(), 2 * context.bfloat16().float()
    t = torch.tensor([3, 801])
    ours: dict[str, Any] = {"x": x, "t": t, "context": context}
    other: dict[str, Any] = {"sample": x, "timestep": t, "encoder_hidden_states": context}
    if name == "xl":
        pooled, sizes = numbers("pooled", 2, 32).bfloat16().float(), [[64, 48, 0, 8, 64, 48]] * 2
        ours |= {"pooled": pooled, "sizes": torch.tensor(sizes)}
        added = {"text_embeds": pooled, "time_ids": torch.tensor(sizes)}
        other |= {"added_cond_kwargs": added}
    if name == "lcm":
        scales = torch.tensor([7.5, 1.25])
        wave = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        other |= {"timestep_cond": wave(None, scales - 1, embedding_dim=16)}
        ours |= {"guidance": scales}
    if name == "upscaler":
        ours |= {"y": torch.tensor([1, 9])}
        other |= {"class_labels": torch.tensor([1, 9])}
    return ours, other


def run(model: UNet, given: dict[str, Any]) -> Tensor:
    cond = {k: v for k, v in given.items() if k not in ("x", "t", "pooled", "sizes")}
    if "pooled" in given:
        cond["y"] = model.vector(given["pooled"], given["sizes"])
    return model(given["x"], given["t"], **cond)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, UNet, Any]:
    return request.param, *pair(UNET, {**TINY_UNET, **CASES[request.param]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_agrees_with_diffusers(case: tuple[str, UNet, Any], dtype: torch.dtype) -> None:
    name, model, other = case
    ours, given = inputs(name, model.config.in_channels)
    keep = {k: ours[k] for k in ("guidance", "sizes") if k in ours}  # these stay float32
    with torch.no_grad():
        mine = run(as_dtype(model, dtype), as_dtype(ours, dtype) | keep)
        right = as_dtype(other, torch.float64)(**as_dtype(given, torch.float64)).sample
        torch_result = as_dtype(other, dtype)(**as_dtype(given, dtype)).sample
    assert right.std() > 0.1
    assert_within_2x(mine, right, torch_result, name)


def test_gradients_are_diffusers(case: tuple[str, UNet, Any]) -> None:
    name, model, other = (as_dtype(each, torch.float64) for each in case)
    ours, given = (as_dtype(each, torch.float64) for each in inputs(name, model.config.in_channels))
    for each in (model, other):
        each.requires_grad_()
    run(model, ours).square().sum().backward()
    other(**given).sample.square().sum().backward()
    right = dict(other.named_parameters())
    for mine, source in UNET.diffusers(model.config).items():
        grad = model.get_parameter(mine).grad
        expected = right[source.keys[0]].grad.reshape(grad.shape)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


def test_three_programs(case: tuple[str, UNet, Any]) -> None:
    """All steps at once are one step at a time, and prompt, schedule and step are forward."""
    name, model, _ = case
    model = as_dtype(model, torch.float64)
    given = as_dtype(inputs(name, model.config.in_channels)[0], torch.float64)
    cond = {k: v for k, v in given.items() if k not in ("x", "t", "pooled", "sizes")}
    if name == "xl":
        cond["y"] = model.vector(given["pooled"], given["sizes"])
    times = torch.tensor([[3, 801], [999, 0], [500, 500]])
    with torch.no_grad():
        prompt = model.prompt(**cond)
        together = model.schedule(times, prompt)
        for step, t in enumerate(times):
            alone = model.schedule(t, prompt)
            for one, values in zip(alone, together, strict=True):
                torch.testing.assert_close(values[step], one, rtol=1e-12, atol=1e-12)
            result = model.step(given["x"], [values[step] for values in together], prompt)
            torch.testing.assert_close(result, model(given["x"], t, **cond), rtol=1e-9, atol=1e-9)


def test_channels_last(case: tuple[str, UNet, Any]) -> None:
    name, model, _ = case
    ours, _ = inputs(name, model.config.in_channels)
    last = {**ours, "x": ours["x"].contiguous(memory_format=torch.channels_last)}
    with torch.no_grad():
        result = run(as_dtype(model, torch.float32).to(memory_format=torch.channels_last), last)
        torch.testing.assert_close(result, run(model, ours), rtol=1e-4, atol=1e-5)


def test_compiled() -> None:
    model, other = pair(UNET, {**TINY_UNET, **_XL})
    ours, given = inputs("xl", 4)
    cond = {"context": ours["context"], "y": model.vector(ours["pooled"], ours["sizes"])}
    with torch.no_grad():
        compiled = fastdiff.compile(model)
        mine = compiled(ours["x"], ours["t"], **cond)
        (graph,) = report(model).graphs
        theirs = fastdiff.compile(copy.deepcopy(other))
        theirs(**given)
        (by_passes,) = report(theirs).graphs
        # What passes make of diffusers' code, ours calls itself, but for the sums before norms.
        name = "add_group_norm_silu"
        assert graph.fused[name] == by_passes.fused[name] > 0
        assert graph.programs["step"]["nodes"] <= by_passes.programs["step"]["nodes"]
        right = as_dtype(other, torch.float64)(**as_dtype(given, torch.float64)).sample
        assert_within_2x(mine, right, other(**given).sample)


@pytest.mark.parametrize("name", FOLDERS)
def test_public_folders(name: str) -> None:
    """config.json, names and shapes of the public folders; and the official single file's names
    through diffusers' own converter."""
    with torch.device("meta"):
        other = theirs(UNET, FOLDERS[name])
        ours = {k: tuple(v.shape) for k, v in UNET.build(CONFIGS[name]).state_dict().items()}
    assert UNET.from_diffusers(FOLDERS[name]) == CONFIGS[name]
    assert UNET.from_diffusers(dict(other.config)) == CONFIGS[name]
    written = UNET.to_diffusers(CONFIGS[name])
    assert UNET.from_diffusers(written) == CONFIGS[name]
    with torch.device("meta"):
        again = type(other).from_config(written)
    right = {k: tuple(v.shape) for k, v in other.state_dict().items()}
    assert right == {k: tuple(v.shape) for k, v in again.state_dict().items()}
    layout = UNET.diffusers(CONFIGS[name])
    assert {source.keys[0]: ours[mine] for mine, source in layout.items()} == right
    assert UNET.recognise(ours) == CONFIGS[name]
    if CONFIGS[name].guidance_dim is None:  # which the converter does not know
        file = {f"{UNET.prefixes[0]}{mine}": mine for mine in ours}
        converted = single_file_utils.convert_ldm_unet_checkpoint(file, dict(other.config))
        assert converted == {source.keys[0]: mine for mine, source in layout.items()}


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(
            channels=(32, 64), depths=(1, 0), num_heads=(8, 8), context_dim=24, num_res_blocks=1
        ),
        UNetConfig(
            *(6, (64, 64, 128)), depths=(0, 2, 1), num_heads=(1, 1, 2), context_dim=32,
            linear_projections=True, vector_dim=48, cross_only=(1,), middle_depth=3,
        ),
        UNetConfig(
            channels=(64, 128), depths=(0, 1), num_heads=(1, 2), context_dim=None,
            num_classes=7, scale_shift=True, resblock_updown=True, model_channels=32,
        ),
    ],
)  # fmt: skip
def test_unknown_sizes_are_recognised(config: UNetConfig) -> None:
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in UNet(config).state_dict().items()}
    assert UNET.recognise(shapes) == config
    for needed in ("out.2.weight", "time_embed.0.weight", "input_blocks.0.0.weight"):
        assert UNET.recognise({k: v for k, v in shapes.items() if k != needed}) is None
        assert UNET.recognise({**shapes, needed: ()}) is None
    for missing in ("input_blocks.1.0.out_layers.3.weight", "middle_block.0.emb_layers.1.bias"):
        assert UNET.recognise({k: v for k, v in shapes.items() if k != missing}) == config


def test_tiny_pair_as_a_single_file() -> None:
    model, other = pair(UNET, {**TINY_UNET, "norm_num_groups": 32})
    file = single_file(UNET, model)
    state = {name.removeprefix(UNET.prefixes[0]): value for name, value in file.items()}
    config = UNET.recognise({name: tuple(value.shape) for name, value in state.items()})
    assert config == model.config
    converted = single_file_utils.convert_ldm_unet_checkpoint(file, dict(other.config))
    right = other.state_dict()
    assert converted.keys() == right.keys()
    assert all(torch.equal(converted[name], right[name]) for name in right)


def test_residuals_reach_the_skips_in_order() -> None:
    model, other = pair(UNET, TINY_UNET)
    ours, given = inputs("sd", 4)
    ours["x"] = given["sample"] = ours["x"][..., :10, :]
    sides = [(10, 14), (10, 14), (5, 7), (5, 7), (5, 7)]
    widths = [*model.skip_channels, 64]
    residuals = [
        numbers(f"residual{n}", 2, width, *side).float()
        for n, (width, side) in enumerate(zip(widths, sides, strict=True))
    ]
    more = {
        "down_block_additional_residuals": residuals[:-1],
        "mid_block_additional_residual": residuals[-1],
    }
    with torch.no_grad():
        prompt = model.prompt(ours["context"])
        mine = model.step(ours["x"], model.schedule(ours["t"], prompt), prompt, residuals)
        wide = as_dtype(given | more, torch.float64)
        right = as_dtype(other, torch.float64)(**wide).sample
        assert_within_2x(mine, right, other(**given, **more).sample)
        with pytest.raises(ValueError, match="residuals must be 5 tensors, got 4"):
            model.step(ours["x"], model.schedule(ours["t"], prompt), prompt, residuals[1:])


SMALL = UNetConfig(
    channels=(32, 64), depths=(1, 0), num_heads=(4, 4), context_dim=24, num_res_blocks=1,
    vector_dim=40, guidance_dim=16, size_dim=8,
)  # fmt: skip


def good() -> dict[str, Tensor]:
    return {
        "x": torch.zeros(2, 4, 8, 8), "t": torch.zeros(2), "context": torch.zeros(2, 3, 24),
        "y": torch.zeros(2, 40), "guidance": torch.ones(2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8, 8)}, r"x must have shape \[B, 4, H, W\], got \[2, 3, 8, 8\]"),
        ({"x": torch.zeros(2, 4, 8)}, "x must have shape"),
        ({"x": torch.zeros(3, 4, 8, 8)}, "t must have x's batch 3, got 2"),
        ({"t": torch.zeros(())}, r"t must have shape \[B\] or \[S, B\], got \[\]"),
        ({"t": torch.zeros(3)}, "t must have the condition's batch 2, got 3"),
        ({"context": None}, r"context must be given, \[B, S, 24\]"),
        ({"context": torch.zeros(2, 3, 25)}, r"context must have shape \[B, S, 24\], got"),
        ({"y": None}, r"y must be given, \[B, 40\]"),
        ({"y": torch.zeros(2, dtype=torch.int64)}, r"y must have shape \[B, 40\], got \[2\]"),
        ({"y": torch.zeros(3, 40)}, "y must have the batch of 2, got 3"),
        ({"guidance": None}, r"guidance must be given, \[B\]"),
        ({"guidance": torch.ones(2, 1)}, r"guidance must have shape \[B\], got \[2, 1\]"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    model = fill(UNet(SMALL))
    model(**good())
    with pytest.raises(ValueError, match=message):
        model(**{**good(), **change})


def test_bad_labels_and_vectors() -> None:
    with torch.device("meta"):
        plain = UNet(replace(SMALL, vector_dim=None, guidance_dim=None))
        labels = UNet(replace(SMALL, vector_dim=None, guidance_dim=None, num_classes=5))
        vector = UNet(SMALL)
    text = torch.zeros(2, 3, 24)
    with pytest.raises(ValueError, match="y must be None for this model, got a tensor"):
        plain.prompt(text, torch.zeros(2))
    with pytest.raises(ValueError, match="guidance must be None for this model"):
        plain.prompt(text, guidance=torch.zeros(2))
    with pytest.raises(TypeError, match=r"y must be integers, got torch.float32"):
        labels.prompt(text, torch.zeros(2))
    with pytest.raises(ValueError, match=r"must have P \+ 8 N = 40, got \[2, 32\] and \[2, 2\]"):
        vector.vector(torch.zeros(2, 32), torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"config must be a UNetConfig, as CONFIGS\['sd1'\]"):
        UNet("sd1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": ()}, "channels must name at least one level"),
        ({"channels": [32, 64]}, r"channels must be a tuple of integers of at least 1, got \[32"),
        ({"channels": (32, 40)}, "channels must be multiples of num_groups 32, got 40"),
        ({"num_heads": (5, 4)}, "channels must be multiples of num_heads 5, got 32"),
        ({"num_heads": (4, 5)}, "channels must be multiples of num_heads 5, got 64"),
        ({"depths": (1,)}, r"depths must have 2 levels, got \(1,\)"),
        ({"depths": (1, -1)}, "depths must be a tuple of integers of at least 0"),
        ({"depths": (2, 0), "context_dim": None}, "depths must be 0 or 1 without a context_dim"),
        ({"cross_only": (1,)}, r"cross_only must name levels that attend, got \(1,\)"),
        ({"num_classes": 3}, "vector_dim must be None with num_classes, got 40"),
        ({"num_res_blocks": 0}, "num_res_blocks must be an integer of at least 1, got 0"),
        ({"scale_shift": 1}, "scale_shift must be True or False, got 1"),
        ({"model_channels": 33}, "model_channels must be even, got 33"),
        ({"guidance_dim": 7}, "guidance_dim must be even and at least 4, got 7"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn must be 'silu' in a U-Net's config.json, got 'gelu'"),
        ({"encoder_hid_dim": 64}, "encoder_hid_dim must be None"),
        ({"something": 1}, "something must be absent .* got 1"),
        ({"class_embed_type": "projection"}, "class_embed_type must be None, got 'projection'"),
        ({"addition_embed_type": "image"}, "addition_embed_type must be None or 'text_time'"),
        ({"layers_per_block": [1, 2]}, "layers_per_block must be the same in all levels"),
        ({"mid_block_type": None}, "mid_block_type must be one of"),
        ({"num_attention_heads": 4}, "num_attention_heads must be None"),
        ({"down_block_types": ["AttnDownBlock2D"] * 2}, "down_block_types must be of"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types must mirror down_block_types"),
        ({"transformer_layers_per_block": [[1], [2]]}, "transformer_layers_per_block must be an"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift must be"),
    ],
)
def test_folders_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNET.from_diffusers({**TINY_UNET, **change})


def refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_diffusers_layout_cannot_hold() -> None:
    refused(lambda: UNET.diffusers(CONFIGS["adm-64"]), "one of a model with text")
    refused(lambda: UNET.to_diffusers(CONFIGS["adm-64"]), "one of a model with text")
    odd = replace(SMALL, depths=(1, 2))
    refused(lambda: UNET.to_diffusers(odd), "middle_depth must be the last level's 2 .* got 1")
