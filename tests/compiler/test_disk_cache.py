"""Graphs stored on disk: found where everything is the same, and only there."""

from __future__ import annotations

import json
import os
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from denoisers import DENOISERS, made, tensors
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import compiler
from fastdiff.compiler import stored
from fastdiff.compiler.reports import Report
from fastdiff.compiler.state import State, Unstorable

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "graphs").glob("*"))


def compiled(model: nn.Module, **options: Any) -> Callable[[], Report]:
    """Compiles anew, as another process would; gives the report."""
    compiler.uncompile(model)
    compiler.compile(model, **options)
    return lambda: compiler.report(model)


def stored_flags(report: Report) -> list[bool]:
    return [graph.stored for graph in report.graphs]


class Net(nn.Module):
    """A small denoiser with things to change."""

    scale = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.out = nn.ModuleList([nn.Linear(8, 8), nn.LayerNorm(8)])
        self.config = {"shift": 1.0, "names": ["a", "b"]}
        self.processor = types.SimpleNamespace(power=2)
        self.table = torch.arange(8.0)
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, extra: Any = None) -> dict[str, Any]:
        y = functional.silu(self.project(x)) * self.scale + self.config["shift"] + self.table
        y = times(y) + _helper(t)[:, None] ** self.processor.power
        for layer in self.out:
            y = layer(y)
        if extra is not None:
            y = y + extra["add"][0]
        return {"sample": y, "same": x, "steps": 3, "pair": (y, None)}


def _helper(t: Tensor) -> Tensor:
    return t * FACTOR


FACTOR = 0.5


def net() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    model = Net().eval().requires_grad_(False)
    return model, torch.randn(2, 8), torch.tensor([3.0, 4.0])


def ready(when: str) -> tuple[Net, Tensor, Tensor, Tensor]:
    """A model whose graph is stored, "before" or "after" it was read; and the right result."""
    model, x, t = net()
    compiled(model)
    right = model(x, t)["sample"]
    report = compiled(model)
    if when == "after":
        assert torch.equal(model(x, t)["sample"], right)
        assert stored_flags(report()) == [True]
    return model, x, t, right


# --- found ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name in ("sdxl", "scale_shift") else ())
        for name in DENOISERS
    ],
)
def test_stored_graphs_give_the_same_bits(name, tmp_path):
    model, inputs = made(name)
    report = compiled(model)
    first = [tensors(model(**inputs(step))) for step in range(3)]
    assert (stored_flags(report()), report().unstored) == ([False], [])
    assert len(files(tmp_path)) == 1
    again = compiled(model)
    second = [model(**inputs(step)) for step in range(3)]
    found = again()
    assert (stored_flags(found), found.captures) == ([True], 0)
    assert "read from the disk" in str(found)
    before = report().graphs[0] if report().graphs else None
    assert before is None or found.graphs[0].fused == before.fused
    for one, other in zip(first, second, strict=True):
        assert all(map(torch.equal, one, tensors(other)))
    compiler.uncompile(model)
    assert type(second[0]) is type(model(**inputs(0)))


SECOND = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import fastdiff
from denoisers import made, tensors
model, inputs = made(sys.argv[2])
if len(sys.argv) > 3:
    import torch._inductor.config, torch._dynamo
fastdiff.compile(model)
with torch.no_grad():
    result = tensors(model(**inputs(0)))[0]
report = fastdiff.report(model)
print(report.captures, result.double().sum().item(), "torch._dynamo.convert_frame" in sys.modules)
"""


@pytest.mark.parametrize("name", ["unet", pytest.param("flux", marks=pytest.mark.long)])
def test_another_process_finds_the_graph(name, fresh_python):
    here = str(Path(__file__).parent)
    pytest.importorskip("diffusers")
    first = fresh_python("-c", SECOND, here, name, PYTHONHASHSEED="1").split()
    second = fresh_python("-c", SECOND, here, name, "loaded", PYTHONHASHSEED="2").split()
    assert (first[0], second[0]) == ("1", "0")
    assert first[1] == second[1]


def test_what_a_model_returns_is_built_again():
    model, x, t = net()
    extra = {"add": [torch.ones(8)]}
    compiled(model)
    right = model(x, t, extra)
    report = compiled(model)
    result = model(x, t, extra)
    assert stored_flags(report()) == [True]
    assert result["same"] is x
    assert (result["steps"], result["pair"][1]) == (3, None)
    assert torch.equal(result["sample"], right["sample"])
    assert torch.equal(result["pair"][0], right["sample"])


# --- only where everything is the same ------------------------------------------------------------


def _power(model: Net) -> None:
    model.processor.power = 3


def _processor(model: Net) -> None:
    model.processor = types.SimpleNamespace(power=1)


def _config(model: Net) -> None:
    model.config["shift"] = 3.0


def _layer(model: Net) -> None:
    model.out[1] = nn.Sequential(nn.Linear(8, 8), nn.SiLU()).requires_grad_(False)


def _weight(model: Net) -> None:
    model.project.weight = nn.Parameter(torch.eye(8), requires_grad=False)


def _wider(model: Net) -> None:
    model.project.double()
    model.project.register_forward_hook(lambda module, args, out: out.float() * 2)
    model.project.register_forward_pre_hook(lambda module, args: (args[0].double(),))


def _hook(model: Net) -> None:
    model.out[0].register_forward_hook(lambda module, args, out: out**2)


def _table(model: Net) -> None:
    model.table = torch.ones(8)


def _in_place(model: Net) -> None:
    model.project.weight.data.mul_(3)


class Doubled(Net):
    def forward(self, x: Tensor, t: Tensor, extra: Any = None) -> dict[str, Any]:
        return {"sample": super().forward(x, t, extra)["sample"] * 2}


def _class(model: Net) -> None:
    model.__class__ = Doubled


def _outer() -> tuple[Callable[[Any], Any], Callable[[int], None]]:
    factor = 1

    def times(x: Any) -> Any:
        return x * factor

    def change(to: int) -> None:
        nonlocal factor
        factor = to

    return times, change


times, change_factor = _outer()


def _enclosed(model: Net) -> None:
    change_factor(model.processor.power + 1)


CHANGES = [
    _class,
    _enclosed,
    _power,
    _processor,
    _config,
    _layer,
    _weight,
    _wider,
    _hook,
    _table,
    _in_place,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_of_the_model_are_seen(change, when):
    change_factor(1)
    model, x, t, before = ready(when)
    change(model)
    result = model(x, t)["sample"]
    again = model(x, t)["sample"]
    compiler.uncompile(model)
    right = model(x, t)["sample"]
    torch.testing.assert_close(result, right)
    torch.testing.assert_close(again, right)
    assert not torch.allclose(right, before)


def _class_attribute(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Net, "scale", 5.0)


def _helper_replaced(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(__import__(__name__), "_helper", lambda t: t * 7)


def _constant(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(__import__(__name__), "FACTOR", 0.25)


def _of_pytorch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(functional, "silu", lambda x: x * 2)


def _forward(patch: pytest.MonkeyPatch) -> None:
    own = Net.forward
    patch.setattr(Net, "forward", lambda self, x, t: own(self, x + 1, t))


PATCHES = [_class_attribute, _helper_replaced, _constant, _of_pytorch, _forward]


@pytest.mark.parametrize("change", PATCHES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_changes_of_the_code_are_seen(change, when, monkeypatch):
    model, x, t, before = ready(when)
    change(monkeypatch)
    result = model(x, t)["sample"]
    compiler.uncompile(model)
    right = model(x, t)["sample"]
    torch.testing.assert_close(result, right)
    assert not torch.allclose(right, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_weights_in_another_precision_are_seen(dtype):
    model, x, t = net()
    inputs = {"x": x, "t": t}
    state = State(model, inputs)
    weight = model.out[0].weight
    assert state.unchanged()
    model.out.to(dtype)
    assert model.out[0].weight is weight  # the same parameter, other contents
    assert not state.unchanged()
    assert State(model, inputs).key != state.key
    model.out.float()
    assert State(model, inputs).key == state.key


def test_what_was_changed_back_is_found_again():
    model, x, t = net()
    compiled(model)
    before = model(x, t)["sample"]
    report = compiled(model)
    model(x, t)
    for power in (3, 2, 3, 2):
        model.processor.power = power
        result = model(x, t)["sample"]
    assert torch.equal(result, before)
    assert report().captures == 1  # for the power of 3


def test_a_model_that_always_changes_is_left_to_pytorch(monkeypatch):
    from fastdiff.compiler import shelf

    monkeypatch.setattr(shelf, "MOST_LOOKS", 4)
    model, x, t = net()
    compiled(model)
    right = model(x, t)["sample"]
    report = compiled(model)
    for step in range(8):
        model.config = {"shift": 1.0, "names": ["a", "b"]}
        assert torch.equal(model(x, t)["sample"], right)
        assert report().captures == (0 if step < 5 else 1)


def test_settings_and_inputs_are_part_of_it():
    model, x, t = net()
    compiled(model)
    model(x, t)
    report = compiled(model)
    model(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x, t)["sample"]
    model(x[:1], t[:1])
    model(x, t, {"add": [torch.zeros(8)]})
    model(x, t)
    assert sorted(stored_flags(report())) == [False, False, False, True]
    report = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x, t)["sample"], half)
    assert stored_flags(report()) == [True]


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.weight - y if x is not y else x * self.weight


def test_whether_two_inputs_are_one_is_part_of_it():
    model = Sum().eval().requires_grad_(False)
    x = torch.randn(4)
    for _ in range(2):
        compiled(model)
        torch.testing.assert_close(model(x, x), x)
        torch.testing.assert_close(model(x, x + 1), torch.full((4,), -1.0))
        torch.testing.assert_close(model(x, x), x)


# --- not stored -----------------------------------------------------------------------------------


class Counts(Net):
    def forward(self, x: Tensor, t: Tensor, extra: Any = None) -> dict[str, Any]:
        self.calls += 1
        return super().forward(x, t, extra)


class Returns(Net):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        return Foreign(super().forward(x, t)["sample"])


class Foreign:
    def __init__(self, sample: Tensor) -> None:
        self.sample = sample


class Breaks(Net):
    def forward(self, x: Tensor, t: Tensor) -> Any:
        y = self.project(x)
        torch._dynamo.graph_break()
        return self.project(y)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Counts, "changes it"), (Returns, "Foreign"), (Breaks, "pieces")],
)
def test_what_is_not_stored_has_a_reason(kind, reason, tmp_path):
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    x, t = torch.randn(2, 8), torch.tensor([3.0, 4.0])
    report = compiled(model)
    model(x, t)
    model(x, t)
    assert not files(tmp_path)
    (found,) = report().unstored
    assert reason in found
    assert f"not stored: {found}" in str(report())
    assert kind is not Counts or model.calls == 2


@pytest.mark.parametrize("value", [object(), iter([]), {object()}])
def test_states_without_a_description_are_named(value):
    model, x, t = net()
    model.processor.strange = value
    with pytest.raises(Unstorable, match=r"Net\.processor\.strange"):
        State(model, {"x": x, "t": t})


def test_nothing_is_stored_when_not_asked_for(tmp_path):
    model, x, t = net()
    compiled(model, disk_cache=False)
    model(x, t)
    assert not files(tmp_path)
    with pytest.raises(TypeError, match="disk_cache must be True or False, got 1"):
        compiler.compile(model, disk_cache=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_cannot_be_written_are_no_error(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    model, x, t = net()
    report = compiled(model)
    model(x, t)
    assert "PermissionError" in report().unstored[0]


def test_a_file_in_the_place_of_the_folder_is_no_error(tmp_path):
    (tmp_path / "cache").write_text("")
    model, x, t = net()
    report = compiled(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        model(x, t)
    assert "Error" in report().unstored[0]


def test_the_folder_does_not_grow_without_bound(tmp_path, monkeypatch):
    model, x, t = net()
    compiled(model)
    model(x, t)
    (oldest,) = files(tmp_path)
    os.utime(oldest, (1, 1))
    monkeypatch.setattr(stored, "MAX_BYTES", int(2.5 * oldest.stat().st_size))
    for rows in (3, 4):
        model(torch.randn(rows, 8), torch.ones(rows))
    assert len(files(tmp_path)) == 2
    assert oldest not in files(tmp_path)


# --- broken files ---------------------------------------------------------------------------------


def _truncated(text: str) -> str:
    return text[: len(text) // 2]


def _edited(edit: Callable[[Any], None]) -> Callable[[str], str]:
    def change(text: str) -> str:
        data = json.loads(text)
        edit(data)
        return json.dumps(data)

    return change


def _calls(data: Any) -> list[Any]:
    return [node for node in data["graph"]["nodes"] if node["op"] == "call_function"]


def _system(data: Any) -> None:
    _calls(data)[0]["target"] = "os:system"


def _load(data: Any) -> None:
    _calls(data)[0]["target"] = "torch:load"


def _method(data: Any) -> None:
    _calls(data)[0].update(op="call_method", target="to(__import__('os').abort())")


def _named(data: Any) -> None:
    data["graph"]["nodes"][0]["name"] = "x = __import__('os').abort(); y"


def _missing_node(data: Any) -> None:
    del data["graph"]["nodes"][0]


def _argument(data: Any) -> None:
    _calls(data)[0]["args"] = {"tuple": [1]}


def _elsewhere(data: Any) -> None:
    data["graph"]["nodes"][0]["from"] = ["model", ".", "nothing"]


def _leaves(data: Any) -> None:
    data["result"]["leaves"].pop()


def _empty(data: Any) -> None:
    data.pop("graph")


EDITS = [_system, _load, _method, _named, _missing_node, _argument, _elsewhere, _leaves, _empty]


@pytest.mark.parametrize("change", [_truncated, *map(_edited, EDITS), lambda text: "[1, 2]"])
def test_broken_files_are_captured_again(change, tmp_path):
    model, x, t = net()
    compiled(model)
    right = model(x, t)["sample"]
    (path,) = files(tmp_path)
    good = path.read_text()
    path.write_text(change(good))
    report = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = model(x, t)["sample"]
    assert torch.equal(result, right)
    assert stored_flags(report()) == [False]
    assert path.read_text() == good  # written anew
    told = [str(w.message) for w in caught if "stored graph is not used" in str(w.message)]
    assert len(told) == (0 if change(good) == "[1, 2]" else 1)


def test_files_of_another_version_are_not_read(tmp_path, monkeypatch):
    model, x, t = net()
    compiled(model)
    model(x, t)
    monkeypatch.setattr(stored, "VERSION", 2)
    report = compiled(model)
    model(x, t)
    assert stored_flags(report()) == [False]


def test_runs_of_sample_are_stored(tmp_path):
    import fastdiff

    model, _ = made("zoo_dit")
    labels = torch.tensor([3, 4])
    right = None
    for run in range(2):
        report = compiled(model)
        found = fastdiff.sample(model, (2, 1, 8, 8), steps=3, seed=0, cond={"y": labels})
        assert stored_flags(report()) == [bool(run)]
        assert right is None or torch.equal(found, right)
        right = found
    assert len(files(tmp_path)) == 1
