"""fastdiff's schedulers beside the diffusers classes they extend, in the loops pipelines run."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers.*"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

from fastdiff.integrations import diffusers as ours  # noqa: E402

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DPM = "DPMSolverMultistepScheduler"
EDM_DPM = "EDMDPMSolverMultistepScheduler"
SINGLE = "DPMSolverSinglestepScheduler"
INVERSE = "DPMSolverMultistepInverseScheduler"
CM = "CMStochasticIterativeScheduler"
CASES: list[tuple[str, dict[str, Any]]] = [
    (DPM, {**SD}),
    (DPM, {**SD, "use_karras_sigmas": True}),
    (DPM, {**SD, "algorithm_type": "sde-dpmsolver++"}),
    (DPM, {**SD, "solver_order": 3, "timestep_spacing": "trailing"}),
    (DPM, {**SD, "prediction_type": "v_prediction", "timestep_spacing": "leading"}),
    (DPM, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    ("UniPCMultistepScheduler", {**SD}),
    ("UniPCMultistepScheduler", {**SD, "solver_order": 3, "use_karras_sigmas": True}),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
    ("DEISMultistepScheduler", {**SD}),
    ("EulerDiscreteScheduler", {**SD}),
    ("EulerDiscreteScheduler", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {**SD, "use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("EulerAncestralDiscreteScheduler", {**SD}),
    ("HeunDiscreteScheduler", {**SD}),
    ("LMSDiscreteScheduler", {**SD}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("DDIMScheduler", {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDPMScheduler", {**SD, "clip_sample": False}),
    ("DDPMScheduler", {**SD, "clip_sample": False, "variance_type": "fixed_large"}),
    ("LCMScheduler", {**SD}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {**SD, "skip_prk_steps": True, "timestep_spacing": "trailing"}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"sigma_data": 1.0, "prediction_type": "v_prediction"}),
    (EDM_DPM, {}),
    (EDM_DPM, {"solver_order": 3, "sigma_schedule": "exponential", "sigma_data": 1.0}),
    (EDM_DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "sigma_data": 0.7}),
    (SINGLE, {**SD}),
    (SINGLE, {**SD, "solver_order": 3, "lower_order_final": True, "use_karras_sigmas": True}),
    (SINGLE, {**SD, "algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
    (SINGLE, {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}),
    (SINGLE, {**SD, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("KDPM2DiscreteScheduler", {**SD}),
    ("KDPM2DiscreteScheduler", {**SD, "prediction_type": "v_prediction"}),
    ("KDPM2AncestralDiscreteScheduler", {**SD}),
    ("KDPM2AncestralDiscreteScheduler", {**SD, "timestep_spacing": "trailing"}),
    ("TCDScheduler", {**SD}),
    ("TCDScheduler", {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("DDIMInverseScheduler", {**SD, "clip_sample": False, "timestep_spacing": "trailing"}),
    (
        "DDIMInverseScheduler",
        {**SD, "clip_sample": False, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    ),
    (INVERSE, {**SD}),
    (INVERSE, {**SD, "solver_order": 3, "solver_type": "heun", "prediction_type": "v_prediction"}),
    (INVERSE, {**SD, "algorithm_type": "dpmsolver", "prediction_type": "sample"}),
    (INVERSE, {**SD, "use_karras_sigmas": True, "timestep_spacing": "leading"}),
    (CM, {"clip_denoised": False}),
    (CM, {"clip_denoised": False, "sigma_data": 1.0, "s_noise": 1.003, "num_train_timesteps": 201}),
]
IDS = [f"{name}-{number}" for number, (name, _) in enumerate(CASES)]
EVERY = pytest.mark.parametrize(("name", "config"), CASES, ids=IDS)
STOCHASTIC = (
    CM,
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * 0.9) * (0.5 + float(t) / 2000)


def pair(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    reference = getattr(diffusers, name)(**config)
    return reference, getattr(ours, name).from_config(reference.config)


def set_timesteps(scheduler: Any, steps: int) -> None:
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    else:
        scheduler.set_timesteps(steps)
    if isinstance(scheduler, diffusers.DPMSolverMultistepInverseScheduler):
        scheduler.sigmas = scheduler.sigmas.double()


def loop(scheduler: Any, steps: int, x: torch.Tensor, skip: int = 0, **kwargs: Any) -> torch.Tensor:
    """The loop of a pipeline; skip > 0 starts part of the way, as image-to-image does."""
    set_timesteps(scheduler, steps)
    order = scheduler.order
    times = scheduler.timesteps[skip * order :]
    if skip and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skip * order)
    generator = torch.Generator().manual_seed(7)
    names = scheduler.step.__code__.co_varnames
    if "generator" in names:
        kwargs["generator"] = generator
    for t in times:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t), t, x, return_dict=False, **kwargs)[0]
    return x


def start(scheduler: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return (z * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)


def close(result: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> bool:
    """Equal to 1e-5, and to what float32 holds of the state ``x`` the run began with."""
    bound = 1e-5 * max(1.0, expected.abs().max().item())
    bound += 4 * torch.finfo(torch.float32).eps * x.abs().max().item()
    return bool((result - expected).abs().max() < bound)


@EVERY
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_same_results(name, config, steps):
    reference, fast = pair(name, config)
    set_timesteps(reference, steps)
    set_timesteps(fast, steps)
    assert not fast.fastdiff_reason
    # One step of the inverse multiplies the state by 34 and takes most of that off again, which
    # costs float32 a digit or two on both sides.
    x = start(reference, torch.float64 if name == INVERSE else torch.float32)
    expected = loop(reference, steps, x)
    assert close(loop(fast, steps, x), expected, x)
    # A second run of the same object starts afresh.
    assert close(loop(fast, steps, x), expected, x)


@EVERY
def test_starting_part_of_the_way(name, config):
    reference, fast = pair(name, config)
    x = start(reference) * 0.3
    expected = loop(reference, 12, x, skip=5)
    if name == "LMSDiscreteScheduler":
        # diffusers takes the weights of order 4 for the one evaluation it has: not a consistent
        # step. Ours starts with order 1.
        fine = loop(ours.HeunDiscreteScheduler.from_config(reference.config), 12, x, skip=5)
        mine = (loop(fast, 12, x, skip=5) - fine).abs().max()
        assert mine < 0.2 * (expected - fine).abs().max()
        return
    assert close(loop(fast, 12, x, skip=5), expected, x)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_further_from_the_truth(name, config, dtype):
    reference, fast = pair(name, config)
    exact = loop(reference, 10, start(reference).to(dtype).float())
    if name in STOCHASTIC or "sde" in config.get("algorithm_type", ""):
        pytest.skip("draws in half precision are other draws")
    x = start(reference, dtype)
    theirs = (loop(reference, 10, x).float() - exact).abs().max()
    mine = loop(fast, 10, x)
    assert mine.dtype == dtype
    assert (mine.float() - exact).abs().max() <= 2 * theirs + torch.finfo(dtype).eps


@EVERY
def test_output_objects_have_the_references_fields(name, config):
    reference, fast = pair(name, config)
    outputs = []
    for scheduler in (reference, fast):
        set_timesteps(scheduler, 6)
        x, t = start(scheduler), scheduler.timesteps[0]
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        names = scheduler.step.__code__.co_varnames
        kwargs = {"generator": torch.Generator().manual_seed(7)} if "generator" in names else {}
        outputs.append(scheduler.step(model(x, t), t, x, **kwargs))
    assert type(outputs[0]) is type(outputs[1])
    assert list(outputs[0]) == list(outputs[1])
    for key in outputs[0]:
        torch.testing.assert_close(outputs[1][key], outputs[0][key], rtol=1e-5, atol=1e-4)


@EVERY
def test_configuration_round_trip(name, config, tmp_path):
    _, fast = pair(name, config)
    fast.save_pretrained(tmp_path)
    again = getattr(ours, name).from_pretrained(tmp_path)
    for key, value in fast.config.items():
        assert key.startswith("_") or again.config[key] == value
    back = getattr(diffusers, name).from_pretrained(tmp_path)  # by those without fastdiff
    x = start(fast)
    expected = loop(back, 6, x)
    assert close(loop(again, 6, x), expected, x)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("DDIMScheduler", {}, "clip_sample"),
        ("DDPMScheduler", {"clip_sample": False, "variance_type": "learned_range"}, "variance"),
        (DPM, {"thresholding": True}, "thresholding"),
        (SINGLE, {"thresholding": True}, "thresholding"),
        (SINGLE, {"prediction_type": "flow_prediction"}, "use_flow_sigmas is False"),
        (DPM, {"prediction_type": "v_prediction", "use_flow_sigmas": True}, "use_flow_sigmas is T"),
        (INVERSE, {"use_flow_sigmas": True}, "goes to less noise"),
        ("DDIMInverseScheduler", {}, "clip_sample"),
        ("TCDScheduler", {"clip_sample": True}, "clip_sample"),
        (CM, {}, "clip_denoised"),
    ],
)
def test_what_a_table_cannot_do_runs_diffusers_step_and_says_so(name, config, reason):
    reference, fast = pair(name, config)
    fast.set_timesteps(5)
    with pytest.warns(UserWarning, match=reason):
        assert reason in fast.fastdiff_reason
    reference.set_timesteps(5)
    x, t = start(reference), reference.timesteps[0]
    output = model(x, t)
    if "learned" in config.get("variance_type", ""):
        output = torch.cat([output, output], 1)
    steps = []
    for scheduler in (reference, fast):
        torch.manual_seed(7)
        steps.append(scheduler.step(output, t, x, return_dict=False)[0])
    assert torch.equal(*steps)


def test_the_callers_tensors_are_left_alone():
    _, fast = pair(DPM, SD)
    fast.set_timesteps(5)
    x = start(fast)
    kept, states = x.clone(), []
    for t in fast.timesteps:
        states.append((x, x.clone()))
        x = fast.step(model(x, t), t, x).prev_sample
    assert torch.equal(states[0][0], kept)
    assert all(torch.equal(a, b) for a, b in states)


def test_a_supported_configuration_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loop(pair(DPM, SD)[1], 5, torch.ones(1, 4, 2, 2))


def test_errors():
    _, fast = pair(DPM, SD)
    x = start(fast)
    with pytest.raises(ValueError, match="set_timesteps"):
        fast.step(x, 10, x)
    fast.set_timesteps(5)
    with pytest.raises(ValueError, match="output must have the sample's shape"):
        fast.step(x[:1], fast.timesteps[0], x)
    _, ddim = pair("DDIMScheduler", {**SD, "clip_sample": False})
    ddim.set_timesteps(5)
    with pytest.raises(ValueError, match="timestep must be one of"):
        ddim.step(x, 3, x)
    for name in ("KDPM2DiscreteScheduler", "HeunDiscreteScheduler"):
        _, inside = pair(name, SD)
        inside.set_timesteps(5)
        inside.set_begin_index(3)
        with pytest.raises(ValueError, match="first step must be an even number"):
            inside.step(x, inside.timesteps[3], x)
    _, inverse = pair(INVERSE, {**SD, "algorithm_type": "sde-dpmsolver++"})
    inverse.set_timesteps(5)
    with pytest.raises(ValueError, match="algorithm_type must be"):
        inverse.step(x, inverse.timesteps[0], x)


@pytest.fixture(scope="module")
def components() -> dict[str, Any]:
    """A Stable Diffusion pipeline's parts, small and random; prompts come as embeddings."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    nothing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return {"unet": unet.eval(), "vae": vae.eval(), **nothing, "requires_safety_checker": False}


SD_CONFIG = {**SD, "steps_offset": 1, "timestep_spacing": "leading", "clip_sample": False}
PIPELINE = (
    "DDIM",
    "DPMSolverMultistep",
    "UniPCMultistep",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "DPMSolverSinglestep",
    "KDPM2Discrete",
    "TCD",
)


@pytest.mark.parametrize("name", PIPELINE)
@pytest.mark.parametrize("image", [False, True], ids=["text to image", "image to image"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_pipeline_takes_the_scheduler(name, image, compiled, components):
    if compiled and name == "EulerAncestralDiscrete":
        pytest.skip("a compiled step takes no generator")
    # As users do it: the configuration the weights came with, into another class.
    shipped = diffusers.DDIMScheduler(**SD_CONFIG).config
    reference, fast = (
        getattr(library, f"{name}Scheduler").from_config(shipped) for library in (diffusers, ours)
    )
    kind = diffusers.StableDiffusionImg2ImgPipeline if image else diffusers.StableDiffusionPipeline
    random = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 1, 7, 16, generator=random)
    kwargs: dict[str, Any] = {"height": 16, "width": 16}
    if image:
        kwargs = {"image": torch.rand(1, 3, 16, 16, generator=random), "strength": 0.6}
    results = []
    for scheduler in (reference, fast):
        pipeline = kind(**components, scheduler=scheduler)
        assert pipeline.scheduler is scheduler
        pipeline.set_progress_bar_config(disable=True)
        if compiled and scheduler is fast:
            torch._dynamo.reset()
            counter = CompileCounter()
            fast.step = torch.compile(fast.step, backend=counter, fullgraph=True)
        results.append(
            pipeline(
                prompt_embeds=embeddings[0],
                negative_prompt_embeds=embeddings[1],
                num_inference_steps=8,
                generator=torch.Generator().manual_seed(3),
                output_type="latent",
                **kwargs,
            ).images
        )
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    if compiled:
        assert counter.frame_count == 1
