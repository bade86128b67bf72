"""One step of whole denoisers in bf16 on a CPU, beside eager PyTorch and torch.compile.

Taking turns: "eager", "eager channels last", with ``--with-compile`` "torch.compile" (channels
last, weights frozen by Inductor: the fastest way we know), "openvino" where it is installed,
"fastdiff" and "fastdiff freeze". Each variant sees another sample and time in every call, as in a
sampling run; eager's and fastdiff's share one copy of the weights. SDXL's peers but eager need more
memory than its weights four times: they are left out below 48 GiB. Nothing is timed before its
error against float32 was at most twice eager's.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoiser_peers import OpenVino, wide
from denoisers import DENOISERS, result
from timing import interleaved
from torch import Tensor, nn

import fastdiff
from fastdiff.testing import assert_within_2x

pytest.importorskip("diffusers")
SECONDS = 60.0
ROUNDS = 5  # at least: a call takes seconds, and its spread is a few per cent
CALLS = 64  # in a run; then the times begin again


class Run:
    """Calls a model as a sampling run does: the condition stays, sample and time do not."""

    def __init__(self, model: Callable[..., Any], inputs: dict[str, Any], last: bool) -> None:
        names = list(inputs)
        self._model, self._inputs, self._sample = model, inputs, names[0]
        self._time = names[1] if len(names) > 1 else ""
        form = torch.channels_last if last else torch.contiguous_format
        self._samples = [
            (inputs[self._sample] * (1 + i / 8)).contiguous(memory_format=form) for i in range(4)
        ]
        self._calls = 0

    def __call__(self) -> Tensor:
        call = self._calls % CALLS
        self._calls += 1
        inputs = {**self._inputs, self._sample: self._samples[call % 4]}
        if self._time:
            inputs[self._time] = self._inputs[self._time] * 0 + 999 - 15 * call
        return result(self._model(**inputs))


def variants(
    model: nn.Module, inputs: dict[str, Any], with_compile: bool, peers: bool
) -> dict[str, Callable[[], Tensor]]:
    def last() -> Any:
        found: Any = copy.deepcopy(model)
        return found.to(memory_format=torch.channels_last)

    def same() -> nn.Module:
        """Modules of their own over the same weights."""
        tensors = [*model.parameters(), *model.buffers()]
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})

    found: dict[str, Callable[[], Tensor]] = {"eager": Run(model, inputs, False)}
    if peers and any(isinstance(module, nn.Conv2d) and module.kernel_size != module.stride
           for module in model.modules()):  # fmt: skip
        found["eager channels last"] = Run(last(), inputs, True)
    if with_compile and peers:
        torch._inductor.config.freezing = True
        found["torch.compile"] = Run(torch.compile(last(), dynamic=False), inputs, True)
    if peers and importlib.util.find_spec("openvino"):
        found["openvino"] = Run(OpenVino(model, inputs), inputs, False)
    found["fastdiff"] = Run(fastdiff.compile(same()), inputs, False)
    found["fastdiff freeze"] = Run(fastdiff.compile(same(), freeze=True), inputs, False)
    return found


def room() -> bool:
    """Whether several engines may hold a large model at once."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >= 48 * 2**30


@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit-xl-2", "vae"])
@torch.no_grad()
def test_step(
    name: str, quick: bool, pytestconfig: pytest.Config, benchmark: Any, record: Any
) -> None:
    with_compile = bool(pytestconfig.getoption("--with-compile"))
    if quick and name != "sd15":
        pytest.skip("--quick: one small model")
    name = "small" if quick else name
    model, inputs = DENOISERS[name](torch.bfloat16)
    exact = Run(copy.deepcopy(model).float(), wide(inputs), False)()
    functions = variants(model, inputs, with_compile, name != "sdxl" or room())
    eager = Run(model, inputs, False)()
    for variant, function in functions.items():
        if variant.startswith("fastdiff"):
            assert_within_2x(function(), exact, eager, what=variant)
    del exact, eager

    def measured() -> None:
        budget = 2.0 if quick else SECONDS
        timings = interleaved(functions, torch.device("cpu"), budget, ROUNDS)
        best = min(t.median for n, t in timings.items() if not n.startswith("fastdiff"))
        columns = {
            variant: {
                "times_eager": timings["eager"].median / timing.median,
                "times_best_baseline": best / timing.median,
            }
            for variant, timing in timings.items()
        }
        row = {"name": name, "dtype": "bfloat16"}
        ours = [variant for variant in timings if variant.startswith("fastdiff")]
        record("cpu", row, timings, columns, ours)

    benchmark.pedantic(measured, rounds=1)
