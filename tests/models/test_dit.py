"""DiT against diffusers' independent implementation with the same weights."""

from __future__ import annotations

import pytest
import torch

from fastdiff.models.dit import CONFIGS, DiT, DiTConfig, position_embedding

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


def to_diffusers(model: DiT, dtype: torch.dtype):
    transformer = pytest.importorskip("diffusers").DiTTransformer2DModel
    config = model.config
    other = transformer(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=config.input_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    ours = model.state_dict()
    theirs = {
        "pos_embed.proj.weight": ours["x_embedder.proj.weight"],
        "pos_embed.proj.bias": ours["x_embedder.proj.bias"],
    }
    for kind in ("weight", "bias"):
        theirs[f"proj_out_1.{kind}"] = ours[f"final_layer.adaLN_modulation.1.{kind}"]
        theirs[f"proj_out_2.{kind}"] = ours[f"final_layer.linear.{kind}"]
        for i in range(config.depth):
            source, target = f"blocks.{i}", f"transformer_blocks.{i}"
            for part, rows in zip("qkv", ours[f"{source}.attn.qkv.{kind}"].chunk(3), strict=True):
                theirs[f"{target}.attn1.to_{part}.{kind}"] = rows
            theirs[f"{target}.attn1.to_out.0.{kind}"] = ours[f"{source}.attn.proj.{kind}"]
            theirs[f"{target}.ff.net.0.proj.{kind}"] = ours[f"{source}.mlp.fc1.{kind}"]
            theirs[f"{target}.ff.net.2.{kind}"] = ours[f"{source}.mlp.fc2.{kind}"]
            norm = f"{target}.norm1"
            theirs[f"{norm}.linear.{kind}"] = ours[f"{source}.adaLN_modulation.1.{kind}"]
            for ours_index, layer in ((0, "linear_1"), (2, "linear_2")):
                theirs[f"{norm}.emb.timestep_embedder.{layer}.{kind}"] = ours[
                    f"t_embedder.mlp.{ours_index}.{kind}"
                ]
    for i in range(config.depth):
        theirs[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = ours[
            "y_embedder.embedding_table.weight"
        ]
    missing, unexpected = other.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert set(missing) <= {"pos_embed.pos_embed"}
    other = other.to(dtype).eval()
    # The position embedding stays diffusers' own, so that ours is compared with it. Its frequencies
    # of the timestep are spread over 127 intervals; the paper's code has 128.
    for block in other.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return other


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
    assert torch.equal(model.blocks[0](tokens, torch.randn(2, 48)), tokens)


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
    ],
)
def test_bad_config(change: dict[str, int], message: str) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_config_by_name_is_refused_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"CONFIGS\['digits'\]"):
        DiT("digits")  # type: ignore[arg-type]
