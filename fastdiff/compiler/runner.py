"""Running the programs of a captured graph, keeping what does not change between steps."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.compiler.cuda_graphs import Droppable, Graphed, Pool
from fastdiff.compiler.cuts import Cut
from fastdiff.compiler.fingerprint import Watch, digest
from fastdiff.compiler.graph import value_of
from fastdiff.compiler.identity import SMALL, is_number, key_of, weight_key
from fastdiff.compiler.split import Program, is_random
from fastdiff.compiler.step_cache import StepCache
from fastdiff.ops._contract import Op

# How many results of a program are kept: prompts in use at once; the steps of a schedule.
KEPT = {"weights": 1, "prompt": 4, "schedule": 256, "both": 256}
# The programs that run again and again, where times cannot be compared by value: worth recording.
REPEATED = ("schedule", "both", "step", "part", "head", "middle", "tail")
# The ops that are mostly products: as PyTorch's own counter does, the others are not counted.
PRODUCTS = ("adaln_attention", "attention", "linear_gate", "linear_quantized", "timestep_mlp")
# Those whose results a run has before its first step, the same in all of it.
BEFORE = ("weights", "prompt")
# Those whose results follow from the time: known for all steps before the first.
TIMED = ("schedule", "both")


class Kept:
    """The results of one program for the inputs it has seen.

    A result is found again by the identity of its inputs: address, version (in-place writes change
    it), shape, strides and dtype; the inputs are held, so that no address comes twice. When a
    weight has changed, everything is forgotten; what no version shows, `Runner` looks for.
    """

    def __init__(
        self,
        program: Program,
        weights: Sequence[str],
        others: Sequence[str],
        run: Callable[..., Any],
    ) -> None:
        self.program, self.weights, self.others = program, tuple(weights), tuple(others)
        self.run = run
        self.hits = self.misses = 0
        self._weights_key: tuple[Any, ...] | None = None
        self._held: tuple[Any, ...] = ()
        self._entries: OrderedDict[Any, tuple[Any, tuple[Any, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def results(
        self, values: dict[str, Any], keys: dict[str, Any], made: tuple[Any, ...] | None = None
    ) -> tuple[Any, ...]:
        """The program's outputs for these values, computed or found.

        keys: what the inputs other than weights are known by. made: the outputs, where they were
        computed elsewhere.
        """
        weights = [values[name] for name in self.weights]
        others = [values[name] for name in self.others]
        weights_key = tuple(weight_key(weight) for weight in weights)
        key = tuple(keys[name] for name in self.others)
        known = None not in key and all(version is not None for _, version in weights_key)
        if known:
            with self._lock:
                if weights_key != self._weights_key:
                    self._entries.clear()
                    self._weights_key, self._held = weights_key, tuple(weights)
                found = self._entries.get(key)
                if found is not None:
                    self._entries.move_to_end(key)
                    self.hits += 1
                    return found[0]
        self.misses += 1
        results: tuple[Any, ...] = made or self.run(*(values[n] for n in self.program.inputs))
        if known:
            with self._lock:
                if weights_key == self._weights_key:
                    self._entries[key] = (results, tuple(others))
                    while len(self._entries) > KEPT[self.program.name]:
                        self._entries.popitem(last=False)
        return results

    def has(self, keys: dict[str, Any]) -> bool:
        """Whether a call with these inputs would find its results, if no weight has changed."""
        with self._lock:
            return tuple(keys[name] for name in self.others) in self._entries

    def put(self, values: dict[str, Any], keys: dict[str, Any], results: tuple[Any, ...]) -> None:
        """Keeps results that were computed elsewhere for these values."""
        self.results(values, keys, results)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()
            self._weights_key, self._held = None, ()

    def nbytes(self) -> int:
        """Bytes of the kept results."""
        with self._lock:
            kept = torch.utils._pytree.tree_leaves([entry[0] for entry in self._entries.values()])
        return sum(_bytes(r) for r in kept if isinstance(r, Tensor))


def _bytes(tensor: Tensor) -> int:
    if tensor.is_mkldnn:  # in blocks, the last of which may be padded
        return int(torch.ops.mkldnn._nbytes(tensor))
    return tensor.numel() * tensor.element_size()


_THREAD = threading.local()


@contextlib.contextmanager
def instead(run: Callable[[Runner, dict[str, Any]], Any]) -> Iterator[None]:
    """Within it, what this thread calls of any runner is ``run(runner, its inputs by name)``."""
    before = getattr(_THREAD, "instead", None)
    _THREAD.instead = run
    try:
        yield
    finally:
        _THREAD.instead = before


class Runner:
    """Calls the programs of one captured graph in order. Two threads may do so at once.

    token: gives an object that is another one in each sampling run, where there is such a thing.
    last: the runner that ran last among those that share the list; another one since means that
    something about the model is not as it was. frozen: writes that no version counts are not
    looked for in the weights of the weights' program. cut: the step in pieces, of which some calls
    run a part only. length: gives the number of steps of a run, where it is known.
    """

    def __init__(
        self,
        programs: Sequence[Program],
        placeholders: Sequence[str],
        roles: dict[str, str],
        pool: Pool | None = None,
        build: Callable[[Program], Callable[..., Any]] | None = None,
        token: Callable[[], Any] | None = None,
        last: list[Any] | None = None,
        frozen: bool = False,
        cut: Cut | None = None,
        length: Callable[[], int | None] | None = None,
    ) -> None:
        self.placeholders = tuple(placeholders)
        self.programs = tuple(programs)
        self.roles = roles
        made: dict[str, set[str]] = {}  # the placeholders each program's results come from
        self.kept: list[Kept] = []
        self.graphed: dict[str, Droppable] = {}
        self.plain: dict[str, Callable[..., Any]] = {}  # the programs without CUDA graphs
        self.why_whole = ""
        constant: set[str] = set()

        def prepared(program: Program) -> Callable[..., Any]:
            run = program.module if build is None else build(program)
            self.plain[program.name] = run
            if pool is None or program.name not in REPEATED:
                return run
            graphed = _graphed(program, run, roles, pool, constant)
            self.graphed[program.name] = graphed
            return graphed

        *before, self.step = programs
        for program in before:
            sources: set[str] = set()
            for name in program.inputs:
                sources |= made.get(name, {name})
            for name in program.outputs:
                made.setdefault(name, sources)
            run = prepared(program)
            if program.name == "weights":
                constant = _tensors(program)
            ordered = [name for name in placeholders if name in sources]
            weights = [name for name in ordered if roles[name] == "weights"]
            others = [name for name in ordered if roles[name] != "weights"]
            self.kept.append(Kept(program, weights, others, run))
        self._token = token or (lambda: None)
        self.cache: StepCache | None = None
        if cut is None:
            self._run_step = prepared(self.step)
        else:
            pieces = {name: prepared(program) for name, program in cut.programs.items()}
            self.cache = StepCache(cut, pieces, roles, self._token, length)
        looked = [k for k in self.kept if not (frozen and k.program.name == "weights")]
        self._others = list(dict.fromkeys(name for kept in self.kept for name in kept.others))
        self._weights = list(dict.fromkeys(name for kept in looked for name in kept.weights))
        self._last = [None] if last is None else last
        self._watch = Watch()
        self._digest: tuple[int, ...] | None = None
        self.fresh = False  # the weights were looked at for the run whose first call comes next

    @functools.cached_property
    def random(self) -> bool:
        """Whether any program draws random numbers."""
        return any(is_random(n) for program in self.programs for n in program.module.graph.nodes)

    def keys(self, values: dict[str, Any]) -> dict[str, Any]:
        """What the inputs of kept results are known by."""
        return {name: key_of(values[name]) for name in self._others}

    def begin(self, values: dict[str, Any]) -> None:
        """Begins a sampling run: results of the programs of :data:`BEFORE` join ``values``."""
        keys = self.keys(values)
        if self._weights:
            self._check(values)
        for kept in self.kept:
            if kept.program.name in BEFORE:
                values.update(zip(kept.program.outputs, kept.results(values, keys), strict=True))

    def stamp(self, values: dict[str, Any], time: str) -> tuple[Any, ...] | None:
        """What :data:`TIMED` results follow from besides the time, to compare; None: not known."""
        timed = [kept for kept in self.kept if kept.program.name in TIMED]
        weights = dict.fromkeys(name for kept in timed for name in kept.weights)
        others = dict.fromkeys(name for kept in timed for name in kept.others if name != time)
        found = [key_of(values[name]) for name in others]
        versions = [weight_key(values[name]) for name in weights]
        if None in found or any(version is None for _, version in versions):
            return None
        return self._digest, *found, *versions

    def run_step(self, values: dict[str, Any]) -> Any:
        """The step alone, without a CUDA graph of its own."""
        return self.plain[self.step.name](*(values[name] for name in self.step.inputs))

    def __call__(self, *args: Any) -> Any:
        values = dict(zip(self.placeholders, args, strict=True))
        other = getattr(_THREAD, "instead", None)
        if other is not None:
            return other(self, values)
        keys = self.keys(values)
        if self._weights:
            self._look(values, keys)
        for kept in self.kept:
            values.update(zip(kept.program.outputs, kept.results(values, keys), strict=True))
        if self.cache is not None:
            return self.cache(values)
        return self._run_step(*(values[name] for name in self.step.inputs))

    def _look(self, values: dict[str, Any], keys: dict[str, Any]) -> None:
        """Forgets everything kept if weights have changed unseen, whenever a run begins."""
        times = [name for name in self._others if self.roles[name] == "time"]
        condition = tuple(keys[name] for name in self._others if name not in times)
        first = values[times[0]] if times else None
        value = None
        if isinstance(first, Tensor) and first.device.type == "cpu" and 0 < first.numel() <= SMALL:
            value = float(first.reshape(-1)[0])
        begins = self._watch.begins(
            condition, tuple(keys[name] for name in times), value, self._token()
        )
        if self._last[0] is not self:
            self._last[0] = self
            begins = True
        fresh, self.fresh = self.fresh, False
        if begins and not fresh:
            self._check(values)

    def _check(self, values: dict[str, Any]) -> None:
        """Forgets everything kept if weights are not what they were."""
        weights = [values[name] for name in self._weights if not is_number(values[name])]
        if any(w.is_cuda for w in weights) and torch.cuda.is_current_stream_capturing():
            return  # nothing can be read then
        found = digest(weights)
        if found != self._digest:
            if self._digest is not None:
                for kept in self.kept:
                    if kept.weights:
                        kept.clear()
                if self.cache is not None:
                    self.cache.clear()
            self._digest = found

    def forget(self) -> None:
        """Forgets all kept results."""
        for kept in self.kept:
            kept.clear()
        if self.cache is not None:
            self.cache.clear()

    def clear(self) -> None:
        """Forgets all kept results and CUDA graphs."""
        self.forget()
        for graphed in list(self.graphed.values()):
            graphed.drop()


def _graphed(
    program: Program,
    run: Callable[..., Any],
    roles: dict[str, str],
    pool: Pool,
    constant: Collection[str],
) -> Graphed:
    """constant: what hardly ever changes besides the weights: tensors made of them alone."""
    fixed = [
        i
        for i, name in enumerate(program.inputs)
        if roles.get(name) == "weights" or name in constant
    ]
    random = any(is_random(node) for node in program.module.graph.nodes)
    return Graphed(run, fixed, pool, "it draws random numbers" if random else "")


def _tensors(program: Program) -> set[str]:
    """The names of those of a program's results that are tensors."""
    (output,) = (node for node in program.module.graph.nodes if node.op == "output")
    results = zip(program.outputs, output.args[0], strict=True)
    return {name for name, node in results if isinstance(value_of(node), Tensor)}


def fake_flops(program: Program) -> int:
    """FLOPs of a program (multiply and add are two), counted on fake tensors.

    Products and convolutions only, those inside fastdiff's ops by their contracts. 0 where shapes
    depend on values.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from fastdiff.ops import OPS

    made = (value_of(node) for node in program.module.graph.nodes if node.op != "output")
    if any(isinstance(v, Tensor) and not all(type(n) is int for n in v.shape) for v in made):
        return 0
    values = [
        node.meta["example_value"]
        for node in program.module.graph.nodes
        if node.op == "placeholder"
    ]
    mode = next((v.fake_mode for v in values if hasattr(v, "fake_mode")), None)
    if mode is None:
        return 0
    own = {getattr(torch.ops.fastdiff, op.name): _flops_of(op) for op in OPS if op.name in PRODUCTS}
    with mode, torch.no_grad(), FlopCounterMode(display=False, custom_mapping=own) as counter:
        # Not as a module: the counter's hooks fail where a result is a view of a weight.
        program.module.forward(*values)
    return int(counter.get_total_flops())


def _flops_of(op: Op) -> Callable[..., int]:
    arguments = len(getattr(torch.ops.fastdiff, op.name).default._schema.arguments) - 1

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        kwargs.pop("impl", None)
        return op.flops(*args[:arguments], **kwargs)

    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not their shapes
    return count
