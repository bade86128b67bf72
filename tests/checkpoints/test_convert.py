"""``convert`` there and back, what diffusers makes of it, and the two commands."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastdiff
from fastdiff.checkpoints.convert import convert
from fastdiff.checkpoints.family import written
from fastdiff.checkpoints.layouts import families
from fastdiff.cli import main
from fastdiff.models.autoencoder import CONFIGS as AUTOENCODERS
from fastdiff.models.autoencoder import AutoencoderKL
from fastdiff.models.dit import CONFIGS as DITS
from fastdiff.models.dit import DiT
from fastdiff.models.unet import UNet
from fastdiff.models.unet_configs import UNetConfig

FAMILIES = {family.name: family for family in families()}
UNET = UNetConfig(
    channels=(32, 64), depths=(1, 0), num_heads=(8, 8), context_dim=32, num_res_blocks=1
)


def randomised(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = torch.randn_like(parameter) * 0.1
    return model


def openclip() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A text encoder with three rows in one tensor of its file."""
    pytest.importorskip("transformers")
    family = FAMILIES["openclip_g"]
    small = {"width": 64, "inner": 64, "layers": 2, "heads": 1, "vocab_size": 99, "projection": 32}
    config = replace(family.configs["openclip-g"], **small)
    model = randomised(family.build(config))
    return model, written(family.layout("official", config), model.state_dict())


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor], str]:
    """A model, its official file's tensors, and their prefix."""
    if name == "openclip":
        return *openclip(), "conditioner.embedders.1.model."
    build: Any = {
        "unet": lambda: UNet(UNET),
        "vae": lambda: AutoencoderKL(replace(AUTOENCODERS["sd1"], widths=(32, 64))),
        "dit": lambda: DiT(DITS["DiT-S/8"]),
    }[name]
    model = randomised(build())
    prefix = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "dit": ""}[name]
    return model, dict(model.state_dict()), prefix


@pytest.mark.parametrize("name", ["unet", "vae", "dit", "openclip"])
@pytest.mark.parametrize("size", ["10GB", 100_000])
def test_there_and_back(tmp_path: Path, name: str, size: int | str) -> None:
    model, official, prefix = made(name)
    source = tmp_path / "source.safetensors"
    save_file({prefix + key: value.contiguous() for key, value in official.items()}, source)
    folder = convert(source, tmp_path / "folder", max_shard_size=size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (size != "10GB")
    assert oct(folder.stat().st_mode & 0o777) == oct(0o777 & ~umask())
    loaded = fastdiff.load(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    if name == "openclip":
        return  # the folder's is another family, which has no such official file
    back = convert(folder, tmp_path / "back.safetensors", layout="official", prefix=prefix)
    first, second = load_file(source), load_file(back)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    half = convert(folder, tmp_path / "h.safetensors", layout="official", dtype=torch.bfloat16)
    assert half.stat().st_size < 0.6 * back.stat().st_size
    assert all(v.dtype == torch.bfloat16 for v in load_file(half).values())


def umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["unet", "vae", "dit"])
def test_diffusers_reads_it(tmp_path: Path, name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    model, official, _ = made(name)
    source = tmp_path / "source.safetensors"
    save_file(official, source)
    folder = convert(source, tmp_path / "folder", max_shard_size="1MB")
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    theirs, report = getattr(diffusers, kind).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    layout = FAMILIES[{"vae": "autoencoder"}.get(name, name)].layout("diffusers", model.config)
    ours = written({k: v for k, v in layout.items() if v.keys}, model.state_dict())
    for key, value in theirs.state_dict().items():
        if key in ours:
            assert torch.equal(value, ours[key]), key


def test_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, official = openclip()
    source = tmp_path / "source.safetensors"
    save_file(
        {f"conditioner.embedders.1.model.{k}": v.contiguous() for k, v in official.items()}, source
    )
    folder = convert(source, tmp_path / "folder")
    theirs = transformers.CLIPTextModelWithProjection.from_pretrained(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value), key


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "unet.safetensors"
    save_file(made("unet")[1], path)
    return path


def test_a_failed_conversion_leaves_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdiff.checkpoints.convert._shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, source.with_name("folder"))
    monkeypatch.undo()
    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, source.with_name("folder"))
    with pytest.raises(KeyboardInterrupt):
        convert(source, source.with_name("new.safetensors"), layout="official")
    assert [path.name for path in source.parent.iterdir()] == ["unet.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "ldm"}, "layout must be one of diffusers, official, got 'ldm'"),
        ({"dtype": torch.int8}, "dtype must be floating-point, .* got torch.int8"),
        ({"max_shard_size": "big"}, "max_shard_size must be bytes, or as '500MB', got 'big'"),
        ({"max_shard_size": 0}, "max_shard_size must be bytes"),
        ({"target": "x.safetensors"}, "target must be a folder, without a prefix, got"),
        ({"prefix": "a."}, "target must be a folder, without a prefix, got"),
        ({"target": "."}, "target must be a new or an empty folder"),
        ({"layout": "official"}, "target must end in .safetensors, got"),
        ({"layout": "official", "target": "unet.safetensors"}, "another file than source"),
        ({"component": "vae"}, "component must be one of unet, got 'vae'"),
        ({"source": "model.ckpt"}, "pickle, which can run any code.*Convert it once"),
    ],
)
def test_bad_arguments(source: Path, change: dict[str, Any], message: str) -> None:
    arguments = {"source": source.name, "target": "folder", **change}
    arguments |= {key: source.parent / arguments[key] for key in ("source", "target")}
    with pytest.raises(ValueError, match=message):
        convert(arguments.pop("source"), arguments.pop("target"), **arguments)
    assert [path.name for path in source.parent.iterdir()] == ["unet.safetensors"]


def test_incomplete_sources_are_refused(source: Path) -> None:
    tensors = load_file(source)
    tensors.pop("out.2.bias")
    save_file(tensors, source)
    with pytest.raises(ValueError, match=r"missing out\.2\.bias"):
        convert(source, source.with_name("folder"))
    assert not source.with_name("folder").exists()


def test_commands(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(source)]) == 0
    out = capsys.readouterr().out
    assert "unet: unet (no public size), official names" in out
    assert "complete: every tensor is there, and fits" in out
    target = source.with_name("folder")
    assert main(["convert", str(source), str(target), "--dtype", "float16"]) == 0
    assert "float16" in capsys.readouterr().out
    assert main(["convert", str(source), str(target)]) == 2
    assert "error: target must be a new or an empty folder" in capsys.readouterr().err
    save_file({k: v for k, v in load_file(source).items() if k != "out.2.bias"}, source)
    assert main(["inspect", str(source)]) == 1
    assert "missing out.2.bias" in capsys.readouterr().out
    pickled = source.with_suffix(".ckpt")
    pickled.write_bytes(pickle.dumps({}))
    assert main(["inspect", str(pickled)]) == 2
    assert "Convert it once" in capsys.readouterr().err
    assert main(["inspect", str(source.with_name("absent.safetensors"))]) == 1
    for command in ("inspect", "convert"):
        assert main([command, "--help"]) == 0
        assert "fastdiff inspect model.safetensors" in capsys.readouterr().out
