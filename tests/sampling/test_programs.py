"""A model of three programs in a run: each as often as it must, and the results of plain calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.models.denoiser import Denoiser
from fastdiff.sampling import Guidance, programs, sample
from fastdiff.sampling.hooks import Hook


class Toy(Denoiser):
    """A denoiser whose prompt and schedule meet in the step."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.text = nn.Parameter(torch.randn(3, 4, generator=generator) / 2)
        self.calls: Counter[str] = Counter()
        self.shapes: list[tuple[int, ...]] = []

    def prompt(self, y: Tensor, scale: float = 1.0) -> Any:
        self.calls["prompt"] += 1
        return {"y": y @ self.text * scale, "none": None}

    def schedule(self, t: Tensor, prompt: Any) -> Any:
        self.calls["schedule"] += 1
        self.shapes.append(tuple(t.shape))
        return [torch.sin(t.to(prompt["y"].dtype) / 50)[..., None] + prompt["y"]]

    def step(self, x: Tensor, schedule: Any, prompt: Any) -> Tensor:
        self.calls["step"] += 1
        return torch.tanh(x * schedule[0][:, :, None, None] + prompt["y"][:, :, None, None])


COND = {"y": torch.tensor([[1.0, 0, 1], [0, 1, -1]])}
UNCOND = {"y": torch.zeros(1, 3)}
RUN: dict[str, Any] = {
    "solver": "dpmpp_2m",
    "steps": 12,
    "schedule": "scaled_linear",
    "cond": COND,
    "uncond": UNCOND,
    "seed": 1,
}


def plain(model: Toy) -> Any:
    """The same function, which nobody can see the programs of."""
    return lambda x, t, **cond: model.forward(x, t, **cond)


@pytest.mark.parametrize(
    ("guidance", "prompts", "schedules"),
    [
        (Guidance(), 1, 1),
        (Guidance(4.0), 1, 1),
        (Guidance(4.0, rescale=0.5), 1, 1),
        (Guidance(4.0, batched=False), 2, 2),
        (Guidance(4.0, interval=(0.3, 5.0)), 2, 2),
    ],
    ids=["none", "cfg", "rescale", "two calls", "interval"],
)
def test_each_program_as_often_as_it_must(guidance: Guidance, prompts: int, schedules: int) -> None:
    model = Toy()
    result = sample(model, (2, 4, 5, 5), guidance=guidance, **RUN)
    calls = dict(model.calls)
    assert calls["prompt"] == prompts
    assert calls["schedule"] == schedules
    assert calls["step"] >= 12
    expected = sample(plain(model), (2, 4, 5, 5), guidance=guidance, **RUN)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_guide_of_the_zoo_runs_in_programs_too() -> None:
    model, guide = Toy(), Toy()
    guide.text.data.mul_(0.5)
    run = {key: value for key, value in RUN.items() if key != "uncond"}
    result = sample(model, (2, 4, 5, 5), guidance=Guidance(2.0, guide=guide), **run)
    assert guide.calls["prompt"] == guide.calls["schedule"] == 1
    expected = sample(plain(model), (2, 4, 5, 5), guidance=Guidance(2.0, guide=plain(guide)), **run)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_long_run_computes_its_schedule_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "CHUNK", 11)
    model = Toy()
    result = sample(model, (2, 4, 5, 5), guidance_scale=3.0, **RUN)
    assert model.shapes == [(2, 4)] * 6
    expected = sample(plain(model), (2, 4, 5, 5), guidance_scale=3.0, **RUN)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_arguments_written_to_in_the_run_are_seen() -> None:
    class Writes(Hook):
        def step(self, info: Any) -> None:
            if info.index == 3:
                y.add_(1.0)

    results = []
    for kind in (lambda model: model, plain):
        y = COND["y"].clone()
        run = {**RUN, "cond": {"y": y}, "uncond": None}
        results.append(sample(kind(Toy()), (2, 4, 5, 5), hooks=[Writes()], **run))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_arguments_of_a_hook_that_change_in_each_step() -> None:
    class Louder(Hook):
        def arguments(self, x: Any, t: Any, arguments: Any, place: Any) -> Any:
            return {"scale": 1.0 + place.index / 10}

    model = Toy()
    result = sample(model, (2, 4, 5, 5), hooks=[Louder()], **RUN)
    assert model.calls["prompt"] == 12
    expected = sample(plain(model), (2, 4, 5, 5), hooks=[Louder()], **RUN)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_hooks_of_the_module_see_its_calls() -> None:
    model, seen = Toy(), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    sample(model, (2, 4, 5, 5), **RUN)
    assert len(seen) == 12


def test_a_subclass_with_a_forward_of_its_own_is_called() -> None:
    class Halved(Toy):
        def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
            return super().forward(x, t, **cond) / 2

    model = Halved()
    result = sample(model, (2, 4, 5, 5), **RUN)
    assert model.calls["prompt"] == 12
    expected = sample(lambda x, t, **cond: Toy().forward(x, t, **cond) / 2, (2, 4, 5, 5), **RUN)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_a_list_whose_tensors_are_exchanged_is_another_condition() -> None:
    class Listed(Toy):
        def prompt(self, ys: list[Tensor]) -> Any:  # type: ignore[override]
            return super().prompt(ys[0])

    class Exchanges(Hook):
        def step(self, info: Any) -> None:
            if info.index == 3:
                ys[0] = ys[0] + 1.0

    results = []
    for kind in (lambda model: model, plain):
        ys = [COND["y"].clone()]
        run = {**RUN, "cond": None, "uncond": None, "model_kwargs": {"ys": ys}}
        results.append(sample(kind(Listed()), (2, 4, 5, 5), hooks=[Exchanges()], **run))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
