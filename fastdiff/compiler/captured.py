"""Capturing the graphs of one set of shapes, and making programs of them."""

from __future__ import annotations

import contextlib
import re
import time
import weakref
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from fastdiff.compiler import cuts
from fastdiff.compiler.functional import functionalise, repair
from fastdiff.compiler.graph import is_tensor, name_of, value_of
from fastdiff.compiler.inductor import compile_program
from fastdiff.compiler.passes import passes_for
from fastdiff.compiler.passes.layout import images
from fastdiff.compiler.passes.quantize import Quantize
from fastdiff.compiler.reports import LEFT, GraphReport
from fastdiff.compiler.runner import Runner, fake_flops
from fastdiff.compiler.schedule import Schedule
from fastdiff.compiler.shelf import Shelf
from fastdiff.compiler.slots import forget_source, forget_source_later, slot_for
from fastdiff.compiler.split import Program, split
from fastdiff.compiler.tidy import tidy
from fastdiff.compiler.waterfall import calls_of

if TYPE_CHECKING:
    from fastdiff.compiler.compiled import Compiled
    from fastdiff.compiler.precision import Cast


class Entry:
    """The graphs of one set of shapes: a function of its own, with guards of its own.

    One graph, or several where PyTorch's front end cannot capture the model whole. PyTorch counts
    recompilations per code object, and gives up after a few; shapes must not. Where something else
    about the model changes more often than that, the graphs begin anew.
    why_pieces: why there are several graphs; why_eager: why the model's own code runs; or "".
    complete: whether it has its only graph, or has come to its end once.
    """

    def __init__(self, owner: Compiled) -> None:
        # Not a strong reference: PyTorch's caches hold the function, and uncompiling frees.
        self._owner = weakref.ref(owner)
        self.graphs: list[Graph] = []
        self.runners: list[Runner] = []
        self.why_pieces = self.why_eager = ""
        self.complete = False
        self._last: list[Any] = [None]
        self._started = 0.0
        self._store = owner.options.disk_cache
        self._begin()

    def _begin(self) -> None:
        self.forget()
        self.graphs, self.runners = [], []
        # The entry holds the shelf, not the other way round.
        build = weakref.WeakMethod(self._stored)
        self.shelf = Shelf(lambda *args: _alive(build)(*args)) if self._store else None
        self._slot = slot_for(self, _call)

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], cast: Cast | None, pieces: bool = True
    ) -> Any:
        """pieces: False returns None, with nothing run, where there is no one graph."""
        shelf = self.shelf
        if shelf is None:
            return self._captured(model, inputs, cast, pieces)
        found = shelf.find(model, inputs, cast)
        try:
            if found is not None:
                return found(inputs)
            result = self._captured(model, inputs, cast, pieces)
            shelf.keep(result)
            return result
        finally:
            shelf.done()

    def _captured(
        self, model: nn.Module, inputs: dict[str, Any], cast: Cast | None, pieces: bool
    ) -> Any:
        if not self.runners:
            self._started = time.perf_counter()
        if not self.why_pieces:
            try:
                return self._slot.whole(model, inputs, cast)
            except FailOnRecompileLimitHit:
                self._begin()
                return self._slot.whole(model, inputs, cast)
            except TorchDynamoException as error:
                # In pieces, with the model's own Python between them; what the model raises itself
                # comes out of that too.
                self.why_pieces = first_line(error)
                self._begin()
                if self.shelf is not None:
                    self.shelf.refuse("it is captured in pieces")
        if not pieces:
            return None
        result = self._slot.pieces(model, inputs, cast)
        if not self.runners:  # PyTorch has given up
            self.why_eager = f"no piece of it was captured: {self.why_pieces}"
        self.complete = True
        return result

    def _backend(self, module: fx.GraphModule, _: list[Any]) -> Any:
        owner = self._owner()
        assert owner is not None  # it is calling
        seconds = time.perf_counter() - (self._started or 0.0)
        if self.shelf is not None:
            self.shelf.capturing(owner.model, module.graph, _source)
        graph = self._add(Graph(module, owner, self._last, seconds, self.why_pieces))
        owner.captured()
        if self.shelf is None or self.why_pieces:
            return graph.runner
        return self.shelf.recorded(graph.runner)

    def _stored(self, module: fx.GraphModule, seconds: float) -> Runner:
        """The runner of a graph that was stored."""
        owner = self._owner()
        assert owner is not None  # it is calling
        graph = self._add(Graph(module, owner, self._last, seconds, stored=True))
        owner.loaded()
        return graph.runner

    def _add(self, graph: Graph) -> Graph:
        self.graphs.append(graph)
        self.runners.append(graph.runner)
        self.complete = self.complete or not self.why_pieces
        return graph

    def forget(self) -> None:
        """Drops kept results and CUDA graphs; a thread that still runs it makes them again."""
        for runner in self.runners:
            runner.clear()

    def close(self) -> None:
        """Not to be used again, but by a thread that still runs it."""
        self.forget()
        self._slot.retire()


def _alive(reference: weakref.WeakMethod[Any]) -> Any:
    method = reference()
    assert method is not None  # it is calling
    return method


def first_line(error: Exception) -> str:
    """The kind and the first line of an error, of the one inside where PyTorch has wrapped it."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _call(model: nn.Module, inputs: dict[str, Any], cast: Cast | None) -> Any:
    if cast is not None:
        inputs = cast.inputs(inputs)
    return model._call_impl(**inputs)


class Graph:
    """A captured graph, fused and split.

    why_piece: why it is not the whole model, or "". stored: whether an earlier process captured it.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        owner: Compiled,
        last: list[Any],
        seconds: float,
        why_piece: str = "",
        stored: bool = False,
    ) -> None:
        graph, options = module.graph, owner.options
        self._stored = stored
        forget_source(module)
        self._why_piece = why_piece
        self._autocast = {
            device: torch.get_autocast_dtype(device)
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        }
        started = time.perf_counter()
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                # flex_attention: needs a compiler of its own.
                raise NotImplementedError(f"{name_of(node)} is a higher-order operator")
        self._before = len(graph.nodes)
        self._half = any(
            value_of(node).dtype in (torch.float16, torch.bfloat16)
            for node in graph.nodes
            if is_tensor(node) and node.op == "placeholder"
        )
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        names = tuple(node.name for node in placeholders)
        roles = {node.name: _role(node, owner.roles, bool(why_piece)) for node in placeholders}
        self._shapes = {
            _argument_name(node) or _source(node)[3:-2]: tuple(node.meta["example_value"].shape)
            for node in placeholders
            if roles[node.name] != "weights" and is_tensor(node)
        }
        repair(graph)
        self.why_whole = functionalise(graph)
        module.recompile()
        self.fused: dict[str, int] = {}
        self._calls = {"captured": calls_of(graph.nodes)}
        self.quantized: list[str] = []
        self.unquantized: dict[str, str] = {}
        self._cache, self._why_uncut = options.cache, ""
        cut = None
        if self.why_whole:
            self._why_uncut = f"it is left as it was: {self.why_whole}"
            body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
            programs = [Program("step", module, names, (), len(body))]
        else:
            tidy(graph)
            self._calls["tidied"] = calls_of(graph.nodes)
            marks = self._marked(graph, owner, roles)
            quantize = Quantize(owner.model, options, roles) if options.quantize else None
            for name, fuse in passes_for(options, quantize).items():
                self.fused[name] = fuse(graph)
                graph.eliminate_dead_code()
                if self.fused[name]:
                    self._calls[name] = calls_of(graph.nodes)
            if quantize is not None:
                self.quantized, self.unquantized = quantize.done, quantize.left
            cut = self._cut(module, roles, marks)
            programs = split(module, roles)
            self._calls["hoisted"] = calls_of(programs[-1].module.graph.nodes)
        for made in (module, *(program.module for program in programs)):
            forget_source_later(made)
        self._after = len(graph.nodes)
        self._unfused = Counter(name_of(node) for node in graph.nodes)
        self._why_unfused = Counter(
            f"{name_of(node)}: {node.meta['left']}" for node in graph.nodes if "left" in node.meta
        )
        self.runner = Runner(
            programs,
            names,
            roles,
            # What changes its inputs must get the inputs themselves.
            None if self.why_whole else owner.pool,
            compile_program if options.mode == "max" else None,
            owner.token,
            last,
            options.freeze,
            cut,
            owner.length,
        )
        self.runner.why_whole = self.why_whole
        self.schedule = Schedule(self.runner)
        self._seconds = seconds + time.perf_counter() - started

    def _marked(self, graph: fx.Graph, owner: Compiled, roles: dict[str, str]) -> cuts.Marks | None:
        """Where its steps can be cut, if they are to be and can be."""
        if self._cache is None:
            return None
        if self._why_piece:
            self._why_uncut = "the model is captured in pieces"
            return None
        try:
            return cuts.mark(graph, owner.model, roles, self._cache)
        except cuts.CannotCut as error:
            self._why_uncut = str(error)
            return None

    def _cut(
        self, module: fx.GraphModule, roles: dict[str, str], marks: cuts.Marks | None
    ) -> cuts.Cut | None:
        """The programs of a step in pieces; the graph is without marks after it."""
        nodes = ([], []) if marks is None else cuts.release(module.graph, marks)
        module.graph.lint()
        if marks is None:
            return None
        try:
            return cuts.programs_of(module, roles, marks, nodes)
        except cuts.CannotCut as error:
            self._why_uncut = str(error)
            return None

    def finished(self) -> GraphReport:
        """The report of this graph."""
        with contextlib.ExitStack() as stack:
            for device, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(device, dtype))
            flops = {program.name: fake_flops(program) for program in self.runner.programs}
            cache = self._cache_facts()
        return GraphReport(
            self._shapes,
            dict(self.fused),
            {name: self._unfused[name] for name in LEFT},
            self._before,
            self._after,
            {
                p.name: {"nodes": p.nodes, "flops": flops[p.name], "bytes": p.nbytes()}
                for p in self.runner.programs
            },
            self._seconds,
            self.why_whole,
            {name: g.facts() for name, g in self.runner.graphed.items()},
            self._why_piece,
            dict(self._why_unfused),
            dict(self._calls),
            self._half,
            stored=self._stored,
            schedule=self.schedule.facts(),
            cache=cache,
            images=images(self._unfused, self.fused),
        )

    def _cache_facts(self) -> dict[str, Any]:
        if self._cache is None:
            return {}
        if self.runner.cache is None:
            return {"kind": self._cache.kind, "why_not": self._why_uncut}
        pieces = self.runner.cache.cut.programs
        return self.runner.cache.facts({name: fake_flops(p) for name, p in pieces.items()})


def _source(node: fx.Node) -> str:
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def _argument_name(node: fx.Node) -> str:
    """The model's argument that a placeholder comes from, or ""."""
    found = _INPUT.match(_source(node))
    return found[1] if found else ""


def _role(node: fx.Node, roles: dict[str, str], piece: bool) -> str:
    """Of a piece of a model, what comes from the pieces before it may be anything: a sample."""
    name = _argument_name(node)
    if name:
        return roles.get(name, "condition")
    return "sample" if piece and not _WEIGHT.search(_source(node)) else "weights"


_WEIGHT = re.compile(r"\b_(parameters|buffers)\[")
_INPUT = re.compile(r"L\['inputs'\]\['(\w+)'\]")
