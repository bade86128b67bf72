"""Launching recorded steps from C++, and what of replayed runs only a GPU shows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from trajectories import SHAPE, SOLVERS, graphs, labels, tiny

import fastdiff
from fastdiff import compiler
from fastdiff.compiler.cuda_graphs import CudaReplay, raw_exec
from fastdiff.sampling.captured import Trajectory


def test_a_graph_that_does_not_tell_its_handle_is_replayed_by_torch():
    class Silent:
        def __init__(self) -> None:
            self.replays = 0

        def replay(self) -> None:
            self.replays += 1

    graph = Silent()
    assert raw_exec(graph) == 0
    replay = CudaReplay(graph)  # type: ignore[arg-type]
    replay(5)
    assert not replay.native
    assert graph.replays == 5


def test_the_cpp_loop_checks_its_arguments():
    from fastdiff._ext import ext

    launch = getattr(ext(), "cuda_launch_graph", None)
    if launch is None:
        pytest.skip("this build of the extension has no CUDA")
    launch(8, 0, 0)
    with pytest.raises(ValueError, match="exec must not be null"):
        launch(0, 0, 1)
    with pytest.raises(ValueError, match="times must be at least 0, got -1"):
        launch(8, 0, -1)


def on_gpu(dtype: torch.dtype = torch.float32) -> Any:
    return compiler.compile(tiny().to("cuda", dtype))


def draw_on_gpu(model: Any, **options: Any) -> Tensor:
    options = {"solver": "euler_ancestral", "steps": 6, "seed": 3, **options}
    dtype = next(model.parameters()).dtype
    cond = {"y": labels(0).to("cuda", dtype)}
    uncond = {"y": torch.zeros(2, 6, device="cuda", dtype=dtype)}
    return fastdiff.sample(
        model,
        SHAPE,
        schedule="scaled_linear",
        cond=cond,
        uncond=uncond,
        guidance_scale=3.0,
        **options,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_on_a_gpu_a_replayed_run_is_the_run(solver, dtype):
    model = on_gpu(dtype)
    for steps, seed in ((6, 3), (9, 4)):
        options = {"solver": solver, "steps": steps, "seed": seed}
        right = draw_on_gpu(model, engine="reference", **options)
        torch.testing.assert_close(draw_on_gpu(model, engine="graph", **options), right)
    assert graphs(model)["0 trajectory"]["recordings"] == 1


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_between_the_steps(monkeypatch):
    model = on_gpu()
    draw_on_gpu(model, engine="graph")
    right = draw_on_gpu(model, engine="graph")
    launch, launched = Trajectory.launch, []

    def watched(self: Trajectory, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launch(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        launched.append(args)

    monkeypatch.setattr(Trajectory, "launch", watched)
    assert torch.equal(draw_on_gpu(model, engine="graph"), right)
    assert len(launched) == 1


@pytest.mark.gpu
def test_on_a_gpu_replays_by_the_cpp_loop_are_those_by_torch():
    x, steps = torch.zeros(1000, device="cuda"), torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(0.5).add_(steps)
        steps.add_(1)
    replay = CudaReplay(graph)
    if not replay.native:
        pytest.skip("this PyTorch or this build does not launch graphs from C++")
    for _ in range(20):
        graph.replay()
    right = x.clone()
    x.zero_()
    steps.zero_()
    replay(20)
    assert torch.equal(x, right)
    assert int(steps) == 20
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        replay(2)
    stream.synchronize()
    assert int(steps) == 22


@pytest.mark.gpu
def test_on_a_gpu_memory_is_bounded_and_freed():
    model = on_gpu()
    compiled = model._compiled_call_impl
    for batch in (1, 2, 3, 1):
        cond = {"y": labels(0)[:1].cuda()}
        x = torch.ones(batch, *SHAPE[1:], device="cuda")
        options: dict[str, Any] = {"solver": "ddim", "steps": 3, "schedule": "linear"}
        fastdiff.sample(model, x=x, cond=cond, engine="graph", **options)
        compiled.pool.max_bytes = 2 * max(t.nbytes for t in compiled.trajectories.values())
        assert compiled.pool.nbytes() <= compiled.pool.max_bytes
    pool = compiled.pool
    compiler.uncompile(model)
    assert pool.nbytes() == 0


@pytest.mark.gpu
def test_on_a_gpu_two_threads_run_one_recording():
    model = on_gpu()
    right = {seed: draw_on_gpu(model, seed=seed) for seed in range(2)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                if not torch.equal(draw_on_gpu(model, seed=seed), right[seed]):
                    wrong.append(seed)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, range(2)))
    assert not wrong
