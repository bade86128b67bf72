"""The video DiT (Latte) against diffusers' independent implementation with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformer_cases as cases

from fastdiff.checkpoints.layouts.video_dit import FAMILY, diffusers
from fastdiff.models.video_dit import CONFIGS, VideoDiT, VideoDiTConfig

SMALL = VideoDiTConfig(
    sample_size=8, in_channels=3, out_channels=6, hidden_size=48, depth=2, num_heads=4,
    context_size=20, frames=5,
)  # fmt: skip


def reference(entries: dict[str, Any]) -> torch.nn.Module:
    return pytest.importorskip("diffusers").LatteTransformer3DModel(**entries)


def inputs(
    dtype: torch.dtype = torch.float32, frames: int = 5, sides: tuple[int, int] = (6, 10)
) -> tuple[torch.Tensor, ...]:
    """x (its sides differ, and are not the configuration's), t, context."""
    return (
        cases.random(2, 3, frames, *sides, seed=1).to(dtype),
        torch.tensor([731, 12]),
        cases.random(2, 7, 20, seed=2).to(dtype),
    )


@pytest.mark.parametrize(
    ("frames", "sides", "eps"),
    [(5, (6, 10), 1e-6), (1, (8, 8), 1e-3)],
    ids=["video", "one frame, another eps"],
)
def test_outputs_are_those_of_diffusers(frames: int, sides: tuple[int, int], eps: float) -> None:
    config = replace(SMALL, norm_eps=eps)
    model = cases.randomise(VideoDiT(config))
    other = reference(FAMILY.to_diffusers(config)).eval()
    other.load_state_dict(cases.written(diffusers(config), model.state_dict()))

    def right(other: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        x, t, context = inputs(dtype, frames, sides)
        return other(x, timestep=t, encoder_hidden_states=context).sample

    cases.check_outputs(model, other, lambda m, dtype: m(*inputs(dtype, frames, sides)), right)


def test_fewer_frames_are_the_first_moments() -> None:
    """Two frames have the positions of the first two; diffusers takes all frames or one."""
    model = cases.randomise(VideoDiT(SMALL))
    other = reference(FAMILY.to_diffusers(replace(SMALL, frames=2))).eval()
    other.load_state_dict(cases.written(diffusers(SMALL), model.state_dict()))
    x, t, context = inputs(frames=2)
    theirs = other(x, timestep=t, encoder_hidden_states=context).sample
    torch.testing.assert_close(model(x, t, context), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(name: str) -> None:
    cases.check_names(FAMILY, CONFIGS[name], reference)


def test_a_folder_with_entries_of_the_class_before() -> None:
    """The public one has entries that diffusers' class no longer takes, off or without effect."""
    older = {"attention_type": "default", "double_self_attention": False, "norm_num_groups": 32}
    older |= {"num_vector_embeds": None, "only_cross_attention": False, "upcast_attention": False}
    entries = {**FAMILY.to_diffusers(CONFIGS["Latte-1"]), **older}
    assert FAMILY.from_diffusers(entries) == CONFIGS["Latte-1"]


def test_programs() -> None:
    x, _, context = inputs()
    steps = torch.tensor([[999.0, 500.5], [3.0, 0.0], [1.0, 750.0]])
    cases.check_programs(cases.randomise(VideoDiT(SMALL)), x, steps, context)


def test_compiled() -> None:
    cases.check_compiled(cases.randomise(VideoDiT(SMALL)), inputs)


def test_gradients() -> None:
    cases.check_gradients(cases.randomise(VideoDiT(SMALL)), inputs())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 6, 6)}, ValueError, r"x must have shape \[2, 3, F, H, W\], got"),
        (
            {"x": torch.zeros(1, 3, 5, 6, 6)},
            ValueError,
            r"x must have shape \[2, 3, F, H, W\], got",
        ),
        ({"x": torch.zeros(2, 3, 6, 6, 6)}, ValueError, "x must have 1..5 frames, got 6"),
        ({"x": torch.zeros(2, 3, 5, 5, 6)}, ValueError, "sides that are multiples of 2, got"),
        ({"t": torch.zeros(3)}, ValueError, r"t must have shape \[2\], got \[3\]"),
        ({"context": torch.zeros(2, 7, 3)}, ValueError, r"context must have shape \[B, L, 20\]"),
        ({"context": None}, TypeError, "context must be a tensor, got NoneType"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(zip(("x", "t", "context"), inputs(), strict=True))
    with pytest.raises(error, match=message):
        VideoDiT(SMALL)(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 0}, "frames must be a positive integer, got 0"),
        ({"sample_size": 7}, "sample_size must be a multiple of patch_size 2, got 7"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads 5 and of 4, got 48"),
        ({"norm_eps": 0}, "norm_eps must be a positive number, got 0"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate', got 'geglu'"),
        ({"cross_attention_dim": 7}, "cross_attention_dim must be 48, got 7"),
        ({"caption_channels": None}, "caption_channels must be given, got None"),
        ({"double_self_attention": True}, "double_self_attention must be off"),
    ],
)
def test_bad_entries(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILY.from_diffusers({**FAMILY.to_diffusers(SMALL), **change})
    with pytest.raises(ValueError, match="activation_fn must be 'gelu-approximate', got 'geglu'"):
        FAMILY.from_diffusers({})


def test_other_files_are_not_recognised() -> None:
    assert FAMILY.recognise(cases.shapes(VideoDiT(SMALL).state_dict())) is None
    with pytest.raises(TypeError, match="config must be a VideoDiTConfig"):
        VideoDiT("Latte-1")  # type: ignore[arg-type]
