"""One call of an op: every way to compute it, compared with float64, then timed in turns.

Variants: "eager" (the plain PyTorch calls the op replaces), "compile ..." (the same through
torch.compile), peers (`peers.py`), every implementation of the op that runs there, called through
the public op, and "copy" (as many bytes, half of them read and half written). Nothing is timed
before its result was compared with float64: a wrong implementation of ours fails the benchmark, a
wrong peer is left out and reported.

The limit is the slower of that copy and of a matrix product of as many operations, both measured in
the same run. On a GPU: a cold L2, and replays of CUDA graphs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from limits import copy_bytes, copy_of, matmul_rate
from peers import Function, Named, compiled, converted, peers, shaped
from timing import Timing, graphed, interleaved

from fastdiff.ops import Op
from fastdiff.ops._contract import Call, Result, outputs
from fastdiff.testing import assert_within_2x

OWN_GRAPHS = "compile max-autotune"  # Inductor's graphs, which cannot be captured once more


@dataclass
class Measured:
    """facts: of the row. columns: of each variant. ours: the implementations."""

    facts: dict[str, Any]
    timings: dict[str, Timing]
    columns: dict[str, dict[str, float]]
    ours: list[str] = field(default_factory=list)


class Gate:
    """What decides whether a result may be timed."""

    def __init__(self, op: Op, call: Call) -> None:
        exact = call.double()
        self._oracle = outputs(op.reference(*exact.args, **exact.kwargs))
        self.reference = outputs(op.reference(*call.args, **call.kwargs))
        self._exact = op.numerics == "exact"

    def check(self, name: str, result: Result, ours: bool = False) -> None:
        """AssertionError for a result that may not be timed."""
        found = outputs(result)
        if len(found) != len(self.reference):
            raise AssertionError(
                f"{name} must give {len(self.reference)} tensors, got {len(found)}"
            )
        for mine, right, theirs in zip(found, self._oracle, self.reference, strict=True):
            assert_within_2x(mine, right, theirs, what=name)
            if ours and self._exact and not torch.equal(mine, theirs):
                raise AssertionError(f"{name} must have the reference's bits, got others")


def left_out(
    gate: Gate, candidates: Iterable[Named], functions: dict[str, Function]
) -> dict[str, str]:
    """Adds the peers that run and are equal to ``functions``; the others with their reasons."""
    reasons = {}
    for name, build in candidates:
        try:
            function = build()
            gate.check(name, shaped(function(), gate.reference))
        except AssertionError as error:
            reasons[name] = f"not equal: {error}"
        except Exception as error:  # whatever somebody else's package raises
            reasons[name] = f"cannot run: {_first_line(error)}"
        else:
            functions[name] = function
    return reasons


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _graphs(
    gate: Gate, functions: dict[str, Function], ours: list[str]
) -> tuple[dict[str, Function], dict[str, str]]:
    """(replays where a function can be captured, else the function; why not)."""
    replays, reasons = {}, {}
    for name, function in functions.items():
        replays[name] = function
        if name == OWN_GRAPHS:
            continue
        try:
            replay, result = graphed(function)
        except RuntimeError as error:
            reasons[name] = _first_line(error)
            continue
        if name in ours:
            gate.check(f"{name} replayed", result, True)
        replays[name] = replay
    return replays, reasons


def describe(
    timings: dict[str, Timing], facts: dict[str, Any], copied: int, others: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """The columns of each variant; the call's own bytes count, not what a variant really moved.

    others: the peers by the column of the fastest of them; the rest, but copy and eager, is ours.
    """
    copy = copied / timings["copy"].median
    limit = facts["limit"]["seconds"]
    rivals = ["eager", *itertools.chain(*others.values())]
    columns = {}
    for name, timing in timings.items():
        moved = copied if name == "copy" else facts["bytes"]
        rate = moved / timing.median
        found = columns[name] = {"gb_per_s": rate / 1e9, "percent_of_copy": 100 * rate / copy}
        if name == "copy":
            continue
        found |= {
            "gflop_per_s": facts["flops"] / timing.median / 1e9,
            "percent_of_limit": 100 * limit / timing.median,
            "times_eager": timings["eager"].median / timing.median,
        }
        if name in rivals:
            continue
        for column, names in (*others.items(), ("times_best_baseline", rivals)):
            if names:
                best = min(timings[rival].median for rival in names)
                found[column] = best / timing.median
    return columns


def measure(
    op: Op, call: Call, budget: float, with_compile: bool, matmul_side: int | None = None
) -> Measured | None:
    """None where only the reference runs; AssertionError where an implementation is wrong.

    budget: seconds, shared by the variants. with_compile: torch.compile too and, on a CPU, the
    runtimes that convert first. matmul_side: of the limit's product; None for the usual.
    """
    device = call.tensors()[0].device
    ours: dict[str, Function] = {}
    for impl in op.implementations:
        if not impl.supports(*call.args, **call.kwargs):
            ours[impl.name] = lambda name=impl.name: op(*call.args, **call.kwargs, impl=name)
    if not ours:
        return None
    gate = Gate(op, call)
    for name, function in ours.items():
        gate.check(name, function(), ours=True)

    functions: dict[str, Function] = {"eager": lambda: op.pattern(*call.args, **call.kwargs)}
    facts: dict[str, Any] = {
        "shape": list(call.args[0].shape),
        "dtype": str(call.args[0].dtype).removeprefix("torch."),
        "bytes": op.bytes_moved(*call.args, **call.kwargs),
        "flops": op.flops(*call.args, **call.kwargs),
        "auto": _chosen(op, call),
        "left_out": {},
    }
    others: dict[str, list[str]] = {"times_best_peer": [], "times_compile": []}
    candidates: dict[str, Iterable[Named]] = {"times_best_peer": peers(op, call)}
    if with_compile:
        candidates["times_compile"] = compiled(op, call)
    for column, named in candidates.items():
        before = set(functions)
        facts["left_out"] |= left_out(gate, named, functions)
        others[column] = [name for name in functions if name not in before]
    try:  # eager is what a model does, and timed in any case
        gate.check("eager", functions["eager"]())
    except AssertionError as error:
        facts["eager_not_equal"] = str(error)

    functions |= ours
    source = torch.zeros(facts["bytes"] // 2, dtype=torch.int8, device=device)
    functions["copy"] = copy_of(source)
    if device.type == "cuda":
        functions, facts["not_captured"] = _graphs(gate, functions, list(ours))
    matmul = matmul_rate(device.type, call.args[0].dtype, min(budget, 1.0), matmul_side)
    timings = interleaved(functions, device, budget)
    if with_compile and device.type == "cpu":
        # Apart: these runtimes have threads of their own, which wait by spinning and would take
        # the processor from the variants that come next.
        functions = {}
        facts["left_out"] |= left_out(gate, converted(op, call), functions)
        others["times_best_peer"] += functions
        timings |= interleaved(functions, device, budget / 2) if functions else {}
    copied = copy_bytes(source)
    by_matmul = facts["flops"] / matmul
    facts["limit"] = {
        "copy_gb_per_s": copied / timings["copy"].median / 1e9,
        "matmul_gflop_per_s": matmul / 1e9,
        "seconds": max(timings["copy"].median, by_matmul),
        "by": "matmul" if by_matmul > timings["copy"].median else "copy",
    }
    return Measured(facts, timings, describe(timings, facts, copied, others), list(ours))


def _chosen(op: Op, call: Call) -> str:
    """The implementation that ``impl="auto"`` takes."""
    run = op.choose("auto", *call.args, **call.kwargs)
    return next((impl.name for impl in op.implementations if impl.run is run), "reference")
