"""What goes wrong leaves a compiled model usable: the same call gives the right answer afterwards,
and nothing half-built is kept. And a short form of endurance.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import endurance
import pytest
import torch
from endurance import Small, inputs
from recorders import Again
from torch import Tensor, nn

import fastdiff
from fastdiff import compiler
from fastdiff.compiler import captured, cuda_graphs
from fastdiff.compiler.passes import PASSES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Pieces(nn.Module):
    """A denoiser that PyTorch's front end captures as two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.between: Callable[[], None] = lambda: None

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(sample)
        torch._dynamo.graph_break()
        self.between()
        return self.last(x) * timestep.reshape(-1, 1, 1, 1)


def compiled(kind: type[nn.Module] = Small, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return compiler.compile(kind().eval().requires_grad_(False), **options)


def entries(model: nn.Module) -> list[captured.Entry]:
    return list(model._compiled_call_impl._entries.values())


def assert_right(model: nn.Module, size: int = 8, graphs: int = 1) -> None:
    """Whole, and with no more kept than the sets of shapes that have worked."""
    endurance.call(model, size, calls=2)
    assert len(entries(model)) == graphs
    assert all(entry.complete and not entry.why_eager for entry in entries(model))


@pytest.mark.parametrize("work", [endurance.cycle, endurance.reshape])
def test_nothing_of_ours_and_no_table_of_pytorch_grows(work):
    model = Small().eval()
    compiler.compile(model, max_graphs=3)
    found = endurance.grown(work, model, 6)
    compiler.uncompile(model)
    # What Python and PyTorch keep of the last few compilations needs the long form.
    tables = {name: value for name, value in found.items() if name not in ("objects", "bytes")}
    assert endurance.too_much(tables) == []


def test_a_model_in_pieces_is_freed_and_captured_again_and_again():
    """PyTorch keeps what it compiled at the code of the model's class, and gives up after 8."""
    model, runners = Pieces().eval(), []
    for size in range(2, 8):
        compiler.compile(model)
        endurance.call(model, 8, calls=1)
        with torch.no_grad():
            x = torch.randn(size, 4, 8, 8)
            torch.testing.assert_close(model(x, torch.ones(1)), model._call_impl(x, torch.ones(1)))
        assert [len(entry.runners) for entry in entries(model)] == [2, 2]
        runners += [weakref.ref(r) for entry in entries(model) for r in entry.runners]
        compiler.uncompile(model)
    gc.collect()
    assert not any(runner() is not None for runner in runners)


def test_a_model_in_pieces_that_pytorch_gives_up_is_reported():
    model = compiled(Pieces, max_graphs=20)
    with torch.no_grad():
        for _ in range(2):
            for size in range(1, 12):
                x = torch.randn(size, 4, 8, 8)
                right = model._call_impl(x, torch.ones(1))
                torch.testing.assert_close(model(x, torch.ones(1)), right)
    report = compiler.report(model)
    assert len(report.graphs) == 16
    assert sum(report.eager.values()) == 3
    assert all("no piece of it was captured: Unsupported" in why for why in report.eager)
    compiler.uncompile(model)


WRONG: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "missing argument": lambda x, t: ((x,), {}),
    "unknown argument": lambda x, t: ((x, t), {"nothing": 1}),
    "too many arguments": lambda x, t: ((x, t, t, t), {}),
    "channels": lambda x, t: ((x[:, :3], t), {}),
    "other sizes": lambda x, t: ((x, t.repeat(3)), {}),
    "no group of channels": lambda x, t: ((x[:, :3].repeat(1, 3, 1, 1), t), {}),
    "a string": lambda x, t: (("x", t), {}),
    "a device": lambda x, t: ((x, "cuda:0"), {}),
    "nothing": lambda x, t: ((None, t), {}),
    "a list": lambda x, t: ((x.tolist(), t), {}),
    "the sample elsewhere": lambda x, t: ((x.to("meta"), t), {}),
    "the time elsewhere": lambda x, t: ((x, t.to("meta")), {}),
}


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs(name, first):
    model = compiled(max_graphs=1)
    if not first:
        assert_right(model)
    kept = entries(model)
    args, kwargs = WRONG[name](*inputs())
    with torch.no_grad():
        with pytest.raises(Exception) as right:
            model._call_impl(*args, **kwargs)
        with pytest.raises(type(right.value)):
            model(*args, **kwargs)
    assert entries(model) == kept  # the good one was not thrown out for it
    assert_right(model)
    assert compiler.report(model).captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize("which", ["sample", "time", "model"])
def test_on_a_gpu_two_devices(which):
    model = compiled().to("cuda")
    x, t = (value.to("cuda") for value in inputs())
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x, t), model._call_impl(x, t))
        if which == "model":
            model.to("cpu")
        with pytest.raises(RuntimeError, match="device"):
            model(x.cpu() if which == "sample" else x, t.cpu() if which == "time" else t)
        model.to("cuda")
        for _ in range(3):
            torch.testing.assert_close(model(x, t), model._call_impl(x, t))


class Full(Again):
    """No memory for some recordings, or for the results of some replays."""

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures

    def record(self, function: Callable[[], Any]) -> Any:
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().record(function)


@pytest.mark.parametrize("failures", [1, 2])
def test_no_memory_while_a_graph_is_recorded(failures):
    """The model's other graphs go; if there is still none, the programs run as they are."""
    model = compiled()
    pool = model._compiled_call_impl.pool
    pool.recorder = Again()
    assert_right(model, 6)
    pool.recorder = recorder = Full(failures)
    assert_right(model, 8, graphs=2)
    other, mine = (graph.cuda_graphs["step"] for graph in compiler.report(model).graphs)
    assert other["bytes"] == 0
    assert ("recording failed: OutOfMemoryError" in mine["why_not"]) == (failures == 2)
    assert recorder.recorded == 2 - failures
    assert_right(model, 6, graphs=2)
    _, other = (graph.cuda_graphs["step"] for graph in compiler.report(model).graphs)
    assert other["recordings"] == 2


@pytest.mark.parametrize("target", ["_foreach_copy_", "clone"])
def test_no_memory_while_a_graph_is_replayed(target):
    """What was not copied is copied by the next call."""
    pool = cuda_graphs.Pool(Again())
    double = cuda_graphs.Graphed(lambda x, y: x * 2 + y, [], pool)
    values = [torch.full((4,), float(number)) for number in range(4)]
    for number in range(3):
        double(values[number], values[0])
    error = torch.OutOfMemoryError("out of memory")
    with (
        mock.patch.object(torch, target, side_effect=error),
        pytest.raises(torch.OutOfMemoryError),
    ):
        double(values[3], values[1])
    for x in (values[3], values[2]):
        for y in (values[1], values[0]):
            assert torch.equal(double(x, y), x * 2 + y)


@contextmanager
def failing(error: BaseException, at: str) -> Iterator[None]:
    """The pass raises."""

    def fail(_: Any) -> int:
        raise error

    with mock.patch.dict(PASSES, {at: fail}):
        yield


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ValueError("a mistake")])
@pytest.mark.parametrize("at", ["group_norm_silu", "qkv"])
def test_a_pass_that_fails_is_reported_and_the_models_own_code_runs(error, at):
    model = compiled()
    with failing(error, at):
        endurance.call(model)
    (entry,) = entries(model)
    assert not entry.graphs
    assert not entry.runners
    (why,) = compiler.report(model).eager
    assert str(error) in why
    assert type(error).__name__ in why
    endurance.call(model)
    endurance.call(model, 6)  # other shapes are captured
    assert len(compiler.report(model).graphs) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), torch.OutOfMemoryError("no memory")])
def test_programs_that_fail(error):
    """In the first run and later; kept results are those of runs that came to their end."""
    model = compiled()
    with torch.no_grad():
        for _ in range(2):
            call = "fastdiff.compiler.runner.Runner.__call__"
            with mock.patch(call, side_effect=error), pytest.raises(type(error)):
                model(*inputs())
            assert_right(model)
        (entry,) = entries(model)
        (runner,) = entry.runners
        (kept,) = (kept for kept in runner.kept if kept.program.name == "schedule")
        run, x, t = kept.run, inputs()[0], torch.tensor([5, 6])
        kept.run = mock.Mock(side_effect=error)
        with pytest.raises(type(error)):
            model(x, t)
        kept.run = run
        torch.testing.assert_close(model(x, t), model._call_impl(x, t))
    assert_right(model)
    assert compiler.report(model).captures == 1


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("where", ["", "norm"])
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_hooks_that_fail(kind, where, first):
    model = compiled()
    if not first:
        assert_right(model)
    state = {"fail": True}

    def hook(*_: Any) -> None:
        if state["fail"]:
            raise ValueError("the user's mistake")

    module = model.get_submodule(where)
    add = module.register_forward_pre_hook if kind == "pre" else module.register_forward_hook
    handle = add(hook)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match="the user's mistake"):
            model(*inputs())
    state["fail"] = False
    endurance.call(model)
    handle.remove()
    endurance.call(model)
    assert not compiler.report(model).eager


def test_a_model_in_pieces_whose_python_fails():
    model = compiled(Pieces)

    def fail() -> None:
        raise ValueError("between two graphs")

    def right() -> None:
        x = torch.randn(2, 4, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(model(x, torch.ones(1)), model._call_impl(x, torch.ones(1)))

    for between, kept in ((fail, 0), (lambda: None, 1), (fail, 1), (lambda: None, 1)):
        model.between = between
        if between is fail:
            with torch.no_grad(), pytest.raises(ValueError, match="between two graphs"):
                model(torch.randn(2, 4, 8, 8), torch.ones(1))
        else:
            right()
        assert len(entries(model)) == kept
    assert not compiler.report(model).eager
    compiler.uncompile(model)


def test_callbacks_that_fail():
    """A solver's hook raises in the middle of a run; the next run is right."""

    class Stop:
        def __init__(self, at: int) -> None:
            self.left = at

        def __call__(self, *_: Any, **__: Any) -> None:
            self.left -= 1
            if not self.left:
                raise ValueError("the user's mistake")

    model = compiled()

    def run(**options: Any) -> Tensor:
        given = {"schedule": "linear", "steps": 4, "seed": 0, **options}
        return fastdiff.sample(lambda x, t: model(x, t.expand(2)), (2, 4, 8, 8), **given)

    right = run()
    for at in (1, 3):
        with pytest.raises(ValueError, match="the user's mistake"):
            run(callback=Stop(at))
        assert torch.equal(run(), right)
    assert_right(model, graphs=2)
