"""What pipelines ask of a scheduler besides ``step``: the same from fastdiff's and diffusers'."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

from fastdiff.integrations import diffusers as ours  # noqa: E402

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHIFTED = {"use_dynamic_shifting": True, "time_shift_type": "exponential"}
TIMES = [999, 850, 610, 322, 123, 7]
SIGMAS = [1.0, 0.9, 0.7, 0.45, 0.2, 0.1]

# class, configuration, the arguments of set_timesteps
CUSTOM: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DPMSolverMultistepScheduler", SD, {"timesteps": TIMES}),
    ("DPMSolverMultistepScheduler", {**FLOW, **SHIFTED}, {"num_inference_steps": 6, "mu": 0.7}),
    ("DPMSolverSinglestepScheduler", SD, {"timesteps": TIMES}),
    ("DPMSolverSinglestepScheduler", {**FLOW, **SHIFTED}, {"num_inference_steps": 6, "mu": 0.7}),
    ("DDPMScheduler", {**SD, "clip_sample": False}, {"timesteps": TIMES}),
    ("DEISMultistepScheduler", {**FLOW, **SHIFTED}, {"num_inference_steps": 6, "mu": 0.7}),
    ("EulerDiscreteScheduler", SD, {"timesteps": TIMES}),
    ("EulerDiscreteScheduler", SD, {"sigmas": [14.6, 7.0, 3.0, 1.2, 0.4, 0.1, 0.0]}),
    ("EulerDiscreteScheduler", {**SD, "timestep_type": "continuous"}, {"num_inference_steps": 6}),
    ("HeunDiscreteScheduler", SD, {"timesteps": TIMES}),
    ("LCMScheduler", SD, {"timesteps": [999, 779, 499, 259]}),
    ("LCMScheduler", SD, {"num_inference_steps": 4, "original_inference_steps": 100}),
    ("LCMScheduler", SD, {"num_inference_steps": 4, "strength": 0.5}),
    ("TCDScheduler", SD, {"timesteps": [999, 779, 499, 259]}),
    ("TCDScheduler", SD, {"timesteps": [999, 779, 499, 0]}),
    ("TCDScheduler", SD, {"num_inference_steps": 4, "original_inference_steps": 100}),
    ("TCDScheduler", SD, {"num_inference_steps": 4, "strength": 0.5}),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False}, {"timesteps": [39, 22, 0]}),
    ("CMStochasticIterativeScheduler", {"clip_denoised": False}, {"num_inference_steps": 40}),
    ("UniPCMultistepScheduler", FLOW, {"sigmas": np.array(SIGMAS)}),
    ("UniPCMultistepScheduler", {**FLOW, **SHIFTED}, {"num_inference_steps": 6, "mu": 0.7}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"num_inference_steps": 6}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": SIGMAS}),
    ("FlowMatchEulerDiscreteScheduler", {}, {"timesteps": [float(t) for t in TIMES]}),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        {"sigmas": SIGMAS, "mu": 1.15},
    ),
    (
        "FlowMatchEulerDiscreteScheduler",
        {"shift_terminal": 0.1, "use_karras_sigmas": True},
        {"num_inference_steps": 6},
    ),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, {"num_inference_steps": 6}),
    ("EDMEulerScheduler", {}, {"sigmas": torch.linspace(0, 1, 6) ** 2}),
    ("EDMEulerScheduler", {"final_sigmas_type": "sigma_min"}, {"num_inference_steps": 6}),
    (
        "EDMDPMSolverMultistepScheduler",
        {"final_sigmas_type": "sigma_min", "euler_at_final": True},
        {"num_inference_steps": 20},
    ),
]
CLASSES: dict[str, dict[str, Any]] = {
    "CMStochasticIterativeScheduler": {"clip_denoised": False},
    "DDIMInverseScheduler": {**SD, "clip_sample": False},
    "DDIMScheduler": {**SD, "clip_sample": False},
    "DDPMScheduler": {**SD, "clip_sample": False},
    "DEISMultistepScheduler": SD,
    "DPMSolverMultistepInverseScheduler": SD,
    "DPMSolverMultistepScheduler": SD,
    "DPMSolverSinglestepScheduler": SD,
    "EDMDPMSolverMultistepScheduler": {"sigma_data": 1.0},
    "EDMEulerScheduler": {"sigma_data": 1.0},
    "EulerAncestralDiscreteScheduler": SD,
    "EulerDiscreteScheduler": SD,
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "HeunDiscreteScheduler": SD,
    "KDPM2AncestralDiscreteScheduler": SD,
    "KDPM2DiscreteScheduler": SD,
    "LCMScheduler": SD,
    "LMSDiscreteScheduler": SD,
    "PNDMScheduler": {**SD, "skip_prk_steps": True},
    "TCDScheduler": SD,
    "UniPCMultistepScheduler": SD,
}


def test_every_public_class_is_here():
    assert sorted(CLASSES) == sorted(ours.__all__)


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    reference = getattr(diffusers, name)(**config)
    return reference, getattr(ours, name).from_config(reference.config)


@pytest.mark.parametrize(
    ("name", "config", "arguments"),
    CUSTOM,
    ids=[f"{name}-{'-'.join(arguments)}-{i}" for i, (name, _, arguments) in enumerate(CUSTOM)],
)
@pytest.mark.filterwarnings("ignore:.*diffusers' own step runs:UserWarning")
def test_custom_timesteps_and_sigmas(name, config, arguments):
    reference, fast = pair(name, config)
    results = []
    for scheduler in (reference, fast):
        scheduler.set_timesteps(**arguments)
        dtype = torch.float32
        if name == "DEISMultistepScheduler":
            # In float32 it loses three digits: its coefficients are differences, and the first step
            # of a flow in eps is 183 x - 182 eps.
            scheduler.sigmas = scheduler.sigmas.double()
            dtype = torch.float64
        random = torch.Generator().manual_seed(5)
        x = torch.randn(1, 4, 4, 4, generator=random).to(dtype)
        x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
        takes = "generator" in scheduler.step.__code__.co_varnames
        extra = {"generator": random} if takes else {}
        for t in scheduler.timesteps:
            seen = x
            if hasattr(scheduler, "scale_model_input"):
                seen = scheduler.scale_model_input(x, t)
            output = torch.tanh(seen) * (0.5 + float(t) / 2000)
            x = scheduler.step(output, t, x, return_dict=False, **extra)[0]
        results.append(x)
    assert torch.equal(reference.timesteps, fast.timesteps)
    # invert_sigmas adds noise: the one case here that no table has.
    assert bool(fast.fastdiff_reason) == ("invert_sigmas" in config)
    scale = max(1.0, results[0].abs().max().item())
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name", CLASSES)
def test_noise_scales_and_order(name):
    pairs = pair(name, CLASSES[name])
    assert pairs[0].order == pairs[1].order
    assert len(pairs[0]) == len(pairs[1])
    random = torch.Generator().manual_seed(5)
    image, noise = torch.randn(2, 1, 4, 4, 4, generator=random)
    found: list[dict[str, Any]] = []
    for scheduler in pairs:
        scheduler.set_timesteps(8)
        t = scheduler.timesteps[2]
        facts = {"timesteps": scheduler.timesteps, "sigma": getattr(scheduler, "sigmas", None)}
        if hasattr(scheduler, "init_noise_sigma"):
            facts["init"] = torch.as_tensor(scheduler.init_noise_sigma)
        if hasattr(scheduler, "add_noise"):
            facts["noisy"] = scheduler.add_noise(image, noise, t.reshape(1))
        if hasattr(scheduler, "scale_noise"):
            facts["noisy"] = scheduler.scale_noise(image, t.reshape(1), noise)
        if hasattr(scheduler, "get_velocity"):
            facts["velocity"] = scheduler.get_velocity(image, noise, t.reshape(1))
        if hasattr(scheduler, "scale_model_input"):
            facts["scaled"] = scheduler.scale_model_input(image, t)
        found.append({key: value for key, value in facts.items() if value is not None})
    assert found[0].keys() == found[1].keys()
    for key, expected in found[0].items():
        assert torch.equal(found[1][key], expected), key


@pytest.mark.parametrize("name", CLASSES)
def test_a_pipelines_configuration_goes_from_class_to_class(name, tmp_path):
    # pipe.scheduler = Class.from_config(pipe.scheduler.config), and back again.
    reference, fast = pair(name, CLASSES[name])
    assert dict(fast.config) == dict(reference.config)
    assert type(fast).from_config(reference.config).config == fast.config
    back = type(reference).from_config(fast.config)
    assert dict(back.config) == dict(reference.config)
    fast.save_pretrained(tmp_path)
    again = type(fast).from_pretrained(tmp_path)
    assert type(again) is type(fast)
    for key, value in reference.config.items():
        assert key.startswith("_") or again.config[key] == value
    assert {c.__name__ for c in fast.compatibles} == {c.__name__ for c in reference.compatibles}


def test_pndm_with_its_runge_kutta_start_runs_diffusers_step():
    reference, fast = pair("PNDMScheduler", SD)
    results = []
    for scheduler in (reference, fast):
        scheduler.set_timesteps(8)
        if scheduler is fast:
            with pytest.warns(UserWarning, match="skip_prk_steps"):
                assert fast.fastdiff_reason
        x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        results.append(x)
    assert torch.equal(*results)


@pytest.mark.parametrize("skip", range(9))
def test_pndm_may_begin_anywhere(skip):
    # Also in the middle of the timestep that is there twice.
    results = []
    for scheduler in pair("PNDMScheduler", {**CLASSES["PNDMScheduler"], "steps_offset": 1}):
        scheduler.set_timesteps(8)
        x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5))
        for t in scheduler.timesteps[skip:]:
            x = scheduler.step(torch.tanh(x), t, x).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_third_order_edm_sde_has_no_reference_and_is_finite():
    scheduler = ours.EDMDPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", solver_order=3, lower_order_final=False
    )
    scheduler.set_timesteps(20)
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5)) * 80
    random = torch.Generator().manual_seed(6)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1].tolist(), strict=True):
        # The network of data that are normal with deviation 0.5: F = 0.
        assert scheduler.scale_model_input(x, t).std() == pytest.approx(
            x.std() / (sigma**2 + 0.25) ** 0.5
        )
        x = scheduler.step(torch.zeros_like(x), t, x, generator=random).prev_sample
    assert float(x.std()) == pytest.approx(0.5, rel=0.05)
