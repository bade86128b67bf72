"""Running a step in part: ``cache=``, see ``fastdiff.compile``, and `cuts` for where it is cut.

What is kept belongs to one sampling run: to one thread and one condition (two prompts that take
turns have one each), known by identity as the results of the prompt's program are. A step is
computed whole when there is doubt.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.cuts import Cut
from fastdiff.compiler.fingerprint import Watch
from fastdiff.compiler.identity import SMALL, key_of, weight_key

RUNS = 8  # whose values are kept: prompts in use at once, times threads
MEASURED = 4096  # steps whose deviation is remembered, at most

BEGINS = "a run begins"
FIRST = "one of the first of a run"
LAST = "one of the last of a run"
INTERVAL = "the interval is over"
CHANGED = "the first block's residual has changed"
TWICE = "two calls at one time: two samples may take turns"
UNKNOWN = "a condition made under inference_mode, whose changes nothing shows"
ENDLESS = "'last' is given, and the length of the run is not known"
RECORDED = "part of a CUDA graph that is being captured"


@dataclass
class Run:
    """One sampling run. kept: the values of the last whole step, by name."""

    watch: Watch = field(default_factory=Watch)
    held: tuple[Any, ...] = ()  # so that no address comes twice
    time: Any = None
    weights: tuple[Any, ...] = ()
    steps: int = 0
    since: int = 0  # the number of the last whole step
    turns: bool = False  # samples may take turns: a time came twice
    moves: int = 0  # calls since then
    kept: dict[str, Tensor] = field(default_factory=dict)
    first: Tensor | None = None
    errors: deque[tuple[Tensor, Tensor]] = field(default_factory=lambda: deque(maxlen=MEASURED))


class StepCache:
    """Runs the programs of a `Cut`.

    run: program's name -> what computes it. token: gives an object that is another one in each
    sampling run, or None. length: gives the number of steps of a run, or None if it is not known.
    """

    def __init__(
        self,
        cut: Cut,
        run: Mapping[str, Callable[..., Any]],
        roles: Mapping[str, str],
        token: Callable[[], Any],
        length: Callable[[], int | None] | None = None,
    ) -> None:
        self.cut, self.options = cut, cut.options
        self._run, self._token, self._length = dict(run), token, length or (lambda: None)
        self._conditions = [name for name, role in roles.items() if role == "condition"]
        self._times = [name for name, role in roles.items() if role == "time"]
        self._weights = [name for name, role in roles.items() if role == "weights"]
        self._runs: OrderedDict[Any, Run] = OrderedDict()
        self._lock = threading.Lock()
        self._never = itertools.count()
        self.whole: Counter[str] = Counter()
        self.part = 0

    def __call__(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """The model's results; ``values``: of all placeholders, and the other programs' results."""
        run, why = self._place(values)
        step = self._deep if self.options.kind == "deepcache" else self._first
        results, why = step(values, run, why)
        with self._lock:
            if why:
                self.whole[why] += 1
            else:
                self.part += 1
        run.steps += 1
        return results

    def _deep(self, values: dict[str, Any], run: Run, why: str) -> tuple[tuple[Any, ...], str]:
        count = self.cut.results
        if not why and run.steps - run.since >= self.options.interval:
            why = INTERVAL
        if why:
            results = self._call("step", values)
            run.kept = dict(zip(self.cut.given, results[count:], strict=True))
            run.since = run.steps
            return results[:count], why
        results = self._call("part", values | run.kept)
        if self.options.measure:
            run.errors.append(deviation(results, self._call("step", values)[:count]))
        return results, ""

    def _first(self, values: dict[str, Any], run: Run, why: str) -> tuple[tuple[Any, ...], str]:
        cut = self.cut
        values = values | dict(
            zip(cut.programs["head"].outputs, self._call("head", values), strict=True)
        )
        new = values[cut.change]
        if not why and run.first is not None:
            change = float(relative_change(new, run.first))  # waits for the device
            why = "" if change < self.options.threshold else CHANGED
        measure = not why and self.options.measure
        if why or measure:
            ends = self._call("middle", values)
            whole = values | dict(zip(cut.given, ends, strict=True))
        if why:
            run.first = new
            run.kept = {
                name: end - values[base]
                for name, base, end in zip(cut.given, cut.bases, ends, strict=True)
            }
            return self._call("tail", whole), why
        given = {
            name: values[base] + run.kept[name]
            for name, base in zip(cut.given, cut.bases, strict=True)
        }
        results = self._call("tail", values | given)
        if measure:
            run.errors.append(deviation(results, self._call("tail", whole)))
        return results, ""

    def _call(self, name: str, values: Mapping[str, Any]) -> tuple[Any, ...]:
        inputs = self.cut.programs[name].inputs
        return tuple(self._run[name](*(values[i] for i in inputs)))

    def _place(self, values: Mapping[str, Any]) -> tuple[Run, str]:
        """(the run that a call belongs to, why it must be whole or "")."""
        given = [values[name] for name in self._conditions]
        conditions = tuple(key_of(value) for value in given)
        if any(isinstance(v, Tensor) and key_of(v) is None for v in given):
            return Run(), UNKNOWN
        token = self._token()
        time, moment = self._moment(values, token)
        if time is RECORDED:
            return Run(), RECORDED
        key = threading.get_ident(), conditions
        with self._lock:
            run = self._runs.setdefault(key, Run())
            self._runs.move_to_end(key)
            while len(self._runs) > RUNS:
                self._runs.popitem(last=False)
        weights = tuple(weight_key(values[name]) for name in self._weights)
        again = run.steps > 0 and time == run.time
        begins = run.watch.begins((), next(self._never), moment, token)
        begins = begins or weights != run.weights
        # Held, like what the kept results are of: their addresses are what they are known by.
        run.held = tuple(values[name] for name in (*self._conditions, *self._times))
        run.time, run.weights = time, weights
        if begins:
            run.steps, run.since, run.turns = 0, 0, False
            run.kept, run.first = {}, None
            run.errors.clear()
            run.moves = 0
        # One that came twice by itself (the second of PLMS) is over when the time has moved twice.
        run.moves = 0 if again else run.moves + 1
        run.turns = again or (run.turns and run.moves < 2)
        return run, self._why_whole(run, begins)

    def _why_whole(self, run: Run, begins: bool) -> str:
        if run.turns:
            return TWICE
        if begins or not run.kept:
            return BEGINS
        if run.steps < self.options.first:
            return FIRST
        if self.options.last:
            length = self.options.steps or self._length()
            if length is None:
                return ENDLESS
            if run.steps >= length - self.options.last:
                return LAST
        return ""

    def _moment(self, values: Mapping[str, Any], token: Any) -> tuple[Any, float | None]:
        """(what the times are known by, the first one's value where it is known)."""
        times = [values[name] for name in self._times]
        first = next((t for t in times if isinstance(t, Tensor) and t.numel()), None)
        if first is None:
            return tuple(times), None
        on_cpu = first.device.type == "cpu"
        if not on_cpu and token is not None:
            return tuple(key_of(t) for t in times), None
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            return RECORDED, None
        value = float(first.reshape(-1)[0])  # waits for the device, unless it is the CPU
        if on_cpu and first.numel() <= SMALL:
            return tuple(key_of(t) for t in times), value
        return value, value

    def clear(self) -> None:
        """Forgets everything kept."""
        with self._lock:
            self._runs.clear()

    def nbytes(self) -> int:
        """Bytes of what is kept."""
        with self._lock:
            kept = [t for run in self._runs.values() for t in (*run.kept.values(), run.first)]
        return sum(t.numel() * t.element_size() for t in kept if t is not None)

    def facts(self, flops: Mapping[str, int]) -> dict[str, Any]:
        """For reports; ``flops``: of each program."""
        part, whole = sum(flops[name] for name in partial(self.cut)), sum(flops.values())
        if self.options.kind == "deepcache":
            whole = flops["step"]
        with self._lock:
            runs = [list(run.errors) for run in reversed(self._runs.values()) if run.errors]
            why = dict(self.whole)
            steps = self.part
        every = sum(why.values()) + steps
        saved = steps * (whole - part) / (every * whole) if every and whole else 0.0
        return {
            "kind": self.options.kind,
            "why_not": "",
            "whole": why,
            "part": steps,
            "flops_whole": whole,
            "flops_part": part,
            "saved": saved,
            "bytes": self.nbytes(),
            "measured": self.options.measure,
            "runs": [
                {"error": [float(e) for e, _ in run], "psnr": [float(p) for _, p in run]}
                for run in runs
            ],
        }


def partial(cut: Cut) -> Sequence[str]:
    """The programs of a step computed in part."""
    return ("part",) if cut.options.kind == "deepcache" else ("head", "tail")


def relative_change(new: Tensor, old: Tensor) -> Tensor:
    """mean|new - old| / mean|old|, in float32; NaN where both are zero."""
    return (new.float() - old.float()).abs().mean() / old.float().abs().mean()


def deviation(mine: Sequence[Any], right: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """(relative error in the L2 norm, PSNR in dB) of the first tensor of floating point.

    The peak of the PSNR is the range of the right values.
    """
    pair = next(
        (a, b)
        for a, b in zip(mine, right, strict=True)
        if isinstance(a, Tensor) and a.is_floating_point()
    )
    mine_, right_ = (tensor.detach().double() for tensor in pair)
    difference = (mine_ - right_).square().mean()
    error = (difference / right_.square().mean()).sqrt()
    return error, 10 * torch.log10((right_.max() - right_.min()).square() / difference)
