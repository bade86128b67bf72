"""Compiled and captured steps of the schedulers: one program for every step, nothing read back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

from fastdiff.integrations import diffusers as ours  # noqa: E402

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM = "DPMSolverMultistepScheduler"
ANCESTRAL = "KDPM2AncestralDiscreteScheduler"
CASES: list[tuple[str, dict[str, Any]]] = [
    (DPM, SD),
    (DPM, {**SD, "solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", SD),
    ("DEISMultistepScheduler", SD),
    ("EulerDiscreteScheduler", SD),
    ("EulerAncestralDiscreteScheduler", SD),
    ("HeunDiscreteScheduler", SD),
    ("LMSDiscreteScheduler", SD),
    ("LCMScheduler", SD),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("DDIMScheduler", {**SD, "clip_sample": False}),
    ("DDPMScheduler", {**SD, "clip_sample": False}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True}),
    ("DPMSolverSinglestepScheduler", {**SD, "solver_order": 3}),
    ("KDPM2DiscreteScheduler", SD),
    (ANCESTRAL, SD),
    ("TCDScheduler", SD),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False}),
    ("DDIMInverseScheduler", {**SD, "clip_sample": False}),
    ("DPMSolverMultistepInverseScheduler", SD),
]
EVERY = pytest.mark.parametrize(
    ("name", "config"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    return torch.tanh(x * 0.9) * (0.5 + t / 2000)


def make(name: str, config: dict[str, Any], steps: int = 8) -> Any:
    scheduler = getattr(ours, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def begin(scheduler: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A state to begin with; the noise that is drawn afterwards is always the same, too."""
    torch.manual_seed(3)
    x = torch.randn(2, 4, 4, 4) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    return x.to(dtype)


def loop(scheduler: Any, step: Any, x: torch.Tensor, skip: int = 0) -> torch.Tensor:
    for t in scheduler.timesteps[skip:]:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = step(model(seen, t), t, x, return_dict=False)[0]
    return x


def eager(name: str, config: dict[str, Any], steps: int = 8, skip: int = 0) -> torch.Tensor:
    scheduler = make(name, config, steps)
    if skip:
        scheduler.set_begin_index(skip)

    def step(output: torch.Tensor, t: torch.Tensor, x: torch.Tensor, **kwargs: Any) -> Any:
        result = scheduler.step(output, t, x, **kwargs)
        if name == ANCESTRAL and scheduler.step_index % 2:
            torch.randn(x.shape)  # a traced step draws here, too
        return result

    return loop(scheduler, step, begin(scheduler), skip)


def check(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@EVERY
def test_compiled_steps_are_one_graph(name, config):
    scheduler = make(name, config)
    counter = CompileCounter()
    step = torch.compile(scheduler.step, backend=counter, fullgraph=True)
    # scale_model_input runs outside of the graph here, and has to know the step all the same.
    check(loop(scheduler, step, begin(scheduler)), eager(name, config))
    scheduler.set_timesteps(8)
    check(loop(scheduler, step, begin(scheduler)), eager(name, config))
    scheduler.set_timesteps(11)  # another run, and still the same graph
    check(loop(scheduler, step, begin(scheduler)), eager(name, config, 11))
    assert counter.frame_count == 1


def test_runs_of_any_length_are_one_graph():
    scheduler = make("DDIMScheduler", {**SD, "clip_sample": False})
    counter = CompileCounter()
    step = torch.compile(scheduler.step, backend=counter, fullgraph=True)
    counts = []
    for steps in (8, 64, 8, 500):
        scheduler.set_timesteps(steps)
        result = loop(scheduler, step, begin(scheduler))
        check(result, eager("DDIMScheduler", {**SD, "clip_sample": False}, steps))
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1, 1]


@EVERY
def test_a_compiled_loop_body_is_one_graph(name, config):
    scheduler = make(name, config)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def body(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        return scheduler.step(model(seen, t), t, x)["prev_sample"]

    x = begin(scheduler)
    for t in scheduler.timesteps:
        x = body(x, t)
    check(x, eager(name, config))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", [DPM, "EulerAncestralDiscreteScheduler"])
def test_inductor(name):
    scheduler = make(name, SD)
    step = torch.compile(scheduler.step, fullgraph=True)
    if name == DPM:
        check(loop(scheduler, step, begin(scheduler)), eager(name, SD))
        return
    # Inductor draws other numbers than the eager step: their moments say that there are some.
    z = torch.zeros(2, 4, 64, 64)
    table = scheduler._table(0)
    drawn = step(z, scheduler.timesteps[0], z, return_dict=False)[0]
    assert abs(float(drawn.std()) / table.rows[0].updates[0].from_noise - 1) < 0.03


@EVERY
def test_one_recorded_step_replays_the_run(name, config, monkeypatch):
    # What a CUDA graph does: operations and addresses are recorded once, and run for every step.
    scheduler = make(name, config)
    x = begin(scheduler)
    base = __import__("fastdiff.integrations.diffusers.base", fromlist=["base"])
    for module in (base, ours.sigma_classes):
        monkeypatch.setattr(module, "is_traced", lambda _sample: True)

    def body(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        return scheduler.step(model(seen, t), t, x, return_dict=False)[0]

    scheduler._prepare(scheduler._options, tuple(x.shape), x.dtype, x.device)
    graph = make_fx(body)(x, scheduler.timesteps[0])
    for steps in (8, 5):
        scheduler.set_timesteps(steps)
        x = begin(scheduler)
        for t in scheduler.timesteps:
            x = graph(x, t)
        with monkeypatch.context() as undone:
            for module in (base, ours.sigma_classes):
                undone.setattr(module, "is_traced", lambda _sample: False)
            check(x, eager(name, config, steps))


@EVERY
def test_a_compiled_run_begins_at_the_begin_index(name, config):
    skip = 4 if "Heun" in name or "KDPM2" in name else 3
    if name == "PNDMScheduler":
        skip = 1  # in the middle of the repeated timestep
    scheduler = make(name, config)
    counter = CompileCounter()
    step = torch.compile(scheduler.step, backend=counter, fullgraph=True)
    loop(scheduler, step, begin(scheduler))
    scheduler.set_timesteps(8)
    scheduler.set_begin_index(skip)
    result = loop(scheduler, step, begin(scheduler), skip)
    check(result, eager(name, config, skip=skip))
    assert counter.frame_count == 1


class NothingReadBack(TorchDispatchMode):
    """Fails where the host asks for a tensor's value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forbidden = (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
        )
        assert func.overloadpacket not in forbidden, f"{func} reads a value back"
        return func(*args, **(kwargs or {}))


@EVERY
def test_eager_steps_after_the_first_read_nothing_back(name, config):
    scheduler = make(name, config)
    x = begin(scheduler)
    outputs = [torch.randn_like(x) for _ in scheduler.timesteps]
    x = scheduler.step(outputs[0], scheduler.timesteps[0], x, return_dict=False)[0]
    with NothingReadBack():
        for t, output in list(zip(scheduler.timesteps, outputs, strict=True))[1:]:
            x = scheduler.step(output, t, x, return_dict=False)[0]
    with NothingReadBack(), pytest.raises(AssertionError, match="reads a value back"):
        float(x[0, 0, 0, 0])


def test_half_precision_and_other_shapes():
    scheduler = make(DPM, SD)
    counter = CompileCounter()
    step = torch.compile(scheduler.step, backend=counter, fullgraph=True)
    for dtype, width in ((torch.float16, 4), (torch.float32, 4), (torch.float32, 6)) * 2:
        scheduler.set_timesteps(8)
        x = begin(scheduler, dtype)[..., :1].repeat(1, 1, 1, width)
        result = loop(scheduler, step, x)
        assert result.dtype == dtype
        plain = make(DPM, SD)
        expected = loop(plain, plain.step, x)
        bound = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(result, expected, rtol=bound, atol=bound)
    assert counter.frame_count == 3


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("LMSDiscreteScheduler", "order", (4, 2, 3)),
        ("DDIMScheduler", "eta", (0.0, 0.5, 1.0)),
        ("TCDScheduler", "eta", (0.0, 0.5, 1.0)),
    ],
)
def test_options_of_step_have_rows_of_their_own(name, option, values):
    config = {**SD, "clip_sample": False} if name == "DDIMScheduler" else SD
    counter = CompileCounter()
    scheduler = make(name, config)
    step = torch.compile(scheduler.step, backend=counter, fullgraph=True)
    for value in values * 2:
        results = []
        for one, run in ((scheduler, step), (plain := make(name, config), plain.step)):
            one.set_timesteps(8)
            x = begin(one)
            for t in one.timesteps:
                x = run(model(x, t), t, x, return_dict=False, **{option: value})[0]
            results.append(x)
        check(*results)
    assert counter.frame_count == len(values)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("LMSDiscreteScheduler", "pred_original_sample"),
        ("DDIMInverseScheduler", "pred_original_sample"),
        ("TCDScheduler", "pred_noised_sample"),
        ("KDPM2DiscreteScheduler", "pred_original_sample"),
    ],
)
def test_the_second_result_of_every_step(name, key):
    config = {**SD, "clip_sample": False} if name == "DDIMInverseScheduler" else SD
    reference = getattr(diffusers, name)(**config)
    reference.set_timesteps(8)
    scheduler, plain = make(name, config), make(name, config)
    step = torch.compile(scheduler.step, backend="eager", fullgraph=True)
    extra = {"eta": 0.0} if name == "TCDScheduler" else {}
    x = begin(scheduler)
    for t in scheduler.timesteps:
        for one in (reference, plain, scheduler):
            one.scale_model_input(x, t)
        output = model(x, t)
        expected = reference.step(output, t, x, **extra)
        for run in (step, plain.step):
            check(run(output, t, x, **extra)[key], expected[key])
        x = expected.prev_sample


def test_noise_is_added_at_the_right_level_in_a_compiled_run():
    scheduler, plain = make("EulerDiscreteScheduler", SD), make("EulerDiscreteScheduler", SD)
    step = torch.compile(scheduler.step, backend="eager", fullgraph=True)
    x = y = begin(scheduler)
    noise, image = torch.randn(2, *x.shape)
    for one in (scheduler, plain):
        one.set_begin_index(0)
    for i, t in enumerate(scheduler.timesteps[:-1]):
        x = step(model(x, t), t, x, return_dict=False)[0]
        y = plain.step(model(y, t), t, y, return_dict=False)[0]
        following = scheduler.timesteps[i + 1].reshape(1)
        levels = [one.add_noise(image, noise, following) for one in (scheduler, plain)]
        check(*levels)


def test_past_the_end_is_nan_and_not_a_wrong_sample():
    scheduler = make("DDIMScheduler", {**SD, "clip_sample": False})
    step = torch.compile(scheduler.step, backend="eager", fullgraph=True)
    x = loop(scheduler, step, begin(scheduler))
    assert x.isfinite().all()
    t = scheduler.timesteps[-1]
    assert step(model(x, t), t, x, return_dict=False)[0].isnan().all()


def test_a_configuration_without_a_table_compiles_diffusers_step():
    config = {**SD, "clip_sample": True}
    scheduler, plain = make("DDIMScheduler", config), diffusers.DDIMScheduler(**config)
    plain.set_timesteps(8)
    step = torch.compile(scheduler.step, backend="eager")
    x, t = begin(scheduler), scheduler.timesteps[0]
    with pytest.warns(UserWarning, match="clip_sample"):
        result = step(model(x, t), t, x, return_dict=False)[0]
    check(result, plain.step(model(x, t), t, x, return_dict=False)[0])


def test_what_cannot_be_compiled_says_so():
    scheduler = make("EulerAncestralDiscreteScheduler", SD)
    x, t = begin(scheduler), scheduler.timesteps[0]
    step = torch.compile(scheduler.step, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="generator must be None"):
        step(x, t, x, generator=torch.Generator())
    scheduler.set_timesteps(8)
    step(x, t, x)
    with pytest.raises(ValueError, match="in every step of a run or in none"):
        scheduler.step(x, t, x)
    scheduler.set_timesteps(8)
    scheduler.step(x, t, x)
    with pytest.raises(Exception, match="in every step of a run or in none"):
        step(x, t, x)


def test_a_capture_without_a_warm_up_says_so(monkeypatch):
    base = __import__("fastdiff.integrations.diffusers.base", fromlist=["base"])
    scheduler = make(DPM, SD)
    x = begin(scheduler)
    monkeypatch.setattr(base, "is_traced", lambda _sample: True)
    monkeypatch.setattr(base, "_host_may_work", lambda _device: False)
    with pytest.raises(ValueError, match="step must run once"):
        scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.gpu
@EVERY
def test_a_cuda_graph_of_one_step_replays_the_run(name, config):
    scheduler = getattr(ours, name)(**config)
    scheduler.set_timesteps(8, device="cuda")
    x, t = begin(scheduler).cuda(), scheduler.timesteps[0].clone()

    def body() -> torch.Tensor:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        return scheduler.step(model(seen, t), t, x, return_dict=False)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        following = body()
    for steps in (8, 5):
        scheduler.set_timesteps(steps, device="cuda")
        start = begin(scheduler).cuda()
        x.copy_(start)
        for entry in scheduler.timesteps:
            t.copy_(entry)
            graph.replay()
            x.copy_(following)
        if next(iter(scheduler._rows.values())).draws:
            assert x.isfinite().all()
            continue
        plain = make(name, config, steps)
        plain.set_timesteps(steps, device="cuda")
        check(x, loop(plain, plain.step, start))


@pytest.mark.gpu
@EVERY
def test_eager_steps_on_a_gpu_wait_for_nothing_after_the_first(name, config):
    scheduler = getattr(ours, name)(**config)
    scheduler.set_timesteps(8, device="cuda")
    x = begin(scheduler).cuda()
    outputs = [torch.randn_like(x) for _ in scheduler.timesteps]
    times = list(scheduler.timesteps)
    x = scheduler.step(outputs[0], times[0], x, return_dict=False)[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t, output in list(zip(times, outputs, strict=True))[1:]:
            x = scheduler.step(output, t, x, return_dict=False)[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()
