"""Compiled models of real widths on a GPU, calls by two threads, and what stays behind.

On a CPU the same checks run on tiny models, so that a GPU finds no mistake of the tests' own.
"""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from denoisers import made, tensors
from real_layouts import MODELS, draw, in_float64

from fastdiff import compiler
from fastdiff.testing import assert_within_2x

GPU = pytest.mark.gpu
DEVICES = ("cpu", pytest.param("cuda", marks=GPU))
# The tiny one of them all would take a minute, and other tests compile the others on a CPU.
TINY = {"dit-xl": "dit"}
BLOCKS = [
    *((name, "cpu") for name in TINY),
    *(pytest.param(name, "cuda", marks=GPU) for name in ("sd15", "sdxl", "sd3", "flux", "dit-xl")),
]
THREADS = [("dit", "cpu"), *(pytest.param(n, "cuda", marks=GPU) for n in ("unet", "dit"))]
HALF = {"cpu": (torch.bfloat16,), "cuda": (torch.bfloat16, torch.float16)}
SIZE = 32  # of the latents; the token counts are those of 256 x 256 pictures
CALLS = 6


def on(values: Any, device: str, dtype: torch.dtype) -> Any:
    """A nest of inputs on a device; floating-point tensors in ``dtype``."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    return torch.utils._pytree.tree_map(one, values)


def real(name: str, device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A model of public widths and its inputs; tiny on a CPU."""
    if device == "cpu":
        model, inputs = made(TINY[name])
        return model, inputs(0)
    model, inputs, (time, kind) = MODELS[name](SIZE)
    draw(model)
    at = {"noise": torch.tensor([500]), "flow": torch.tensor([700.0]), "unit": torch.tensor([0.7])}
    return model, {**inputs, time: at[kind]}


@pytest.mark.parametrize(("name", "device"), BLOCKS)
@torch.no_grad()
def test_compiled_blocks_are_within_twice_eagers_error(name: str, device: str) -> None:
    model, inputs = real(name, device)
    model = model.to(device)
    model.load_state_dict({k: v.bfloat16() for k, v in model.state_dict().items()}, assign=False)
    inputs = on(on(inputs, device, torch.bfloat16), device, torch.float32)
    with in_float64(model):
        exact = tensors(model(**on(inputs, device, torch.float64)))
    for dtype in (torch.float32, *HALF[device]):
        here = copy.deepcopy(model).to(dtype)
        given = on(inputs, device, dtype)
        eager = tensors(here(**given))
        compiler.compile(here)
        for _ in range(3):  # recorded, replayed, replayed again
            mine = tensors(here(**given))
        for result, right, theirs in zip(mine, exact, eager, strict=True):
            assert_within_2x(result, right, theirs, f"{name} {dtype}")
        report = compiler.report(here)
        assert len(report.graphs) == 1, report
        assert not report.eager, report
        assert sum(report.graphs[0].fused.values()), report
        if device == "cuda":
            assert report.graphs[0].cuda_graphs["step"]["replays"] >= 1, report
        compiler.uncompile(here)
        torch.compiler.reset()


@pytest.mark.parametrize(("name", "device"), THREADS)
def test_two_threads_call_one_compiled_model(name: str, device: str) -> None:
    """Each with a condition, a stream and samples of its own; nobody sees the other's results."""
    model, inputs = made(name)
    model = model.to(device)
    condition = [on(inputs(0), device, torch.float32) for _ in range(2)]
    calls: list[list[dict[str, Any]]] = [[], []]
    for thread in range(2):
        for step in range(CALLS):
            given = on(inputs(step), device, torch.float32)
            first = next(iter(given))
            given[first] = given[first] + thread
            same = {k: v for k, v in condition[thread].items() if k not in (first, "timestep")}
            calls[thread].append({**given, **same})
    with torch.no_grad():
        right = [[tensors(model(**given)) for given in each] for each in calls]
        compiler.compile(model)
        for given in calls[0][:3]:
            model(**given)

    def work(thread: int) -> list[int]:
        wrong = []
        stream = torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext()
        with torch.no_grad(), stream:
            for number in range(3 * CALLS):
                step = number % CALLS
                mine = tensors(model(**calls[thread][step]))
                if device == "cuda":
                    torch.cuda.current_stream().synchronize()
                for result, other in zip(mine, right[thread][step], strict=True):
                    if not torch.allclose(result, other, rtol=1e-3, atol=1e-4):
                        wrong.append(number)
        return wrong

    if device == "cuda":
        torch.cuda.synchronize()
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(work, range(2))) == [[], []]
    assert compiler.report(model).captures == 1


def held(device: str) -> int:
    """Bytes of tensors that are alive: by the allocator's account, or of all that Python knows."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("device", DEVICES)
def test_compiling_and_uncompiling_leaves_nothing_behind(device: str) -> None:
    model, inputs = made("dit")
    model = model.to(device)
    before = []
    for _ in range(4):
        compiler.compile(model)
        with torch.no_grad():
            for step in range(4):
                model(**on(inputs(step), device, torch.float32))
        compiler.uncompile(model)
        before.append(held(device))
    assert before[1:] == before[1:2] * 3, before
