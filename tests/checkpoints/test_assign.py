"""A state dict into a module: one error for everything, then every value, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import save_file

from fastdiff.checkpoints.assign import assign, dominant_dtype
from fastdiff.checkpoints.convert import _Rewritten
from fastdiff.checkpoints.differences import differences, nearest
from fastdiff.checkpoints.empty import build_empty
from fastdiff.checkpoints.family import Family, written
from fastdiff.checkpoints.files import Checkpoint


def opened(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    path = tmp_path / "file.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return Checkpoint.open(path)


def other_state(model: toys.Toy) -> dict[str, torch.Tensor]:
    tensors = written(toys.OTHER, model.state_dict())
    return {name: value for name, value in tensors.items() if name != "head.weight"}


@pytest.mark.parametrize("layout", [None, toys.OTHER])
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float64])
def test_every_value_arrives(tmp_path, layout, mapped, dtype) -> None:
    source = toys.toy()
    tensors = toys.state(source) if layout is None else other_state(source)
    model = build_empty(toys.Toy, 4)
    assert all(p.is_meta for p in model.parameters())
    assign(model, opened(tmp_path, tensors), layout, dtype=dtype, mapped=mapped)
    for name, value in source.state_dict().items():
        expected = value if dtype is None or name == "steps" else value.to(dtype)
        assert torch.equal(model.state_dict()[name], expected), name
    assert model.head.weight is model.table.weight
    assert torch.equal(model.places, source.places)
    if layout is not None:
        assert tensors["proj.weight"].shape == (4, 4)
    x = torch.randn(2, 4, 1, 1, dtype=model.out.weight.dtype)
    assert torch.equal(model.out(x), source.to(x.dtype).out(x))


def test_a_module_with_values_gets_other_tensors_and_keeps_its_old_ones(tmp_path: Path) -> None:
    model = toys.toy(seed=1)
    old = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    assign(model, opened(tmp_path, toys.state(toys.toy())))
    assert torch.equal(model.qkv.weight, toys.toy().qkv.weight)
    assert all(torch.equal(value, copy) for value, copy in old.values())


def test_views_are_private(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, toys.state(toys.toy()))
    before = checkpoint.path.read_bytes()
    model = build_empty(toys.Toy, 4)
    assign(model, checkpoint)
    with torch.no_grad():
        model.qkv.weight.fill_(3)
    assert checkpoint.path.read_bytes() == before
    assert torch.equal(checkpoint.tensor("qkv.weight"), toys.toy().qkv.weight)


def test_a_replaced_file_does_not_change_the_model(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, toys.state(toys.toy()))
    model = build_empty(toys.Toy, 4)
    assign(model, checkpoint)
    new = tmp_path / "new.safetensors"
    save_file(toys.state(toys.toy(seed=5)), new)
    new.replace(checkpoint.path)
    for name, value in toys.toy().state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_file_that_changed_after_the_check_is_refused(tmp_path: Path) -> None:
    checkpoint, model = opened(tmp_path, toys.state(toys.toy())), toys.toy(seed=1)
    before = dict(model.named_parameters())
    save_file({**toys.state(toys.toy()), "out.bias": torch.zeros(9)}, checkpoint.path)
    with pytest.raises(ValueError, match=r"must not change while it is read: out\.bias"):
        assign(model, checkpoint)
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="must not change while it is read"):
        assign(model, checkpoint)
    assert all(before[name] is value for name, value in model.named_parameters())


def test_all_differences_in_one_error(tmp_path: Path) -> None:
    tensors = toys.state(toys.toy())
    tensors["qvk.weight"] = tensors.pop("qkv.weight")
    tensors["out.bias"] = torch.zeros(5)
    tensors["steps"] = torch.zeros(())
    tensors["modulation.bias"] = torch.zeros(8, dtype=torch.int64)
    tensors["extra"] = torch.zeros(1)
    del tensors["table.weight"]
    model = build_empty(toys.Toy, 4)
    with pytest.raises(ValueError) as caught:
        assign(model, opened(tmp_path, tensors))
    lines = str(caught.value).splitlines()
    assert "must hold the tensors of its configuration, got 8 differences:" in lines[0]
    assert sorted(line.strip() for line in lines[1:]) == sorted(
        [
            "missing head.weight (did you mean 'qvk.weight'?)",
            "missing table.weight (did you mean 'qvk.weight'?)",
            "missing qkv.weight (did you mean 'qvk.weight'?)",
            "unknown extra",
            "unknown qvk.weight (did you mean 'qkv.weight' or 'head.weight' or 'table.weight'?)",
            "out.bias must have shape (4,), got (5,)",
            "steps must be torch.int64, got torch.float32",
            "modulation.bias must be floating-point, got torch.int64",
        ]
    )


def test_differences_in_another_layout_are_named_as_in_the_file(tmp_path: Path) -> None:
    tensors = other_state(toys.toy())
    tensors["attn.k.weight"] = torch.zeros(5, 4)
    tensors["proj.weight"] = torch.zeros(4, 1, 4, 2)
    del tensors["attn.v.bias"]
    found = differences(build_empty(toys.Toy, 4), opened(tmp_path, tensors), toys.OTHER)
    assert found.missing == ("attn.v.bias",)
    assert found.unknown == ()
    assert found.wrong == (
        "attn.k.weight must have shape (4, 4), got (5, 4)",
        "proj.weight must have shape (4, 4, 1, 1), got (4, 1, 4, 2)",
    )


def test_optional_names_may_be_there_or_not(tmp_path: Path) -> None:
    tensors = {**toys.state(toys.toy()), "blocks.3.ids": torch.zeros(2), "sigmas": torch.ones(1)}
    checkpoint = opened(tmp_path, tensors)
    model = build_empty(toys.Toy, 4)
    assert differences(model, checkpoint).unknown == ("blocks.3.ids", "sigmas")
    assign(model, checkpoint, optional={"blocks.*.ids", "sigmas", "never"})


def test_what_a_build_leaves_empty_is_an_error_of_the_family(tmp_path: Path) -> None:
    model = build_empty(toys.Toy, 4)
    model.register_buffer("lost", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(RuntimeError, match=r"Toy must compute what .* no values for lost"):
        assign(model, opened(tmp_path, toys.state(toys.toy())))
    assert model.qkv.weight.is_meta


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    source = toys.OTHER | {"out.bias": type(toys.OTHER["out.bias"])(("a.bias", "b.bias"))}
    tensors = other_state(toys.toy())
    tensors |= {"a.bias": tensors["proj.bias"], "b.bias": tensors.pop("proj.bias").clone()}
    model = build_empty(toys.Toy, 4)
    assign(model, opened(tmp_path, tensors), source)
    tensors["b.bias"][0] += 1
    model = build_empty(toys.Toy, 4)
    with pytest.raises(ValueError, match=r"b\.bias must be a copy of a\.bias"):
        assign(model, opened(tmp_path, tensors), source)
    assert all(p.is_meta for p in model.parameters())


def test_rewriting_gives_what_written_gives(tmp_path: Path) -> None:
    """The streamed conversion, tensor by tensor, against the whole state dict at once."""
    source = toys.toy()
    family = Family("toy", {}, toys.Toy, ("",), lambda shapes: None)

    class Part:
        checkpoint = opened(tmp_path, toys.state(source))

        def sources(self) -> None:
            return None

    part = Part()
    part.family = family
    new = _Rewritten(part, build_empty(toys.Toy, 4), toys.OTHER, "x.", None)
    expected = other_state(source)
    assert set(new.about) == {f"x.{name}" for name in expected}
    for name, (dtype, shape) in new.about.items():
        value = new.tensor(name)
        assert (value.dtype, tuple(value.shape)) == (dtype, shape)
        assert torch.equal(value, expected[name.removeprefix("x.")])


def test_building_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    build_empty(toys.Toy, 4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([(torch.float16, 9), (torch.float32, 2), (torch.int64, 99)], torch.float16),
        ([(torch.float8_e4m3fn, 9), (torch.float32, 2)], torch.bfloat16),
        ([(torch.int64, 9)], None),
    ],
)
def test_dominant_dtype(tmp_path, kinds, expected) -> None:
    tensors = {str(i): torch.zeros(n).to(kind) for i, (kind, n) in enumerate(kinds)}
    assert dominant_dtype(opened(tmp_path, tensors)) == expected


def test_thousands_of_missing_names_take_no_time(tmp_path: Path) -> None:
    """All are listed; only the first hundred get the names nearest to them."""
    model = torch.nn.ModuleList(torch.nn.Linear(1, 1, device="meta") for _ in range(2000))
    theirs = {f"blocks.{i}.linear.weight": torch.zeros(1, 1) for i in range(2000)}
    found = differences(model, opened(tmp_path, theirs))
    assert len(found) == 6000


def test_nearest_among_many() -> None:
    names = [f"input_blocks.{i}.1.transformer_blocks.0.attn2.to_k.weight" for i in range(500)]
    word = "input_blocks.137.1.transformer_block.0.attn2.to_k.weight"
    assert f"(did you mean '{names[137]}'" in nearest(word, names)


MEMORY = """
import json, os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from fastdiff.checkpoints.assign import assign
from fastdiff.checkpoints.empty import build_empty
from fastdiff.checkpoints.family import Source
from fastdiff.checkpoints.files import Checkpoint
import tqdm

torch.set_num_threads(1)
WIDTH, SIZE = 1024, 200 * 2**20

def status(key):
    lines = dict(line.split(':') for line in open('/proc/self/status'))
    return int(lines[key].split()[0]) * 1024

def model_of(depth):
    return nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(depth))

def write(path, stored, split):
    depth, tensors = SIZE // (3 * WIDTH**2 * stored.itemsize), {}
    for i in range(depth):
        for kind, shape in (('weight', (3 * WIDTH, WIDTH)), ('bias', (3 * WIDTH,))):
            value = torch.ones(shape, dtype=stored)
            parts = zip('qkv', value.chunk(3)) if split else [('', value)]
            tensors |= {f'{i}.{p}.{kind}'.replace('..', '.'): v.clone() for p, v in parts}
    save_file(tensors, path)
    return depth

def measure(path, depth, dtype, split, mapped):
    layout = {f'{i}.{k}': Source(tuple(f'{i}.{p}.{k}' for p in 'qkv'), 'rows')
              for i in range(depth) for k in ('weight', 'bias')}
    model, checkpoint = build_empty(model_of, depth), Checkpoint.open(path)
    before = status('VmRSS')
    assign(model, checkpoint, layout if split else None, dtype=dtype, mapped=mapped)
    for p in model.parameters():
        p.view(-1)[:: 512].float().sum().item()  # every page is touched
    size = sum(p.nbytes for p in model.parameters())
    return [status('VmHWM') - before, checkpoint.nbytes, size]

def child(work):
    read, write_end = os.pipe()
    if not os.fork():  # a process of its own, whose peak begins here
        os.write(write_end, json.dumps(work()).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(read, 10000))

path = Path(sys.argv[1]) / 'file.safetensors'
for name, stored, dtype, split, mapped in (
    ('views', torch.bfloat16, None, False, True),
    ('copies', torch.bfloat16, None, False, False),
    ('wider', torch.bfloat16, torch.float32, False, True),
    ('joined', torch.bfloat16, None, True, True),
    ('narrower', torch.float32, torch.bfloat16, False, True),
):
    depth = child(lambda: write(path, stored, split))
    print(json.dumps([name, *child(lambda: measure(path, depth, dtype, split, mapped))]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """Of 200 MB: never more than the model itself and a fifth of the file."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path)], capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in rows] == ["views", "copies", "wider", "joined", "narrower"]
    for name, peak, size, model in rows:
        assert peak <= model + 0.2 * size, (name, peak / size, model / size)
        assert peak >= 0.9 * model, name  # the measure sees it
