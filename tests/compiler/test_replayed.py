"""``fastdiff.sample`` of a compiled model as replays of one recorded step.

Without a GPU the recorder is that of trajectories.py: the step runs again on the same memory.
"""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from denoisers import made
from recorders import Again
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from trajectories import (
    SHAPE,
    SOLVERS,
    Tiny,
    draw,
    graphs,
    labels,
    prepared,
    recordings,
    tiny,
)

import fastdiff
from fastdiff import compiler
from fastdiff.sampling import Clip, Guidance
from fastdiff.sampling.captured import Trajectory
from fastdiff.solvers import Row, SolverTable, Update, make_table
from fastdiff.solvers.trajectory import IndexedTable
from fastdiff.testing import psnr


@pytest.fixture
def recorder() -> Again:
    return Again()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_replayed_run_is_the_run_step_by_step(recorder, solver, scale):
    model = prepared(recorder)
    plain = draw(tiny(), solver=solver, scale=scale)
    replayed = draw(model, solver=solver, scale=scale, engine="graph")
    assert torch.equal(replayed, draw(model, solver=solver, scale=scale, engine="reference"))
    torch.testing.assert_close(replayed, plain)
    assert recordings(model) == 1
    assert recorder.launches[0] == graphs(model)["0 trajectory"]["replays"]  # at once


def test_other_seeds_steps_prompts_schedules_and_solvers_need_no_recording(recorder):
    model = prepared(recorder)
    draw(model, solver="unipc", engine="graph")
    runs: list[dict[str, Any]] = [
        {"seed": 8},
        {"seed": [9, 2**63 + 1]},
        {"steps": 3},
        {"steps": 40},
        {"y": 1},
        {"scale": 7.5},
        {"solver": "euler"},
        {"solver": "euler_ancestral", "seed": 1},
        {"x": torch.ones(SHAPE)},
        {"init": torch.ones(SHAPE), "strength": 0.5},
    ]
    for options in runs:
        right = draw(model, engine="reference", **options)
        assert torch.equal(draw(model, engine="graph", **options), right), options
    assert (
        recordings(model) == 2
    )  # Euler's times are no whole numbers: the model's is another graph
    # More rows than there is room for: other tables, so another recording; then none.
    for steps in (70, 90, 20):
        right = draw(model, engine="reference", steps=steps)
        assert torch.equal(draw(model, engine="graph", steps=steps), right)
    assert recordings(model) == 3


class Operations(TorchDispatchMode):
    """The names of those that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back(recorder, monkeypatch):
    model = prepared(recorder)
    draw(model, solver="euler_ancestral", engine="graph")
    (trajectory,) = model._compiled_call_impl.trajectories.values()
    names: list[str] = []

    def watch(owner: type, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with Operations() as operations:  # PyTorch's front end, around it, refuses to run so
                result = function(*args, **kwargs)
            names.extend(operations.names)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(Trajectory, "_run_step")
    for part in ("model_input", "time", "step"):
        watch(IndexedTable, part)
    trajectory.rewind()
    with torch.no_grad():
        trajectory.launch(trajectory.loaded)
    rows = len(trajectory.loaded)
    assert names.count("fastdiff.solver_step_indexed_.default") == rows
    assert names.count("aten.convolution.default") == 2 * rows
    assert not [name for name in names if "_local_scalar_dense" in name or "nonzero" in name]


def test_an_image_does_not_depend_on_its_batch(recorder):
    model = prepared(recorder)

    def one(seed: list[int]) -> Tensor:
        x = (len(seed), *SHAPE[1:])
        y = {"y": labels(0)[:1].expand(len(seed), -1)}
        return fastdiff.sample(
            model, x, solver="ddpm", steps=5, schedule="linear", seed=seed, cond=y, engine="graph"
        )

    both, alone = one([4, 11]), one([11])
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both[:1], alone, atol=0.1)


def test_rows_without_a_model_are_solver_steps_alone(recorder):
    def row(time: float, value: float) -> Row:
        update = Update(0, (0.75, 0.0), -0.25, 0.5)
        return Row(0, time, 0.5, 0.0, value, (update,), draw=3 - int(time) // 100)

    rows = (row(300, 1.0), row(200, 0.0), row(100, 1.0), row(0, 1.0))
    table = SolverTable("gaps", 2, rows, num_draws=4)
    model = prepared(recorder)
    replayed = draw(model, solver=table, scale=1.0, engine="graph")
    assert recorder.launches == [1, 2]
    assert torch.equal(replayed, draw(model, solver=table, scale=1.0, engine="reference"))


def test_a_run_goes_on_where_it_was_interrupted(recorder):
    model = prepared(recorder)
    states: list[Any] = []

    def stop(info: Any) -> bool:
        states.append(info.capture())
        return info.index < 2

    whole = draw(model, solver="unipc", engine="graph")
    draw(model, solver="unipc", callback=stop)
    rest = fastdiff.sample(
        model,
        resume=states[-1],
        cond={"y": labels(0)},
        uncond={"y": torch.zeros(2, 6)},
        guidance_scale=3.0,
        engine="graph",
    )
    torch.testing.assert_close(rest, whole)
    assert recorder.launches[0] == 6
    assert recorder.launches[-1] == 3


@pytest.mark.parametrize("write", ["in place", "through data", "elsewhere", "state dict"])
def test_changed_weights_are_seen(recorder, write):
    model, other = prepared(recorder), tiny(seed=1)
    before = draw(model, engine="graph")
    with torch.no_grad():
        if write == "state dict":
            model.load_state_dict(other.state_dict())
        else:
            for mine, new in zip(model.parameters(), other.parameters(), strict=True):
                if write == "in place":
                    mine.copy_(new)
                elif write == "through data":
                    mine.data.copy_(new)
                else:
                    mine.data = new.data.clone()
    after = draw(model, engine="graph")
    torch.testing.assert_close(after, draw(other))
    assert not torch.allclose(before, after)
    assert recordings(model) == 1 + (write == "elsewhere")


def test_adapters_that_come_change_and_go_are_seen(recorder):
    peft = pytest.importorskip("peft")
    model = prepared(recorder)
    base = draw(model, engine="graph")
    config = peft.LoraConfig(r=2, target_modules=["label", "text"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()
    with_adapter = draw(model, engine="graph")
    assert not torch.allclose(with_adapter, base)
    assert torch.equal(with_adapter, draw(model, engine="reference"))
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.25)
    scaled = draw(model, engine="graph")
    assert not torch.allclose(scaled, with_adapter)
    assert torch.equal(scaled, draw(model, engine="reference"))


@pytest.mark.parametrize("name", ["unet", pytest.param("sdxl", marks=pytest.mark.long), "zoo_dit"])
def test_real_architectures(recorder, name):
    model, inputs = made(name)
    model.eval()
    first = inputs(0)
    names = {"sample", "hidden_states", "x"}
    x = next(first.pop(n) for n in names if n in first)
    time = next(n for n in ("timestep", "t") if n in first)
    del first[time]
    options: dict[str, Any] = {"solver": "euler_ancestral", "steps": 4, "seed": 1}
    options |= {"schedule": "scaled_linear", "cond": first, "drop_variance": True}

    def run(**more: Any) -> Tensor:
        return fastdiff.sample(model, tuple(x.shape), **options, **more)

    right = run()
    prepared(recorder, model)
    replayed = run(engine="graph")
    assert psnr(replayed, right) >= 80
    assert torch.equal(replayed, run(engine="reference"))
    assert recordings(model) == 1
    (graph,) = compiler.report(model).graphs
    assert graph.schedule["why_not"] == ""
    assert graph.schedule["together"] >= 4
    assert graph.schedule["alone"] == 0


class Breaks(Tiny):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        result = super().forward(x, t, y)
        torch._dynamo.graph_break()
        return result * 0.5


class Reads(Tiny):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * float(y[0, 0].item())


class Noisy(Tiny):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) + torch.randn_like(x)


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "callback": ({"callback": lambda info: True}, "a callback or a progress bar"),
    "progress": ({"progress": True}, "a callback or a progress bar"),
    "hook": ({"hooks": [Clip(2.0)]}, "hooks: Clip"),
    "rescale": ({"guidance": Guidance(3.0, rescale=0.5), "scale": 1.0}, "guidance: rescale"),
    "two calls": (
        {"guidance": Guidance(3.0, batched=False), "scale": 1.0},
        "guidance: batched=False",
    ),
    "interval": (
        {"guidance": Guidance(3.0, interval=(0.5, 3.0)), "scale": 1.0},
        "guidance: rows without guidance",
    ),
    "generator": (
        {"solver": "ddpm", "generator": torch.Generator()},
        "its noise comes from torch generators",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_looks_between_the_steps_breaks_out(recorder, name):
    options, reason = REASONS[name]
    model = prepared(recorder)
    right = draw(tiny(), **options)
    if "generator" in options:
        options["generator"].manual_seed(0)
        right = draw(tiny(), **options)
        options["generator"].manual_seed(0)
    torch.testing.assert_close(draw(model, **options), right)
    assert recordings(model) == 0
    ((said, count),) = compiler.report(model).stepwise.items()
    assert said.startswith(reason)
    assert count == 1
    assert f"sampled step by step 1 times: {reason}" in str(compiler.report(model))
    with pytest.raises(RuntimeError, match=f"engine='graph' cannot run: {reason}"):
        draw(model, **options, engine="graph")


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (Breaks, "it is captured in pieces"),
        (Noisy, "it draws random numbers"),
        (Tiny, "the model is in training mode"),
    ],
)
def test_models_that_no_recording_holds_run_as_they_are(recorder, made, reason):
    torch.manual_seed(0)
    model = prepared(recorder, made().eval())
    if made is Tiny:
        model.train()
    with torch.no_grad():
        torch.manual_seed(5)
        result = draw(model)
        torch.manual_seed(5)
        compiler.uncompile(model)
        torch.testing.assert_close(result, draw(model))
        prepared(recorder, model)
        with pytest.raises(RuntimeError, match=reason):
            draw(model, engine="graph")
    assert recordings(model) == 0


def test_a_number_that_the_prompt_gives_is_part_of_the_recording(recorder):
    torch.manual_seed(0)
    model = Reads().eval()
    right = {y: draw(model, y=y, scale=1.0) for y in range(2)}
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        prepared(recorder, model)
        for y in (0, 1, 0):
            torch.testing.assert_close(draw(model, y=y, scale=1.0, engine="graph"), right[y])


def test_models_that_are_not_compiled_say_so():
    for model in (tiny(), lambda x, t, y: x):
        with pytest.raises(RuntimeError, match="not one that fastdiff"):
            draw(model, engine="graph")


def test_options_and_devices_that_record_nothing(recorder):
    model = prepared(recorder)
    model._compiled_call_impl.pool = None
    with pytest.raises(RuntimeError, match="cuda_graphs=False"):
        draw(model, engine="graph")
    model = compiler.compile(tiny())
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        draw(model, engine="graph")
    tight = prepared(recorder, max_graph_bytes=1000)
    with pytest.raises(RuntimeError, match="more than max_graph_bytes"):
        draw(tight, engine="graph")


def test_a_recording_that_fails_leaves_the_model_usable(recorder):
    model = prepared(recorder)
    recorder.fail = True
    torch.testing.assert_close(draw(model), draw(tiny()))
    why = "recording failed: RuntimeError: operation not permitted"
    assert list(compiler.report(model).stepwise) == [why]
    assert graphs(model)["0 trajectory"]["bytes"] == 0


def test_what_the_model_raises_comes_out(recorder):
    model = prepared(recorder)
    with pytest.raises(TypeError, match="missing a required argument"):
        fastdiff.sample(model, SHAPE, schedule="linear", steps=2, seed=0)
    assert torch.equal(draw(model, engine="graph"), draw(model, engine="reference"))


def test_memory_is_bounded_and_freed(recorder):
    recorder.size = 10_000_000
    model = prepared(recorder, max_graph_bytes=25_000_000)
    pool = model._compiled_call_impl.pool
    for batch in (1, 2, 3, 1, 3):
        x = torch.ones(batch, *SHAPE[1:])
        options: dict[str, Any] = {"solver": "ddim", "steps": 3, "schedule": "linear"}
        options |= {"x": x, "cond": {"y": labels(0)[:1]}}
        right = fastdiff.sample(tiny(), **options)
        torch.testing.assert_close(fastdiff.sample(model, engine="graph", **options), right)
        assert pool.nbytes() <= 25_000_000
    assert recordings(model) == 4  # the first one went, and came again
    trajectories = [weakref.ref(t) for t in model._compiled_call_impl.trajectories.values()]
    assert len(trajectories) == 3
    compiler.uncompile(model)
    assert pool.nbytes() == 0
    gc.collect()
    assert all(t() is None for t in trajectories)


def test_shapes_beyond_max_graphs_go(recorder):
    model = prepared(recorder, max_graphs=2)
    for batch in (1, 2, 3, 4):
        x = torch.ones(batch, *SHAPE[1:])
        cond = {"y": labels(0)[:1]}
        fastdiff.sample(
            model, x=x, steps=2, schedule="linear", cond=cond, solver="ddim", engine="graph"
        )
    kept = model._compiled_call_impl.trajectories
    assert len(kept) == 2
    assert model._compiled_call_impl.pool.nbytes() == sum(t.nbytes for t in kept.values()) > 0


def test_two_threads_run_one_recording(recorder):
    model = prepared(recorder)
    right = {seed: draw(model, seed=seed, y=seed) for seed in range(2)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            if not torch.equal(draw(model, seed=seed, y=seed), right[seed]):
                wrong.append(seed)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
    assert not wrong
    assert recordings(model) == 1


def test_under_inference_mode(recorder):
    model = prepared(recorder)
    right = draw(tiny())
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(draw(model, engine="graph"), right)
    torch.testing.assert_close(draw(model, engine="graph"), right)


def test_tables_of_every_solver_have_room(recorder):
    model = prepared(recorder)
    wide = make_table("unipc", "scaled_linear", 5, prediction="eps").with_guidance(3.0)
    assert wide.num_registers > 1
    for table in (make_table("ddim", "scaled_linear", 5).with_guidance(3.0), wide):
        right = draw(model, solver=table, scale=1.0, engine="reference")
        assert torch.equal(draw(model, solver=table, scale=1.0, engine="graph"), right)
    assert recordings(model) == 2  # more registers than there was room for
