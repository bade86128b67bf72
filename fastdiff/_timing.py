"""How everything here is timed: variants take turns, so that drift hits all alike; medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Function = Callable[[], object]

# Written between two timed calls, so that no call finds its input in L2: several times the largest
# L2 (126 MB on B200), and long enough (0.2 ms and more) for the host to queue the call meanwhile.
FLUSH_BYTES = 1 << 30
MIN_ROUNDS = 10
MAX_ROUNDS = 300


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a fraction of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def _host_seconds(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


class _ColdDevice:
    """Times one call on the GPU by events, with a cold L2; the host never waits in between."""

    def __init__(self, device: torch.device) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, function: Function) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        begin.record()
        function()
        end.record()
        return begin, end


def interleaved(
    functions: Mapping[str, Function],
    device: torch.device,
    budget: float,
    least: int = MIN_ROUNDS,
) -> dict[str, Timing]:
    """Times every function, in turns, for about ``budget`` seconds but at least ``least`` rounds.

    On a GPU: CUDA events around each call and a cold L2. On a CPU: the wall clock and whatever the
    other variants left in the caches. Every function runs twice before the first timed round.
    """
    for function in functions.values():
        function()
    if device.type == "cuda":
        return _interleaved_cuda(functions, device, budget, least)
    pilot = sum(_host_seconds(function) for function in functions.values())
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(_rounds(budget, pilot, least)):
        for name, function in functions.items():
            samples[name].append(_host_seconds(function))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _interleaved_cuda(
    functions: Mapping[str, Function], device: torch.device, budget: float, least: int
) -> dict[str, Timing]:
    timed = _ColdDevice(device)

    def one_round() -> dict[str, tuple[torch.cuda.Event, torch.cuda.Event]]:
        return {name: timed(function) for name, function in functions.items()}

    torch.cuda.synchronize(device)
    start = time.perf_counter()
    one_round()
    torch.cuda.synchronize(device)
    rounds = [one_round() for _ in range(_rounds(budget, time.perf_counter() - start, least))]
    torch.cuda.synchronize(device)
    return {
        name: Timing(
            tuple(begin.elapsed_time(end) / 1e3 for begin, end in (r[name] for r in rounds))
        )
        for name in functions
    }


def _rounds(budget: float, one_round: float, least: int) -> int:
    return max(least, min(MAX_ROUNDS, int(budget / max(one_round, 1e-9))))
