"""FLUX.1 against diffusers' independent implementation with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformer_cases as cases
from torch._subclasses import FakeTensorMode

from fastdiff.checkpoints.layouts.flux import FAMILY, diffusers
from fastdiff.models.flux import CONFIGS, Flux, FluxConfig

SMALL = FluxConfig(
    in_channels=3, out_channels=3, hidden_size=48, depth=2, single_depth=2, num_heads=2,
    context_size=20, pooled_size=12, axes=(4, 8, 12),
)  # fmt: skip
SCHNELL = replace(SMALL, guidance=False)
FILL = replace(SMALL, in_channels=5)
# The numbers that diffusers multiplies by 1000 in the weights' dtype, which bf16 holds exactly.
TIMES, GUIDANCE = (250.0, 500.0), 4.0


def reference(entries: dict[str, Any]) -> torch.nn.Module:
    return pytest.importorskip("diffusers").FluxTransformer2DModel(**entries)


def inputs(config: FluxConfig = SMALL, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The image's sides differ."""
    more = config.in_channels - config.out_channels
    return {
        "x": cases.random(2, 3, 6, 10, seed=1).to(dtype),
        "t": torch.tensor(TIMES),
        "context": cases.random(2, 7, 20, seed=2).to(dtype),
        "y": cases.random(2, 12, seed=3).to(dtype),
        "guidance": GUIDANCE if config.guidance else None,
        "joined": cases.random(2, more, 6, 10, seed=4).to(dtype) if more else None,
    }


def packed(image: torch.Tensor) -> torch.Tensor:
    """[B, C, 2 h, 2 w] to [B, h w, 4 C], as the pipelines of diffusers do it."""
    b, c, h, w = image.shape
    parts = image.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(b, h * w // 4, c * 4)


def right(other: torch.nn.Module, config: FluxConfig, dtype: torch.dtype) -> torch.Tensor:
    given = inputs(config, dtype)
    x = given["x"] if given["joined"] is None else torch.cat([given["x"], given["joined"]], 1)
    rows, columns = torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij")
    guidance = torch.full((2,), GUIDANCE, dtype=dtype) if config.guidance else None
    out = other(
        packed(x),
        encoder_hidden_states=given["context"],
        pooled_projections=given["y"],
        timestep=given["t"].to(dtype) / 1000,
        img_ids=torch.stack([torch.zeros(3, 5), rows, columns], dim=-1).flatten(0, 1),
        txt_ids=torch.zeros(7, 3),
        guidance=guidance,
    ).sample
    return out.view(2, 3, 5, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 6, 10)


@pytest.mark.parametrize("config", [SMALL, SCHNELL, FILL], ids=["dev", "schnell", "fill"])
def test_outputs_are_those_of_diffusers(config: FluxConfig) -> None:
    model = cases.randomise(Flux(config))
    other = reference(FAMILY.to_diffusers(config)).eval()
    other.load_state_dict(cases.written(diffusers(config), model.state_dict()))
    cases.check_outputs(
        model,
        other,
        lambda m, dtype: m(**inputs(config, dtype)),
        lambda m, dtype: right(m, config, dtype),
    )


def test_outputs_are_those_of_the_official_code() -> None:
    """black-forest-labs/flux: data/flux.json says how it was run."""
    values = cases.randomise(Flux(SMALL)).double()(**inputs(dtype=torch.float64)).flatten()[::23]
    golden = cases.golden("flux")["values"]
    # Both embed times in float32, the official code after a product by 1000.
    torch.testing.assert_close(values.tolist(), golden, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes(name: str) -> None:
    ours = cases.check_names(FAMILY, CONFIGS[name], reference)
    assert cases.digest(cases.shapes(ours.state_dict())) == cases.golden("flux")["names"][name]
    # diffusers' own converter reads what has our names, which are Black Forest Labs'.
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = {f"model.diffusion_model.{k}": v for k, v in ours.state_dict().items()}
    converted = utils.convert_flux_transformer_checkpoint_to_diffusers(state)
    with torch.device("meta"):
        theirs = reference(FAMILY.to_diffusers(CONFIGS[name]))
    assert cases.shapes(converted) == cases.shapes(theirs.state_dict())


def test_layout_is_that_of_diffusers_converter() -> None:
    """The converter's width is FLUX's own, so the values need one block of it, of few numbers."""
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = replace(CONFIGS["FLUX.1-dev"], depth=1, single_depth=1)
    with torch.device("meta"):
        state = Flux(config).state_dict()
    # Rows tell themselves; the other dimension is one number behind a stride of 0.
    made = {}
    for number, (name, value) in enumerate(state.items()):
        rows = torch.arange(float(len(value))) + 1e6 * number
        made[name] = rows.view(-1, *[1] * (value.dim() - 1))
    mine = cases.written(diffusers(config), made)
    theirs = utils.convert_flux_transformer_checkpoint_to_diffusers(dict(made))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    back = cases.read(diffusers(config), mine, made)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], made[name]) for name in state)


def test_programs() -> None:
    given = inputs(FILL)
    x, _ = given.pop("x"), given.pop("t")
    steps = torch.tensor([[1000.0, 500.5], [3.0, 0.0], [1.0, 750.0]])
    cases.check_programs(cases.randomise(Flux(FILL)), x, steps, **given)


def test_compiled() -> None:
    model = cases.randomise(Flux(SMALL))
    cases.check_compiled(model, lambda dtype: tuple(inputs(dtype=dtype).values())[:5])


def test_gradients_and_guidance_as_a_tensor() -> None:
    model, given = cases.randomise(Flux(SMALL)), inputs()
    with torch.inference_mode():  # its tables are used by the training below
        one = model(**given)
        for guidance in (torch.tensor(GUIDANCE), torch.full((2,), GUIDANCE, dtype=torch.bfloat16)):
            assert torch.equal(model(**{**given, "guidance": guidance}), one)
        assert not torch.equal(model(**{**given, "guidance": 1.0}), one)
    cases.check_gradients(model, tuple(given.values()))


def test_rotations_are_kept_for_few_sizes() -> None:
    model, given = Flux(SMALL), inputs()
    for rows in range(1, 7):
        model(**{**given, "x": torch.zeros(2, 3, 2 * rows, 10)})
    assert [size[0] for size in model.rotations.values] == [3, 4, 5, 6]
    size = (3, 5, 7, SMALL.axes, given["x"].device)
    cos = model.rotations.values[size][0]
    model(**given)
    assert model.rotations.values[size][0] is cos
    with FakeTensorMode():
        model.rotations(1, 1, 7, SMALL.axes, given["x"].device)
    assert (1, 1, 7, SMALL.axes, given["x"].device) not in model.rotations.values


@pytest.mark.parametrize(
    ("config", "change", "error", "message"),
    [
        (SMALL, {"x": torch.zeros(2, 4, 6, 6)}, ValueError, r"x must have shape \[2, 3, H, W\]"),
        (SMALL, {"x": torch.zeros(1, 3, 6, 6)}, ValueError, r"x must have shape \[2, 3, H, W\]"),
        (SMALL, {"x": torch.zeros(2, 3, 5, 6)}, ValueError, "sides that are multiples of 2, got"),
        (SMALL, {"t": torch.zeros(3)}, ValueError, r"t must have shape \[2\], got \[3\]"),
        (SMALL, {"context": None}, TypeError, "context must be a tensor, got NoneType"),
        (
            SMALL,
            {"context": torch.zeros(2, 7, 3)},
            ValueError,
            r"context must have shape \[B, L, 20",
        ),
        (SMALL, {"y": torch.zeros(1, 12)}, ValueError, r"y must have shape \[2, 12\], got \[1, 12"),
        (SMALL, {"guidance": None}, ValueError, "guidance must be a number or .* got None"),
        (
            SMALL,
            {"guidance": torch.ones(3)},
            ValueError,
            r"guidance must have shape \[2\], got \[3",
        ),
        (SMALL, {"guidance": "4"}, TypeError, r"guidance must be a number or \[B\], got str"),
        (SCHNELL, {"guidance": 3.5}, ValueError, "guidance must be None: .* got 3.5"),
        (
            SMALL,
            {"joined": torch.zeros(2, 2, 6, 10)},
            ValueError,
            "joined must be None: none go in",
        ),
        (
            FILL,
            {"joined": None},
            ValueError,
            "joined must be given: the model takes 2 channels more",
        ),
        (FILL, {"joined": torch.zeros(2, 2, 6, 6)}, ValueError, r"joined must have the sides of x"),
    ],
)
def test_bad_input(
    config: FluxConfig, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Flux(config)(**{**inputs(config), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"single_depth": 0}, "single_depth must be a positive integer, got 0"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads 5, got 48"),
        ({"axes": (4, 8, 8)}, r"axes must be three even numbers .* = 24, got \(4, 8, 8\)"),
        ({"in_channels": 2}, "in_channels must be at least out_channels 3, got 2"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"patch_size": 2}, "patch_size must be 1, got 2"),
        ({"in_channels": 63}, "in_channels must be a multiple of 4, got 63"),
        ({"timestep_guidance": 1}, "timestep_guidance must be off"),
    ],
)
def test_bad_entries(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILY.from_diffusers(entries)


def test_other_files_are_not_recognised() -> None:
    assert FAMILY.recognise({"img_in.weight": (1, 2)}) is None
    assert FAMILY.recognise(cases.shapes(Flux(SMALL).state_dict())) is None
    with pytest.raises(TypeError, match="config must be a FluxConfig"):
        Flux("FLUX.1-dev")  # type: ignore[arg-type]
