"""Steps computed in part: the results of DeepCache and of the first-block cache written by hand,
and whole steps wherever there is doubt."""

from __future__ import annotations

import copy
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoisers import made, tensors
from recorders import Again
from step_caches import (
    MOVES,
    THRESHOLD,
    TRANSFORMERS,
    UNETS,
    DeepCache,
    FirstBlock,
    counts,
    facts,
    results,
    steps,
    wide,
)
from test_foreign_models import ClassTransformer, PixelUNet
from torch import Tensor, nn

import fastdiff
from fastdiff import compiler
from fastdiff.compiler import step_cache
from fastdiff.compiler.cuda_graphs import Pool
from fastdiff.testing import assert_within_2x, psnr

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]

SHARED_CACHE = True
LONG = pytest.mark.long
ALL = (*UNETS, *TRANSFORMERS)
# Of their kind, another one is always tried.
OTHERS = dict.fromkeys(("sdxl", "scale_shift", "sd3", "pixart", "flux2", "zoo_dit"), LONG)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(pytest.param(name, torch.float32, marks=OTHERS.get(name, ())) for name in ALL),
        *((name, torch.bfloat16) for name in ("unet", "wan")),
        pytest.param("dit", torch.bfloat16, marks=LONG),
    ],
    ids=str,
)
def test_steps_that_are_all_whole_are_bit_equal_to_no_cache(name, dtype):
    model, inputs = made(name)
    model = model.to(dtype)
    run = steps(inputs, dtype)
    right = results(compiler.compile(model), run)
    (plain,) = compiler.report(model).graphs
    assert plain.cache == {}
    never = {"kind": "deepcache", "interval": 1}
    if name in TRANSFORMERS:
        never = {"kind": "first_block", "threshold": 0}
    mine = results(compiler.compile(model, cache=never), run)
    assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
    assert counts(model) == (len(run), 0)
    (graph,) = compiler.report(model).graphs
    # A cut may keep a cast out of a norm that follows it, and that costs no FLOPs.
    assert [(n, p["flops"]) for n, p in graph.programs.items()] == [
        (n, p["flops"]) for n, p in plain.programs.items()
    ]
    assert graph.cache["flops_whole"] == plain.programs["step"]["flops"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "interval", "branch"),
    [("unet", 2, 0), ("unet", 3, 2), pytest.param("sdxl", 2, 0, marks=LONG)],
)
def test_deepcache_is_the_one_written_by_hand(name, interval, branch, dtype):
    model, inputs = made(name)
    exact = DeepCache(copy.deepcopy(model).double(), interval, branch)
    model = model.to(dtype)
    run = steps(inputs, dtype)
    oracle = results(exact, wide(run))
    eager = results(DeepCache(copy.deepcopy(model), interval, branch), run)
    compiler.compile(model, cache={"kind": "deepcache", "interval": interval, "branch": branch})
    for number, both in enumerate(zip(results(model, run), oracle, eager, strict=True)):
        assert_within_2x(*both, what=f"step {number}")
    assert counts(model) == (-(-len(run) // interval), len(run) - -(-len(run) // interval))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dit", "sd3", "flux", pytest.param("pixart", marks=LONG)])
def test_first_block_is_the_one_written_by_hand(name, dtype):
    model, inputs = made(name)
    exact = FirstBlock(copy.deepcopy(model).double(), THRESHOLD)
    model = model.to(dtype)
    run = steps(inputs, dtype)
    oracle = results(exact, wide(run))
    by_hand = FirstBlock(copy.deepcopy(model), THRESHOLD)
    eager = results(by_hand, run)
    assert by_hand.whole == exact.whole == [True, False, False] * 2
    compiler.compile(model, cache={"kind": "first_block", "threshold": THRESHOLD})
    for number, both in enumerate(zip(results(model, run), oracle, eager, strict=True)):
        assert_within_2x(*both, what=f"step {number}")
    assert counts(model) == (2, 4)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_first_block_is_that_of_diffusers(name):
    hooks = pytest.importorskip("diffusers.hooks")
    if not hasattr(hooks, "apply_first_block_cache"):
        pytest.skip("no first-block cache in this version of diffusers")
    from diffusers.models.cache_utils import CacheMixin

    model, inputs = made(name)
    run = steps(inputs)
    theirs = []
    for other, given in ((copy.deepcopy(model).double(), wide(run)), (copy.deepcopy(model), run)):
        config = hooks.FirstBlockCacheConfig(threshold=THRESHOLD)
        hooks.apply_first_block_cache(other, config)
        with CacheMixin.cache_context(other, "run"):
            theirs.append(results(other, given))
    compiler.compile(model, cache={"kind": "first_block", "threshold": THRESHOLD})
    for number, both in enumerate(zip(results(model, run), *theirs, strict=True)):
        assert_within_2x(*both, what=f"step {number}")
    assert counts(model) == (2, 4)


@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        (PixelUNet, {"kind": "deepcache", "interval": 2}),
        (ClassTransformer, {"kind": "first_block", "threshold": 1e6}),
    ],
)
def test_models_of_others_are_cut_by_their_structure(kind, cache, monkeypatch):
    torch.manual_seed(0)
    model, x = kind().eval().requires_grad_(False), torch.randn(2, 3, 16, 16)
    rest: dict[str, Tensor] = {}
    if kind is ClassTransformer:
        x, rest = torch.randn(2, 4, 8, 8), {"y": torch.tensor([1, 2])}
    time = "time" if kind is PixelUNet else "t"
    run = [{"x": x, time: torch.tensor([900, 900]), **rest}] * 2
    right = results(compiler.compile(copy.deepcopy(model)), run)
    # The same step again, in part: what is kept is exact.
    monkeypatch.setattr(step_cache.StepCache, "_why_whole", lambda self, run, begins: not run.kept)
    first, second = results(compiler.compile(model, cache=cache), run)
    assert torch.equal(first, right[0])
    torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-5)
    assert counts(model) == (1, 1)
    assert facts(model)["flops_part"] < 0.6 * facts(model)["flops_whole"]


def cached(name: str, **more: Any) -> tuple[nn.Module, list[dict[str, Any]], nn.Module]:
    """(a model with a cache that hardly ever computes a whole step, its run, one without)."""
    model, inputs = made(name)
    plain = compiler.compile(copy.deepcopy(model))
    cache = {"kind": "deepcache", "interval": 100}
    if name in TRANSFORMERS:
        cache = {"kind": "first_block", "threshold": 1e6}
    return compiler.compile(model, cache=cache | more), steps(inputs), plain


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_a_new_run_starts_whole(name):
    model, run, plain = cached(name)
    first, right = results(model, run), results(plain, run)
    assert torch.equal(first[0], right[0])
    assert not any(torch.equal(a, b) for a, b in zip(first[1:], right[1:], strict=True))
    assert counts(model) == (1, 5)
    again = results(model, run)  # the time turns round
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert counts(model) == (2, 10)
    other = [{**v, "encoder_hidden_states": run[0]["encoder_hidden_states"] * 2} for v in run[1:]]
    for values in other:  # the same object in all steps, at times that go on
        values["encoder_hidden_states"] = other[0]["encoder_hidden_states"]
    assert torch.equal(results(model, other)[0], results(plain, other)[0])
    assert counts(model) == (3, 14)
    with torch.no_grad():
        run[0]["encoder_hidden_states"].mul_(1.5)  # the same object, another prompt
    assert torch.equal(results(model, run[3:])[0], results(plain, run[3:])[0])
    assert counts(model) == (4, 16)
    assert facts(model)["whole"] == {step_cache.BEGINS: 4}


def test_a_change_of_weights_starts_whole():
    model, run, plain = cached("unet")
    results(model, run[:3])
    for one in (model, plain):
        with torch.no_grad():
            one.down_blocks[1].resnets[0].conv1.weight.mul_(1.5)
    assert torch.equal(results(model, run[3:4])[0], results(plain, run[3:4])[0])
    assert counts(model) == (2, 2)


def test_another_call_of_a_pipeline_starts_whole():
    model, run, plain = cached("unet")
    made = model._compiled_call_impl
    token = [object()]
    made.token = lambda: token[0]
    results(model, run[:3])
    token[0] = object()
    assert torch.equal(results(model, run[3:])[0], results(plain, run[3:])[0])
    assert counts(model) == (2, 4)


@pytest.mark.parametrize("name", ["unet", "sd3"])
def test_two_prompts_that_take_turns_are_not_mixed_up(name):
    model, run, _ = cached(name)
    text = torch.randn(run[0]["encoder_hidden_states"].shape)
    other = [{**values, "encoder_hidden_states": text} for values in run]
    alone = results(model, run), results(model, other)
    compiled = compiler.compile(model, cache=model._compiled_call_impl.options.cache)
    both = results(compiled, [v for pair in zip(run, other, strict=True) for v in pair])
    for mine, right in ((both[::2], alone[0]), (both[1::2], alone[1])):
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
    assert counts(model) == (2, 10)


def test_two_samples_that_take_turns_are_computed_whole():
    """Of the same prompt at the same times: the views of a panorama."""
    model, run, plain = cached("unet")
    other = [{**values, "sample": values["sample"].flip(-1)} for values in run]
    both = [v for pair in zip(run, other, strict=True) for v in pair]
    mine, right = results(model, both), results(plain, both)
    assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
    assert facts(model)["whole"] == {step_cache.BEGINS: 1, step_cache.TWICE: 11}
    results(model, run)  # one again
    assert counts(model) == (13, 5)


def test_a_time_that_comes_twice_by_itself_costs_two_whole_steps():
    model, run, plain = cached("unet")
    order = [0, 1, 1, 2, 3, 4]
    mine, right = ([results(m, [run[i]])[0] for i in order] for m in (model, plain))
    whole = [torch.equal(a, b) for a, b in zip(mine, right, strict=True)]
    assert whole == [True, False, True, True, False, False]


def test_what_cannot_be_told_apart_is_computed_whole():
    model, run, plain = cached("unet")
    with torch.inference_mode():
        text = torch.randn(2, 7, 32)
        run = [{**values, "encoder_hidden_states": text} for values in run]
        mine, right = results(model, run), results(plain, run)
    assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))
    assert facts(model)["whole"] == {step_cache.UNKNOWN: 6}


def test_threads_have_runs_of_their_own():
    model, run, _ = cached("unet")
    other = [{**values, "sample": values["sample"].flip(-1)} for values in run]
    alone = results(model, run), results(model, other)
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    turn = threading.Barrier(2)

    def work(number: int) -> None:
        for values in (run, other)[number]:
            turn.wait()
            found[number] += results(model, [values])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert all(torch.equal(a, b) for a, b in zip(found[number], alone[number], strict=True))


def test_first_and_last_steps_are_whole():
    model, run, plain = cached("unet", first=2, last=1, steps=len(MOVES))
    right = results(plain, run)
    for count in (1, 2):  # runs
        mine = results(model, run)
        whole = [torch.equal(a, b) for a, b in zip(mine, right, strict=True)]
        assert whole == [True, True, False, False, False, True]
        reasons = (step_cache.BEGINS, step_cache.FIRST, step_cache.LAST)
        assert facts(model)["whole"] == dict.fromkeys(reasons, count)


def test_another_shape_has_a_cache_of_its_own():
    model, run, plain = cached("unet")
    small = [{**values, "sample": values["sample"][..., :8, :8].clone()} for values in run]
    both = [v for pair in zip(run, small, strict=True) for v in pair]
    mine, right = results(model, both), results(plain, both)
    for a, b in zip(mine[:2], right[:2], strict=True):
        assert torch.equal(a, b)
    assert counts(model) == (2, 10)


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_the_deviation_is_measured_and_changes_nothing(name):
    model, run, plain = cached(name)
    unmeasured, right = results(model, run), results(plain, run)
    assert "deviation: not measured" in str(compiler.report(model))
    model, _, _ = cached(name, measure=True)
    mine = results(model, run)
    assert all(torch.equal(a, b) for a, b in zip(mine, unmeasured, strict=True))
    (measured,) = facts(model)["runs"]
    for number, (a, b) in enumerate(zip(mine[1:], right[1:], strict=True)):
        difference = (a - b).double().square().mean()
        error = float((difference / b.double().square().mean()).sqrt())
        assert measured["error"][number] == pytest.approx(error, rel=1e-6)
        psnr = float(10 * torch.log10((b.max() - b.min()).double().square() / difference))
        assert measured["psnr"][number] == pytest.approx(psnr, rel=1e-6)
    assert min(measured["error"]) > 0
    assert f"relative L2 {max(measured['error']):.2e} at most" in str(compiler.report(model))
    results(model, run[:2])
    assert [len(r["error"]) for r in facts(model)["runs"]] == [1]  # of the last run


@pytest.mark.parametrize("name", ["unet", "flux"])
def test_report_counts_the_flops_that_are_saved(name):
    model, run, _ = cached(name)
    results(model, run)
    found = facts(model)
    assert (sum(found["whole"].values()), found["part"]) == (1, 5)
    assert 0 < found["flops_part"] < found["flops_whole"]
    saved = 5 * (1 - found["flops_part"] / found["flops_whole"]) / 6
    assert found["saved"] == pytest.approx(saved)
    assert found["bytes"] > 0
    text = str(compiler.report(model))
    share = found["flops_part"] / found["flops_whole"]
    line = f"{found['kind']}: 1 steps whole, 5 in part, with {share:.1%} of the FLOPs; {saved:.1%}"
    assert line in text
    assert "1 whole: a run begins" in text
    assert compiler.report(model).to_dict()["cache"] == found["kind"]
    model._compiled_call_impl.clear()


def test_flops_of_a_step_in_part_are_those_of_its_layers():
    """Branch 0 of the tiny U-Net: the first convolution, one layer of the last block, the end."""
    model, run, _ = cached("unet")
    results(model, run[:1])
    layer = model.up_blocks[-1].resnets[-1]
    convolutions = [model.conv_in, layer.conv1, layer.conv2, layer.conv_shortcut, model.conv_out]
    pixels = 2 * 16 * 16
    least = sum(2 * pixels * c.weight.numel() for c in convolutions)
    transformer = model.up_blocks[-1].attentions[-1]
    linear = [m for m in transformer.modules() if isinstance(m, nn.Linear)]
    text = transformer.transformer_blocks[0].attn2
    linear = [m for m in linear if m not in (text.to_k, text.to_v)]  # the prompt's
    least += sum(2 * pixels * m.weight.numel() for m in linear)
    least += sum(2 * pixels * c.weight.numel() for c in (transformer.proj_in, transformer.proj_out))
    attention = 4 * 2 * 32 * 256 * (256 + 7)  # queries of 256 pixels, keys of pixels and 7 words
    assert facts(model)["flops_part"] == least + attention


@pytest.mark.parametrize(
    ("name", "cache", "why"),
    [
        ("controlnet", "deepcache", "looks for a concatenation"),
        ("dit", "deepcache", "looks for a concatenation"),
        ("flux", "deepcache", "looks for a concatenation"),
        ("flux2", "deepcache", "looks for a concatenation"),
        ("unet", "first_block", "looks for a value that .*'deepcache' is for U-Nets"),
        ("autoencoder", "deepcache", "no argument is a time"),
        ("scale_shift", {"kind": "deepcache", "branch": 6}, "branch must be below 4.*got 6"),
    ],
)
def test_where_there_is_no_place_to_cut_steps_are_whole_and_the_report_says_why(name, cache, why):
    model, inputs = made(name)
    plain = compiler.compile(copy.deepcopy(model))
    compiler.compile(model, cache=cache)
    with torch.no_grad():
        for step in range(2):
            a, b = tensors(model(**inputs(step))), tensors(plain(**inputs(step)))
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    kind = facts(model)["kind"]
    text = str(compiler.report(model))
    assert re.search(why, facts(model)["why_not"])
    assert f"{kind}: all steps are whole: {facts(model)['why_not']}" in text


class Blocks(nn.Module):
    """A stack of layers; what they give is added outside of them."""

    def __init__(self, count: int, broken: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))
        self.broken = broken

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.broken:
            torch._dynamo.graph_break()
        total = x
        for layer in self.layers:
            x = x + layer(x) * t
            total = total + x
        return total


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Blocks(1), "looks for two or more blocks in lists of modules .* and found 1"),
        (Blocks(3), "looks for a value that the first block adds to"),
        (Blocks(3, broken=True), "captured in pieces"),
    ],
)
def test_models_without_blocks_and_in_pieces(model, why):
    model = model.eval().requires_grad_(False)
    compiler.compile(model, cache="first_block")
    x = torch.randn(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, torch.tensor(3.0)), model._call_impl(x, torch.tensor(3.0))
        )
    for graph in compiler.report(model).graphs:
        assert re.search(why, graph.cache["why_not"])


def test_calls_of_the_models_own_code_say_that_they_are_not_cached():
    model, run, _ = cached("unet")
    model.train()
    results(model, run[:1])
    text = str(compiler.report(model))
    assert "ran as it is 1 times, without deepcache: the model is in training mode" in text


@pytest.mark.parametrize("name", ["unet", pytest.param("sdxl", marks=LONG), "dit", "flux"])
def test_through_recorded_programs(name):
    model, run, _ = cached(name)
    right = results(model, run)
    model, run, _ = cached(name)
    recorder = Again()
    pool = model._compiled_call_impl.pool
    assert isinstance(pool, Pool)
    pool.recorder = recorder
    for _ in range(3):
        mine = results(model, run)
        for a, b in zip(mine, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    (graph,) = compiler.report(model).graphs
    pieces = {"step": 2, "part": 14}
    if name in TRANSFORMERS:
        pieces = {"head": 17, "middle": 2, "tail": 17}
    replays = {piece: graph.cuda_graphs[piece]["replays"] for piece in pieces}
    assert replays == pieces
    assert all(graph.cuda_graphs[piece]["recordings"] == 1 for piece in pieces)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unet", {"freeze": True}),
        ("zoo_dit", {"quantize": "int8"}),
        ("zoo_dit", {"freeze": True, "quantize": "int8"}),
    ],
    ids=str,
)
def test_with_packed_and_quantised_weights(name, options, monkeypatch):
    model, inputs = made(name)
    model = model.to(torch.bfloat16)
    run = steps(inputs, torch.bfloat16)
    right = results(compiler.compile(copy.deepcopy(model), **options), run)
    kind = "deepcache" if name in UNETS else "first_block"
    often = {"interval": 1} if name in UNETS else {"threshold": 0}
    whole = compiler.compile(copy.deepcopy(model), cache={"kind": kind, **often}, **options)
    assert all(torch.equal(a, b) for a, b in zip(results(whole, run), right, strict=True))
    seldom = {"interval": 9} if name in UNETS else {"threshold": 1e6}
    compiler.compile(model, cache={"kind": kind, **seldom}, **options)
    # The same step again, in part: what is kept is exact.
    monkeypatch.setattr(step_cache.StepCache, "_why_whole", lambda self, run, begins: not run.kept)
    first, second = results(model, run[:1] * 2)
    assert counts(model) == (1, 1)
    if name in UNETS:
        assert torch.equal(first, second)
    else:  # but for the rounding of first + (last - first)
        assert float((second - first).norm() / first.norm()) <= torch.finfo(torch.bfloat16).eps


def test_nothing_is_kept_after_uncompiling_and_clearing():
    model, run, _ = cached("unet")
    results(model, run[:2])
    (entry,) = model._compiled_call_impl._entries.values()
    (runner,) = entry.runners
    assert runner.cache.nbytes() > 0
    runner.clear()
    assert runner.cache.nbytes() == 0
    results(model, run[2:4])
    assert counts(model) == (2, 2)


def test_the_number_of_runs_kept_is_bounded():
    model, run, _ = cached("unet")
    for number in range(step_cache.RUNS + 5):
        text = torch.full((2, 7, 32), float(number))
        results(model, [{**run[0], "encoder_hidden_states": text}])
    (entry,) = model._compiled_call_impl._entries.values()
    assert len(entry.runners[0].cache._runs) == step_cache.RUNS


@pytest.mark.parametrize("kind", ["deepcache", "first_block"])
def test_a_trajectory_deviates_less_where_more_is_computed(kind):
    """The model is trained (digits) for the first-block cache, and has random weights for the
    other. PSNR of the last state against the one without a cache."""
    found = []
    settings = [{"interval": n} for n in (1, 2, 4)]
    if kind == "first_block":
        settings = [{"threshold": n} for n in (0, 0.05, 0.5)]
    for more in settings:
        model, inputs = made("unet" if kind == "deepcache" else "zoo_dit")
        plain = compiler.compile(copy.deepcopy(model))
        compiler.compile(model, cache={"kind": kind, **more})
        found.append(psnr(trajectory(model, inputs), trajectory(plain, inputs)))
        whole, part = counts(model)
        assert whole + part == 20
        assert bool(part) == math.isfinite(found[-1])
    assert found[0] == math.inf
    assert found[1] > found[2]


def trajectory(model: nn.Module, inputs: Callable[[int], dict[str, Any]]) -> Tensor:
    """The last state of 20 steps of DDIM."""
    values = inputs(0)
    if hasattr(model, "sampling"):
        cond = {"y": torch.arange(4)}
        return fastdiff.sample(model, (4, 1, 8, 8), solver="ddim", steps=20, seed=0, cond=cond)
    text = {"encoder_hidden_states": values["encoder_hidden_states"]}
    kind = {"schedule": "scaled_linear", "prediction": "eps", "solver": "ddim"}
    shape = values["sample"].shape
    return fastdiff.sample(model, shape, steps=20, seed=0, model_kwargs=text, **kind)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("tea", "cache must be None, one of deepcache, first_block, or .* got 'tea'"),
        (3, "cache must be None, one of .* got 3"),
        ({"interval": 3}, "as 'kind', got {'interval': 3}"),
        ({"kind": "deepcache", "threshold": 0.1}, "for deepcache, got 'threshold'"),
        ({"kind": "first_block", "interval": 2}, "for first_block, got 'interval'"),
        ({"kind": "deepcache", "intervall": 2}, "interval, branch, first, .*got 'intervall'"),
        ({"kind": "deepcache", "interval": 0}, r"cache\['interval'\] must be .* least 1, got 0"),
        ({"kind": "deepcache", "branch": -1}, r"cache\['branch'\] must be .* least 0, got -1"),
        ({"kind": "deepcache", "first": 0}, r"cache\['first'\] must be .* least 1, got 0"),
        ({"kind": "deepcache", "last": 1}, r"cache\['steps'\] must be the number .* got None"),
        ({"kind": "deepcache", "steps": 2.5}, r"cache\['steps'\] must be .* got 2.5"),
        ({"kind": "first_block", "threshold": -1}, r"cache\['threshold'\] must .* got -1"),
        ({"kind": "first_block", "threshold": math.nan}, r"cache\['threshold'\] must .* got nan"),
        ({"kind": "first_block", "measure": 1}, r"cache\['measure'\] must be True or False, got 1"),
    ],
)
def test_bad_options_are_refused(cache, message):
    with pytest.raises((ValueError, TypeError), match=message):
        compiler.compile(nn.Linear(2, 2), cache=cache)
