"""fastdiff.sample: engines agree, guidance, seeds, callbacks, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mixture import Mixture
from torch import nn

import fastdiff
from fastdiff import solvers
from fastdiff._ext import ext

SHAPE = (2, 3, 8, 8)
SCHEDULE = solvers.scaled_linear()
MIXTURE = Mixture(SCHEDULE)
needs_cpp = pytest.mark.skipif(
    not hasattr(ext(), "sampling_loop"), reason="the extension is not built"
)


def model(x, t, y=None):
    output = MIXTURE(x.float() if x.dtype.itemsize == 2 else x, t).to(x.dtype)
    return output if y is None else output * y.view(-1, 1, 1, 1).to(x.dtype)


def draw(network=model, shape=SHAPE, **kwargs):
    return fastdiff.sample(network, shape, **{"schedule": SCHEDULE, "steps": 6, **kwargs})


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("ddim", {}),
        ("ddim", {"eta": 0.7}),
        ("ddpm", {"steps_offset": 1}),
        ("dpmpp_2m", {}),
        ("dpmpp_2m", {"solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    ],
)
def test_engines_agree_bit_for_bit(solver, options, layout, dtype):
    # 9 x 7 elements: no multiple of a vector register; noise by either source; with guidance.
    x = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype).contiguous(memory_format=layout)
    guidance = {
        "cond": {"y": torch.tensor([1.0, 0.9, 0.8])},
        "uncond": {"y": torch.tensor([0.95])},
        "guidance_scale": 2.5,
    }
    for extra in ({}, guidance):
        for noise in ("seed", "generator"):
            results = []
            for engine in ("cpp", "reference"):
                source = {"seed": 9}
                if noise == "generator":
                    source = {"generator": torch.Generator().manual_seed(4)}
                results.append(
                    draw(
                        shape=None, x=x, solver=solver, engine=engine, **options, **extra, **source
                    )
                )
            assert torch.isfinite(results[0]).all()
            assert torch.equal(*results), (noise, bool(extra))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_every_engine_on_the_gpu_has_the_cpus_bits(solver, layout, dtype):
    def halving(x, t, y):
        return x * 0.5 + y.view(-1, 1, 1, 1)  # one rounding each: the same on every device

    def go(device, engine):
        x = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(1))
        y = torch.tensor([0.5, 0.25, 0.125], dtype=dtype, device=device)
        return draw(
            halving,
            shape=None,
            x=x.to(device, dtype).contiguous(memory_format=layout),
            solver=solver,
            cond={"y": y},
            uncond={"y": -y},
            guidance_scale=2.5,
            seed=2**63 + 9,
            engine=engine,
        )

    expected = go("cpu", "reference")
    for engine in ("auto", "reference", *["cpp"] * hasattr(ext(), "cuda_solver_step")):
        result = go("cuda", engine)
        assert result.is_cuda
        assert torch.equal(result.cpu(), expected), engine


@needs_cpp
def test_engines_agree_on_a_table_with_scaled_inputs_and_many_registers():
    rows = tuple(
        solvers.Row(
            feed=i % 2,
            time=900.0 - 100 * i,
            input_scale=0.5 + 0.1 * i,
            from_state=0.3,
            from_output=-0.7,
            updates=(
                solvers.Update(0, (0.9, 0.05 * (i > 0), 0.01 * (i > 0)), 0.2, 0.1 * (i % 2)),
                solvers.Update(1, (0.1, 0.0, 0.0), 0.5),
                solvers.Update(2, (0.0, 0.3 * (i > 0), 0.0), 0.0),
            ),
            draw=i // 2 if i % 2 else -1,
        )
        for i in range(6)
    )
    table = solvers.SolverTable("test", 3, rows, num_draws=3, init_scale=2.0)
    results = [draw(solver=table, seed=3, engine=engine) for engine in ("cpp", "reference")]
    assert torch.equal(*results)


ENGINES = [pytest.param("cpp", marks=needs_cpp), "reference"]


@pytest.mark.parametrize("engine", ENGINES)
def test_batched_guidance_is_guidance_by_hand(engine):
    cond, uncond = torch.tensor([1.0, 0.9]), torch.tensor([0.8, 0.8])

    def by_hand(x, t):
        u = model(x, t, uncond)
        return u + 3.0 * (model(x, t, cond) - u)

    guided = draw(cond={"y": cond}, uncond={"y": uncond}, guidance_scale=3.0, seed=1, engine=engine)
    # cond - u is scaled by a float32 number in one case and a float64 one in the other: same here.
    assert torch.equal(guided, draw(by_hand, seed=1, engine=engine))


@pytest.mark.parametrize("engine", ENGINES)
def test_guidance_of_one_evaluates_only_the_condition(engine):
    batches = []

    def spy(x, t, y):
        batches.append((x.shape[0], y.shape[0], t.shape[0]))
        return model(x, t, y)

    cond, uncond = {"y": torch.tensor([1.0])}, {"y": torch.tensor([0.5])}
    draw(spy, cond=cond, uncond=uncond, seed=0, engine=engine)
    assert set(batches) == {(2, 2, 2)}
    batches.clear()
    draw(spy, cond=cond, uncond=uncond, guidance_scale=2.0, seed=0, engine=engine)
    assert set(batches) == {(4, 4, 4)}
    assert len(batches) == 6


def test_guidance_stacks_uncond_first_and_repeats_shared_arguments():
    seen = {}

    def spy(x, t, y, shared, scale, nested):
        seen.update(y=y, shared=shared, scale=scale, nested=nested)
        return x

    draw(
        spy,
        cond={"y": torch.tensor([1.0, 2.0]), "nested": {"z": torch.tensor([[5.0]])}},
        uncond={"y": torch.tensor([3.0, 4.0]), "nested": {"z": torch.tensor([[6.0]])}},
        model_kwargs={"shared": torch.tensor([7.0, 8.0]), "scale": 0.5},
        guidance_scale=2.0,
        seed=0,
        steps=1,
    )
    assert seen["y"].tolist() == [3, 4, 1, 2]
    assert seen["shared"].tolist() == [7, 8, 7, 8]
    assert seen["nested"]["z"].tolist() == [[6], [6], [5], [5]]
    assert seen["scale"] == 0.5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("solver", ["ddpm", "dpmpp_2m"])
def test_the_picture_of_a_seed_does_not_depend_on_its_batch(solver, engine):
    def run(count, seed):
        shape = (count, 3, 5, 3)
        return draw(polynomial, shape=shape, solver=solver, seed=seed, engine=engine)

    def polynomial(x, t):  # torch.exp rounds by position in the vector; products do not
        return 0.9 * x - 0.01 * x * x * x

    batch = run(4, [7, 8, 100, 9])
    assert torch.equal(batch[3:], run(1, 9))
    shifted = run(2, 7)
    assert torch.equal(batch[:2], shifted)
    assert not torch.equal(batch[0], batch[1])


def test_neither_seed_nor_generator_uses_the_global_generator():
    torch.manual_seed(5)
    a = draw(solver="ddpm")
    torch.manual_seed(5)
    b = draw(solver="ddpm")
    assert torch.equal(a, b)
    assert not torch.equal(b, draw(solver="ddpm"))


@pytest.mark.parametrize("engine", ENGINES)
def test_callback_sees_every_step_and_stops(engine):
    seen = []

    def callback(info):
        seen.append((info.index, info.total, info.time, info.x.clone()))
        return None if info.index < 3 else False

    result = draw(seed=0, callback=callback, engine=engine)
    times = solvers.make_table("best_linear", SCHEDULE, 6).times
    assert [s[:3] for s in seen] == [(i, 6, times[i]) for i in range(4)]
    assert torch.equal(result, seen[-1][3])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, StopIteration])
def test_exceptions_of_model_and_callback_come_through(error, engine):
    def fail(*_):
        raise error("stop")

    with pytest.raises(error, match="stop"):
        draw(fail, seed=0, engine=engine)
    with pytest.raises(error, match="stop"):
        draw(seed=0, callback=fail, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_callers_tensors_are_left_alone(engine):
    x = torch.randn(SHAPE)
    before = x.clone()

    def in_place(x, t):
        return x.mul_(0.5)

    result = draw(in_place, shape=None, x=x, engine=engine)
    assert torch.equal(x, before)
    assert result.data_ptr() != x.data_ptr()
    assert not result.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_of_other_kinds_are_understood(engine):
    plain = draw(seed=0, engine=engine)
    variants = [
        lambda x, t: (model(x, t), "more"),
        lambda x, t: SimpleNamespace(sample=model(x, t)),
        lambda x, t: model(x, t).to(memory_format=torch.channels_last),
        lambda x, t: model(x, t).double(),
    ]
    for variant in variants:
        assert torch.equal(draw(variant, seed=0, engine=engine), plain)
    learned = draw(
        lambda x, t: torch.cat([model(x, t), x], dim=1), seed=0, engine=engine, drop_variance=True
    )
    assert torch.equal(learned, plain)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.sampling = SimpleNamespace(
            schedule=SCHEDULE, prediction="v", shape=(3, 4, 4), num_classes=0
        )

    def forward(self, x, t):
        assert x.dtype == torch.bfloat16
        return x * self.weight


def test_a_models_own_settings_are_the_defaults():
    result = fastdiff.sample(Network(), seed=[1, 2], steps=3)
    assert result.shape == (2, 3, 4, 4)
    assert result.dtype == torch.bfloat16
    same = fastdiff.sample(
        Network(), (2, 3, 4, 4), schedule=SCHEDULE, prediction="v", seed=[1, 2], steps=3
    )
    assert torch.equal(result, same)


def test_half_precision_keeps_a_float32_state():
    exact = draw(dtype=torch.float64, shape=None, x=torch.ones(SHAPE, dtype=torch.float64))
    seen = []
    half = draw(
        dtype=torch.bfloat16,
        shape=None,
        x=torch.ones(SHAPE),
        callback=lambda info: seen.append(info.x.dtype),
    )
    assert half.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}
    assert (half.double() - exact).abs().max() < 0.03


def test_times_are_whole_numbers_unless_the_grid_says_otherwise():
    kinds = set()

    def spy(x, t):
        kinds.add(t.dtype)
        return x

    draw(spy, seed=0, solver="dpmpp_2m")
    assert kinds == {torch.int64}
    kinds.clear()
    draw(spy, seed=0)
    assert kinds == {torch.float32}
    kinds.clear()
    draw(spy, seed=0, grid="karras", mode="exact")
    assert kinds == {torch.float32}
    kinds.clear()
    draw(spy, seed=0, grid=[900.5, 100.25])
    assert kinds == {torch.float32}


def test_progress_shows_a_bar(capsys):
    draw(seed=0, progress=True)
    assert "6/6" in capsys.readouterr().err


def test_naming_an_engine_that_cannot_run_is_an_error(monkeypatch):
    from fastdiff.solvers import engine

    monkeypatch.setattr(engine, "ext", lambda: None)
    monkeypatch.setattr(engine, "ext_status", lambda: "not built, says the test")
    with pytest.raises(RuntimeError, match="not built, says the test"):
        draw(seed=0, engine="cpp")
    assert torch.isfinite(draw(seed=0)).all()


Y = {"y": torch.ones(2)}


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (ValueError, "steps must be at least 1", {"steps": 0}),
        (ValueError, "steps must be at least 1", {"steps": -3}),
        (TypeError, "steps must be an integer", {"steps": 2.5}),
        (TypeError, "steps must be an integer", {"steps": True}),
        (ValueError, "at most 1000", {"steps": 1001, "solver": "ddim"}),
        (ValueError, "did you mean 'dpmpp_2m'", {"solver": "dpmpp2m"}),
        (TypeError, "solver must be", {"solver": 3}),
        (TypeError, "takes the options", {"solver": "ddim", "order": 2}),
        (ValueError, "schedule must be given", {"schedule": None}),
        (ValueError, "did you mean 'cosine'", {"schedule": "cosin"}),
        (TypeError, "schedule must be", {"schedule": 5}),
        (ValueError, "timesteps must be finite", {"grid": [900.0, float("nan")]}),
        (ValueError, "timesteps must be finite", {"grid": [float("inf"), 3.0]}),
        (ValueError, "timesteps must decrease", {"grid": [1, 2]}),
        (ValueError, r"0\.\.999", {"grid": [5000, 2]}),
        (ValueError, "spacing must be", {"grid": "uniform"}),
        (ValueError, "prediction must be", {"prediction": "noise"}),
        (ValueError, "seed and generator", {"seed": 0, "generator": torch.Generator()}),
        (TypeError, "seed must be", {"seed": "a"}),
        (TypeError, "seed must be", {"seed": 1.5}),
        (TypeError, "seed must be", {"seed": True}),
        (ValueError, r"seed must be in 0\.\.", {"seed": -1}),
        (ValueError, "one per image", {"seed": [1, 2, 3]}),
        (ValueError, "generator must be one or one per", {"generator": [torch.Generator()]}),
        (TypeError, "generator must be", {"generator": [1, 2]}),
        (TypeError, "generator must be", {"generator": 3}),
        (ValueError, "without cond and uncond", {"guidance_scale": 3.0}),
        (ValueError, "without uncond", {"guidance_scale": 3.0, "cond": Y}),
        (ValueError, "without cond", {"guidance_scale": 3.0, "uncond": Y}),
        (ValueError, "must be finite", {"guidance_scale": float("nan"), "cond": Y, "uncond": Y}),
        (TypeError, "guidance_scale must be", {"guidance_scale": "7"}),
        (ValueError, "one per row", {"guidance_scale": [2.0], "cond": Y, "uncond": Y}),
        (TypeError, "cond must be a dict", {"cond": torch.ones(2)}),
        (ValueError, "batch", {"cond": {"y": torch.ones(3)}}),
        (ValueError, "keys of cond", {"guidance_scale": 2.0, "cond": Y, "uncond": {}}),
        (
            ValueError,
            "shape and dtype",
            {"guidance_scale": 2.0, "cond": Y, "uncond": {"y": torch.ones(2, 3)}},
        ),
        (
            ValueError,
            "batch first, or equal",
            {"guidance_scale": 2.0, "cond": {"y": 1}, "uncond": {"y": 2}},
        ),
        (ValueError, "must not repeat", {"cond": Y, "model_kwargs": Y}),
        (TypeError, "model_kwargs must be", {"model_kwargs": 3}),
        (ValueError, "shape or x", {"shape": None}),
        (ValueError, "positive", {"shape": (0, 3, 4, 4)}),
        (ValueError, "positive", {"shape": ()}),
        (TypeError, "shape must be", {"shape": (1, 2.5)}),
        (TypeError, "shape must be", {"shape": 5}),
        (TypeError, "shape must be", {"shape": (1, "a")}),
        (ValueError, "shape must be x's", {"x": torch.ones(1, 3)}),
        (TypeError, "x must be a tensor", {"shape": None, "x": [1.0]}),
        (TypeError, "x must be float32", {"shape": None, "x": torch.ones(2, 3).long()}),
        (TypeError, "dtype must be", {"dtype": torch.int32}),
        (ValueError, "device must be x's", {"shape": None, "x": torch.ones(1), "device": "meta"}),
        (TypeError, "callback must be callable", {"callback": 3}),
        (ValueError, "engine must be", {"engine": "cuda"}),
    ],
)
def test_bad_arguments_are_refused(error, message, kwargs):
    with pytest.raises(error, match=message):
        draw(**kwargs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("error", "message", "network"),
    [
        (TypeError, "model must return a tensor", lambda x, t: None),
        (TypeError, "model must return a tensor", lambda x, t: ()),
        (TypeError, "model must return a tensor", lambda x, t: 3.0),
        (TypeError, "model must return a tensor", lambda x, t: np.ones(3)),
        (TypeError, "floating-point", lambda x, t: x.long()),
        (ValueError, "shape", lambda x, t: x[:1]),
        (ValueError, "shape", lambda x, t: x.flatten()),
        (ValueError, "drop_variance", lambda x, t: torch.cat([x, x], dim=1)),
        (ValueError, "on cpu", lambda x, t: x.to("meta")),
    ],
)
def test_bad_model_outputs_are_refused(error, message, network, engine):
    with pytest.raises(error, match=message):
        draw(network, seed=0, engine=engine)


def test_a_model_must_be_callable():
    with pytest.raises(TypeError, match="callable"):
        draw(3)
