"""MMDiT (SD3, SD3.5) against diffusers' independent implementation with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformer_cases as cases

from fastdiff.checkpoints.layouts.mmdit import FAMILY, diffusers
from fastdiff.models.mmdit import CONFIGS, MMDiT, MMDiTConfig

SMALL = MMDiTConfig(
    sample_size=12, in_channels=4, hidden_size=128, depth=3, num_heads=2, context_size=24,
    pooled_size=20, position_size=9,
)  # fmt: skip
NORMED = replace(SMALL, qk_norm=True, dual_blocks=(0, 1))
# The last block asks for no queries of the text.
UNUSED = ("joint_blocks.2.context_block.attn.ln_q.weight",)


def reference(entries: dict[str, Any]) -> torch.nn.Module:
    return pytest.importorskip("diffusers").SD3Transformer2DModel(**entries)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x (its sides differ, and are not the table's), t, context, y."""
    return (
        cases.random(2, 4, 8, 14, seed=1).to(dtype),
        torch.tensor([731.0, 12.5]),
        cases.random(2, 7, 24, seed=2).to(dtype),
        cases.random(2, 20, seed=3).to(dtype),
    )


@pytest.mark.parametrize("config", [SMALL, NORMED], ids=["SD3", "SD3.5"])
def test_outputs_are_those_of_diffusers(config: MMDiTConfig) -> None:
    model = cases.randomise(MMDiT(config))
    other = reference(FAMILY.to_diffusers(config))
    mine = other.state_dict()["pos_embed.pos_embed"]
    assert torch.equal(model.pos_embed, mine)
    other.load_state_dict(cases.written(diffusers(config), model.state_dict()))

    def right(other: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        x, t, context, y = inputs(dtype)
        return other(x, encoder_hidden_states=context, pooled_projections=y, timestep=t).sample

    cases.check_outputs(model, other.eval(), lambda m, dtype: m(*inputs(dtype)), right)


def test_outputs_are_those_of_the_official_code() -> None:
    """Stability-AI/sd3.5, whose width is 64 for each block: data/mmdit.json says how it was run."""
    model = cases.randomise(MMDiT(replace(NORMED, hidden_size=192, num_heads=3))).double()
    values = model(*inputs(torch.float64)).flatten()[::29]
    golden = cases.golden("mmdit")["values"]
    torch.testing.assert_close(values.tolist(), golden, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(name: str) -> None:
    ours = cases.check_names(FAMILY, CONFIGS[name], reference)
    assert cases.digest(cases.shapes(ours.state_dict())) == cases.golden("mmdit")["names"][name]
    # diffusers' own converter reads what has our names, which are Stability's.
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = {f"model.diffusion_model.{k}": v for k, v in ours.state_dict().items()}
    converted = utils.convert_sd3_transformer_checkpoint_to_diffusers(state)
    with torch.device("meta"):
        theirs = reference(FAMILY.to_diffusers(CONFIGS[name]))
    assert cases.shapes(converted) == cases.shapes(theirs.state_dict())


def test_layout_is_that_of_diffusers_converter() -> None:
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    model = cases.randomise(MMDiT(NORMED), keep=())
    layout, state = diffusers(NORMED), model.state_dict()
    mine = cases.written(layout, state)
    theirs = utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    back = cases.read(layout, mine, state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_programs() -> None:
    x, _, *cond = inputs()
    steps = torch.tensor([[1000.0, 500.5], [3.0, 0.0], [1.0, 750.0]])
    cases.check_programs(cases.randomise(MMDiT(NORMED)), x, steps, *cond)


def test_compiled() -> None:
    cases.check_compiled(cases.randomise(MMDiT(NORMED)), inputs)


def test_gradients() -> None:
    cases.check_gradients(cases.randomise(MMDiT(NORMED)), inputs(), without=UNUSED)


def test_a_table_of_positions_bounds_the_sides() -> None:
    model = MMDiT(SMALL)
    _, t, context, y = inputs()
    assert model(torch.zeros(2, 4, 18, 18), t, context, y).shape == (2, 4, 18, 18)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"x": torch.zeros(2, 3, 8, 8)},
            ValueError,
            r"x must have shape \[2, 4, H, W\], got \[2, 3",
        ),
        (
            {"x": torch.zeros(1, 4, 8, 8)},
            ValueError,
            r"x must have shape \[2, 4, H, W\], got \[1, 4",
        ),
        ({"x": torch.zeros(2, 4, 7, 8)}, ValueError, "sides that are multiples of 2, up to 18"),
        ({"x": torch.zeros(2, 4, 8, 20)}, ValueError, "sides that are multiples of 2, up to 18"),
        ({"t": torch.zeros(3)}, ValueError, r"t must have shape \[2\], got \[3\]"),
        ({"t": 5.0}, TypeError, "t must be a tensor, got float"),
        ({"context": None}, TypeError, "context must be a tensor, got NoneType"),
        ({"context": torch.zeros(2, 7, 23)}, ValueError, r"context must have shape \[B, L, 24\]"),
        ({"y": torch.zeros(2, 24)}, ValueError, r"y must have shape \[2, 20\], got \[2, 24\]"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(zip(("x", "t", "context", "y"), inputs(), strict=True))
    with pytest.raises(error, match=message):
        MMDiT(SMALL)(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"num_heads": 3}, "hidden_size must be a multiple of num_heads 3 and of 4, got 128"),
        ({"dual_blocks": [3]}, r"dual_blocks must be numbers of blocks, 0..2, got \(3,\)"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"out_channels": 8}, "out_channels must be 16, got 8"),
        ({"caption_projection_dim": 7}, "caption_projection_dim must be 1152, got 7"),
        ({"qk_norm": "layer_norm"}, "qk_norm must be None or 'rms_norm', got 'layer_norm'"),
        ({"register_tokens": 4}, "register_tokens must be off"),
    ],
)
def test_bad_entries(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILY.from_diffusers(entries)


def test_other_files_are_not_recognised() -> None:
    assert FAMILY.recognise({"x_embedder.proj.weight": (1, 2, 3, 4)}) is None
    with pytest.raises(TypeError, match=r"config must be an MMDiTConfig"):
        MMDiT("SD3-medium")  # type: ignore[arg-type]
