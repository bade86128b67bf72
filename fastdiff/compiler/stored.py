"""Captured graphs on disk, so that the next process need not capture them.

One file of JSON per graph in the folder ``graphs`` of `fastdiff.environment.cache_folder`, named
after the `State` it was captured in. A file holds calls and where their inputs come from, no
weights and no code: functions are named, and only those of PyTorch, ``operator`` and ``math`` that
compute.
"""

from __future__ import annotations

import importlib
import json
import keyword
import math
import os
import re
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from fastdiff.compiler.state import Unstorable
from fastdiff.environment import cache_folder

MAX_BYTES = 1 << 29  # of the folder; the oldest files go
VERSION = 1
# Whose functions may be called, and of those that are not written in C the modules they are of.
MODULES = (
    *("_operator", "math", "torch", "torch.nn.functional", "torch.functional"),
    *("torch._C._nn", "torch._C._linalg", "torch._C._fft", "torch._C._special"),
)
PYTHON = ("torch.nn.functional", "torch.functional", "torch._jit_internal")
NAMESPACES = ("aten", "prims", "fastdiff")
FILES = ("from_file",)
EXTRA = {"builtins:getattr": getattr, "torch._C:_log_api_usage_once": torch._C._log_api_usage_once}
_STEP = re.compile(r"""\.([A-Za-z_]\w*)|\['((?:[^'\\])*)'\]|\[(\d+)\]""")


# --- where things are -----------------------------------------------------------------------------


def steps_of(source: str) -> list[str | int]:
    """The way to a value from the name that PyTorch's front end gives it.

    "L['model']._modules['a'].x[0]" is ["model", ".", "_modules", "a", ".", "x", 0], where "." says
    that an attribute follows. Raises `Unstorable` for names of another kind.
    """
    if not source.startswith("L["):
        raise Unstorable(f"it reads {source or 'a value without a name'}")
    steps: list[str | int] = []
    position = 1
    while position < len(source):
        found = _STEP.match(source, position)
        if found is None:
            raise Unstorable(f"it reads {source}")
        attribute, key, index = found.groups()
        steps += [".", attribute] if attribute else [key] if key is not None else [int(index)]
        position = found.end()
    return steps


def follow(steps: list[str | int], start: dict[str, Any]) -> Any:
    """The value at the end of a way; KeyError, AttributeError, IndexError where it ends before."""
    value: Any = start
    waiting = iter(steps)
    for step in waiting:
        value = getattr(value, str(next(waiting))) if step == "." else value[step]
    return value


# --- functions ------------------------------------------------------------------------------------


def _name_of_function(target: Any) -> str:
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__name__", "")
    if (
        isinstance(target, types.MethodDescriptorType)
        and target.__objclass__ is torch._C.TensorBase
    ):
        module = "torch.Tensor"
    text = f"{module}:{name}"
    if isinstance(target, torch._ops.OpOverload):
        text = f"torch.ops:{target.namespace}:{target._opname}:{target._overloadname}"
    elif isinstance(target, torch._ops.OpOverloadPacket):  # an op that the model calls itself
        text = f"torch.ops:{target._qualified_op_name.replace('::', ':')}"
    try:
        if _function(text) is target:
            return text
    except (ValueError, AttributeError):
        pass
    raise Unstorable(f"it calls {module}.{name}")


def _function(text: str) -> Any:
    """The function of a name; ValueError where it is not one that a graph may call."""
    if text in EXTRA:
        return EXTRA[text]
    module, *rest = text.split(":")
    if all(part.isidentifier() for part in rest) and rest and rest[-1] not in FILES:
        if module == "torch.ops" and len(rest) in (2, 3) and rest[0] in NAMESPACES:
            packet = getattr(getattr(torch.ops, rest[0]), rest[1])
            op = getattr(packet, rest[2]) if rest[2:] else packet
            if isinstance(op, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
                return op
        if module == "torch.Tensor" and not rest[0].startswith("__"):
            return getattr(Tensor, rest[0])
        if module in MODULES:
            found = getattr(importlib.import_module(module), rest[0])
            builtin = isinstance(found, types.BuiltinFunctionType)
            if builtin or getattr(found, "__module__", "") in PYTHON:
                return found
    raise ValueError(f"{text} may not be called")


# --- arguments ------------------------------------------------------------------------------------

_NAMED: dict[type, str] = {
    torch.dtype: "dtype",
    torch.layout: "layout",
    torch.memory_format: "memory_format",
}


def _encode(value: Any) -> Any:
    kind = type(value)
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is list or isinstance(value, fx.immutable_collections.immutable_list):
        return [_encode(item) for item in value]
    if isinstance(value, (tuple, torch.Size)) and (kind in (tuple, torch.Size)):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"dict": {key: _encode(item) for key, item in value.items()}}
    if kind is slice:
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": 0}
    if kind is torch.device:
        return {"device": str(value)}
    if kind in _NAMED:
        return {"torch": str(value).removeprefix("torch.")}
    raise Unstorable(f"a call has an argument of type {kind.__name__}")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == "node":
        return nodes[inside]
    if kind == "float":
        return float(inside)
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in inside)
    if kind == "dict":
        return {key: _decode(item, nodes) for key, item in inside.items()}
    if kind == "slice":
        return slice(*(_decode(part, nodes) for part in inside))
    if kind == "ellipsis":
        return Ellipsis
    if kind == "device":
        return torch.device(inside)
    found = getattr(torch, inside) if kind == "torch" else None
    if type(found) not in _NAMED:
        raise ValueError(f"{value} is no argument of a call")
    return found


# --- graphs ---------------------------------------------------------------------------------------


def encode(graph: fx.Graph, source: Callable[[fx.Node], str]) -> dict[str, Any]:
    """A captured graph as plain data. Raises `Unstorable`.

    source: what PyTorch's front end calls the origin of a placeholder.
    """
    nodes: list[dict[str, Any]] = []
    stacks: dict[str, int] = {}
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("example_value")):
            sizes = value.shape if isinstance(value, Tensor) else (value,)
            if any(
                isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) for size in sizes
            ):
                raise Unstorable("a shape depends on values")
        made: dict[str, Any] = {"op": node.op, "name": node.name}
        if node.op == "placeholder":
            made["from"] = steps_of(source(node))
        elif node.op == "output":
            made["args"] = _encode(node.args)
        elif node.op in ("call_function", "call_method"):
            function = node.op == "call_function"
            made["target"] = _name_of_function(node.target) if function else str(node.target)
            if not function and made["target"].startswith("__"):
                raise Unstorable(f"it calls {made['target']}")
            made["args"], made["kwargs"] = _encode(node.args), _encode(dict(node.kwargs))
            modules = [(key, where[0]) for key, where in _stack(node).items()]
            made["in"] = stacks.setdefault(json.dumps(modules), len(stacks))
        else:
            raise Unstorable(f"it holds {node.target}, which is no call of a function")
        nodes.append(made)
    return {"nodes": nodes, "modules": [json.loads(stack) for stack in stacks]}


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    return node.meta.get("nn_module_stack") or {}


def decode(data: dict[str, Any], start: dict[str, Any]) -> fx.GraphModule:
    """The graph again, as the front end would give it: with fake values and origins.

    start: what the ways of the placeholders begin at. Raises ValueError, KeyError, TypeError,
    AttributeError or IndexError for data that `encode` did not make, RuntimeError where calls do
    not fit their inputs.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    stacks = [{str(key): (str(path), "") for key, path in stack} for stack in data["modules"]]
    mode = FakeTensorMode()
    for made in data["nodes"]:
        name = _identifier(made["name"])
        if made["op"] == "placeholder":
            node = graph.placeholder(name)
            real = follow(made["from"], start)
            if not isinstance(real, Tensor):
                raise ValueError(f"{made['from']} is no tensor")
            node.meta["example_value"] = mode.from_tensor(real, static_shapes=True)
            node.meta["grapharg"] = types.SimpleNamespace(example=real)
            node._dynamo_source = types.SimpleNamespace(name=_source(made["from"]))  # type: ignore[attr-defined]
        elif made["op"] == "output":
            graph.output(*_decode(made["args"], nodes))
            continue
        else:
            args, kwargs = _decode(made["args"], nodes), _decode(made["kwargs"], nodes)
            method = made["op"] == "call_method"
            target: Any = _method(made["target"]) if method else _function(made["target"])
            if target is getattr and (len(args) < 2 or str(args[1]).startswith("__")):
                raise ValueError(f"getattr may not have the arguments {args}")
            node = graph.create_node(made["op"], target, args, kwargs, name)
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["example_value"])
            call = getattr(Tensor, target) if method else target
            with mode, torch.no_grad():
                node.meta["example_value"] = call(*values[0], **values[1])
            node.meta["nn_module_stack"] = stacks[made["in"]]
        if node.name != name:
            raise ValueError(f"{name} is the name of two calls")
        nodes[name] = node
    return fx.GraphModule(torch.nn.Module(), graph)


def _identifier(name: Any) -> str:
    """A name that code may be made of."""
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{name!r} is no name of a call")
    return name


def _method(name: Any) -> str:
    if _identifier(name).startswith("__"):
        raise ValueError(f"{name} may not be called")
    return str(name)


def _source(steps: list[str | int]) -> str:
    text, waiting = "L", iter(steps)
    for step in waiting:
        text += f".{next(waiting)}" if step == "." else f"[{step!r}]"
    return text


# --- results --------------------------------------------------------------------------------------


def encode_result(result: Any, outputs: Any, inputs: Any) -> dict[str, Any]:
    """How the model's result is made of the graph's outputs, as plain data. Raises `Unstorable`."""
    leaves, structure = pytree.tree_flatten(result)
    given = pytree.tree_leaves(inputs)
    made: list[Any] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            made.append({"value": _encode(leaf)})
            continue
        places = [("output", outputs), ("input", given)]
        found = [{k: i} for k, all_ in places for i, one in enumerate(all_) if one is leaf]
        if not found:
            raise Unstorable("it returns a tensor that is neither computed nor given")
        made.append(found[0])
    try:
        text = pytree.treespec_dumps(structure)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Unstorable(f"it returns a {type(result).__name__}: {error}") from error
    return {"structure": text, "leaves": made}


class Result:
    """Makes the model's result of the graph's outputs and the inputs."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._structure = pytree.treespec_loads(data["structure"])
        self._leaves = [next(iter(leaf.items())) for leaf in data["leaves"]]
        if self._structure.num_leaves != len(self._leaves):
            raise ValueError("leaves must be as many as the structure has")

    def __call__(self, outputs: Any, inputs: Any) -> Any:
        given = pytree.tree_leaves(inputs) if any(k == "input" for k, _ in self._leaves) else ()
        places = {"output": outputs, "input": given}
        leaves = [
            _decode(what, {}) if kind == "value" else places[kind][what]
            for kind, what in self._leaves
        ]
        return pytree.tree_unflatten(leaves, self._structure)


# --- files ----------------------------------------------------------------------------------------


def path_of(key: str) -> Path:
    """Where the graph of a state is stored. FileNotFoundError without a folder to be in."""
    return cache_folder() / "graphs" / f"{key}.json"


def read(key: str) -> dict[str, Any] | None:
    """What was stored for a state; None where nothing is, or (with a warning) nothing readable."""
    try:
        path = path_of(key)
        data = json.loads(path.read_text(encoding="utf-8"))
        os.utime(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"a stored graph is not used: {error}", RuntimeWarning, stacklevel=2)
        return None
    return data if isinstance(data, dict) and data.get("version") == VERSION else None


def write(key: str, data: dict[str, Any]) -> None:
    """Stores a graph, whole or not at all. Raises OSError."""
    path = path_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=".new.", delete=False
    ) as file:
        json.dump({"version": VERSION, **data}, file)
    try:
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise
    _prune(path.parent)


def _prune(folder: Path) -> None:
    """Removes the files that were not used for longest, while they are more than `MAX_BYTES`."""
    found = []
    for path in folder.glob("*.json"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # another process
            continue
        found.append((facts.st_mtime, facts.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= MAX_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size
