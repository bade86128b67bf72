"""Files, shards and folders: what is there, where, and what is not taken."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from fastdiff.checkpoints.files import Checkpoint, find_weights
from fastdiff.checkpoints.header import DTYPES
from fastdiff.checkpoints.writing import serialised


def test_a_file(tmp_path: Path) -> None:
    tensors = toys.state(toys.toy())
    path = tmp_path / "toy.safetensors"
    save_file(tensors, path, {"format": "pt", "a": "b"})
    found = Checkpoint.open(path)
    assert found.metadata == {"format": "pt", "a": "b"}
    assert set(found) == set(found.names) == set(tensors)
    assert found.shapes == {name: tuple(value.shape) for name, value in tensors.items()}
    assert found.dtypes == {name: value.dtype for name, value in tensors.items()}
    assert found.nbytes == sum(value.nbytes for value in tensors.values())
    assert found.files == (path,)
    assert all(torch.equal(found.tensor(name), value) for name, value in tensors.items())
    with pytest.raises(KeyError):
        found.tensor("absent")
    part = found.part({"a": "qkv.weight"})
    assert part.names == ("a",)
    assert torch.equal(part.tensor("a"), tensors["qkv.weight"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(6).reshape(2, 3).to(dtype)
    path = tmp_path / "x.safetensors"
    save_file({"x": value, "scalar": value[0, 0].clone(), "none": value[:0].clone()}, path)
    found = Checkpoint.open(path)
    for name, expected in load_file(path).items():
        assert found.tensor(name).dtype == dtype
        assert torch.equal(found.tensor(name).float(), expected.float())


def test_numbers_at_odd_places_are_copied_to_even_ones(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    text = json.dumps(header)
    text += " " * (-len(text) % 8 + 1)
    values = torch.tensor([1.0, 2.0, 3.0])
    path = toys.write(tmp_path / "odd.safetensors", text, values.numpy().tobytes())
    found = Checkpoint.open(path).tensor("x")
    assert found.data_ptr() % 4 == 0
    assert torch.equal(found, values)


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = toys.state(toys.toy()) | {"half": torch.ones(3, dtype=torch.float16)}
    about = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(serialised(about, tensors.__getitem__, {"ä": "ö"})))
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(path).items())
    assert Checkpoint.open(path).metadata == {"ä": "ö"}


@pytest.mark.parametrize("by", ["folder", "index"])
def test_shards(tmp_path: Path, by: str) -> None:
    tensors = toys.state(toys.toy())
    index = toys.write_shards(tmp_path / "a", tensors, 3)
    found = Checkpoint.open(index if by == "index" else index.parent)
    assert set(found) == set(tensors)
    assert len(found.files) == 3
    assert all(torch.equal(found.tensor(name), value) for name, value in tensors.items())


def test_a_tensor_in_another_shard_than_said(tmp_path: Path) -> None:
    index = toys.write_shards(tmp_path, toys.state(toys.toy()), 2)
    table = json.loads(index.read_text())
    where = table["weight_map"]
    first, second = sorted(set(where.values()))
    name = next(name for name in where if where[name] == first)
    where[name] = second
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError) as caught:
        Checkpoint.open(tmp_path)
    assert f"{name} is not in {second}" in str(caught.value)
    assert f"{name} is in {first}, not in {second}" in str(caught.value)


def test_links_stay_in_the_folder_or_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    index = toys.write_shards(folder, toys.state(toys.toy()))
    shard = next(folder.glob("*-00001-*"))
    inner = folder / "inner"
    inner.mkdir()
    shard.rename(inner / "real")
    shard.symlink_to(inner / "real")
    assert len(Checkpoint.open(index)) == 8
    outside = tmp_path / "outside"
    (inner / "real").rename(outside)
    shard.unlink()
    shard.symlink_to(outside)
    with pytest.raises(ValueError, match="is a link that leaves the folder"):
        Checkpoint.open(index)
    # The hub's cache: snapshots of links to blobs.
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123" / "unet"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    outside.rename(repository / "blobs" / "abc")
    shard.unlink()
    for file in folder.iterdir():
        if file.is_file():
            file.rename(snapshot / file.name)
    (snapshot / shard.name).symlink_to("../../../blobs/abc")
    assert len(Checkpoint.open(snapshot)) == 8


def test_other_kinds_of_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="must be a regular file"):
        Checkpoint.open(pipe)
    with pytest.raises(ValueError, match=r"pickle.*Convert it once"):
        Checkpoint.open(tmp_path / "absent.ckpt")
    with pytest.raises(FileNotFoundError):
        Checkpoint.open(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    ("names", "variant", "expected"),
    [
        (["model.safetensors"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], None, "model.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "fp16", "model.fp16.safetensors"),
        (["model.fp16.safetensors"], None, "model.fp16.safetensors"),
        (["model.fp16.safetensors", "model.bf16.safetensors"], None, None),
        (["model.safetensors"], "fp16", None),
        (["a.safetensors", "b.safetensors"], None, None),
        (["m-00001-of-00002.safetensors", "m.safetensors.index.json"], None, 1),
        (["m.safetensors.index.fp16.json", "m.safetensors.index.json"], "fp16", 0),
        (["m.fp16.safetensors.index.json"], "fp16", 0),
        (["m-00001-of-00002.safetensors"], None, None),
        (["pytorch_model.bin"], None, None),
        ([], None, None),
    ],
)
def test_which_file_of_a_folder(tmp_path: Path, names, variant, expected) -> None:
    for name in names:
        (tmp_path / name).touch()
    if expected is None:
        with pytest.raises(ValueError, match=r"exactly one \.safetensors file"):
            find_weights(tmp_path, variant)
    else:
        name = names[expected] if isinstance(expected, int) else expected
        assert find_weights(tmp_path, variant).name == name
