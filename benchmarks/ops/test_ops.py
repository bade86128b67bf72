"""Every op on the shapes of real models, beside plain PyTorch and beside a copy.

Per shape and dtype, taking turns: "copy" (as many bytes, half of them read and half written: the
limit), "eager" (the plain PyTorch calls the op replaces), "compile" (the same through
torch.compile, with --with-compile) and every implementation of the op that runs on this device,
called through the public op. Nothing is timed before its result was compared with float64. On a
GPU: CUDA events and a cold L2.

x best is the speed-up against the fastest of the baselines that were measured.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from limits import copy_bytes, copy_of
from timing import Timing, interleaved

from fastdiff.ops import OPS, Op
from fastdiff.ops._contract import Call, Example
from fastdiff.testing import assert_within_2x

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    pytest.param(op, example, id=f"{op.name}-{example.name}")
    for op in OPS
    for example in op.examples
]
SECONDS = 3.0  # per case, shared by its variants
QUICK_SECONDS = 0.2
QUICK_ELEMENTS = 1 << 21


def gate(op: Op, call: Call, results: dict[str, torch.Tensor]) -> None:
    """AssertionError for a result that may not be timed."""
    exact = call.double()
    oracle = op.reference(*exact.args, **exact.kwargs)
    torch_result = op.reference(*call.args, **call.kwargs)
    for name, result in results.items():
        assert_within_2x(result, oracle, torch_result, what=name)


def describe(
    timings: dict[str, Timing], moved: int, copied: int, flops: int, baselines: list[str]
) -> dict[str, dict[str, float]]:
    """The columns of each variant; a variant's own bytes count, not what it really moved."""
    limit = copied / timings["copy"].median
    best = min(timings[name].median for name in baselines)
    variants = {}
    for name, timing in timings.items():
        rate = (copied if name == "copy" else moved) / timing.median
        variants[name] = {
            "us": timing.median * 1e6,
            "spread": timing.spread,
            "rounds": len(timing.seconds),
            "gb_per_s": rate / 1e9,
            "gflop_per_s": 0.0 if name == "copy" else flops / timing.median / 1e9,
            "percent_of_copy": 100 * rate / limit,
            "times_eager": timings["eager"].median / timing.median,
        }
        if name not in ("copy", *baselines):
            variants[name]["times_best_baseline"] = best / timing.median
    return variants


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "example"), CASES)
@torch.no_grad()
def test_op(
    op: Op,
    example: Example,
    device: str,
    dtype: torch.dtype,
    quick: bool,
    pytestconfig: pytest.Config,
    benchmark: Any,
    record: Any,
) -> None:
    call = example.make(device, dtype)
    x = call.args[0]
    if quick and x.numel() > QUICK_ELEMENTS:
        pytest.skip("--quick: small shapes only")
    functions: dict[str, Any] = {"eager": lambda: op.pattern(*call.args, **call.kwargs)}
    if pytestconfig.getoption("--with-compile"):
        compiled = torch.compile(op.pattern, fullgraph=True, dynamic=False)
        functions["compile"] = lambda: compiled(*call.args, **call.kwargs)
    baselines = list(functions)
    for impl in op.implementations:
        if not impl.supports(*call.args, **call.kwargs):
            functions[impl.name] = lambda name=impl.name: op(*call.args, **call.kwargs, impl=name)
    if len(functions) == len(baselines):
        pytest.skip(f"no implementation of {op.name} besides the reference runs here")
    gate(op, call, {name: function() for name, function in functions.items()})
    moved = op.bytes_moved(*call.args, **call.kwargs)
    source = torch.zeros(moved // 2, dtype=torch.int8, device=device)
    functions["copy"] = copy_of(source)

    timings: dict[str, Timing] = {}

    def measure() -> None:
        budget = QUICK_SECONDS if quick else SECONDS
        timings.update(interleaved(functions, x.device, budget))

    benchmark.group = op.name
    benchmark.pedantic(measure, rounds=1, iterations=1)  # the rounds are inside, variants in turns
    flops = op.flops(*call.args, **call.kwargs)
    variants = describe(timings, moved, copy_bytes(source), flops, baselines)
    row = {
        "name": f"{op.name} {example.name} {str(dtype).removeprefix('torch.')}",
        "op": op.name,
        "example": example.name,
        "shape": list(x.shape),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": moved,
        "flops": flops,
        "variants": variants,
    }
    benchmark.extra_info.update(row)
    record(device, row)
