"""A model whose calls run as captured, fused programs."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from fastdiff.compiler.captured import Entry, Graph, first_line
from fastdiff.compiler.cuda_graphs import Droppable, Pool
from fastdiff.compiler.lora import Scales, take_scale
from fastdiff.compiler.options import Options
from fastdiff.compiler.passes.quantize import errors
from fastdiff.compiler.precision import Cast, cast, dtypes, instructions
from fastdiff.compiler.reports import Report
from fastdiff.compiler.runner import Runner, instead

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
# Numbers that loops change and models only multiply with.
FACTORS = ("conditioning_scale", "controlnet_conditioning_scale")


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


class _Seen(Exception):
    """What a call would run; thrown through PyTorch's front end, which has looked at its guards."""

    def __init__(self, runner: Runner, values: dict[str, Any]) -> None:
        super().__init__()
        self.runner, self.values = runner, values


def _stop(runner: Runner, values: dict[str, Any]) -> None:
    raise _Seen(runner, values)


class Compiled:
    """Stands in for a module's call; see ``fastdiff.compile``.

    options: see `Options`.
    token: gives an object that is another one in each sampling run; length: the number of its
    steps, or None; see `Runner`.
    lock: taken before the pool's. trajectories: recorded for ``fastdiff.sample``, by what they are
    made for; the least recently used first. stepwise: why runs of it were none, with counts.
    """

    token: Callable[[], Any] | None = None
    length: Callable[[], int | None] | None = None

    def __init__(
        self, model: nn.Module, options: Options, roles: Mapping[str, str] | None = None
    ) -> None:
        self.model = model
        self.signature = inspect.signature(model.forward)
        self.roles = roles_of(model, roles)
        self.options = options
        before = getattr(model, "_compiled_call_impl", None)
        known = before.cast if isinstance(before, Compiled) else None
        self.cast: Cast | None = cast(model, options.dtype, self.roles, known)
        self._errors: dict[str, tuple[Any, dict[str, float]]] = {}
        self.pool: Pool | None = None
        if options.cuda_graphs:
            self.pool = Pool(max_bytes=options.max_graph_bytes)
        self._entries: OrderedDict[Any, Entry] = OrderedDict()
        self._eager: Counter[str] = Counter()
        self.lock = threading.RLock()
        self._scales = Scales()
        self._captures = 0
        self.trajectories: OrderedDict[Any, Droppable] = OrderedDict()
        self.stepwise: Counter[str] = Counter()
        self._find_hooks()

    def seen(self, *args: Any, **kwargs: Any) -> tuple[Graph, dict[str, Any]] | str:
        """What a call would run: its graph and the graph's inputs by name; or why there is no one.

        Nothing is computed. For new shapes the graph is captured.
        """
        reason = self._why_eager(args, kwargs)
        if reason:
            return reason
        inputs = self._bind(args, kwargs)
        with self._scaled(inputs):
            _, entry = self._entry(inputs)
            try:
                if not entry.why_eager:
                    with instead(_stop):
                        entry(self.model, inputs, self.cast, pieces=False)
            except _Seen as seen:
                self._bound()
                graph = next(g for g in entry.graphs if g.runner is seen.runner)
                return graph, seen.values
            except TorchDynamoException as error:
                entry.why_eager = f"it cannot be captured: {first_line(error)}"
        if entry.why_pieces:
            return f"it is captured in pieces: {entry.why_pieces}"
        return entry.why_eager or "its graph is empty"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._why_eager(args, kwargs)
        if reason:
            return self._run_eager(reason, args, kwargs)
        inputs = self._bind(args, kwargs)
        with self._scaled(inputs):
            key, entry = self._entry(inputs)
            try:
                if not entry.why_eager:
                    result = entry(self.model, inputs, self.cast)
                    self._bound()
                    return result if self.cast is None else self.cast.result(result, inputs)
            except TorchDynamoException as error:
                # Before anything has run: PyTorch's front end cannot capture this.
                entry.why_eager = f"it cannot be captured: {first_line(error)}"
            except BaseException:
                self._abandon(key, entry)
                raise
        try:
            result = self._run_eager(entry.why_eager, args, kwargs)
        except BaseException:
            self._abandon(key, entry)
            raise
        entry.complete = True
        self._bound()
        return result

    def _run_eager(self, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._eager[reason] += 1
        if self.cast is None:
            return self.model._call_impl(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        bound = self.cast.bound(bound)
        return self.cast.result(self.model._call_impl(*bound.args, **bound.kwargs), given)

    @contextlib.contextmanager
    def _scaled(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Within it the scales of LoRA layers are tensors, with the scale of this call in them."""
        if not getattr(self.model, "peft_config", None) and not self._scales:
            yield
            return
        with self.lock:
            scale = take_scale(inputs)
            self._scales.place(self.model, scale)
            try:
                yield
            finally:
                if scale != 1:
                    self._scales.restore()

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
        hooks = getattr(getattr(self.model, "_diffusers_hook", None), "hooks", None)
        if hooks:
            return f"hooks of diffusers are set on it ({', '.join(hooks)})"
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
            elif number and name in FACTORS:
                # Not on the device: there it would be rounded to the dtype of what it multiplies.
                inputs[name] = torch.tensor(value, dtype=torch.float64)
        return inputs

    def _entry(self, inputs: dict[str, Any]) -> tuple[Any, Entry]:
        key = _shapes_key(inputs), self._hooks()
        with self.lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry(self)
            else:
                self._entries.move_to_end(key)
        return key, entry

    def _hooks(self) -> tuple[Any, ...]:
        """The hooks of all modules, by number: PyTorch's guards do not look at them."""
        hooks = self._hook_tables
        if not any(hooks):
            return ()
        return tuple((i, *table) for i, table in enumerate(hooks) if table)

    def _bound(self) -> None:
        """Lets the least recently used go; after a call, so that one that fails costs nobody."""
        with self.lock:
            while len(self._entries) > self.options.max_graphs:
                _, oldest = self._entries.popitem(last=False)
                oldest.close()

    def _abandon(self, key: Any, entry: Entry) -> None:
        """Forgets what an error has left half done."""
        with self.lock:
            if not entry.complete and self._entries.get(key) is entry:
                del self._entries[key]
                entry.close()

    def clear(self) -> None:
        """Forgets all graphs and all kept results."""
        with self.lock:
            for entry in self._entries.values():
                entry.close()
            self._entries.clear()
            self.trajectories.clear()
            if self.pool is not None:
                self.pool.clear()

    def close(self) -> None:
        """The model is as it was before."""
        self.clear()
        with self.lock:
            self._scales.restore(numbers=True)
            for trajectory in self.trajectories.values():
                trajectory.drop()
            self.trajectories.clear()

    def captured(self) -> None:
        """Counts a graph."""
        self._captures += 1
        self.loaded()

    def loaded(self) -> None:
        """There is a new graph: modules may be others now."""
        self._find_hooks()

    def _find_hooks(self) -> None:
        # Not the modules: those that are exchanged must not stay in memory.
        modules = list(self.model.modules())
        self._hook_tables = [module._forward_pre_hooks for module in modules]
        self._hook_tables += [module._forward_hooks for module in modules]

    def report(self) -> Report:
        """What was captured, fused, hoisted, and what was not, with reasons."""
        with self.lock:
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
            self._captures,
            "" if self.cast is None else f"{self.cast.before} to {self.cast.after}",
            self.options.quantize or "",
            *self._quantized(entries),
            unstored=list(
                dict.fromkeys(e.shelf.why_not for e in entries if e.shelf and e.shelf.why_not)
            ),
            stepwise=dict(self.stepwise),
            cache="" if self.options.cache is None else self.options.cache.kind,
            dtype=dtypes(self.model),
            instructions=instructions() if _on_cpu(self.model) else "",
        )

    def _quantized(self, entries: list[Entry]) -> tuple[dict[str, Any], dict[str, str]]:
        """(layer -> its errors, the worst first; layer -> why it is not quantised)."""
        graphs = [graph for entry in entries for graph in entry.graphs]
        left = {name: why for graph in graphs for name, why in graph.unquantized.items()}
        found: dict[str, dict[str, float]] = {}
        for name in dict.fromkeys(name for graph in graphs for name in graph.quantized):
            weight = self.model.get_parameter(f"{name}.weight")
            key = (weight.data_ptr(), None if weight.is_inference() else weight._version)
            known, values = self._errors.get(name, (None, {}))
            if known != key:
                values = errors(weight, str(self.options.quantize))
                self._errors[name] = key, values
            found[name] = values
            left.pop(name, None)
        return dict(sorted(found.items(), key=lambda item: -item[1]["output"])), left


def _device(inputs: dict[str, Any]) -> torch.device:
    first = next((v for v in inputs.values() if isinstance(v, Tensor)), None)
    return torch.device("cpu") if first is None else first.device


def _shapes_key(inputs: dict[str, Any]) -> Any:
    """What one entry is for: layouts, which tensors are the same one, and all other values."""
    leaves, structure = torch.utils._pytree.tree_flatten(inputs)
    first: dict[int, int] = {}
    described: tuple[Any, ...] = tuple(
        (leaf.shape, leaf.dtype, leaf.device, leaf.stride(), first.setdefault(id(leaf), i))
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf)
        for i, leaf in enumerate(leaves)
    )
    try:
        hash(described)
    except TypeError:
        described = tuple(map(repr, described))
    return described, structure


def _on_cpu(model: nn.Module) -> bool:
    return any(p.device.type == "cpu" for p in model.parameters())
