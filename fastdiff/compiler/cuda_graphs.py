"""Programs replayed as CUDA graphs: one launch in place of hundreds.

A graph reads and writes fixed addresses. The weights' are the model's own, so that writes to them
are seen, and a weight that moves (``.data = ...``) records again. All other inputs are copied into
buffers, those that are still the same objects as at the last replay excepted. Results are copied
out: solvers keep them, and the next replay overwrites them.

The graphs of a model share one memory pool. They are replayed one after the other, whatever thread
or stream asks, and the least recently used ones go when all together take more than a bound.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff._ext import ext

MAX_BYTES = 8 << 30


class Recorder(Protocol):
    """What records and replays; :class:`CudaRecorder`, but for tests."""

    def why_not(self, values: Sequence[Any]) -> str:
        """ "" or why a call with these inputs cannot be recorded."""

    def constant(self, value: Tensor) -> bool:
        """Whether a recording holds the value of this tensor, instead of reading it again."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[int], None], Any, int]:
        """(replay(times), the results that a replay overwrites, bytes taken)."""

    def wait(self) -> None:
        """The current stream waits for what other streams have asked for."""

    def done(self) -> None:
        """Other streams will wait for what this one has been given so far."""


class CudaRecorder:
    """CUDA graphs of one device, with one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None
        self._last: int | None = None

    def why_not(self, values: Sequence[Any]) -> str:
        tensors = [value for value in values if isinstance(value, Tensor)]
        devices = {value.device for value in tensors if not self.constant(value)}
        if not any(device.type == "cuda" for device in devices):
            return "not on a CUDA device"
        if len(devices) > 1:
            return f"inputs on several devices: {', '.join(sorted(map(str, devices)))}"
        if torch.cuda.is_current_stream_capturing():
            return "part of a graph that is being captured"
        return ""

    def constant(self, value: Tensor) -> bool:
        # A number on the CPU (a LoRA's scale) is an argument of the kernels that use it.
        return value.device.type == "cpu" and value.dim() == 0

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[int], None], Any, int]:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        # Other threads may go on allocating and launching.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode=mode):
            results = function()
        return CudaReplay(graph), results, max(0, torch.cuda.memory_reserved() - before)

    def wait(self) -> None:
        stream = torch.cuda.current_stream()
        if self._event is not None and self._last != stream.cuda_stream:
            stream.wait_event(self._event)

    def done(self) -> None:
        stream = torch.cuda.current_stream()
        if self._event is None:
            self._event = torch.cuda.Event()
        self._event.record(stream)
        self._last = stream.cuda_stream


class CudaReplay:
    """Launches a recorded graph on the current stream, so many times in a row.

    Several at once go through the C++ loop, without Python, where PyTorch tells the graph's handle
    and the extension was built with CUDA; ``native`` says whether. The graphs draw no random
    numbers: PyTorch's own replay would do nothing else for them.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph  # the handle is its own
        self._exec = raw_exec(graph)
        self._launch = getattr(ext(), "cuda_launch_graph", None)
        self.native = bool(self._exec and self._launch)

    def __call__(self, times: int) -> None:
        if self._launch is not None and self._exec and times > 1:
            self._launch(self._exec, torch.cuda.current_stream().cuda_stream, times)
            return
        for _ in range(times):
            self._graph.replay()


def raw_exec(graph: Any) -> int:
    """The cudaGraphExec_t of an instantiated graph; 0 where this PyTorch does not tell."""
    try:
        return int(graph.raw_cuda_graph_exec())
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return 0


class Droppable(Protocol):
    """Something recorded, which a pool counts and a report tells of."""

    nbytes: int

    def forget(self) -> None:
        """Frees what was recorded; it is recorded again when it is needed."""

    def drop(self) -> None:
        """Like ``forget``, and no longer counted by the pool."""

    def facts(self) -> dict[str, Any]:
        """For reports: "recordings", "replays", "bytes", "why_not"."""


class Pool:
    """The graphs of one model. max_bytes bounds what they take."""

    def __init__(self, recorder: Recorder | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.recorder: Recorder = CudaRecorder() if recorder is None else recorder
        self.max_bytes = max_bytes
        self.lock = threading.RLock()
        self._users: OrderedDict[int, Droppable] = OrderedDict()

    def used(self, user: Droppable) -> None:
        """Marks a graph as the most recently used, and drops others that are too much."""
        self._users[id(user)] = user
        self._users.move_to_end(id(user))
        while self.nbytes() > self.max_bytes and len(self._users) > 1:
            _, oldest = self._users.popitem(last=False)
            oldest.forget()

    def without(self, user: Droppable) -> None:
        """Forgets one."""
        self._users.pop(id(user), None)

    def nbytes(self) -> int:
        """Bytes of all graphs."""
        return sum(user.nbytes for user in self._users.values())

    def clear(self) -> None:
        """Drops all graphs; they are recorded again when they are needed."""
        with self.lock:
            for user in self._users.values():
                user.forget()
            self._users.clear()


class Counted:
    """What a report tells of something recorded."""

    recordings: int
    replays: int
    nbytes: int
    why_not: str

    def facts(self) -> dict[str, Any]:
        """How often recorded and replayed (a trajectory: its steps), bytes, why it is not."""
        return {
            "recordings": self.recordings,
            "replays": self.replays,
            "bytes": self.nbytes,
            "why_not": self.why_not,
        }


class Graphed(Counted):
    """A function of tensors, run as it is the first time, then recorded, then replayed.

    fixed: the positions of inputs whose addresses hardly ever change: weights.
    why_not: a reason never to record (random numbers), or "".
    """

    def __init__(
        self, function: Callable[..., Any], fixed: Sequence[int], pool: Pool, why_not: str = ""
    ) -> None:
        self._function, self._pool = function, pool
        self._fixed = frozenset(fixed)
        self.why_not = why_not
        self.recordings = self.replays = 0
        self._warm = False
        self.forget()

    def forget(self) -> None:
        """Drops the graph and its buffers."""
        self.nbytes = 0
        self._key: tuple[Any, ...] = ()
        self._buffers: Buffers | None = None
        self._replay: Callable[[int], None] | None = None
        self._results: Any = None

    def drop(self) -> None:
        """Like ``forget``, and no longer counted."""
        with self._pool.lock:
            self.forget()
            self._pool.without(self)

    def __call__(self, *values: Any) -> Any:
        """The function's results for these inputs, in memory of their own."""
        if self.why_not or not self._warm:
            self._warm = True
            return self._function(*values)
        recorder = self._pool.recorder
        reason = recorder.why_not(values)
        if reason:
            if "captured" not in reason:
                self.why_not = reason
            return self._function(*values)
        with self._pool.lock:
            recorder.wait()
            moving, _ = _flat(values, self._fixed)
            held = [value for value in moving if not isinstance(value, Tensor)]
            fixed = [values[i] for i in self._fixed]
            held += [v.item() for v in (*moving, *fixed) if self._held(v)]
            key = (*(value.data_ptr() for value in fixed if not self._held(value)), *held)
            if self._replay is None or key != self._key:
                try:
                    self._record_or_make_room(values, key)
                except Exception as error:  # what a graph cannot hold, or no memory for it
                    self.forget()
                    first = str(error).splitlines()[0] if str(error) else ""
                    self.why_not = f"recording failed: {type(error).__name__}: {first}"
                    return self._function(*values)
            assert self._replay is not None
            assert self._buffers is not None
            self._buffers.load(moving)
            try:
                self._replay(1)
                self.replays += 1
                results = torch.utils._pytree.tree_map_only(Tensor, torch.clone, self._results)
            finally:
                recorder.done()
            self._pool.used(self)
        return results

    def _held(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self._pool.recorder.constant(value)

    def _record_or_make_room(self, values: Sequence[Any], key: tuple[Any, ...]) -> None:
        """All other graphs of the model go if there is no memory for this one."""
        try:
            self._record(values, key)
        except torch.OutOfMemoryError:
            self._pool.clear()
            self._record(values, key)

    def _record(self, values: Sequence[Any], key: tuple[Any, ...]) -> None:
        self.forget()
        moving, structure = _flat(values, self._fixed)
        self._buffers = Buffers(moving, self._pool.recorder.constant)
        rest = iter(torch.utils._pytree.tree_unflatten(self._buffers.values, structure))
        static = [value if i in self._fixed else next(rest) for i, value in enumerate(values)]
        self._replay, self._results, taken = self._pool.recorder.record(
            lambda: self._function(*static)
        )
        self._key = key
        self.nbytes = taken + self._buffers.nbytes
        self.recordings += 1


class Buffers:
    """Memory whose addresses stay, for values that a recording reads.

    values: the buffers, with the first values in them; what is no tensor, and what a recording
    holds (``held``), is the value itself.
    """

    def __init__(self, values: Sequence[Any], held: Callable[[Tensor], bool]) -> None:
        self._held = held
        self._given: list[tuple[Any, int | None]] = [(None, None)] * len(values)
        with torch.inference_mode(False):
            self.values = [torch.empty_like(v) if isinstance(v, Tensor) else v for v in values]
        for buffer, value in zip(self.values, values, strict=True):
            if isinstance(value, Tensor):
                buffer.copy_(value)

    @property
    def nbytes(self) -> int:
        owned = [buffer for buffer in self.values if isinstance(buffer, Tensor)]
        return sum(buffer.numel() * buffer.element_size() for buffer in owned)

    def load(self, values: Sequence[Any]) -> None:
        """Copies those that are not the ones of the last time."""
        into, source = [], []
        given: dict[int, tuple[Any, int | None]] = {}
        for i, value in enumerate(values):
            if not isinstance(value, Tensor) or self._held(value):
                self.values[i] = value
                continue
            version = None if value.is_inference() else value._version
            held, last = self._given[i]
            if held is value and version is not None and version == last:
                continue
            given[i] = (value, version)  # held, so that it stays this object
            self._given[i] = (None, None)  # if the copy fails, it may be half done
            into.append(self.values[i])
            source.append(value)
        if into:
            torch._foreach_copy_(into, source)
        for i, known in given.items():
            self._given[i] = known


def _flat(values: Sequence[Any], fixed: frozenset[int]) -> tuple[list[Any], Any]:
    """The leaves of all inputs but the fixed ones; programs hand over tuples of tensors too."""
    rest = [value for i, value in enumerate(values) if i not in fixed]
    return torch.utils._pytree.tree_flatten(rest)
