"""Damaged and hostile files: one clear error, nothing executed, nothing applied, little memory."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import save_file

import fastdiff
from fastdiff.checkpoints.assign import assign
from fastdiff.checkpoints.files import Checkpoint
from fastdiff.checkpoints.inspection import inspect

REFUSED = (ValueError, OSError)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "toy.safetensors"
    save_file(toys.state(toys.toy()), path, {"format": "pt"})
    return path


class Target:
    """A model that a damaged file must not change."""

    def __init__(self) -> None:
        self.model = toys.toy(seed=1)
        self.before = {k: (v, v.clone()) for k, v in self.model.state_dict(keep_vars=True).items()}

    def try_file(self, path: Path) -> bool:
        """Whether the file was taken; in every other case the model is untouched."""
        try:
            assign(self.model, Checkpoint.open(path))
        except REFUSED:
            after = self.model.state_dict(keep_vars=True)
            for name, (tensor, values) in self.before.items():
                assert after[name] is tensor
                assert torch.equal(tensor, values)
            return False
        self.__init__()  # type: ignore[misc]
        return True


def offsets(entry: dict[str, Any]) -> list[int]:
    return entry.get("data_offsets", [0])


def test_truncated_anywhere(saved: Path) -> None:
    """At every mark of the header, and one byte around both ends of every tensor."""
    content, target = saved.read_bytes(), Target()
    assert target.try_file(saved)
    header, data = toys.header_of(saved)
    start = len(content) - len(data)
    cuts = {i for i in range(start) if i < 16 or content[i : i + 1] in b'{}[]",:'}
    ends = [end for name in header for end in offsets(header[name])]
    cuts |= {start + end + shift for end in ends for shift in (-1, 0, 1)}
    for length in sorted(cut for cut in cuts if cut < len(content)):
        saved.write_bytes(content[:length])
        assert not target.try_file(saved), length


def test_bytes_too_many(saved: Path) -> None:
    content, target = saved.read_bytes(), Target()
    for more in (b"\0", b"\0" * 8, content):
        saved.write_bytes(content + more)
        assert not target.try_file(saved)


def test_every_bit_of_the_length_and_bits_of_the_header(saved: Path) -> None:
    """A flipped bit is refused, or it was in a place that means nothing: then nothing is lost."""
    content, target = saved.read_bytes(), Target()
    end = 8 + int.from_bytes(content[:8], "little")
    chance = random.Random(0)
    places = [(i, b) for i in range(8) for b in range(8)]
    places += [(chance.randrange(8, end), chance.randrange(8)) for _ in range(600)]
    taken = 0
    for place, bit in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        saved.write_bytes(damaged)
        taken += target.try_file(saved)
    # Metadata and the blanks at the end are free; of the tensors' entries nothing is.
    assert taken < 40


def test_random_bytes_in_the_header(saved: Path) -> None:
    content, target = saved.read_bytes(), Target()
    end = 8 + int.from_bytes(content[:8], "little")
    chance = random.Random(1)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(chance.randint(2, 20)):
            damaged[chance.randrange(8, end)] = chance.randrange(256)
        saved.write_bytes(damaged)
        target.try_file(saved)


VALUES: list[Any] = [
    *(None, True, -1, 0, 1.5, 2**31, 2**63, 2**64, 10**400, "F32", "", [], {}, [[]], [-1, 4]),
    *(
        [0, 2**62],
        [2**62, 2**63],
        [True, False],
        ["0", "4"],
        [0],
        [4, 0],
        [0, 4, 8],
        "F99",
        "pickle",
    ),
    *(float("nan"), float("inf"), [1] * 40, [2**40, 2**40], {"__reduce__": "os.system"}),
]


def test_every_field_with_every_wrong_value(saved: Path) -> None:
    header, data = toys.header_of(saved)
    target, count = Target(), 0
    for name in [key for key in header if key != "__metadata__"]:
        for field in ("dtype", "shape", "data_offsets", None):
            for value in VALUES:
                damaged = json.loads(json.dumps(header))
                if field is None:
                    damaged[name] = value
                elif damaged[name][field] == value:
                    continue
                else:
                    damaged[name][field] = value
                toys.write(saved, damaged, data)
                # steps is a scalar: its shape may be [], and is.
                assert not target.try_file(saved), (name, field, value)
                count += 1
    assert count > 700


def rewritten(header: dict[str, Any], data: bytes) -> Iterator[tuple[str, Any, bytes]]:
    """Headers that are wrong as a whole."""
    first, second = [key for key in header if key != "__metadata__"][:2]
    text = json.dumps(header)
    entry = json.dumps(header[first])
    yield "overlap", {**header, first: {**header[second]}}, data
    yield "same bytes twice", {**header, "again": header[first]}, data
    yield "hole", {k: v for k, v in header.items() if k != first}, data
    yield "duplicate key", text[:-1] + f', "{first}": {entry}}}', data
    doubled = text.replace('"dtype"', '"dtype": "F32", "dtype"', 1)
    yield "duplicate field", doubled, data
    yield "a field more", {**header, first: {**header[first], "code": "os.system"}}, data
    yield "metadata of numbers", {**header, "__metadata__": {"a": 1}}, data
    yield "metadata a list", {**header, "__metadata__": ["a"]}, data
    yield "NUL in a name", text.replace(first, first + "\\u0000"), data
    yield "newline in a name", text.replace(first, first + "\\n"), data
    yield "empty name", text.replace(first, ""), data
    yield "lone surrogate", text.replace(first, "\\ud800"), data
    yield "not UTF-8", text.encode().replace(first.encode(), b"\xff\xfe"), data
    yield "UTF-16", text.encode("utf-16"), data
    yield "a list", [header], data
    yield "a string", '"toy"', data
    yield "null", "null", data
    yield "nothing", "", data
    yield "{}", "{}", data
    yield "deep lists", "[" * 100_000 + "]" * 100_000, data
    yield "deep objects", '{"a":' * 100_000 + "1" + "}" * 100_000, data
    yield "deep inside", {**header, first: "x"}, data
    yield "thousands of digits", text.replace("[0,", "[" + "9" * 5000 + ",", 1), data
    yield "text after it", text + " {}", data
    yield (
        "empty tensor of a great shape",
        ({**header, "void": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [0, 0]}}),
        data,
    )


def test_headers_that_are_wrong_as_a_whole(saved: Path) -> None:
    target = Target()
    for kind, header, data in rewritten(*toys.header_of(saved)):
        toys.write(saved, header, data)
        assert not target.try_file(saved), kind


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1])
def test_huge_declared_headers_are_not_read(saved: Path, length: int) -> None:
    header, data = toys.header_of(saved)
    toys.write(saved, header, data, length=length)
    with pytest.raises(ValueError, match=r"must be a whole safetensors file, got .* bytes"):
        Checkpoint.open(saved)


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def disguises(folder: Path, trap: Path) -> Iterator[tuple[str, bytes]]:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield "pickle", pickle.dumps(Trap(trap), protocol)
    archive = folder / "archive.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(Trap(trap)))
        file.writestr("archive/data/0", b"\0" * 2**24)
    yield "zip", archive.read_bytes()
    torch.save({"weight": torch.zeros(3)}, archive)
    yield "torch.save", archive.read_bytes()
    torch.save({"w": torch.zeros(3)}, archive, _use_new_zipfile_serialization=False)
    yield "old torch.save", archive.read_bytes()
    yield "gguf", b"GGUF" + bytes(60)
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    yield "html", b"<!DOCTYPE html><html><body>404</body></html>"
    yield "zlib bomb", zlib.compress(b"\0" * 2**24)


def test_disguised_files_are_named_and_nothing_runs(tmp_path: Path) -> None:
    trap, target = tmp_path / "ran", Target()
    for kind, content in disguises(tmp_path, trap):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        for read in (fastdiff.load, inspect, Checkpoint.open):
            with pytest.raises(ValueError, match="must be a whole safetensors file"):
                read(path)
        assert not target.try_file(path), kind
        if kind in ("zip", "torch.save"):
            with pytest.raises(ValueError, match=r"it is a zip archive, as torch\.save writes"):
                Checkpoint.open(path)
    assert not trap.exists()


INDICES: list[Any] = [
    *(None, [], "x", 3, {}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}),
    *({"weight_map": {"qkv.weight": value}} for value in (None, 3, [], {}, "", ".", "..", "\0")),
]
NAMES = [
    *("../toy.safetensors", "/etc/passwd", "sub/../model.safetensors", "a/b.safetensors"),
    *("..\\toy.safetensors", "C:toy.safetensors", "~/toy.safetensors", "toy\0.safetensors"),
    *("absent.safetensors", "toy.bin", "model-00001-of-00002.safetensors/", ".", "a" * 300),
    *(
        "\udcff.safetensors",
        "file:///etc/passwd.safetensors",
        "*.safetensors",
        "folder.safetensors",
    ),
]


@pytest.mark.parametrize("number", range(len(INDICES)))
def test_wrong_indices(tmp_path: Path, number: int) -> None:
    folder, target = tmp_path / "shards", Target()
    index = toys.write_shards(folder, toys.state(toys.toy()))
    assert target.try_file(folder)
    index.write_text(json.dumps(INDICES[number]))
    assert not target.try_file(folder)


@pytest.mark.parametrize("number", range(len(NAMES)))
def test_path_tricks_in_the_index(tmp_path: Path, number: int) -> None:
    folder, target = tmp_path / "shards", Target()
    index = toys.write_shards(folder, toys.state(toys.toy()))
    save_file(toys.state(toys.toy()), tmp_path / "toy.safetensors")
    (folder / "folder.safetensors").mkdir()
    (folder / "toy.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    table = json.loads(index.read_text())
    table["weight_map"]["qkv.weight"] = NAMES[number]
    index.write_text(json.dumps(table))
    assert not target.try_file(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("number", range(40))
def test_shuffled_indices_name_all_that_is_misplaced(tmp_path: Path, number: int) -> None:
    """Every tensor is in exactly the shard that the index says, or all are named that are not."""
    folder, target = tmp_path / "shards", Target()
    index = toys.write_shards(folder, toys.state(toys.toy()), 3)
    table, chance = json.loads(index.read_text()), random.Random(number)
    where = table["weight_map"]
    before = dict(where)
    moved = chance.sample(sorted(where), chance.randint(1, 4))
    for name in moved:
        others = sorted(set(where.values()) - {where[name]})
        kind = chance.randrange(3)
        if kind == 0:
            where[name] = chance.choice(others)
        elif kind == 1:
            del where[name]
        else:
            where[name + "_"] = where.pop(name)
    index.write_text(json.dumps(table))
    assert not target.try_file(folder)
    with pytest.raises(ValueError) as caught:
        Checkpoint.open(folder)
    # A shard that the index no longer names is not looked into.
    read = set(where.values())
    assert all(name in str(caught.value) for name in moved if before[name] in read)


@pytest.mark.parametrize("where", ["index", "shard"])
def test_random_damage_in_shards(tmp_path: Path, where: str) -> None:
    folder, target = tmp_path / "shards", Target()
    index = toys.write_shards(folder, toys.state(toys.toy()))
    path = index if where == "index" else next(folder.glob("*-00001-*"))
    content, chance = path.read_bytes(), random.Random(2)
    for _ in range(150):
        damaged = bytearray(content)
        if chance.random() < 0.3:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            damaged[chance.randrange(min(len(damaged), 300))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        target.try_file(folder)


CONFIGS: list[Any] = [
    *([], 3, None, "x", {}, {"_class_name": None}, {"_class_name": 3}, {"_class_name": []}),
    *({"_class_name": "os.system"}, {"architectures": [{}]}, {"architectures": 7}),
    *({"_class_name": "UNet2DConditionModel", name: value} for name in (
        "in_channels", "block_out_channels", "layers_per_block", "attention_head_dim",
        "cross_attention_dim", "down_block_types", "norm_num_groups",
        "transformer_layers_per_block",
    ) for value in (None, -1, 0, "x", [], {}, [[]], 1.5, 10**12, [10**12] * 4)),
]  # fmt: skip


def test_wrong_configurations(tmp_path: Path) -> None:
    """Of a folder of diffusers'; a number in it makes nothing that the tensors do not have."""
    save_file(toys.state(toys.toy()), tmp_path / "diffusion_pytorch_model.safetensors")
    for config in CONFIGS:
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError):
            fastdiff.load(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        *(3, None, {}, [], ["x"], ["diffusers", 3], ["a", "b", "c"]),
        ["diffusers", "UNet2DConditionModel"],
        ["os", "system"],
    ],
)
@pytest.mark.parametrize("name", ["unet", "../unet", "/", "", "a/b", "unet\0"])
def test_wrong_pipeline_indices(tmp_path: Path, name: str, entry: Any) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    index = {"_class_name": "StableDiffusionPipeline", name: entry}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError):
        fastdiff.load(folder)


def test_memory_stays_small(tmp_path: Path) -> None:
    """Headers that ask for much: each is refused with less than 200 MB beyond the imports."""
    many = "{" + ",".join(f'"{i}":[]' for i in range(500_000)) + "}"
    toys.write(tmp_path / "a.safetensors", many)
    toys.write(tmp_path / "b.safetensors", "[" * 2**23)
    toys.write(tmp_path / "c.safetensors", b"{}", length=2**62)
    shape = {"x": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 2**62]}}
    toys.write(tmp_path / "d.safetensors", shape)
    code = """
import sys, pathlib
def status(key):
    lines = dict(line.split(':') for line in open('/proc/self/status'))
    return int(lines[key].split()[0])
from fastdiff.checkpoints.files import Checkpoint
before = status('VmRSS')
for path in sorted(pathlib.Path(sys.argv[1]).glob('*.safetensors')):
    try:
        Checkpoint.open(path)
        print('taken', path)
    except ValueError:
        pass
print((status('VmHWM') - before) // 1024)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200
