"""U-Nets without text against numbers and names of OpenAI's code, which cannot be installed here.

data/adm.json was written by make_adm_data.py from openai/guided-diffusion at 22e0df8 and
openai/improved-diffusion at 1bc7bbb: for the public models' flags the number of tensors, a SHA-256
of all names and shapes, and (heads, channels) of each attention; for tiny models every 17th number
of the output in three dtypes, weights and inputs by a formula.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formulas import fill, numbers
from make_adm_data import digest
from torch import Tensor

import fastdiff
from fastdiff.checkpoints.layouts.unet import FAMILY
from fastdiff.compiler import report
from fastdiff.models.unet import CONFIGS, UNet, UNetConfig
from fastdiff.models.unet_blocks import AttentionBlock
from fastdiff.testing import assert_within_2x

DATA: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "adm.json").read_text())

# The settings of make_adm_data.py, as ours.
_COMMON: dict[str, Any] = {"in_channels": 3, "context_dim": None}
SMALL = {
    "guided": UNetConfig(
        channels=(32, 64), model_channels=64, num_res_blocks=1, depths=(0, 1), num_heads=(1, 2),
        num_classes=10, scale_shift=True, resblock_updown=True, split_first=True, out_channels=6,
        **_COMMON,
    ),
    "guided-heads": UNetConfig(
        channels=(32, 64, 64), num_res_blocks=1, depths=(0, 1, 1), num_heads=(4, 4, 4),
        scale_shift=True, resblock_updown=True, out_channels=3, **_COMMON,
    ),
    "improved": UNetConfig(
        channels=(32, 64), num_res_blocks=2, depths=(1, 1), num_heads=(2, 2), num_classes=10,
        scale_shift=True, out_channels=6, **_COMMON,
    ),
    "improved-plain": UNetConfig(
        channels=(32, 64), num_res_blocks=1, depths=(0, 1), num_heads=(1, 1), out_channels=3,
        **_COMMON,
    ),
}  # fmt: skip


def inputs(config: UNetConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    given = {"x": numbers("x", 2, 3, 16, 16).bfloat16().to(dtype), "t": torch.tensor([7, 803])}
    return given | ({"y": torch.tensor([3, 9])} if config.num_classes else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_numbers_of_the_official_code(name: str, dtype: torch.dtype) -> None:
    model = fill(UNet(SMALL[name]), dtype=dtype)
    result = model(**inputs(SMALL[name], dtype)).flatten()[::17]
    stored = DATA["small"][name]
    oracle = torch.tensor(stored["float64"], dtype=torch.float64)
    theirs = torch.tensor(stored[str(dtype).removeprefix("torch.")]).to(dtype)
    assert oracle.std() > 0.1
    assert_within_2x(result, oracle, theirs, name)


@pytest.mark.parametrize("name", SMALL)
def test_all_of_the_output_is_right_in_float64(name: str) -> None:
    """float32 rounds its embeddings of the time, which are float32 in the official code."""
    model = fill(UNet(SMALL[name]), dtype=torch.float64)
    result = model(**inputs(SMALL[name], torch.float64)).flatten()[::17]
    oracle = torch.tensor(DATA["small"][name]["float64"], dtype=torch.float64)
    torch.testing.assert_close(result, oracle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DATA["public"])
def test_names_shapes_and_heads_of_the_public_models(name: str) -> None:
    with torch.device("meta"):
        model = UNet(CONFIGS[name])
    blocks = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    heads = [[block.num_heads, block.norm.num_channels] for block in blocks]
    assert {**digest(model), "heads": heads} == DATA["public"][name]
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert FAMILY.recognise(shapes) == CONFIGS[name]


def test_lsun_of_guided_diffusion_is_the_unconditional_model() -> None:
    assert CONFIGS["adm-lsun"] == CONFIGS["adm-256-uncond"]


def test_compiled() -> None:
    config = SMALL["guided"]
    model, given = fill(UNet(config)), inputs(config, torch.float32)
    wide = fill(UNet(config), dtype=torch.float64)(**inputs(config, torch.float64))
    with torch.no_grad():
        plain = model(**given)
        assert_within_2x(fastdiff.compile(model)(**given), wide, plain)
        assert len(report(model).graphs) == 1


def test_gradients_flow() -> None:
    model = fill(UNet(SMALL["guided"])).requires_grad_()
    model(**inputs(SMALL["guided"], torch.float32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_sides_must_halve_where_resblocks_do() -> None:
    model = fill(UNet(SMALL["guided"]))
    with pytest.raises(ValueError, match="x must have sides of a multiple of 2, got"):
        model(torch.zeros(1, 3, 15, 16), torch.zeros(1), y=torch.zeros(1, dtype=torch.int64))
