"""fastdiff.compile: the same results as the model's own code, whatever happens in between."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from denoisers import DENOISERS, MATCHES, made, tensors
from torch import Tensor, nn

from fastdiff import compiler
from fastdiff.testing import assert_within_2x

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


def cast(values: Any, dtype: torch.dtype) -> Any:
    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return torch.utils._pytree.tree_map(one, values)


def step_by_step(model: nn.Module, inputs: Any, dtype: torch.dtype, steps: int = 4) -> list[Any]:
    """One tensor list per step; the condition is cast once, as a pipeline does it."""
    first = cast(inputs(0), dtype)
    results = []
    with torch.no_grad():
        for step in range(steps):
            here = cast(inputs(step), dtype)
            for name in first:
                if inputs(0)[name] is inputs(1)[name]:
                    here[name] = first[name]
            results.append(tensors(model(**here)))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DENOISERS)
def test_results_are_within_twice_eagers_error(name, dtype):
    model, inputs = made(name)
    exact = step_by_step(copy.deepcopy(model).double(), inputs, torch.float64)
    model = model.to(dtype)
    eager = step_by_step(model, inputs, dtype)
    assert compiler.compile(model) is model
    mine = step_by_step(model, inputs, dtype)
    for step, (results, theirs, right) in enumerate(zip(mine, eager, exact, strict=True)):
        for result, other, oracle in zip(results, theirs, right, strict=True):
            assert_within_2x(result, oracle, other, what=f"{name}, step {step}")
    report = compiler.report(model)
    assert len(report.graphs) == 1
    assert not report.eager
    assert not report.graphs[0].why_whole
    assert MATCHES[name].items() <= report.graphs[0].fused.items()
    if name not in ("autoencoder",):
        # Step 3 is step 0's time again; the condition is the same all along.
        assert report.hits > 0
        assert report.graphs[0].hoisted > 0


def kept_results(model: nn.Module) -> dict[str, Any]:
    """What is kept of each program of the only graph."""
    (entry,) = model._compiled_call_impl._entries.values()
    return {kept.program.name: kept for kept in entry.runners[0].kept}


def test_what_is_hoisted_is_computed_once():
    model, inputs = made("zoo_dit")
    compiler.compile(model)
    step_by_step(model, inputs, torch.float32, steps=9)
    counts = {name: (k.misses, k.hits) for name, k in kept_results(model).items()}
    assert counts["prompt"] == (1, 8)
    assert counts["schedule"] == (3, 6)
    assert counts["both"] == (3, 6)


@pytest.mark.parametrize("name", ["unet", "sdxl", "flux"])
def test_writes_to_weights_and_conditions_are_seen(name):
    model, inputs = made(name)
    compiler.compile(model)
    own = model._call_impl
    with torch.no_grad():
        values = inputs(0)
        model(**values)
        generator = torch.Generator().manual_seed(0)
        for number, parameter in enumerate(model.parameters()):
            if number % 7 == 0:  # a LoRA fused into some layers
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        for mine, right in zip(tensors(model(**values)), tensors(own(**values)), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
        values["encoder_hidden_states"].mul_(1.5)
        for mine, right in zip(tensors(model(**values)), tensors(own(**values)), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
        for parameter in model.parameters():  # other memory for the same parameter
            parameter.data = parameter.data * 0.9
        for mine, right in zip(tensors(model(**values)), tensors(own(**values)), strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    assert len(compiler.report(model).graphs) == 1  # nothing was captured again


def test_memory_of_a_dead_condition_used_again_is_not_taken_for_it():
    """Addresses come again; a result must not."""
    model, inputs = made("unet")
    compiler.compile(model)
    values = inputs(0)
    with torch.no_grad():
        for number in range(20):
            text = torch.full((2, 7, 32), float(number))
            values["encoder_hidden_states"] = text
            mine, right = model(**values).sample, model._call_impl(**values).sample
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
            del text


class Small(nn.Module):
    """A denoiser that is captured at once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)
        self.time = nn.Linear(1, 4)

    def forward(self, sample: Tensor, timestep: Tensor, scale: Tensor | None = None) -> Tensor:
        t = self.time(timestep.reshape(-1, 1).float())
        out = nn.functional.silu(self.norm(sample + t[:, :, None, None]))
        return out if scale is None else out * scale


def test_new_shapes_capture_new_graphs_within_a_bound():
    model = Small().eval()
    compiler.compile(model, max_graphs=2)
    with torch.no_grad():
        for size in (8, 16, 12, 8, 16):
            values = torch.randn(2, 4, size, size), torch.tensor([3, 4])
            torch.testing.assert_close(model(*values), model._call_impl(*values))
    report = compiler.report(model)
    assert [graph.shapes["sample"][-1] for graph in report.graphs] == [8, 16]


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_flops_are_those_of_the_models_own_calls(name):
    """Those inside the ops by their contracts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = made(name)
    # As plain products: the counter does not know the CPU's flash attention.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        model(**inputs(0))
    compiler.compile(model)
    with torch.no_grad():
        model(**inputs(0))
    (graph,) = compiler.report(model).graphs
    total = sum(program["flops"] for program in graph.programs.values())
    assert total == counter.get_total_flops()


def test_twenty_shapes_are_all_captured():
    """More than PyTorch recompiles one function for."""
    model = Small().eval()
    compiler.compile(model, max_graphs=32)
    with torch.no_grad():
        for size in range(2, 22):
            values = torch.randn(2, 4, size, 3), torch.tensor([3, 4])
            torch.testing.assert_close(model(*values), model._call_impl(*values))
    assert len(compiler.report(model).graphs) == 20
    assert not compiler.report(model).eager


@pytest.mark.parametrize("time", [5, 5.0, torch.tensor(5), torch.tensor([5, 5])])
def test_times_of_every_kind(time):
    model, inputs = made("unet")
    compiler.compile(model)
    with torch.no_grad():
        values = {**inputs(0), "timestep": time}
        mine, right = model(**values).sample, model._call_impl(**values).sample
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
        if not isinstance(time, Tensor):  # another number is no other graph
            model(**{**values, "timestep": time + 1})
    assert len(compiler.report(model).graphs) == 1


def test_arguments_by_position_and_both_kinds_of_output():
    model, inputs = made("unet")
    compiler.compile(model)
    values = inputs(0)
    with torch.no_grad():
        right = model._call_impl(**values)
        named = model(**values)
        assert type(named) is type(right)
        (plain,) = model(*values.values(), return_dict=False)
    torch.testing.assert_close(named.sample, right.sample, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, right.sample, rtol=1e-4, atol=1e-5)


def test_gradients_and_training_run_the_models_own_code():
    model, inputs = made("unet")
    compiler.compile(model)
    values = inputs(0)
    model.requires_grad_(True)
    model(**values).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.requires_grad_(False)
    sample = values["sample"].requires_grad_()
    model(**values).sample.sum().backward()
    assert sample.grad is not None
    model.train()
    with torch.no_grad():
        model(**values)
    reasons = compiler.report(model).eager
    assert sum(reasons.values()) == 3
    assert any("training mode" in reason for reason in reasons)
    assert any("weights require" in reason for reason in reasons)
    assert any("an input requires" in reason for reason in reasons)


def test_inference_mode_gives_the_same():
    """Writes to its tensors are not counted, so nothing that depends on them is kept."""
    model, inputs = made("unet")
    compiler.compile(model)
    with torch.inference_mode():
        values = {**inputs(0), "encoder_hidden_states": torch.randn(2, 7, 32)}
        for _ in range(2):
            mine, right = model(**values).sample, model._call_impl(**values).sample
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
            values["encoder_hidden_states"].mul_(2.0)


def test_the_model_stays_what_it_was():
    model, inputs = made("unet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compiler.compile(model)
    values = inputs(0)
    with torch.no_grad():
        right = model(**values).sample
        assert list(model.state_dict()) == list(before)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other._compiled_call_impl is None  # copies run their own code
            torch.testing.assert_close(other(**values).sample, right, rtol=1e-4, atol=1e-5)
        assert compiler.uncompile(model) is model
        assert torch.equal(model(**values).sample, model._call_impl(**values).sample)
    with pytest.raises(ValueError, match="model must be compiled"):
        compiler.report(model)


def test_forward_hooks_run():
    model, inputs = made("unet")
    compiler.compile(model)
    seen = []
    handle = model.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        model(**inputs(0))
        assert len(seen) == 1
        handle.remove()
        model(**inputs(0))
    assert len(seen) == 1


def test_errors_of_the_model_come_through_and_leave_it_usable():
    model, inputs = made("unet")
    compiler.compile(model)
    values = inputs(0)
    with torch.no_grad():
        with pytest.raises(Exception, match=r"(?i)shape|channels|size"):
            model(**{**values, "sample": torch.randn(2, 5, 16, 16)})
        with pytest.raises(TypeError):
            model(**values, unknown_argument=3)
        mine, right = model(**values).sample, model._call_impl(**values).sample
    torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)


def test_two_threads_may_call_one_model():
    model, inputs = made("unet")
    compiler.compile(model)
    prompts = [torch.randn(2, 7, 32) for _ in range(2)]
    with torch.no_grad():
        model(**inputs(0))
        right = [
            [model._call_impl(**{**inputs(s), "encoder_hidden_states": p}).sample for s in range(6)]
            for p in prompts
        ]
    results: list[list[Tensor]] = [[], []]

    def work(number: int) -> None:
        with torch.no_grad():
            for step in range(6):
                values = {**inputs(step), "encoder_hidden_states": prompts[number]}
                results[number].append(model(**values).sample)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, theirs in zip(results, right, strict=True):
        assert len(mine) == 6
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_uncompiling_leaves_nothing_behind():
    model, inputs = made("zoo_dit")
    compiler.compile(model)
    with torch.no_grad():
        model(**inputs(0))
    held = [
        weakref.ref(tensor)
        for kept in kept_results(model).values()
        for results, _ in kept._entries.values()
        for tensor in torch.utils._pytree.tree_leaves(results)
    ]
    gone = weakref.ref(model._compiled_call_impl)
    assert held
    compiler.uncompile(model)
    gc.collect()
    assert gone() is None
    assert not any(reference() is not None for reference in held)


def test_graphs_are_freed_when_shapes_change_and_models_are_compiled_again():
    """PyTorch's own caches must not keep them (it kept every one of them, with its results)."""
    model = Small().eval()
    runners = []

    def call(size: int) -> None:
        with torch.no_grad():
            model(torch.randn(2, 4, size, 3), torch.tensor([3, 4]))
        (*_, entry) = model._compiled_call_impl._entries.values()
        runners.append(weakref.ref(entry.runners[0]))

    compiler.compile(model, max_graphs=2)
    for size in range(3, 9):
        call(size)
    gc.collect()
    assert [r() is not None for r in runners] == [False] * 4 + [True] * 2
    for _ in range(3):
        compiler.uncompile(model)
        compiler.compile(model)
        call(4)
    compiler.uncompile(model)
    gc.collect()
    assert not any(r() is not None for r in runners)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_digests_tell_any_change(dtype):
    from fastdiff.compiler.fingerprint import BLOCK, digest

    x = torch.randn(3, BLOCK + 5, generator=torch.Generator().manual_seed(0)).mul(20).to(dtype)
    before = digest([x])
    assert digest([x.clone()]) == before
    view = x.data
    for place in ((0, 0), (1, 7), (2, BLOCK + 4)):
        view[place] += 1
        assert digest([x]) != before
        view[place] -= 1
    if dtype is not torch.bfloat16:
        view.copy_(torch.where(x == x, -x, x))  # every sign
        assert digest([x]) != before
    assert digest([x.flip(1)]) != before


def test_report_says_what_was_done():
    model, inputs = made("sdxl")
    compiler.compile(model)
    step_by_step(model, inputs, torch.float32, steps=2)
    report = compiler.report(model)
    graph = report.graphs[0]
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    fused = graph.fused["group_norm_silu"], graph.fused["add_group_norm_silu"]
    assert sum(fused) == norms
    assert min(fused) > 0
    assert graph.unfused["group_norm"] == 0
    # The tables of frequencies, which depend on the weights alone, are part of an op.
    assert set(graph.programs) == {"prompt", "schedule", "both", "step"}
    text = str(report)
    assert f"{fused[1]} add_group_norm_silu, {fused[0]} group_norm_silu" in text
    assert "36 layer_norm: nothing follows, and it is small" in text
    assert sum(graph.why_unfused.values()) == graph.unfused["layer_norm"] == 36
    assert "sample [2, 4, 16, 16]" in text
    stages = list(graph.calls)
    assert stages[:2] == ["captured", "tidied"]
    assert stages[-1] == "hoisted"
    assert graph.calls["captured"] > 1.5 * graph.calls["hoisted"] > 0
    assert list(graph.calls.values()) == sorted(graph.calls.values(), reverse=True)
    assert f"{graph.calls['captured']} before, {graph.calls['hoisted']} now" in text
    step = graph.programs["step"]
    assert graph.limits()["H200 SXM"] == pytest.approx(
        1e3 * max(step["bytes"] / 4.8e12, step["flops"] / 494.5e12)
    )
    picture = ElementTree.fromstring(graph.svg("a & b"))
    words = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert words[0] == "a & b"
    assert words[1::2] == stages
    assert list(map(int, words[2::2])) == list(graph.calls.values())
    data = report.to_dict()
    assert data["graphs"][0]["fused"] == graph.fused


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "model must be a torch.nn.Module", lambda m: compiler.compile(lambda x: x)),
        (ValueError, "max_graphs must be", lambda m: compiler.compile(m, max_graphs=0)),
        (ValueError, "must be 'sample', 'time'", lambda m: compiler.compile(m, roles={"x": "y"})),
        (
            ValueError,
            "roles must name arguments",
            lambda m: compiler.compile(m, roles={"z": "time"}),
        ),
    ],
)
def test_bad_arguments_are_refused(error, message, call):
    with pytest.raises(error, match=message):
        call(nn.Linear(2, 2))
