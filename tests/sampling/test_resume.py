"""A run that is interrupted and resumed gives the bits of the run that was not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff._ext import ext
from fastdiff.sampling import Guidance, Hook, Inpaint, RunState, StepInfo

SHAPE = (2, 3, 4, 4)
ENGINES = ["reference", *(["cpp"] if ext() is not None else [])]
COND, UNCOND = {"y": torch.ones(1)}, {"y": torch.zeros(1)}


def model(x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    shift = 0.0 if y is None else y.reshape(-1, 1, 1, 1).to(x.dtype)
    return torch.tanh(0.9 * x + 0.1 * shift)


def generators(kind: str) -> dict[str, Any]:
    if kind == "seed":
        return {"seed": [7, 2**63 + 1]}
    if kind == "one generator":
        return {"generator": torch.Generator().manual_seed(3)}
    if kind == "a generator each":
        return {"generator": [torch.Generator().manual_seed(s) for s in (3, 4)]}
    torch.manual_seed(11)
    return {}


class Stop:
    def __init__(self, after: int) -> None:
        self.after = after
        self.state: RunState

    def __call__(self, info: StepInfo) -> bool:
        if info.index == self.after:
            assert info.capture is not None
            self.state = info.capture()
            return False
        return True


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["seed", "one generator", "a generator each", "global"])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "dpmpp_3m_sde", "heun", "ddpm", "pndm"])
@pytest.mark.parametrize("after", [0, 1, 6])
def test_resuming_from_a_file(engine, kind, solver, after, tmp_path):
    common = {"schedule": "scaled_linear", "solver": solver, "steps": 8, "engine": engine}
    whole = fastdiff.sample(model, SHAPE, **common, **generators(kind))
    stop = Stop(after)
    part = fastdiff.sample(model, SHAPE, callback=stop, **common, **generators(kind))
    assert torch.equal(part, stop.state.x)
    path = tmp_path / "run.safetensors"
    stop.state.save(path)
    torch.manual_seed(99)  # a resumed run does not use the global generator
    other = {"cpp": "reference", "reference": engine}[engine]
    for which in (engine, other):  # and goes on in either engine
        result = fastdiff.sample(model, resume=RunState.load(path), engine=which)
        assert torch.equal(result, whole)


def test_guidance_hooks_and_dtype_go_on():
    known, mask = torch.linspace(-1, 1, 96).reshape(SHAPE), torch.ones(1, 1, 4, 4)
    mask[..., 0] = 0
    calls = []

    class Count(Hook):
        def step(self, info: StepInfo) -> None:
            calls.append(info.index)

    common = {
        "cond": COND,
        "uncond": UNCOND,
        "hooks": [Inpaint(known, mask), Count()],
    }
    fresh = {
        "schedule": "scaled_linear",
        "steps": 6,
        "seed": 3,
        "dtype": torch.bfloat16,
        "guidance": Guidance(2.0, rescale=0.4),
    }
    whole = fastdiff.sample(model, SHAPE, **common, **fresh)
    stop = Stop(2)
    fastdiff.sample(model, SHAPE, callback=stop, **common, **fresh)
    calls.clear()
    result = fastdiff.sample(model, resume=stop.state, guidance=Guidance(rescale=0.4), **common)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, whole)
    assert calls == [3, 4, 5]


def test_a_finished_run_resumes_to_its_result():
    stop = Stop(3)
    result = fastdiff.sample(model, SHAPE, schedule="linear", steps=4, seed=0, callback=stop)
    assert torch.equal(fastdiff.sample(model, resume=stop.state), result)


def test_a_state_can_be_taken_in_every_step_and_used_twice():
    states = []

    def keep(info: StepInfo) -> None:
        assert info.capture is not None
        states.append(info.capture())

    common = {"schedule": "linear", "solver": "unipc", "steps": 5, "seed": 0}
    whole = fastdiff.sample(model, SHAPE, callback=keep, **common)
    for state in [*states, *states]:
        assert torch.equal(fastdiff.sample(model, resume=state), whole)
    assert [state.next_row for state in states] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\x08\0\0\0\0\0\0\0{}      "])
def test_files_that_are_no_run_are_refused(content, tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="path must be a saved run"):
        RunState.load(path)
    with pytest.raises(FileNotFoundError):
        RunState.load(tmp_path / "none")


def test_a_truncated_file_is_refused(tmp_path):
    stop, path = Stop(1), tmp_path / "run.safetensors"
    fastdiff.sample(model, SHAPE, schedule="linear", steps=4, seed=0, callback=stop)
    stop.state.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="path must be a saved run"):
            RunState.load(path)


@pytest.mark.parametrize(
    ("error", "message", "more"),
    [
        (ValueError, "seed must be None when resume", {"seed": 1}),
        (ValueError, "generator must be None when", {"generator": torch.Generator()}),
        (ValueError, "x must be None when resume", {"x": torch.ones(SHAPE)}),
        (ValueError, "init must be None when resume", {"init": torch.ones(SHAPE)}),
        (TypeError, "takes no options", {"eta": 1.0}),
        (TypeError, "resume must be a RunState", {"resume": 3}),
    ],
)
def test_bad_resumption_is_refused(error, message, more):
    stop = Stop(1)
    fastdiff.sample(model, SHAPE, schedule="linear", steps=4, seed=0, callback=stop)
    with pytest.raises(error, match=message):
        fastdiff.sample(model, **{"resume": stop.state, **more})
