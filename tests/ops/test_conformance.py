"""Every op against its contract: every usable implementation, dtype, layout, awkward shape."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff
from fastdiff.ops import OPS, Op
from fastdiff.ops._contract import Call, Example, outputs
from fastdiff.testing import assert_within_2x, poisoned_empty

ROOT = Path(__file__).parents[2]
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
SAMPLES = [
    pytest.param(op, sample, id=f"{op.name}-{sample.name}") for op in OPS for sample in op.samples
]
EVERY_OP = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


def usable(op: Op, call: Call) -> list[str]:
    """The implementations that take this call on this machine; "auto" always does."""
    names = [n for n in op.implementation_names() if not op.why_not(n, *call.args, **call.kwargs)]
    return ["auto", *names]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_within_twice_torchs_error(
    op: Op, sample: Example, dtype: torch.dtype, device: str
) -> None:
    call = sample.make(device, dtype)
    before = [tensor.clone() for tensor in call.tensors()]
    exact = call.double()
    oracle = outputs(op.reference(*exact.args, **exact.kwargs))
    torch_result = outputs(op.reference(*call.args, **call.kwargs))
    for impl in usable(op, call):
        with poisoned_empty():
            result = outputs(op(*call.args, **call.kwargs, impl=impl))
        for mine, right, theirs in zip(result, oracle, torch_result, strict=True):
            assert_within_2x(mine, right, theirs, what=impl)
            assert mine.stride() == theirs.stride(), impl
            if op.numerics == "exact":
                torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        for tensor, copy in zip(call.tensors(), before, strict=True):
            assert torch.equal(tensor, copy), f"{impl} changed an input"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_nan_is_not_hidden(op: Op, sample: Example, device: str) -> None:
    call = sample.make(device, torch.float32)
    if not call.args[0].numel():
        pytest.skip("no elements")
    x = call.args[0]
    x[(0,) * x.dim()] = float("nan")
    expected = [value.isnan() for value in outputs(op.reference(*call.args, **call.kwargs))]
    for impl in usable(op, call):
        result = outputs(op(*call.args, **call.kwargs, impl=impl))
        for mine, nan in zip(result, expected, strict=True):
            assert torch.equal(mine.isnan(), nan), impl


@EVERY_OP
@pytest.mark.parametrize("device", DEVICES)
def test_self_check_reports_every_implementation(op: Op, device: str) -> None:
    outcomes = op.self_check(device)
    assert set(outcomes) == set(op.implementation_names())
    assert all(o.startswith(("ok", "not usable: ")) for o in outcomes.values()), outcomes
    assert outcomes["reference"].startswith("ok")


@EVERY_OP
def test_opcheck(op: Op) -> None:
    overload = getattr(torch.ops.fastdiff, op.name).default
    for index in (0, len(op.samples) // 2, len(op.samples) - 3):
        call = op.samples[index].make("cpu", torch.float32)
        call = call.map_tensors(lambda t: t.requires_grad_(t.is_floating_point()))
        torch.library.opcheck(overload, call.args, call.kwargs)


@EVERY_OP
def test_gradients_are_the_references(op: Op) -> None:
    for sample in op.samples[:3]:
        call = sample.make("cpu", torch.float64)
        mine, theirs = (
            call.map_tensors(lambda t: t.clone().requires_grad_(t.is_floating_point()))
            for _ in range(2)
        )
        result = outputs(op(*mine.args, **mine.kwargs))
        expected = outputs(op.reference(*theirs.args, **theirs.kwargs))
        generator = torch.Generator().manual_seed(3)
        seeds = [torch.randn(r.shape, generator=generator).to(r) for r in result]
        for values in (result, expected):
            torch.autograd.backward(values, seeds)
        for a, b in zip(mine.tensors(), theirs.tensors(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)


@EVERY_OP
def test_public_function_compiles_without_graph_breaks(op: Op) -> None:
    torch.compiler.reset()  # every op compiles the same code object, which has a limit
    function = getattr(fastdiff.ops, op.name)
    torch._dynamo.reset()  # the limit on recompilations counts for the code below, not for an op

    def doubled(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        return [value * 2 for value in outputs(function(*args, **kwargs))]

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for sample in op.samples[:4]:
        call = sample.make("cpu", torch.float32)
        expected = doubled(*call.args, **call.kwargs)
        result = compiled(*call.args, **call.kwargs)
        for mine, value in zip(result, expected, strict=True):
            assert torch.equal(mine, value)


@EVERY_OP
def test_named_implementation_is_an_error_where_it_cannot_run(op: Op) -> None:
    refused = 0
    for dtype in (torch.float32, torch.float64):
        call = op.samples[0].make("cpu", dtype)
        for impl in op.implementations:
            if not op.why_not(impl.name, *call.args, **call.kwargs):
                continue
            with pytest.raises(RuntimeError, match=f"{op.name}: impl='{impl.name}' cannot run: "):
                op(*call.args, **call.kwargs, impl=impl.name)
            refused += 1
        with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
            op(*call.args, **call.kwargs, impl="fastest")
    assert refused or not op.implementations


@EVERY_OP
def test_one_name_finds_the_op_everywhere(op: Op) -> None:
    assert (ROOT / "kernels" / f"{op.name}.py").is_file()
    assert (ROOT / "tests" / "ops" / f"test_{op.name}.py").is_file()
    module = importlib.import_module(f"fastdiff.ops.{op.name}")
    assert op.name in module.__dict__
    assert callable(getattr(fastdiff.ops, op.name))
    assert hasattr(torch.ops.fastdiff, op.name)


@EVERY_OP
def test_examples_count_their_work(op: Op) -> None:
    names = [example.name for example in op.examples]
    assert len(set(names)) == len(names)
    moved = []
    for example in op.examples:
        call = example.make("cpu", torch.bfloat16)
        op.check(*call.args, **call.kwargs)
        with FakeTensorMode() as mode:
            fakes = call.map_tensors(mode.from_tensor)
            result = outputs(op(*fakes.args, **fakes.kwargs))
        moved.append(op.bytes_moved(*call.args, **call.kwargs))
        written = sum(value.numel() * value.element_size() for value in result)
        assert moved[-1] > written, "the result and some input"
        assert op.flops(*call.args, **call.kwargs) > result[0].numel()
    assert moved[0] == min(moved), "self_check runs the first example: it must be the smallest"


@EVERY_OP
def test_pattern_is_the_reference(op: Op) -> None:
    """In float64, where the reference's care for dtypes changes nothing."""
    for sample in op.samples:
        call = sample.make("cpu", torch.float32).double()
        expected = outputs(op.reference(*call.args, **call.kwargs))
        result = outputs(op.pattern(*call.args, **call.kwargs))
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
@EVERY_OP
def test_examples_on_a_gpu(op: Op) -> None:
    """The shapes of real models, which take every way through the launch policy."""
    for example in op.examples:
        for dtype in (torch.bfloat16, torch.float32):
            call = example.make("cuda", dtype)
            exact = call.double()
            oracle = outputs(op.reference(*exact.args, **exact.kwargs))
            torch_result = outputs(op.reference(*call.args, **call.kwargs))
            for impl in usable(op, call):
                result = outputs(op(*call.args, **call.kwargs, impl=impl))
                for mine, right, theirs in zip(result, oracle, torch_result, strict=True):
                    assert_within_2x(mine, right, theirs, what=f"{example.name} {impl}")


@EVERY_OP
@pytest.mark.gpu
def test_cuda_graph_replays(op: Op) -> None:
    call = op.examples[0].make("cuda", torch.bfloat16)
    eager = outputs(op(*call.args, **call.kwargs))  # also compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(op(*call.args, **call.kwargs))
    for value in captured:
        value.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(captured, eager, strict=True))
