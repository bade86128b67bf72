"""fastdiff.compile(pipe): the pictures of diffusers' own pipelines, whatever users do meanwhile."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

from tiny_pipelines import PIPELINES, draw, made, random  # noqa: E402

import fastdiff  # noqa: E402
from fastdiff.integrations import diffusers as adapters  # noqa: E402
from fastdiff.testing import psnr  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(mine: Tensor, right: Tensor) -> None:
    """1e-4 of the largest latent: pictures in float32 after some steps."""
    assert mine.isfinite().all()
    assert float((mine - right).abs().max()) <= 1e-4 * float(right.abs().max())


def captures(pipe: Any) -> int:
    return fastdiff.report(pipe).captures()


def denoiser(pipe: Any) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


@pytest.mark.parametrize("name", PIPELINES)
def test_the_picture_is_eagers(name):
    pipe, call = made(name)
    right = draw(pipe, call())
    scheduler = pipe.scheduler
    config = dict(scheduler.config)
    assert fastdiff.compile(pipe) is pipe
    same(draw(pipe, call()), right)
    before = captures(pipe)
    same(draw(pipe, call()), right)
    assert captures(pipe) == before  # the second call finds everything
    report = fastdiff.report(pipe)
    assert report.components["scheduler"].status == "swapped"
    assert isinstance(pipe.scheduler, getattr(adapters, type(scheduler).__name__))
    assert dict(pipe.scheduler.config) == config
    for component in report.components.values():
        for part in component.parts.values():
            assert not part.eager
    for kind in ("unet", "transformer", "controlnet", "vae"):
        if kind in report.components:
            assert report.components[kind].status == "compiled"
    assert "scheduler: swapped" in str(report)
    assert report.to_dict()["components"]["scheduler"]["status"] == "swapped"
    assert fastdiff.uncompile(pipe) is pipe
    assert pipe.scheduler is scheduler
    modules = [c for c in pipe.components.values() if isinstance(c, nn.Module)]
    assert all(m._compiled_call_impl is None for c in modules for m in c.modules())
    assert torch.equal(draw(pipe, call()), right)


def test_another_size_and_batch_cost_one_capture_each():
    pipe, call = made("sd3")
    right = {size: draw(pipe, call(*size)) for size in ((32, 1), (48, 2))}
    fastdiff.compile(pipe)
    for size, count in (((32, 1), 1), ((48, 2), 2), ((32, 1), 2), ((48, 2), 2)):
        same(draw(pipe, call(*size)), right[size])
        assert captures(pipe) == count
    same(draw(pipe, {**call(), "num_inference_steps": 5, "guidance_scale": 7.0}), right[32, 1])
    assert captures(pipe) == 2
    more = {**call(), "num_inference_steps": 8, "guidance_scale": 3.0}
    mine = draw(pipe, more)
    assert captures(pipe) == 2
    same(mine, draw(fastdiff.uncompile(pipe), more))


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_callbacks_read_and_replace_latents_and_guidance(name):
    pipe, call = made(name)
    seen: list[Tensor] = []

    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        latents = values["latents"]
        seen.append(latents.clone())
        if step == 1:
            latents = latents * 0.9 + 0.1
        elif step == 2:
            latents.mul_(1.1)
        if step == 3:
            pipeline._guidance_scale = 2.0
        return {"latents": latents}

    arguments = {**call(), "callback_on_step_end": callback}
    right, read = draw(pipe, arguments), list(seen)
    seen.clear()
    fastdiff.compile(pipe)
    same(draw(pipe, arguments), right)
    assert len(seen) == len(read) >= 5
    for mine, theirs in zip(seen, read, strict=True):
        same(mine, theirs)
    assert captures(pipe) == 1


def test_guidance_may_end_midway():
    """Half the batch is left then: one more capture."""
    pipe, call = made("sd")

    def callback(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipeline._guidance_scale = 0.0
            return {"prompt_embeds": values["prompt_embeds"].chunk(2)[1]}
        return {}

    inputs = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    arguments = {**call(), "callback_on_step_end": callback, **inputs}
    right = draw(pipe, arguments)
    fastdiff.compile(pipe)
    for _ in range(2):
        same(draw(pipe, arguments), right)
        assert captures(pipe) == 2


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_twenty_steps_in_decibels(name):
    """float32: 80 dB of eager; bfloat16: eager's bfloat16 against its float32, less 1 dB."""
    pipe, call = made(name)
    arguments = {**call(), "num_inference_steps": 20}
    exact = draw(pipe, arguments)
    fastdiff.compile(pipe)
    assert psnr(draw(pipe, arguments), exact) >= 80
    short = fastdiff.uncompile(pipe).to(torch.bfloat16)
    rounded = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    theirs = psnr(draw(short, rounded), exact)
    fastdiff.compile(short)
    assert psnr(draw(short, rounded), exact) >= theirs - 1


def test_the_same_pipeline_drawn_by_two_threads():
    pipe, call = made("sd3")
    unet = denoiser(pipe)
    fastdiff.compile(pipe)
    pipes = [diffusers.StableDiffusion3Pipeline(**pipe.components) for _ in range(2)]
    for other in pipes:
        other.set_progress_bar_config(disable=True)
        other.scheduler = copy.deepcopy(pipe.scheduler)
        assert other.transformer is unet
    right = [draw(other, call(), seed) for seed, other in enumerate(pipes)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        found[seed] = draw(pipes[seed], call(), seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(2):
        same(found[seed], right[seed])
    assert captures(pipe) == 1


class Interrupted(Exception):
    pass


def test_an_exception_in_a_callback_leaves_it_usable():
    pipe, call = made("sd3")
    right = draw(pipe, call())
    fastdiff.compile(pipe)

    def callback(*_: Any) -> dict[str, Any]:
        raise Interrupted

    with pytest.raises(Interrupted):
        draw(pipe, {**call(), "callback_on_step_end": callback})
    same(draw(pipe, call()), right)


def test_saving_loading_and_casting(tmp_path):
    pipe, call = made("sdxl")
    plain = copy.deepcopy(pipe.unet.state_dict())
    fastdiff.compile(pipe)
    draw(pipe, call())
    pipe.save_pretrained(tmp_path, safe_serialization=True)
    index = (tmp_path / "model_index.json").read_text()
    assert "fastdiff" not in index
    assert "fastdiff" not in (tmp_path / "scheduler" / "scheduler_config.json").read_text()
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path, subfolder="unet")
    assert loaded.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in loaded.state_dict().items())
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert type(scheduler) is diffusers.EulerDiscreteScheduler
    pipe.to(torch.bfloat16)
    assert pipe.unet.dtype is torch.bfloat16
    rounded = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in call().items()}
    assert draw(pipe, rounded).isfinite().all()
    for other in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        assert other._compiled_call_impl is None


def test_a_scheduler_set_later_is_the_users():
    pipe, call = made("sdxl")
    fastdiff.compile(pipe)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    assert fastdiff.report(pipe).components["scheduler"].status == "kept"
    mine = draw(pipe, call())
    chosen = pipe.scheduler
    fastdiff.uncompile(pipe)
    assert pipe.scheduler is chosen
    same(mine, draw(pipe, call()))


def test_a_scheduler_of_no_table_is_kept():
    pipe, _ = made("sdxl")
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=True)
    fastdiff.compile(pipe)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    found = fastdiff.report(pipe).components["scheduler"]
    assert (found.status, found.why) == ("kept", "clip_sample is not linear in the state")


def test_chosen_components_and_bad_arguments():
    pipe, _ = made("sdxl")
    with pytest.raises(ValueError, match="must be compiled"):
        fastdiff.report(pipe)
    fastdiff.compile(pipe, components=["scheduler"])
    found = fastdiff.report(pipe).components
    assert found["scheduler"].status == "swapped"
    assert found["unet"].status == "kept"
    with pytest.raises(ValueError, match="components must name parts"):
        fastdiff.compile(pipe, components=["transformer"])
    with pytest.raises(ValueError, match="roles must be None for a pipeline"):
        fastdiff.compile(pipe, roles={"x": "time"})
    with pytest.raises(ValueError, match="components must be None for a module"):
        fastdiff.compile(pipe.unet, components=["unet"])


def test_a_pipeline_and_its_pictures_are_freed():
    pipe, call = made("sd3")
    fastdiff.compile(pipe)
    draw(pipe, call())
    gone = weakref.ref(pipe), weakref.ref(pipe.transformer._compiled_call_impl)
    fastdiff.uncompile(pipe)
    del pipe, call
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


class Doubling:
    """An attention processor of somebody's own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own = diffusers.models.attention_processor.AttnProcessor()
        return own(attn, hidden_states, *args, **kwargs) * 0.5


def test_attention_processors_and_slicing():
    pipe, call = made("sd")
    fastdiff.compile(pipe)
    first = draw(pipe, call())
    pipe.unet.set_attn_processor(Doubling())
    mine = draw(pipe, call())
    assert float((mine - first).abs().max()) > 1e-2
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())
    pipe.enable_attention_slicing()
    sliced = draw(pipe, call())
    fastdiff.uncompile(pipe)
    same(sliced, draw(pipe, call()))
    pipe.unet.set_attn_processor(Doubling())
    same(mine, draw(pipe, call()))


def test_ip_adapter_layers_pass_through():
    """Tokens of a picture beside those of the text, in processors that have weights."""
    pipe, _ = made("sd")
    processors = {}
    for name in pipe.unet.attn_processors:
        if name.endswith("attn1.processor"):
            processors[name] = diffusers.models.attention_processor.AttnProcessor2_0()
            continue
        wide = 32 if not name.startswith("mid") else 64
        own = diffusers.models.attention_processor.IPAdapterAttnProcessor2_0
        processors[name] = own(hidden_size=wide, cross_attention_dim=32, scale=0.7)
    pipe.unet.set_attn_processor(processors)
    values = {
        "sample": random(2, 4, 16, 16),
        "timestep": torch.tensor(501),
        "encoder_hidden_states": (random(2, 7, 32), [random(2, 1, 4, 32)]),
    }
    with torch.no_grad():
        right = pipe.unet(**values).sample
        fastdiff.compile(pipe)
        same(pipe.unet(**values).sample, right)
        values["encoder_hidden_states"][1][0].mul_(3.0)
        same(pipe.unet(**values).sample, pipe.unet._call_impl(**values).sample)


def test_offload_hooks_are_respected():
    """accelerate's hooks of whole models; without an accelerator they are set by hand."""
    hooks = pytest.importorskip("accelerate.hooks")
    pipe, call = made("sd3")
    right = draw(pipe, call())
    fastdiff.compile(pipe)
    moved: list[str] = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            moved.append(type(module).__name__)
            return args, kwargs

    hooks.add_hook_to_module(pipe.transformer, Hook())
    same(draw(pipe, call()), right)
    assert len(moved) == 5
    (reason,) = fastdiff.report(pipe).components["transformer"].parts["transformer"].eager
    assert "offload hook" in reason
    hooks.remove_hook_from_module(pipe.transformer, recurse=True)
    same(draw(pipe, call()), right)
    assert captures(pipe) == 1


def test_layers_offloaded_one_by_one():
    """Sequential offload: the weights are on the meta device between calls."""
    accelerate = pytest.importorskip("accelerate")
    pipe, _ = made("sd3")
    values = {
        "hidden_states": random(2, 4, 16, 16),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_hidden_states": random(2, 7, 32),
        "pooled_projections": random(2, 64),
    }
    with torch.no_grad():
        right = pipe.transformer(**values).sample
        fastdiff.compile(pipe)
        accelerate.cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
        assert next(pipe.transformer.parameters()).device.type == "meta"
        same(pipe.transformer(**values).sample, right)


def test_another_precision_and_bytes_for_the_denoiser():
    pipe, call = made("sd")
    right = draw(pipe, call())
    fastdiff.compile(pipe, dtype=torch.bfloat16, quantize="int8", skip=["*.ff*"])
    dtypes = {name: next(m.parameters()).dtype for name, m in pipe.components.items()
              if isinstance(m, nn.Module)}  # fmt: skip
    assert set(dtypes.values()) == {torch.bfloat16}
    assert psnr(draw(pipe, call()), right) > 30
    arguments = {**call(), "output_type": "pt", "generator": torch.Generator().manual_seed(0)}
    assert pipe(**arguments).images.isfinite().all()  # the decoder takes what the denoiser gives
    parts = fastdiff.report(pipe).components
    assert parts["unet"].parts["unet"].cast == "torch.float32 to torch.bfloat16"
    assert parts["unet"].parts["unet"].quantize == "int8"
    assert all(part.quantize == part.cast == "" for part in parts["vae"].parts.values())
    # Asked for other things, it is compiled anew.
    fastdiff.compile(pipe)
    assert fastdiff.report(pipe).components["unet"].parts["unet"].quantize == ""


def test_options_that_cannot_be_had_change_nothing():
    pipe, _ = made("sd")
    scheduler = pipe.scheduler
    for options, message in (
        ({"quantize": "fp8"}, "sm_89"),
        ({"quantize": "int8", "skip": ["decoder.*"]}, "skip must name modules"),
    ):
        with pytest.raises(ValueError, match=message):
            fastdiff.compile(pipe, dtype=torch.bfloat16, **options)
    assert pipe.scheduler is scheduler
    assert denoiser(pipe)._compiled_call_impl is None
    assert next(denoiser(pipe).parameters()).dtype == torch.float32
