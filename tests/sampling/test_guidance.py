"""Every form of guidance against the formula of its paper, written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdiff
from fastdiff import solvers
from fastdiff.sampling import Guidance, classifier_gradient

SHAPE = (2, 3, 4, 4)
COND, UNCOND = {"y": torch.tensor([1.0, 0.7])}, {"y": torch.tensor([0.2, 0.3])}


def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    scale = y.reshape(-1, 1, 1, 1) * (0.5 + t.reshape(-1, 1, 1, 1) / 2000)
    return torch.tanh(x * scale) + 0.1 * scale


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def draw(network: Any = model, **kwargs: Any) -> Tensor:
    kwargs = {"cond": COND, "uncond": UNCOND, "x": start(), "steps": 8, **kwargs}
    return fastdiff.sample(network, schedule="scaled_linear", **kwargs)


def by_hand(output: Any, **kwargs: Any) -> Tensor:
    """The same run of a model that is guided already: ``output(x, t, cond, other)``."""

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return output(x, t, model(x, t, COND["y"]), model(x, t, UNCOND["y"]))

    return draw(guided, cond=None, uncond=None, **kwargs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("given", [{"scale": 3.5}, {"weight": 2.5}])
@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "unipc", "deis"])
def test_both_forms_of_the_scale_in_one_call_or_two(batched, given, solver):
    expected = by_hand(lambda x, t, c, u: u + 3.5 * (c - u), solver=solver)
    close(draw(guidance=Guidance(**given, batched=batched), solver=solver), expected)
    close(draw(guidance_scale=3.5, solver=solver), expected)


def test_sequential_evaluation_never_sees_twice_the_batch():
    batches = []

    def watched(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches.append(len(x))
        return model(x, t, y)

    draw(watched, guidance=Guidance(3.0, batched=False))
    assert batches == [2] * 16
    batches.clear()
    draw(watched, guidance=Guidance(3.0))
    assert batches == [4] * 8


def test_interval_guides_inside_and_evaluates_once_outside():
    schedule = solvers.scaled_linear()
    low, high = 0.5, 3.0
    batches = []

    def level(t: Tensor) -> float:
        return math.exp(-float(schedule.lambda_at(float(t[0]))))

    def watched(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches.append((level(t), len(x)))
        return model(x, t, y)

    result = draw(watched, guidance=Guidance(4.0, interval=(low, high)), solver="ddim")
    assert [n for _, n in batches] == [4 if low < s <= high else 2 for s, _ in batches]
    assert {n for _, n in batches} == {2, 4}
    expected = by_hand(
        lambda x, t, c, u: u + 4.0 * (c - u) if low < level(t) <= high else c, solver="ddim"
    )
    close(result, expected)


def test_a_scale_per_step():
    scales = [1.0, 2.0, 3.0, 4.0, 5.0, 1.0, 1.5, 7.0]
    at = iter(scales)
    expected = by_hand(lambda x, t, c, u: u + next(at) * (c - u))
    close(draw(guidance=Guidance(scales)), expected)
    close(draw(guidance_scale=scales), expected)


@pytest.mark.parametrize("amount", [0.3, 1.0])
def test_rescale_is_diffusers(amount):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    assert diffusers

    def expected(x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> Tensor:
        return rescale_noise_cfg(u + 6.0 * (c - u), c, guidance_rescale=amount)

    close(draw(guidance=Guidance(6.0, rescale=amount)), by_hand(expected))


def test_autoguidance_extrapolates_from_the_worse_model():
    def worse(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.8 * model(x, t, y) + 0.05 * x

    def expected(x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> Tensor:
        bad = 0.8 * c + 0.05 * x
        return bad + 2.2 * (c - bad)

    close(draw(uncond=None, guidance=Guidance(2.2, guide=worse)), by_hand(expected))

    def unconditional(x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> Tensor:
        bad = 0.8 * u + 0.05 * x
        return bad + 2.2 * (c - bad)

    close(draw(guidance=Guidance(2.2, guide=worse)), by_hand(unconditional))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cfg_plus_plus_renoises_with_the_other_prediction(eta):
    """arXiv 2406.08070, algorithm 2: the clean sample is guided, the noise is not."""
    schedule, steps, scale = solvers.scaled_linear(), 8, 0.6
    grid = solvers.make_grid(schedule, steps, "leading", convention="ddim")
    x = start()
    generator = torch.Generator().manual_seed(3)
    for time, lam, target in zip(grid.times, grid.lambdas, grid.targets, strict=True):
        alpha, sigma = map(float, schedule.marginal(lam))
        alpha_to, sigma_to = map(float, schedule.marginal(target))
        t = torch.full((2,), int(time))
        cond, other = model(x, t, COND["y"]), model(x, t, UNCOND["y"])
        x0 = (x - sigma * (other + scale * (cond - other))) / alpha
        std = eta * sigma_to * math.sqrt(-math.expm1(-2 * (target - lam)))
        z = torch.randn(SHAPE, generator=generator, dtype=torch.float64) if eta else 0.0
        x = alpha_to * x0 + math.sqrt(max(sigma_to**2 - std**2, 0)) * other + std * z
    ours = draw(
        solver="ddim",
        eta=eta,
        mode="exact",
        grid=grid,
        generator=torch.Generator().manual_seed(3),
        guidance=Guidance(scale, plus_plus=True),
    )
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_classifier_guidance_adds_the_gradient_to_the_score(prediction):
    schedule = solvers.scaled_linear()
    push = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(1, 3, 4, 4)

    def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return push * torch.cos(x) * y.reshape(-1, 1, 1, 1)

    def expected(x: Tensor, t: Tensor, c: Tensor, u: Tensor) -> Tensor:
        alpha, sigma = map(float, schedule.marginal(schedule.lambda_at(float(t[0]))))
        shift = 1.7 * gradient(x, t, COND["y"])  # of the score
        shifts = {
            "eps": -sigma * shift,
            "v": -sigma / alpha * shift,
            "x0": sigma**2 / alpha * shift,
        }
        return c + shifts[prediction]

    guidance = Guidance(gradient=gradient, gradient_scale=1.7)
    close(
        draw(guidance=guidance, prediction=prediction, solver="ddim"),
        by_hand(expected, prediction=prediction, solver="ddim"),
    )
    # Solvers that work with the noise get it too.
    close(
        draw(guidance=guidance, prediction=prediction, solver="deis"),
        by_hand(expected, prediction=prediction, solver="deis"),
    )


def test_classifier_gradient_is_the_gradient_of_the_label():
    weight = torch.randn(48, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def classifier(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x).flatten(1) @ weight / (1 + t[:, None])

    x, t, y = start(), torch.tensor([3, 3]), torch.tensor([4, 1])
    gradient = classifier_gradient(classifier)(x, t, y=y)
    step = 1e-6
    for image, place in ((0, (0, 1, 2)), (1, (2, 3, 3))):
        ends = []
        for sign in (-1, 1):
            moved = x.clone()
            moved[(image, *place)] += sign * step
            ends.append(torch.log_softmax(classifier(moved, t), -1)[image, y[image]])
        assert gradient[(image, *place)].item() == pytest.approx(
            (ends[1] - ends[0]).item() / (2 * step), rel=1e-6
        )
    with torch.no_grad():  # as the sampling loop runs it
        assert torch.equal(classifier_gradient(classifier)(x, t, y=y), gradient)


def test_all_forms_together_in_half_precision_are_finite_and_close():
    guidance = Guidance(4.0, rescale=0.5, interval=(0.05, 10.0), batched=False)
    exact = draw(guidance=guidance)
    half = draw(guidance=guidance, x=start().half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("error", "message", "kwargs"),
    [
        (ValueError, "weight must be None", {"scale": 2.0, "weight": 1.0}),
        (ValueError, "interval must be", {"interval": (2.0, 1.0)}),
        (ValueError, "interval must be", {"interval": (-1.0, 1.0)}),
        (ValueError, r"rescale must be in 0\.\.1", {"rescale": 1.5}),
        (ValueError, "gradient_scale must be finite", {"gradient_scale": math.inf}),
        (TypeError, "guide must be callable", {"guide": 3}),
        (TypeError, "gradient must be callable", {"gradient": 3}),
        (ValueError, "guidance_scale must be finite", {"scale": math.nan}),
        (TypeError, "guidance_scale must be a number", {"scale": "7"}),
        (TypeError, "weight must be a number", {"weight": "7"}),
    ],
)
def test_bad_guidance_is_refused(error, message, kwargs):
    with pytest.raises(error, match=message):
        Guidance(**kwargs)


def test_what_does_not_fit_the_run_is_refused():
    with pytest.raises(ValueError, match="guidance_scale must be 1 when guidance is given"):
        draw(guidance_scale=2.0, guidance=Guidance(3.0))
    with pytest.raises(ValueError, match="without uncond"):
        draw(uncond=None, guidance=Guidance(3.0))
    with pytest.raises(ValueError, match="plus_plus must be False"):
        draw(guidance=Guidance(0.5, plus_plus=True), solver="dpmpp_2m")
    with pytest.raises(ValueError, match="gradient must return"):
        draw(guidance=Guidance(gradient=lambda x, t, y: x[:1]))
    bare = solvers.SolverTable(
        "bare", 1, (solvers.Row(0, 5.0, 1.0, 0.0, 1.0, (solvers.Update(0, (0.5,), 0.5),)),)
    )
    with pytest.raises(ValueError, match="interval must be None"):
        draw(solver=bare, guidance=Guidance(2.0, interval=(0.1, 1.0)))
    with pytest.raises(ValueError, match="zero terminal SNR"):
        fastdiff.sample(
            model,
            x=start(),
            schedule=solvers.zero_terminal_snr(solvers.scaled_linear()),
            prediction="v",
            grid="trailing",
            cond=COND,
            guidance=Guidance(gradient=lambda x, t, y: x),
        )
