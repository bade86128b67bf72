"""ControlNet, alone and several on one U-Net, against diffusers' ControlNetModel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from formulas import numbers
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils
from unets import (
    CONTROL,
    CONTROL_FOLDERS,
    TINY_CONTROL,
    TINY_UNET,
    UNET,
    as_dtype,
    pair,
    theirs,
)

import fastdiff
from fastdiff.compiler import report
from fastdiff.models.controlnet import (
    CONTROLS,
    ControlledUNet,
    ControlNet,
    ControlNetConfig,
)
from fastdiff.testing import assert_within_2x

_XL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 32 + 8 * 6,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}
CASES: dict[str, dict[str, Any]] = {
    "sd": {},
    "xl": _XL,
    "pooled": {"global_pool_conditions": True, "mid_block_type": "UNetMidBlock2D"},
}


def rounded(name: str, *shape: int) -> Tensor:
    return numbers(name, *shape).bfloat16().float()


def inputs(hints: int, xl: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the condition and the state, diffusers' added conditions)."""
    given = {"x": rounded("x", 2, 4, 8, 6), "t": torch.tensor([3, 801])}
    given |= {"context": rounded("context", 2, 7, 32)}
    given |= {"hints": rounded("hint", 2, hints, 3, 16, 12).abs()}
    pooled, sizes = rounded("pooled", 2, 32), torch.tensor([[64, 48, 0, 8, 64, 48]] * 2)
    added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}} if xl else {}
    return given, added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_residuals_are_diffusers(name: str, dtype: torch.dtype) -> None:
    model, other = pair(CONTROL, {**TINY_CONTROL, **CASES[name]})
    given, added = inputs(1, name == "xl")

    def run(kind: torch.dtype) -> list[Tensor]:
        own, more, net = as_dtype(given, kind), as_dtype(added, kind), as_dtype(other, kind)
        state = own["x"], own["t"], own["context"], own["hints"][:, 0]
        skips, middle = net(*state, **more, return_dict=False)
        return [*skips, middle]

    own = as_dtype(given, dtype)
    model = as_dtype(model, dtype)
    y = None
    if added:
        y = model.vector(*(as_dtype(v, dtype) for v in added["added_cond_kwargs"].values()))
    with torch.no_grad():
        mine = model(own["x"], own["t"], own["context"], own["hints"][:, 0], y)
        right, torch_results = run(torch.float64), run(dtype)
    assert len(mine) == len(right) == len(model.skip_channels) + 1
    for number, result in enumerate(mine):
        assert right[number].std() > 0.05
        assert_within_2x(result, right[number], torch_results[number], f"residual {number}")


def controlled(scales: Any = (0.5, 0.8)) -> tuple[ControlledUNet, Any]:
    """Two ControlNets on a U-Net, and a function that is diffusers'."""
    unet, other = pair(UNET, TINY_UNET)
    nets = [pair(CONTROL, TINY_CONTROL) for _ in scales]
    with torch.no_grad():
        for number, (mine, net) in enumerate(nets):  # not the same weights in both
            mine.input_hint_block[0].weight.mul_(1 + number)
            net.controlnet_cond_embedding.conv_in.weight.mul_(1 + number)

    def run(given: dict[str, Any], dtype: torch.dtype) -> Tensor:
        given = as_dtype(given, dtype)
        total: list[Tensor] = []
        for (_, net), scale, hint in zip(nets, scales, given["hints"].unbind(1), strict=True):
            state = given["x"], given["t"], given["context"], hint, scale
            skips, middle = as_dtype(net, dtype)(*state, return_dict=False)
            each = [*skips, middle]
            total = [a + b for a, b in zip(total, each, strict=True)] if total else each
        more = {
            "down_block_additional_residuals": total[:-1],
            "mid_block_additional_residual": total[-1],
        }
        state = given["x"], given["t"], given["context"]
        return as_dtype(other, dtype)(*state, **more).sample

    return ControlledUNet(unet, [mine for mine, _ in nets], scales), run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_controls_add_up(dtype: torch.dtype) -> None:
    model, run = controlled()
    given, _ = inputs(2)
    with torch.no_grad():
        mine = as_dtype(model, dtype)(**as_dtype(given, dtype))
        assert_within_2x(mine, run(given, torch.float64), run(given, dtype))
        plain = model.unet(given["x"], given["t"], given["context"])
        model.scales = (0.0, 0.0)
        assert torch.equal(model(**given), plain)
        assert (mine.float() - plain).abs().max() > 0.1


def test_ways_to_give_hints_and_scales() -> None:
    model, _ = controlled()
    given, _ = inputs(2)
    hints = given.pop("hints")
    count = len(model.unet.skip_channels) + 1
    with torch.no_grad():
        together = model(**given, hints=hints)
        assert torch.equal(model(**given, hints=list(hints.unbind(1))), together)
        model.scales = ([0.5] * count, [0.8] * count)
        assert torch.equal(model(**given, hints=hints), together)
        model.scales = ([0.5] * (count - 1) + [0.0], 0.8)
        assert not torch.equal(model(**given, hints=hints), together)
        alone = ControlledUNet(model.unet, [model.controls[0]])
        assert torch.equal(alone(**given, hints=hints[:, 0]), alone(**given, hints=hints[:, :1]))


def test_three_programs_and_more_channels_in_the_unet() -> None:
    unet, _ = pair(UNET, {**TINY_UNET, "in_channels": 9})
    control, _ = pair(CONTROL, TINY_CONTROL)
    model = as_dtype(ControlledUNet(unet, [control]), torch.float64)
    given = as_dtype(inputs(1)[0], torch.float64)
    x, times = numbers("inpainting", 2, 9, 8, 6), torch.tensor([[3, 801], [999, 0]])
    with torch.no_grad():
        prompt = model.prompt(given["context"], hints=given["hints"])
        together = model.schedule(times, prompt)
        for step, t in enumerate(times):
            now = {
                "unet": [value[step] for value in together["unet"]],
                "controls": [[value[step] for value in each] for each in together["controls"]],
            }
            whole = model(x, t, given["context"], hints=given["hints"])
            torch.testing.assert_close(model.step(x, now, prompt), whole, rtol=1e-9, atol=1e-9)
        residuals = control.double()(x[:, :4], times[0], given["context"], given["hints"][:, 0])
        own = model.unet.prompt(given["context"])
        result = model.unet.step(x, model.unet.schedule(times[0], own), own, residuals)
        expected = model(x, times[0], given["context"], hints=given["hints"])
        torch.testing.assert_close(result, expected)


def test_compiled() -> None:
    model, run = controlled((0.8,))
    given, _ = inputs(1)
    with torch.no_grad():
        mine = fastdiff.compile(model)(**given)
        assert len(report(model).graphs) == 1
        assert_within_2x(mine, run(given, torch.float64), run(given, torch.float32))


def test_gradients_flow() -> None:
    model, _ = controlled()
    model.requires_grad_()
    model(**inputs(2)[0]).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_new_one_changes_nothing() -> None:
    with torch.no_grad():
        unet, _ = pair(UNET, TINY_UNET)
        control = ControlNet(CONTROL.from_diffusers(TINY_CONTROL))
        given, _ = inputs(1)
        mine = ControlledUNet(unet, [control])(**given)
        assert torch.equal(mine, unet(given["x"], given["t"], given["context"]))


@pytest.mark.parametrize("name", CONTROL_FOLDERS)
def test_public_folders(name: str) -> None:
    config = CONTROLS[name]
    with torch.device("meta"):
        other = theirs(CONTROL, CONTROL_FOLDERS[name])
        ours = {k: tuple(v.shape) for k, v in CONTROL.build(config).state_dict().items()}
    assert CONTROL.from_diffusers(CONTROL_FOLDERS[name]) == config
    assert CONTROL.from_diffusers(dict(other.config)) == config
    written = CONTROL.to_diffusers(config)
    assert CONTROL.from_diffusers(written) == config
    with torch.device("meta"):
        again = type(other).from_config(written)
    right = {k: tuple(v.shape) for k, v in other.state_dict().items()}
    assert right == {k: tuple(v.shape) for k, v in again.state_dict().items()}
    layout = CONTROL.diffusers(config)
    assert {source.keys[0]: ours[mine] for mine, source in layout.items()} == right
    assert CONTROL.recognise(ours) == config
    assert UNET.recognise(ours) is None
    file = {f"{CONTROL.prefixes[0]}{mine}": mine for mine in ours}
    converted = single_file_utils.convert_controlnet_checkpoint(file, dict(other.config))
    right_names = {source.keys[0]: mine for mine, source in layout.items()}
    # The converter leaves the layers of SDXL's vector out.
    assert converted == {k: mine for k, mine in right_names.items() if "add_embedding" not in k}


def test_unknown_sizes_are_recognised() -> None:
    config = ControlNetConfig(
        channels=(32, 64), depths=(1, 0), num_heads=(8, 8), context_dim=24, num_res_blocks=1,
        hint_channels=(4, 8, 12), hint_in=1,
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in ControlNet(config).state_dict().items()}
    assert CONTROL.recognise(shapes) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hints": ()}, "hints must be 2, got 0"),
        ({"hints": torch.zeros(2, 3, 16, 12)}, "hints must be 2, got 1"),
        ({"hints": torch.zeros(2, 2, 1, 16, 12)}, r"hint must have shape \[B, 3, H, W\], got"),
        ({"hints": torch.zeros(2, 2, 3, 8, 12)}, r"hint must be x's picture .* times 2, got"),
        ({"context": None}, "context must be given"),
        ({"x": torch.zeros(2, 3, 8, 6)}, r"x must have shape \[B, 4, H, W\]"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    model, _ = controlled()
    with pytest.raises(ValueError, match=message):
        model(**{**inputs(2)[0], **change})


def test_bad_parts() -> None:
    model, _ = controlled()
    control = model.controls[0]
    with pytest.raises(ValueError, match="controls must hold at least one"):
        ControlledUNet(model.unet, [])
    with pytest.raises(ValueError, match="scales must be 1 numbers"):
        ControlledUNet(model.unet, [control], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"scales must be 1 numbers \(or 5 numbers each\)"):
        ControlledUNet(model.unet, [control], [[0.5, 0.5]])
    small = ControlNet(replace(control.config, channels=(32, 32)))
    with pytest.raises(ValueError, match="controls must have the U-Net's features"):
        ControlledUNet(model.unet, [small])
    with pytest.raises(TypeError, match="config must be a ControlNetConfig"):
        ControlNet(model.unet.config)
    bgr = {**TINY_CONTROL, "controlnet_conditioning_channel_order": "bgr"}
    with pytest.raises(ValueError, match="channel_order must be 'rgb', got 'bgr'"):
        CONTROL.from_diffusers(bgr)
