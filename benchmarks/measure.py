"""One call of an op, measured beside plain PyTorch and beside a copy.

Taking turns: "copy" (as many bytes, half of them read and half written: the limit), "eager" (the
plain PyTorch calls the op replaces), "compile" (the same through torch.compile, where asked for)
and every implementation of the op that runs there, called through the public op. Nothing is timed
before its result was compared with float64.
"""

from __future__ import annotations

from typing import Any

import torch
from limits import copy_bytes, copy_of
from timing import Timing, interleaved

from fastdiff.ops import Op
from fastdiff.ops._contract import Call, Result, outputs
from fastdiff.testing import assert_within_2x


def gate(op: Op, call: Call, results: dict[str, Result]) -> None:
    """AssertionError for a result that may not be timed."""
    exact = call.double()
    oracle = outputs(op.reference(*exact.args, **exact.kwargs))
    torch_result = outputs(op.reference(*call.args, **call.kwargs))
    for name, result in results.items():
        for mine, right, theirs in zip(outputs(result), oracle, torch_result, strict=True):
            assert_within_2x(mine, right, theirs, what=name)


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


def measure(op: Op, call: Call, budget: float, with_compile: bool) -> dict[str, Any] | None:
    """{"shape", "dtype", "bytes", "flops", "variants"}; None where only the reference runs.

    budget: seconds, shared by the variants.
    """
    x = call.args[0]
    functions: dict[str, Any] = {"eager": lambda: op.pattern(*call.args, **call.kwargs)}
    if with_compile:
        compiled = torch.compile(op.pattern, fullgraph=True, dynamic=False)
        functions["compile"] = lambda: compiled(*call.args, **call.kwargs)
    baselines = list(functions)
    for impl in op.implementations:
        if not impl.supports(*call.args, **call.kwargs):
            functions[impl.name] = lambda name=impl.name: op(*call.args, **call.kwargs, impl=name)
    if len(functions) == len(baselines):
        return None
    gate(op, call, {name: function() for name, function in functions.items()})
    moved = op.bytes_moved(*call.args, **call.kwargs)
    source = torch.zeros(moved // 2, dtype=torch.int8, device=x.device)
    functions["copy"] = copy_of(source)
    timings = interleaved(functions, x.device, budget)
    flops = op.flops(*call.args, **call.kwargs)
    return {
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "bytes": moved,
        "flops": flops,
        "variants": describe(timings, moved, copy_bytes(source), flops, baselines),
    }
