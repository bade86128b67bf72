"""Stored graphs in the place of captured ones: of one set of shapes, in one process."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from fastdiff.compiler import stored
from fastdiff.compiler.state import State, Unstorable
from fastdiff.compiler.stored import Result

if TYPE_CHECKING:
    from fastdiff.compiler.runner import Runner

# A model that changes more often than that, or is looked at again more often, is left to PyTorch's
# own guards: describing a large one takes a tenth of a second.
MOST_STATES = 16
MOST_LOOKS = 256
_BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError)


class Stored:
    """A stored graph, ready to run for one model.

    build: makes a runner of a captured graph; it is told the seconds that reading took.
    """

    def __init__(
        self,
        data: dict[str, Any],
        start: dict[str, Any],
        build: Callable[[fx.GraphModule, float], Runner],
    ) -> None:
        started = time.perf_counter()
        self._result = Result(data["result"])
        ways = [node["from"] for node in data["graph"]["nodes"] if node["op"] == "placeholder"]
        module = stored.decode(data["graph"], start)
        self.runner = build(module, time.perf_counter() - started)
        self._ways = [(i, way) for i, way in enumerate(ways) if way[0] == "inputs"]
        self._others = [(i, way) for i, way in enumerate(ways) if way[0] != "inputs"]
        self._args: list[Any] = [None] * len(ways)

    def find(self, start: dict[str, Any]) -> None:
        """Looks up the weights, which a changed model may hold elsewhere."""
        args = list(self._args)
        for i, way in self._others:
            args[i] = stored.follow(way, start)
        self._args = args

    def __call__(self, inputs: dict[str, Any]) -> Any:
        args = list(self._args)
        for i, way in self._ways:
            args[i] = stored.follow(way, {"inputs": inputs})
        return self._result(self.runner(*args), inputs)


class _Call(threading.local):
    """What one thread is calling. outputs: of the graph that waits to be stored."""

    inputs: dict[str, Any] | None = None
    settings: Any = None
    state: State | None = None
    outputs: Any = None
    captured = 0


class Shelf:
    """Finds the stored graph of a call, and stores what is captured for want of one.

    why_not: why the last graph that was captured is not stored, or "".
    """

    def __init__(self, build: Callable[[fx.GraphModule, float], Runner]) -> None:
        self._build = build
        self._found: dict[str, Stored | None] = {}
        self._state: State | None = None
        self._now: Stored | None = None
        self._looks = 0
        # Captured, and not yet run to the end of a call.
        self._waiting: tuple[State, dict[str, Any]] | None = None
        self._lock = threading.Lock()
        self._call = _Call()
        self.why_not = ""

    def find(self, model: nn.Module, inputs: dict[str, Any], settings: Any) -> Stored | None:
        """The graph that an earlier process captured for this call, if there is one."""
        call = self._call
        call.inputs, call.settings, call.state, call.captured = inputs, settings, None, 0
        if self._found and not any(self._found.values()):
            return None  # captured in this process: PyTorch's own guards know when it is valid
        if len(self._found) > MOST_STATES or self._looks > MOST_LOOKS:
            return None
        with self._lock:
            if self._state is not None and self._state.unchanged():
                return self._now
            self._looks += 1
            start = {"model": model, "inputs": inputs}
            try:
                self._state = call.state = State(model, inputs, settings)
            except Unstorable:
                self._state = self._now = self._found[""] = None
                return None
            key = self._state.key
            if key not in self._found:
                self._found[key] = self._read(key, start)
            self._now = self._found[key]
            if self._now is not None:
                self._now.find(start)
            return self._now

    def refuse(self, reason: str) -> None:
        """Neither looks for graphs nor stores them any more."""
        self.why_not, self._found[""] = reason, None

    def _read(self, key: str, start: dict[str, Any]) -> Stored | None:
        data = stored.read(key)
        try:
            return None if data is None else Stored(data, start, self._build)
        except _BROKEN as error:
            warnings.warn(f"a stored graph is not used: {error!r}", RuntimeWarning, stacklevel=2)
            return None

    def capturing(
        self, model: nn.Module, graph: fx.Graph, source: Callable[[fx.Node], str]
    ) -> None:
        """Notes a graph that PyTorch's front end gives in this call, before it is changed."""
        call = self._call
        if call.inputs is None:  # the graphs began anew in this call
            return
        call.captured += 1
        self._waiting = None
        try:
            if call.captured > 1:
                raise Unstorable("one call needs several graphs")
            if call.state is None:
                call.state = State(model, call.inputs, call.settings)
            self._waiting = call.state, stored.encode(graph, source)
            self.why_not = ""
        except Unstorable as reason:
            self.why_not = str(reason)

    def recorded(self, runner: Runner) -> Callable[..., Any]:
        """The runner of what was captured last, noting what it gives while that is not stored."""
        call, mine = self._call, self._waiting

        def run(*args: Any) -> Any:
            outputs = runner(*args)
            if mine is not None and self._waiting is mine:
                call.outputs = outputs
            return outputs

        return run

    def keep(self, result: Any) -> None:
        """Stores what was captured, if that was one graph and all of the model."""
        call, waiting = self._call, self._waiting
        if waiting is None or call.outputs is None:
            return
        self._waiting = None
        state, graph = waiting
        try:
            if not state.unchanged(tensors=False):  # merging projections moves weights
                raise Unstorable("calling the model changes it")
            made = stored.encode_result(result, call.outputs, call.inputs)
            stored.write(state.key, {"graph": graph, "result": made})
        except Unstorable as reason:
            self.why_not = str(reason)
        except OSError as error:
            self.why_not = f"{type(error).__name__}: {error}"

    def done(self) -> None:
        """The call is over: nothing of it is held."""
        call = self._call
        call.inputs = call.settings = call.state = call.outputs = None
