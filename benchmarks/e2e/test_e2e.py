"""Whole sampling runs of public models, ours beside what a user would take instead.

``-m gpu``: the public sizes in bf16 with random weights, batches of 1, 4 and 16. Without a GPU the
same suite on small models and, with every variant, on SD1.5's U-Net of half the widths; with
``--quick`` three small models and fewer variants. One row for each variant of a workload and a
batch; the order of the tests is that of their worth, so that a short ``--budget`` has the most.

A variant is timed after its gate only (`runs.py`). ``percent_of_limit``: the time its products
take at the rate that a square product reached in this run, over its time.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

import engines
import runs
import workloads
from budget import Budget
from limits import matmul_rate
from pairs import DTYPE, Pair
from timing import Timing
from variants import Variant, variants_for, why_not
from workloads import Workload

SECONDS = {"cuda": 6.0, "cpu": 6.0}  # of timed runs, for each variant
SMALL_SECONDS = 0.3
# For the estimates alone: FLOP/s that a run reaches, seconds to capture and to compile.
REACHED, IN_FLOAT32 = {"cuda": 3e14, "cpu": 4e11}, {"cuda": 3e13, "cpu": 1e11}
CAPTURE, COMPILE = {"cuda": 15.0, "cpu": 8.0}, {"cuda": 90.0, "cpu": 60.0}
SMALL_TIERS = (0, 1)
# Of the small models: a U-Net, a transformer and a decoder.
QUICK = ("SD1.5 small", "SD3-medium small", "VAE decode small")
# (tier of the variants, batch), by worth.
PASSES = ((0, 1), (1, 1), (2, 1), (0, 4), (4, 1), (0, 16), (5, 1))


@dataclasses.dataclass(frozen=True)
class Case:
    """The variants of one tier, of one workload at one batch."""

    workload: Workload
    batch: int
    tier: int
    device: str

    @property
    def name(self) -> str:
        return f"{self.workload.name} batch {self.batch}"

    def variants(self) -> list[Variant]:
        return variants_for(self.workload, self.device, self.tier)

    def seconds(self, variant: Variant, flops: float, wanted: float) -> float:
        """About how long a variant takes, with its gate."""
        run = flops / REACHED[self.device]
        ready = 0.0 if variant.by == "eager" else CAPTURE[self.device]
        if variant.slow or variant.by in engines.CONVERTERS:
            ready = COMPILE[self.device]
        return ready + 3 * run + max(wanted, runs.least_runs(run) * run)

    def gate_seconds(self) -> float:
        """About how long the models' making and the gate's float32 take."""
        steps = runs.gate_steps(self.workload, self.batch) or 1
        call = (self.workload.call_tflop or 0.0) * 1e12
        return CAPTURE[self.device] + steps * self.batch * call / IN_FLOAT32[self.device]


def cases() -> Iterator[Any]:
    for tier, batch in PASSES:
        for work in workloads.GPU:
            case = Case(work, batch, tier, "cuda")
            if case.variants():
                yield pytest.param(case, id=f"{case.name}-{tier}", marks=pytest.mark.gpu)
    for tier in sorted({tier for tier, _ in PASSES}):
        for work in workloads.CPU:
            case = Case(work, 1, tier, "cpu")
            if case.variants() and (tier in SMALL_TIERS or work not in workloads.SMALL):
                yield pytest.param(case, id=f"{case.name}-{tier}-cpu")


class Store:
    """The pair of the last workload, and every gate: a pass builds one model after the other."""

    def __init__(self) -> None:
        self._key: Any = None
        self._pair: Pair | None = None
        self._gates: dict[str, tuple[runs.Gate, float, float]] = {}

    def pair(self, case: Case) -> Pair:
        key = (case.name, case.device)
        if key != self._key:
            self._key = self._pair = None
            gc.collect()
            self._pair = Pair(case.workload, case.batch, case.device, DTYPE)
            self._pair.to(DTYPE)
            self._key = key
        assert self._pair is not None
        return self._pair

    def gate(self, case: Case) -> tuple[runs.Gate, float, float]:
        """(the gate, FLOPs of a call, FLOPs of the decoder at the end)."""
        if case.name not in self._gates:
            pair = self.pair(case)
            with torch.no_grad():
                made = runs.make_gate(pair)
                self._gates[case.name] = made, pair.flops(), pair.decode_flops()
        return self._gates[case.name]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    made = Store()
    yield made
    made.__init__()  # type: ignore[misc]  # models go before other benchmarks begin
    gc.collect()


def work_of(case: Case) -> float:
    """FLOPs of a run as far as the targets' counts tell, for the estimate before the first run."""
    call = (case.workload.call_tflop or 0.0) * 1e12
    return case.batch * call * max(1, case.workload.steps)


def check_flops(case: Case, call: float) -> None:
    """What is measured is what the targets speak of: as many operations, within one percent."""
    if case.workload.call_tflop is not None:
        ratio = call / (case.batch * case.workload.call_tflop * 1e12)
        assert 0.99 < ratio < 1.01, f"{case.name}: {ratio:.3f} of the target's operations"


@pytest.mark.parametrize("case", cases())
def test_run(
    case: Case,
    store: Store,
    quick: bool,
    budget: Budget,
    resumed: Callable[[str, str], None],
    pytestconfig: pytest.Config,
    tmp_path: Path,
    benchmark: Any,
    record: Any,
) -> None:
    if quick and (case.workload.name not in QUICK or case.tier):
        pytest.skip("--quick: three small models, the first variants")
    if case.device == "cpu" and torch.cuda.is_available():
        pytest.skip("a GPU is here: its own sizes")
    with_compile = bool(pytestconfig.getoption("--with-compile"))
    small = case.workload in workloads.SMALL
    wanted = SMALL_SECONDS if small else SECONDS[case.device]
    left_out: dict[str, str] = {}
    todo = []
    for variant in case.variants():
        reason = why_not(variant, with_compile, case.device)
        try:
            resumed(case.device, f"{case.name}: {variant.name}")
        except pytest.skip.Exception as there:
            reason = str(there)
        if reason:
            left_out[variant.name] = reason
        else:
            todo.append(variant)
    if not todo:
        pytest.skip("; ".join(f"{name}: {why}" for name, why in left_out.items()))
    budget.need(case.gate_seconds() + case.seconds(todo[0], work_of(case), wanted))

    def measured() -> None:
        failed = []
        gate, call, decode = store.gate(case)
        pair = store.pair(case)
        check_flops(case, call)
        flops = call * max(1, case.workload.steps) + decode
        for number, variant in enumerate(todo):
            if reason := budget.why_not(case.seconds(variant, flops, wanted)):
                left_out[variant.name] = reason
                continue
            folder = tmp_path / str(number)
            warm = not small and not variant.slow
            try:
                found = runs.measure(variant, pair, gate, wanted, folder, warm)
            except Exception as error:  # the others are still worth measuring
                failed.append(f"{variant.name}: {type(error).__name__}: {error}")
                continue
            row, timings, columns = rows(case, variant, gate, found, flops, call)
            ours = [] if variant.peer else [variant.name]
            record(case.device, row, timings=timings, columns=columns, ours=ours)
        for name, reason in left_out.items():
            print(f"{case.name}: {name} left out: {reason}")
        if failed:
            pytest.fail("\n".join(failed), pytrace=False)

    benchmark.pedantic(measured, rounds=1)


def rows(
    case: Case, variant: Variant, gate: runs.Gate, found: dict[str, Any], flops: float, call: float
) -> tuple[dict[str, Any], dict[str, Timing], dict[str, dict[str, Any]]]:
    """(the row's facts, the timing of its one variant, that variant's columns)."""
    work = case.workload
    rate = matmul_rate(case.device, DTYPE, 1.0)
    seconds = found.pop("seconds_each")
    row = {
        "name": f"{case.name}: {variant.name}",
        "workload": case.name,
        "model": work.name,
        "size": work.size,
        "batch": case.batch,
        "steps": work.steps,
        "variant": variant.name,
        "waterfall": variant.waterfall,
        "changes_results": not variant.exact,
        "dtype": "bfloat16",
        "flops": flops,
        "flops_of_a_call": call,
        "target_tflop_of_a_call": work.call_tflop,
        "matmul_flop_per_s": rate,
        "gate_psnr_db": {"eager": gate.eager, "moved by half a picture": gate.moved},
    }
    limit = flops / rate
    columns = {
        **found,
        "gflop_per_s": flops / found["seconds"]["p50"] / 1e9,
        "percent_of_limit": 100 * limit / found["seconds"]["p50"],
    }
    return row, {variant.name: Timing(tuple(seconds))}, {variant.name: columns}
