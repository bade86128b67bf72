"""Weights: what goes in comes out, and every kind of bad file has its own clear error."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdiff.models import CONFIGS, DiT, DiTConfig, Sampling, load, save

TINY = DiTConfig(
    input_size=4,
    in_channels=1,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    learn_sigma=False,
)
SAMPLING = Sampling(shape=(1, 4, 4), num_classes=3, guidance_scale=1.5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "tiny.safetensors"
    save(DiT(TINY), path, sampling=SAMPLING)
    return path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize("as_folder", [False, True])
def test_round_trip(saved: Path, as_folder: bool) -> None:
    torch.manual_seed(0)
    original = DiT(TINY)
    model = load(saved.parent if as_folder else str(saved))
    assert model.config == TINY
    assert model.sampling == SAMPLING
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    for key, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_storage_loads_as_float32_unless_asked(saved: Path, stored: torch.dtype) -> None:
    half = saved.with_name("half.safetensors")
    save(load(saved), half, dtype=stored)
    assert half.stat().st_size < 0.75 * saved.stat().st_size
    assert {p.dtype for p in load(half).parameters()} == {torch.float32}
    model = load(half, dtype=stored)
    assert {p.dtype for p in model.parameters()} == {stored}
    for key, value in load(saved).state_dict().items():
        assert torch.equal(model.state_dict()[key], value.to(stored))


def test_embedded_digits() -> None:
    model = load("digits")
    assert model.config == CONFIGS["digits"]
    assert isinstance(model.sampling, Sampling)
    assert model.sampling.shape == (1, 8, 8)
    assert all(p.isfinite().all() for p in model.parameters())


def test_public_checkpoint_is_recognised_from_its_shapes(tmp_path: Path) -> None:
    config = CONFIGS["DiT-S/8"]
    path = tmp_path / "public.safetensors"
    save_file(DiT(config).state_dict(), path)
    model = load(path)
    assert model.config == config
    expected = Sampling(schedule="linear", shape=(4, 32, 32), num_classes=1000, guidance_scale=4.0)
    assert model.sampling == expected


def test_differences_are_listed_together_with_nearest_names(saved: Path) -> None:
    tensors, metadata = load_file(saved), metadata_of(saved)
    tensors["blocks.0.attn.qvk.weight"] = tensors.pop("blocks.0.attn.qkv.weight")
    tensors["pos_embed"] = tensors["pos_embed"][:, :3].clone()
    tensors["other"] = torch.zeros(1)
    del tensors["blocks.1.mlp.fc1.bias"]
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"].long()
    save_file(tensors, saved, unchecksummed(metadata, tensors))
    with pytest.raises(ValueError) as caught:
        load(saved)
    message = str(caught.value)
    for part in (
        "got 6 differences",
        "missing blocks.0.attn.qkv.weight (did you mean 'blocks.0.attn.qvk.weight'?)",
        "unknown blocks.0.attn.qvk.weight (did you mean 'blocks.0.attn.qkv.weight'?)",
        "missing blocks.1.mlp.fc1.bias\n",
        "unknown other",
        "pos_embed must have shape (1, 4, 16), got (1, 3, 16)",
        "final_layer.linear.bias must be floating-point, got torch.int64",
    ):
        assert part in message


def unchecksummed(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The metadata with a checksum that fits, so that the tensors' own check speaks."""
    from fastdiff.models.weights import _checksum

    about = json.loads(metadata["fastdiff"])
    del about["sha256"]
    return {"fastdiff": json.dumps({**about, "sha256": _checksum(tensors, about)})}


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated(saved: Path, keep: int) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"must be a whole safetensors file, got .* bytes"):
        load(saved)


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    """One bit at a time, over the header and the data: an error, never other weights."""
    content = saved.read_bytes()
    want = load(saved).state_dict()
    positions = [*range(64), *range(64, len(content), 397)]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        saved.write_bytes(damaged)
        try:
            got = load(saved).state_dict()
        except ValueError:
            continue
        assert all(torch.equal(got[key], value) for key, value in want.items()), position


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth", ".bin", ".pkl"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    trap = tmp_path / "ran"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (trap,))

    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"must be a .safetensors file.*pickle.*Convert it once"):
        load(path)
    disguised = tmp_path / "model.safetensors"
    disguised.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load(disguised)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("digit", ValueError, "must be one of 'digits'.*got 'digit' .did you mean 'digits'"),
        ("zebra", ValueError, "must be one of 'digits', a .safetensors file .* got 'zebra'$"),
        ("DiT-XL/2", ValueError, "must be a file for 'DiT-XL/2'.*embeds only digits"),
        ("absent.safetensors", FileNotFoundError, "must exist, got 'absent.safetensors'"),
        (7, TypeError, "must be a string or a path, got 7"),
    ],
)
def test_bad_names(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load(name)


def test_folder_without_or_with_several_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"exactly one .safetensors file.*with none"):
        load(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"with a\.safetensors, b\.safetensors"):
        load(tmp_path)


def test_foreign_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"must carry its configuration.*or have the shapes of"):
        load(path)
    save_file({"x": torch.zeros(1)}, path, {"fastdiff": '{"family": "UNet", "sha256": ""}'})
    with pytest.raises(ValueError, match="family must be 'DiT', got 'UNet'"):
        load(path)
    save_file({"x": torch.zeros(1)}, path, {"fastdiff": "{"})
    with pytest.raises(ValueError, match="must carry a fastdiff configuration this version reads"):
        load(path)


def test_dtype_must_be_floating(saved: Path) -> None:
    with pytest.raises(TypeError, match=r"dtype must be a floating-point.*got torch\.int8"):
        load(saved, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be a DiT, got Linear"),
        ({"path": "x.pt"}, ValueError, "path must end in .safetensors, got 'x.pt'"),
        ({"sampling": None}, ValueError, "sampling must be given"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of float32"),
    ],
)
def test_bad_save(tmp_path: Path, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": DiT(TINY), "path": tmp_path / "a.safetensors", "sampling": SAMPLING}
    arguments |= change
    with pytest.raises(error, match=message):
        save(arguments.pop("model"), arguments.pop("path"), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_overflow_in_half_storage(tmp_path: Path) -> None:
    model = DiT(TINY)
    model.final_layer.linear.bias.data[0] = 1e6
    with pytest.raises(ValueError, match=r"dtype must hold the values of final_layer.linear.bias"):
        save(model, tmp_path / "a.safetensors", sampling=SAMPLING, dtype=torch.float16)


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(DiT(TINY), saved, sampling=SAMPLING)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
