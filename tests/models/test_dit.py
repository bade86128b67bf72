"""DiT against diffusers' independent implementation with the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformer_cases as cases

from fastdiff.checkpoints.layouts.dit import FAMILY, diffusers
from fastdiff.models.dit import CONFIGS, DiT, DiTConfig
from fastdiff.models.transformer import position_embedding

SMALL = DiTConfig(
    hidden_size=48, depth=3, num_heads=4, patch_size=2, input_size=8, in_channels=3, num_classes=7
)


def randomised(config: DiTConfig, dtype: torch.dtype) -> DiT:
    """A model without the zero initialisation, which would hide every block."""
    generator = torch.Generator().manual_seed(0)
    model = DiT(config)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            value = torch.randn(parameter.shape, generator=generator)
            parameter.data = value * (0.1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5)
    return model.to(dtype).eval()


def reference(entries: dict[str, Any]) -> torch.nn.Module:
    return pytest.importorskip("diffusers").DiTTransformer2DModel(**entries)


def to_diffusers(model: DiT, dtype: torch.dtype) -> torch.nn.Module:
    entries = FAMILY.to_diffusers(model.config)
    other = reference({k: v for k, v in entries.items() if k != "frequency_shift"})
    # The position embedding stays diffusers' own, so that ours is compared with it.
    other.load_state_dict(cases.written(diffusers(model.config), model.state_dict()))
    if model.config.frequency_shift == 0:
        # Its frequencies of the timestep are spread over 127 intervals; the paper's code has 128.
        for block in other.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return other.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 3e-7), (torch.float32, 5e-6)])
@pytest.mark.parametrize("config", [SMALL, CONFIGS["digits"]], ids=["learn_sigma", "digits"])
def test_agrees_with_diffusers(config: DiTConfig, dtype: torch.dtype, tolerance: float) -> None:
    model = randomised(config, dtype)
    other = to_diffusers(model, dtype)
    generator = torch.Generator().manual_seed(1)
    shape = (5, config.in_channels, config.input_size, config.input_size)
    x = torch.randn(shape, generator=generator, dtype=dtype)
    t = torch.tensor([0, 1, 499, 731, 999])
    y = torch.tensor([0, 1, config.num_classes - 1, config.num_classes, 3])
    with torch.no_grad():
        ours = model(x, t, y)
        theirs = other(x, timestep=t, class_labels=y).sample
    assert ours.shape == (5, config.out_channels, config.input_size, config.input_size)
    assert ours.isfinite().all()
    assert ours.std() > 0.1
    # diffusers keeps its position embedding in float32, which bounds the float64 comparison.
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


FOLDER = replace(SMALL, frequency_shift=1.0, mlp_norm_eps=1e-5)


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        cases.random(5, 3, 8, 8, seed=1).to(dtype),
        torch.tensor([0, 1, 499, 731, 999]),
        torch.tensor([0, 1, 6, 7, 3]),
    )


@pytest.mark.parametrize("config", [SMALL, FOLDER], ids=["paper", "folder"])
def test_outputs_are_those_of_diffusers(config: DiTConfig) -> None:
    model = cases.randomise(DiT(config))

    def right(other: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
        x, t, y = inputs(dtype)
        return other(x, timestep=t, class_labels=y).sample

    other = to_diffusers(model, torch.float32)
    cases.check_outputs(model, other, lambda m, dtype: m(*inputs(dtype)), right)


def test_outputs_are_those_of_the_paper_s_code() -> None:
    """facebookresearch/DiT, run once in float64: data/dit.json says how."""
    golden = cases.golden("dit")
    model = DiT(SMALL)
    mine = {name: list(value.shape) for name, value in model.state_dict().items()}
    assert mine == golden["keys"]
    cases.randomise(model).double()
    x = cases.random(2, 3, 8, 8, seed=1).double()
    # Both compute the timestep's embedding in float32, by different operations.
    values = model(x, torch.tensor([731, 12]), torch.tensor([7, 3])).flatten()[::24]
    torch.testing.assert_close(values.tolist(), golden["values"], rtol=2e-5, atol=2e-5)
    with torch.device("meta"):
        sizes = {name: DiT(CONFIGS[name]).state_dict().values() for name in golden["sizes"]}
    counts = {n: [len(v), sum(t.numel() for t in v)] for n, v in sizes.items()}
    assert counts == golden["sizes"]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "digits"])
def test_names_and_shapes_of_both_layouts(name: str) -> None:
    def made(entries: dict[str, Any]) -> torch.nn.Module:
        return reference({k: v for k, v in entries.items() if k != "frequency_shift"})

    config = CONFIGS[name]
    entries = FAMILY.to_diffusers(config)
    assert FAMILY.from_diffusers(entries) == config
    folder = replace(config, frequency_shift=1.0, mlp_norm_eps=1e-5)
    with torch.device("meta"):
        ours, theirs = DiT(config), made(FAMILY.to_diffusers(folder))
    state = {key: value.to("meta") for key, value in ours.state_dict().items()}
    assert cases.shapes(cases.written(diffusers(config), state)) == cases.shapes(
        theirs.state_dict()
    )
    assert FAMILY.from_diffusers(dict(theirs.config)) == folder
    assert FAMILY.recognise(cases.shapes(state)) == config
    # The position embedding is computed, on the CPU whatever the others are on.
    assert not ours.pos_embed.is_meta
    del state["pos_embed"]
    assert FAMILY.recognise(cases.shapes(state)) == replace(config, input_size=32)


def test_the_computed_position_embedding_may_be_wider_than_the_weights() -> None:
    model = cases.randomise(DiT(SMALL)).bfloat16()
    right = model(*inputs(torch.bfloat16))
    model.pos_embed.data = model.pos_embed.float()
    assert torch.equal(model(*inputs(torch.bfloat16)), right)


def test_a_folder_whose_copies_differ_is_refused() -> None:
    model = cases.randomise(DiT(SMALL))
    layout, state = diffusers(SMALL), model.state_dict()
    tensors = cases.written(layout, state)
    found = cases.read(layout, tensors, state)
    assert all(torch.equal(found[name], state[name]) for name in layout)
    assert set(state) - set(layout) == {"pos_embed"}
    key = "transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"
    tensors[key] = tensors[key] + 1
    with pytest.raises(ValueError, match=f"{key} must be a copy of transformer_blocks.0"):
        cases.read(layout, tensors, state)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"norm_type": "ada_norm_single"}, "norm_type must be 'ada_norm_zero', got 'ada_norm_s"),
        ({"out_channels": 5}, "out_channels must be 4 or 8, got 5"),
        ({"caption_channels": 4096}, "caption_channels must be off"),
        ({"upcast_attention": True}, "upcast_attention must be off"),
    ],
)
def test_bad_entries(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILY.from_diffusers({"_class_name": "Transformer2DModel", "dropout": 0.0, **entries})


def test_a_folder_with_entries_of_the_class_before() -> None:
    """The public folders were written by Transformer2DModel, without an entry for the eps."""
    entries = {
        "_class_name": "Transformer2DModel", "activation_fn": "gelu-approximate",
        "attention_bias": True, "cross_attention_dim": None, "norm_num_groups": 32,
        "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000, "num_vector_embeds": None,
        "only_cross_attention": False, "out_channels": 8, "sample_size": 64,
    }  # fmt: skip
    expected = replace(CONFIGS["DiT-XL/2-512"], frequency_shift=1.0, mlp_norm_eps=1e-5)
    assert FAMILY.from_diffusers(entries) == expected


def test_other_files_are_not_recognised() -> None:
    assert FAMILY.recognise({}) is None
    shapes = cases.shapes(DiT(SMALL).state_dict())
    assert FAMILY.recognise(shapes) is None


def test_programs() -> None:
    model = cases.randomise(DiT(SMALL))
    x, _, y = inputs(torch.float32)
    steps = torch.tensor([[999.0, 500.5, 3.0, 1.0, 0.0], [10.0, 20.0, 30.0, 40.0, 50.0]])
    cases.check_programs(model, x, steps, y)
    prompt = model.prompt(y)
    with pytest.raises(ValueError, match=r"t must have shape \[S, 5\], got \[2, 4\]"):
        model.schedule(steps[:, :4], prompt)
    with pytest.raises(ValueError, match=r"x must have shape \[5, 3, 8, 8\], got \[4, 3, 8, 8\]"):
        model.step(x[:4], model.schedule(steps[0], prompt), prompt)


def test_compiled() -> None:
    cases.check_compiled(cases.randomise(DiT(SMALL)), inputs)


def test_gradients() -> None:
    model = cases.randomise(DiT(SMALL))
    cases.check_gradients(model, inputs(torch.float32), without=("pos_embed",))


def test_names_of_the_public_checkpoints() -> None:
    expected = {
        "pos_embed",
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
        "y_embedder.embedding_table.weight",
    }
    layers = ["t_embedder.mlp.0", "t_embedder.mlp.2"]
    layers += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    for i in range(SMALL.depth):
        parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        layers += [f"blocks.{i}.{part}" for part in parts]
    expected |= {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(DiT(SMALL).state_dict()) == expected


@pytest.mark.parametrize(
    ("name", "millions"),
    [("DiT-XL/2", 675), ("DiT-L/2", 458), ("DiT-B/4", 130), ("DiT-S/8", 33)],
)
def test_sizes_of_the_paper(name: str, millions: int) -> None:
    """Table 4 of the paper lists the parameters of each configuration."""
    with torch.device("meta"):
        model = DiT(CONFIGS[name])
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - millions) < 1.5


def test_starts_as_zero_and_blocks_as_identity() -> None:
    model = DiT(SMALL)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.5, 900.25]), torch.tensor([0, 7])
    assert (model(x, t, y) == 0).all()
    tokens = torch.randn(2, 16, 48)
    modulation = model.blocks[0].adaLN_modulation(torch.randn(2, 48))
    assert torch.equal(model.blocks[0](tokens, modulation), tokens)


def test_position_embedding_tells_rows_from_columns() -> None:
    grid = position_embedding(16, 4).view(4, 4, 16)
    assert torch.equal(grid[0, :, :8], grid[3, :, :8])
    assert torch.equal(grid[:, 0, 8:], grid[:, 3, 8:])
    assert not torch.equal(grid[0, 1], grid[1, 0])


def good() -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(2, 3, 8, 8), "t": torch.zeros(2), "y": torch.zeros(2).long()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(2, 1, 8, 8)},
            r"x must have shape \[B, \*\[3, 8, 8\]\], got \[2, 1, 8, 8\]",
        ),
        ({"x": torch.zeros(3, 8, 8)}, "x must have shape"),
        (
            {"x": torch.zeros(2, 3, 8, 6)},
            r"x must have shape \[B, \*\[3, 8, 8\]\], got \[2, 3, 8, 6\]",
        ),
        ({"t": torch.zeros(3)}, r"t must have shape \[2\], got \[3\]"),
        ({"y": torch.zeros(1).long()}, r"y must have shape \[2\], got \[1\]"),
        ({"y": torch.tensor([0, 8])}, "y must be in 0..7 .*got 8"),
        ({"y": torch.tensor([-1, 8])}, "y must be in 0..7 .*got -1"),
    ],
)
def test_bad_input(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(SMALL)(**{**good(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads 5 .*got 48"),
        ({"patch_size": 3}, "input_size must be a multiple of patch_size 3, got 8"),
        ({"hidden_size": 50, "num_heads": 2}, "hidden_size must be a multiple of .* of 4, got 50"),
        ({"mlp_ratio": -1}, "mlp_ratio must be a positive number, got -1"),
        ({"mlp_norm_eps": 0}, "mlp_norm_eps must be a positive number, got 0"),
        ({"frequency_shift": 128}, "frequency_shift must be in 0..127, got 128"),
    ],
)
def test_bad_config(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_config_by_name_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"CONFIGS\['digits'\]"):
        DiT("digits")  # type: ignore[arg-type]
