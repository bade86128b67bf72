"""Recording and replaying programs, without a GPU through the recorder of trajectories.py."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from denoisers import made, tensors
from recorders import Again
from torch import Tensor, nn

from fastdiff import compiler
from fastdiff.compiler.cuda_graphs import Graphed, Pool


def affine(x: Tensor, weight: Tensor, shift: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return x * weight + shift, {"sum": x + shift}


@pytest.fixture
def recorder() -> Again:
    return Again()


def test_results_are_those_of_the_function_and_stay(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    weight, shift = torch.randn(5), torch.randn(5)
    inputs = [torch.randn(3, 5) for _ in range(6)]
    results = [graphed(x, weight, shift) for x in inputs]
    for x, (first, rest) in zip(inputs, results, strict=True):
        assert torch.equal(first, x * weight + shift)
        assert torch.equal(rest["sum"], x + shift)
    assert graphed.facts() == {"recordings": 1, "replays": 5, "bytes": 1000 + 80, "why_not": ""}


def test_writes_to_weights_and_inputs_are_seen(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    x, weight, shift = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    for step in range(6):
        (x, weight, shift)[step % 3].mul_(1.5)
        assert torch.equal(graphed(x, weight, shift)[0], x * weight + shift)
    assert recorder.recorded == 1


def test_inference_tensors_are_copied_every_time(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    with torch.inference_mode():
        x, weight, shift = torch.randn(3, 5), torch.randn(5), torch.randn(5)
        for _ in range(4):
            x.add_(1)
            assert torch.equal(graphed(x, weight, shift)[0], x * weight + shift)


def test_a_weight_elsewhere_records_again(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    x, weight, shift = torch.randn(3, 5), nn.Parameter(torch.randn(5)), torch.randn(5)
    with torch.no_grad():
        for _ in range(3):
            graphed(x, weight, shift)
        weight.data = weight.data * 2
        for _ in range(2):
            assert torch.equal(graphed(x, weight, shift)[0], x * weight + shift)
    assert recorder.recorded == 2


def test_numbers_are_part_of_the_recording(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    x, shift = torch.randn(3, 5), torch.randn(5)
    weight = torch.tensor(2.0, dtype=torch.float64)
    for step in range(4):
        if step == 2:
            weight.fill_(3.0)
        assert torch.equal(graphed(x, weight, shift)[0], x * weight + shift)
    assert recorder.recorded == 2


def test_expanded_and_strided_inputs(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    weight = torch.randn(5)
    for _ in range(3):
        x, shift = torch.randn(5, 3).t(), torch.randn(1, 5).expand(3, 5)
        assert torch.equal(graphed(x, weight, shift)[0], x * weight + shift)


def test_what_cannot_be_recorded_runs_as_it_is(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    recorder.fail = True
    values = torch.randn(3, 5), torch.randn(5), torch.randn(5)
    for _ in range(3):
        assert torch.equal(graphed(*values)[0], values[0] * values[1] + values[2])
    assert graphed.why_not == "recording failed: RuntimeError: operation not permitted"
    assert graphed.nbytes == 0


def test_the_least_recently_used_graph_goes_and_comes_again(recorder):
    pool = Pool(recorder, max_bytes=2500)
    users = [Graphed(lambda x, n=n: x * n, [], pool) for n in range(3)]
    x = torch.randn(4)
    for n in (0, 1, 2, 0, 0, 2):
        for _ in range(2):
            assert torch.equal(users[n](x), x * n)
    assert pool.nbytes() <= 2500
    assert [user.nbytes > 0 for user in users] == [True, False, True]
    assert [user.recordings for user in users] == [2, 1, 1]
    pool.clear()
    assert pool.nbytes() == 0
    assert torch.equal(users[0](x), x * 0)


def test_on_a_cpu_nothing_is_recorded_and_the_report_says_so():
    model, inputs = made("unet")
    compiler.compile(model)
    with torch.no_grad():
        for step in range(3):
            model(**inputs(step))
    (graph,) = compiler.report(model).graphs
    assert graph.cuda_graphs["step"]["why_not"] == "not on a CUDA device"
    assert "CUDA graph of step: none, not on a CUDA device" in str(compiler.report(model))


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_a_model_through_recorded_programs(name, recorder):
    model, inputs = made(name)
    compiler.compile(model)
    pool = model._compiled_call_impl.pool
    pool.recorder = recorder
    with torch.no_grad():
        for step in range(7):
            if step == 5:
                for parameter in model.parameters():
                    parameter.mul_(1.01)
            mine = tensors(model(**inputs(step)))
            for value, right in zip(mine, tensors(model._call_impl(**inputs(step))), strict=True):
                torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5)
    (graph,) = compiler.report(model).graphs
    assert graph.cuda_graphs["step"]["recordings"] == 1
    assert graph.cuda_graphs["step"]["replays"] == 6
    assert pool.nbytes() > 0
    model._compiled_call_impl.clear()
    assert pool.nbytes() == 0


def test_random_numbers_are_not_recorded(recorder):
    class Noisy(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample + timestep * torch.randn_like(sample)

    model = Noisy().eval()
    compiler.compile(model)
    model._compiled_call_impl.pool.recorder = recorder
    values = torch.zeros(8), torch.ones(())
    with torch.no_grad():
        results = [model(*values) for _ in range(3)]
    assert not torch.equal(results[1], results[2])
    (graph,) = compiler.report(model).graphs
    assert graph.cuda_graphs["step"]["why_not"] == "it draws random numbers"


def test_two_threads_replay_one_graph(recorder):
    graphed = Graphed(affine, [1], Pool(recorder))
    weight, shift = torch.randn(5), torch.randn(5)
    graphed(torch.randn(3, 5), weight, shift)
    wrong = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = torch.randn(3, 5, generator=generator)
            if not torch.equal(graphed(x, weight, shift)[0], x * weight + shift):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_graphs", 0, "max_graphs must be an integer of at least 1, got 0"),
        ("max_graph_bytes", -1, "max_graph_bytes must be an integer of at least 0, got -1"),
        ("max_graph_bytes", 1.5, "max_graph_bytes must be an integer of at least 0, got 1.5"),
    ],
)
def test_bad_bounds(option, value, message):
    with pytest.raises(ValueError, match=message):
        compiler.compile(nn.Linear(2, 2), **{option: value})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["unet", "sdxl", "flux"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_gpu_a_replayed_step_is_the_step_and_waits_for_nothing(name, dtype):
    def on_gpu(values: Any) -> Any:
        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to("cuda", dtype if value.is_floating_point() else None)

        return torch.utils._pytree.tree_map(one, values)

    model, inputs = made(name)
    model = model.to("cuda", dtype)
    steps = [on_gpu(inputs(step)) for step in range(6)]
    with torch.no_grad():
        right = [tensors(model(**values)) for values in steps]
        compiler.compile(model)
        for values in steps[:3]:
            model(**values)
        # A run begins here: the weights behind kept results are looked at once.
        mine = [tensors(model(**steps[0]))]
        torch.cuda.set_sync_debug_mode("error")
        try:
            mine += [tensors(model(**values)) for values in steps[1:]]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for results, expected in zip(mine, right, strict=True):
        for result, other in zip(results, expected, strict=True):
            torch.testing.assert_close(result, other)
    (graph,) = compiler.report(model).graphs
    assert graph.cuda_graphs["step"]["recordings"] == 1
    assert graph.cuda_graphs["step"]["replays"] >= 6
