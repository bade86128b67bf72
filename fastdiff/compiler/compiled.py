"""A model whose calls run as captured, fused programs."""

from __future__ import annotations

import inspect
import re
import threading
import time
import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import TorchDynamoException

from fastdiff.compiler.cuda_graphs import Pool
from fastdiff.compiler.functional import functionalise, repair
from fastdiff.compiler.graph import is_tensor, name_of
from fastdiff.compiler.inductor import compile_program
from fastdiff.compiler.passes import MEMORY, PASSES
from fastdiff.compiler.report import LEFT, GraphReport, Report
from fastdiff.compiler.runner import Runner, fake_flops
from fastdiff.compiler.split import Program, split
from fastdiff.compiler.tidy import tidy

# Names that arguments of public denoisers have.
SAMPLE_NAMES = ("sample", "hidden_states", "x", "x_t", "latents", "noisy_latents", "input", "img")
TIME_NAMES = ("timestep", "timesteps", "t", "time", "sigma", "sigmas", "noise_level", "c_noise")
# Changes in every step without being the sample.
STEP_NAMES = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
    "x_self_cond",
)


def roles_of(model: nn.Module, given: Mapping[str, str] | None) -> dict[str, str]:
    """The role of each argument of ``model.forward``: "sample", "time" or "condition".

    The sample is the argument of a known name, else the first one. ``given`` overrides.
    """
    names = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY, p.POSITIONAL_ONLY)
    ]
    sample = next((name for name in names if name in SAMPLE_NAMES), names[0] if names else "")
    roles = {}
    for name in names:
        if name == sample or name in STEP_NAMES:
            roles[name] = "sample"
        else:
            roles[name] = "time" if name in TIME_NAMES else "condition"
    for name, role in (given or {}).items():
        if role not in ("sample", "time", "condition"):
            raise ValueError(
                f"roles[{name!r}] must be 'sample', 'time' or 'condition', got {role!r}"
            )
        if names and name not in names:
            raise ValueError(
                f"roles must name arguments of forward ({', '.join(names)}), got {name!r}"
            )
        roles[name] = role
    return roles


class Compiled:
    """Stands in for a module's call; see ``fastdiff.compile``.

    max_graphs: how many captured graphs are kept, the least recently used one going first.
    pool: of the CUDA graphs, None for none. mode: "default", or "max" for Inductor between the ops.
    """

    def __init__(
        self,
        model: nn.Module,
        roles: Mapping[str, str] | None = None,
        max_graphs: int = 8,
        pool: Pool | None = None,
        mode: str = "default",
    ) -> None:
        self.model = model
        self.signature = inspect.signature(model.forward)
        self.roles = roles_of(model, roles)
        self.max_graphs = max_graphs
        self.pool, self.mode = pool, mode
        self._entries: OrderedDict[Any, _Entry] = OrderedDict()
        self._eager: Counter[str] = Counter()
        self._lock = threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._why_eager(args, kwargs)
        if reason:
            self._eager[reason] += 1
            return self.model._call_impl(*args, **kwargs)
        inputs = self._bind(args, kwargs)
        entry = self._entry(inputs)
        if not entry.why_eager:
            try:
                return entry(self.model, inputs)
            except TorchDynamoException as error:
                entry.why_eager = f"it cannot be captured: {_first_line(error)}"
        self._eager[entry.why_eager] += 1
        return self.model._call_impl(*args, **kwargs)

    def _why_eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if torch.compiler.is_compiling():
            return "it is part of another compiled function"
        if self.model.training:
            return "the model is in training mode"
        if torch.is_grad_enabled():
            if any(p.requires_grad for p in self.model.parameters()):
                return "gradients are enabled (torch.no_grad was not used) and weights require them"
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            if any(isinstance(v, Tensor) and v.requires_grad for v in leaves):
                return "an input requires gradients"
        if getattr(self.model, "_hf_hook", None) is not None:
            return "accelerate moves its weights (an offload hook is set)"
        return ""

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name; numbers for a time become tensors, as models make them."""
        bound = self.signature.bind(*args, **kwargs)
        inputs: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                inputs.update(value)
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                raise TypeError(f"model must take its arguments by name, got {len(value)} more")
            else:
                inputs[name] = value
        for name, value in inputs.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and self.roles.get(name) == "time":
                dtype = torch.int64 if isinstance(value, int) else torch.float64
                inputs[name] = torch.tensor(value, dtype=dtype, device=_device(inputs))
        return inputs

    def _entry(self, inputs: dict[str, Any]) -> _Entry:
        key = _shapes_key(inputs)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry(self)
                while len(self._entries) > self.max_graphs:
                    _, oldest = self._entries.popitem(last=False)
                    oldest.forget()
            else:
                self._entries.move_to_end(key)
        return entry

    def clear(self) -> None:
        """Forgets all graphs and all kept results."""
        with self._lock:
            self._entries.clear()
            if self.pool is not None:
                self.pool.clear()

    def report(self) -> Report:
        """What was captured, fused, hoisted, and what was not, with reasons."""
        with self._lock:
            entries = list(self._entries.values())
        graphs = [graph for entry in entries for graph in entry.graphs]
        kept = [kept for entry in entries for runner in entry.runners for kept in runner.kept]
        return Report(
            type(self.model).__name__,
            [graph.finished() for graph in graphs],
            dict(self._eager),
            sum(k.nbytes() for k in kept),
            sum(k.hits for k in kept),
            sum(k.misses for k in kept),
        )


def _device(inputs: dict[str, Any]) -> torch.device:
    first = next((v for v in inputs.values() if isinstance(v, Tensor)), None)
    return torch.device("cpu") if first is None else first.device


def _shapes_key(inputs: dict[str, Any]) -> Any:
    leaves, structure = torch.utils._pytree.tree_flatten(inputs)
    described = tuple(
        (leaf.shape, leaf.dtype, leaf.device, leaf.stride()) if isinstance(leaf, Tensor) else leaf
        for leaf in leaves
    )
    try:
        hash(described)
    except TypeError:
        described = tuple(map(repr, described))
    return described, structure


class _Entry:
    """The graph of one set of shapes: a function of its own, with guards of its own.

    PyTorch counts recompilations per code object, and gives up after a few; shapes must not.
    """

    def __init__(self, owner: Compiled) -> None:
        # Not a strong reference: PyTorch's caches hold the function, and uncompiling frees.
        self._owner = weakref.ref(owner)
        self.graphs: list[_Graph] = []
        self.runners: list[Runner] = []
        own = types.FunctionType(
            _call.__code__.replace(co_name=f"{_call.__name__}_{id(self):x}"), _call.__globals__
        )
        compiled = partial(torch.compile, own, backend=self._backend, dynamic=False)
        self._whole, self._pieces = compiled(fullgraph=True), compiled(fullgraph=False)
        self._started = 0.0
        self.why_pieces = self.why_eager = ""

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if not self.runners:
            self._started = time.perf_counter()
        if not self.why_pieces:
            try:
                return self._whole(model, inputs)
            except TorchDynamoException as error:
                # In pieces, with the model's own Python between them; what the model raises itself
                # comes out of that too.
                self.why_pieces = _first_line(error)
                self.graphs.clear()
                self.runners.clear()
        return self._pieces(model, inputs)

    def _backend(self, module: fx.GraphModule, _: list[Any]) -> Any:
        owner = self._owner()
        assert owner is not None  # it is calling
        seconds = time.perf_counter() - (self._started or 0.0)
        graph = _Graph(module, owner, seconds, self.why_pieces)
        self.graphs.append(graph)
        self.runners.append(graph.runner)
        return graph.runner

    def forget(self) -> None:
        """Drops kept results and CUDA graphs; a thread that still runs it makes them again."""
        for runner in self.runners:
            runner.clear()


def _call(model: nn.Module, inputs: dict[str, Any]) -> Any:
    return model._call_impl(**inputs)


class _Graph:
    """A captured graph, fused and split."""

    def __init__(
        self, module: fx.GraphModule, owner: Compiled, seconds: float, why_piece: str = ""
    ) -> None:
        graph, roles = module.graph, owner.roles
        self._seconds, self._why_piece = seconds, why_piece
        started = time.perf_counter()
        for node in graph.nodes:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                # flex_attention: needs a compiler of its own.
                raise NotImplementedError(f"{name_of(node)} is a higher-order operator")
        self._before = len(graph.nodes)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        names = tuple(node.name for node in placeholders)
        of_input = {node.name: _role(node, roles, bool(why_piece)) for node in placeholders}
        self._shapes = {
            _argument_name(node) or _source(node)[3:-2]: tuple(node.meta["example_value"].shape)
            for node in placeholders
            if of_input[node.name] != "weights" and is_tensor(node)
        }
        repair(graph)
        self.why_whole = functionalise(graph)
        module.recompile()
        self.fused: dict[str, int] = {}
        if self.why_whole:
            body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
            programs = [Program("step", module, names, (), len(body))]
        else:
            tidy(graph)
            for name, fuse in PASSES.items():
                if owner.mode == "max" and name in MEMORY:
                    continue
                self.fused[name] = fuse(graph)
                graph.eliminate_dead_code()
            graph.lint()
            programs = split(module, of_input)
        self._after = len(graph.nodes)
        self._unfused = Counter(name_of(node) for node in graph.nodes)
        self._why_unfused = Counter(
            f"{name_of(node)}: {node.meta['left']}" for node in graph.nodes if "left" in node.meta
        )
        build = compile_program if owner.mode == "max" else None
        if self.why_whole:  # what changes its inputs must get the inputs themselves
            self.runner = Runner(programs, names, of_input, None, build)
        else:
            self.runner = Runner(programs, names, of_input, owner.pool, build)
        self._seconds += time.perf_counter() - started

    def finished(self) -> GraphReport:
        """The report of this graph."""
        return GraphReport(
            self._shapes,
            dict(self.fused),
            {name: self._unfused[name] for name in LEFT},
            self._before,
            self._after,
            {p.name: {"nodes": p.nodes, "flops": fake_flops(p)} for p in self.runner.programs},
            self._seconds,
            self.why_whole,
            {name: g.facts() for name, g in self.runner.graphed.items()},
            self._why_piece,
            dict(self._why_unfused),
        )


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


def _first_line(error: Exception) -> str:
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


_WEIGHT = re.compile(r"\b_(parameters|buffers)\[")
_INPUT = re.compile(r"L\['inputs'\]\['(\w+)'\]")
