"""What a captured graph depends on besides the contents of tensors: structure, settings and code.

PyTorch's own guards do not outlive a process. A graph that was stored by an earlier one is used
again where all this is the same: the tree of modules with every attribute, the code that
``forward`` can reach by the names it mentions (of PyTorch and of the standard library the names
alone, with the version), the shapes and settings of the inputs, and PyTorch's own settings.
"""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import logging
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff._version import __version__

# Changes when what is looked at does.
FORMAT = 1
# Code that the versions identify: their names are looked at, not their code.
KNOWN = frozenset((*sys.stdlib_module_names, "torch", "numpy", "triton", "fastdiff", "__builtin__"))
# Of those, the modules whose names somebody may have given another meaning: an attention of another
# library in the place of PyTorch's. Others are filled while a process runs.
REPLACED = (
    *("torch", "torch.nn", "torch.nn.functional", "torch.functional", "torch.linalg", "torch.fft"),
    *("torch.special", "torch.amp"),
)
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), slice, range)
TORCH_PLAIN = (torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# Of every module: looked at apart, or without a meaning for a call that needs no gradients.
SKIPPED = frozenset(
    (
        *HOOKS,
        *("_compiled_call_impl", "_is_full_backward_hook", "_non_persistent_buffers_set"),
        *("_backward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs"),
        *("_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks"),
        *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    )
)
# A list that diffusers makes of a set: in another order in every process.
UNORDERED = "_use_default_values"
MOST = 200_000  # values looked at


class Unstorable(Exception):
    """Something that has no description which holds in another process; the message says what."""


class State:
    """A description of a model and of the inputs of one call.

    key: the same hexadecimal digits in every process where everything is the same. Raises
    `Unstorable`.
    """

    def __init__(self, model: nn.Module, inputs: Any, settings: Any = None) -> None:
        walk = _Walk()
        self._ambient = ambient()
        for part in (FORMAT, __version__, str(torch.__version__), sys.version):
            walk.value(part, "version")
        walk.value((self._ambient, settings), "settings")
        walk.value(model, type(model).__name__)
        walk.value(inputs, "inputs", watch=False)
        walk.code()
        self.key = walk.digest()
        self._watched = walk.watched

    def unchanged(self, tensors: bool = True) -> bool:
        """Whether everything of the model is the same object as when this was made.

        False says nothing: an attribute may have been set to an equal value. tensors: whether they
        must be where they were, too.
        """
        try:
            same = ambient() == self._ambient
        except Unstorable:
            return False
        return same and all(
            watched.unchanged()
            for watched in self._watched
            if tensors or not isinstance(watched, _Tensors)
        )


def ambient() -> tuple[Any, ...]:
    """The settings of PyTorch that change what a model's code does.

    Raises `Unstorable` where functions are overridden.
    """
    if torch._C._len_torch_function_stack():
        raise Unstorable("a mode overrides PyTorch's functions")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_cache_enabled(),
        *(
            (device, torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
            if torch.is_autocast_enabled(device)
        ),
    )


class _Dict:
    """A dictionary's keys and the objects in it, which are held, so that no id comes twice."""

    def __init__(self, watched: dict[Any, Any]) -> None:
        self._dict, self._keys = watched, list(watched)
        self._ids = list(map(id, watched.values()))
        # But for what stands in for the model's call: that is who holds this.
        self._held = [v for k, v in watched.items() if k != "_compiled_call_impl"]

    def unchanged(self) -> bool:
        return list(map(id, self._dict.values())) == self._ids and list(self._dict) == self._keys


class _List:
    def __init__(self, watched: list[Any] | set[Any]) -> None:
        self._list, self._held = watched, list(watched)
        self._ids = list(map(id, self._held))

    def unchanged(self) -> bool:
        return list(map(id, self._list)) == self._ids


class _Names:
    """Names in the namespace of a module or a class, and what they mean."""

    def __init__(self, space: dict[str, Any] | type) -> None:
        self.space = vars(space) if isinstance(space, type) else space
        self.found: dict[str, Any] = {}

    def unchanged(self) -> bool:
        get = self.space.get
        return all(get(name, _Names) is value for name, value in self.found.items())


class _Module:
    """A module's class, which some libraries exchange, and that it has no hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._kind = module, type(module)
        self._dicts = [getattr(module, name) for name in HOOKS]

    def unchanged(self) -> bool:
        return type(self._module) is self._kind and not any(self._dicts)


class _Tensors:
    """Where tensors are and what they are: ``.to()`` leaves a parameter the same object."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor, tuple[Any, ...]]] = []

    def add(self, tensor: Tensor) -> None:
        self._found.append((tensor, self._facts(tensor)))

    @staticmethod
    def _facts(tensor: Tensor) -> tuple[Any, ...]:
        return tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape

    def unchanged(self) -> bool:
        facts = self._facts
        return all(facts(tensor) == known for tensor, known in self._found)


class _Cells:
    """The variables of enclosing functions."""

    def __init__(self) -> None:
        self.found: list[tuple[types.CellType, Any]] = []

    def unchanged(self) -> bool:
        try:
            return all(cell.cell_contents is value for cell, value in self.found)
        except ValueError:  # empty now
            return False


class _Walk:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._tensors, self._cells = _Tensors(), _Cells()
        self.watched: list[Any] = [self._tensors, self._cells]
        self._numbers: dict[int, int] = {}  # of objects that were described: the second is a number
        self._held: list[Any] = []
        self._names: dict[str, None] = {}  # that code mentions, in order
        self._classes: dict[int, type] = {}
        self._modules: dict[int, types.ModuleType] = {}
        self._spaces: dict[int, _Names] = {}
        self._functions: dict[int, Any] = {}

    def digest(self) -> str:
        return self._hash.hexdigest()

    def _emit(self, *parts: Any) -> None:
        self._hash.update(("\0".join(map(str, parts)) + "\1").encode(errors="surrogatepass"))

    def _again(self, value: Any) -> bool:
        """Whether an object was described before; it is numbered."""
        number = self._numbers.get(id(value))
        if number is not None:
            self._emit("again", number)
            return True
        if len(self._numbers) > MOST:
            raise Unstorable(f"more than {MOST} values belong to it")
        self._numbers[id(value)] = len(self._numbers)
        self._held.append(value)
        return False

    def value(self, value: Any, path: str, watch: bool = True) -> None:
        """Describes anything."""
        kind = type(value)
        if kind in PLAIN or isinstance(value, TORCH_PLAIN):
            self._emit(kind.__name__, repr(value))
        elif isinstance(value, enum.Enum):
            self._emit(kind.__qualname__, value.name)
        elif self._again(value):
            pass
        elif isinstance(value, Tensor):
            self._tensor(value, path, watch)
        elif isinstance(value, nn.Module):
            self._module(value, path)
        elif isinstance(value, (dict, types.MappingProxyType)):
            self._mapping(value, path, watch)
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            self._sequence(value, path, watch)
        elif isinstance(value, types.ModuleType):
            self._emit("module", value.__name__)
            if not _is_known(value.__name__) or value.__name__ in REPLACED:
                self._modules[id(value)] = value
        elif isinstance(value, logging.Logger):
            self._emit("logger", value.name)
        elif isinstance(value, weakref.ref):
            self.value(value(), path, watch)
        elif isinstance(value, type):
            self._class(value)
        elif _is_code(value):
            self._function(value, path)
        elif getattr(value, "__dict__", None) is not None and not hasattr(kind, "__slots__"):
            self._emit("object")
            self._class(kind)
            self.value(vars(value), path, watch)
        else:
            raise Unstorable(f"{path} is a {kind.__module__}.{kind.__qualname__}")

    def _tensor(self, value: Tensor, path: str, watch: bool) -> None:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.layout != torch.strided:
            raise Unstorable(f"{path} is a {type(value).__name__} of layout {value.layout}")
        self._emit("tensor", value.dtype, value.device, *value.shape, "by", *value.stride())
        if watch:
            self._tensors.add(value)

    def _module(self, module: nn.Module, path: str) -> None:
        if any(getattr(module, name) for name in HOOKS):
            raise Unstorable(f"{path} has hooks")
        self.watched.append(_Module(module))
        self._emit("module")
        self._class(type(module))
        state = vars(module)
        self.watched.append(_Dict(state))
        for name, value in state.items():
            if name not in SKIPPED:
                self._emit(name)
                self.value(value, f"{path}.{name}")

    def _mapping(self, value: Any, path: str, watch: bool) -> None:
        self._emit(type(value).__qualname__, len(value))
        if watch and isinstance(value, dict):
            self.watched.append(_Dict(value))
        for key, item in value.items():
            self.value(key, path, watch)
            if key != UNORDERED:
                self.value(item, f"{path}.{key}", watch)
        if hasattr(value, "__dict__") and type(value) is not dict:
            self.value({k: v for k, v in vars(value).items() if v is not value}, path, False)

    def _sequence(self, value: Any, path: str, watch: bool) -> None:
        self._emit(type(value).__qualname__, len(value))
        items: Iterable[Any] = value
        if isinstance(value, (set, frozenset)):
            if not all(isinstance(item, (*PLAIN, *TORCH_PLAIN)) for item in value):
                raise Unstorable(f"{path} is a set without an order")
            items = sorted(value, key=repr)
        if watch and isinstance(value, (list, set)):
            self.watched.append(_List(value))
        for number, item in enumerate(items):
            self.value(item, f"{path}[{number}]", watch)

    # --- code -------------------------------------------------------------------------------------

    def _class(self, kind: type) -> None:
        self._emit("class", kind.__module__, kind.__qualname__)
        for base in kind.__mro__:
            if base is not object and id(base) not in self._classes:
                self._classes[id(base)] = base
                self._name("forward" if issubclass(base, nn.Module) else "__call__")

    def _name(self, name: str) -> None:
        self._names.setdefault(name)

    def _function(self, value: Any, path: str) -> None:
        """Notes a function, and describes what it is bound to."""
        if isinstance(value, functools.partial):
            self._emit("partial")
            self.value((value.func, value.args, value.keywords), path)
            return
        if isinstance(value, types.MethodType):
            self._emit("method")
            self.value(value.__self__, path)
            value = value.__func__
        value = getattr(value, "__wrapped__", value) if not _code_of(value) else value
        module = getattr(value, "__module__", None) or ""
        self._emit("function", module, getattr(value, "__qualname__", type(value).__qualname__))
        code = _code_of(value)
        if code is None or _is_known(module):
            return
        if id(value) in self._functions:
            return
        self._functions[id(value)] = value
        for name in _code(code, self._emit):
            self._name(name)
        self.value((value.__defaults__, value.__kwdefaults__), f"{module}.{value.__qualname__}")
        for cell in value.__closure__ or ():
            try:
                inside = cell.cell_contents
            except ValueError:  # empty
                continue
            self._cells.found.append((cell, inside))
            self._loose(inside, f"{module}.{value.__qualname__}")

    def _loose(self, value: Any, path: str) -> None:
        """What a name in code means. Objects that have no description are known by their class."""
        try:
            self.value(value, path)
        except Unstorable:
            self._emit(type(value).__module__, type(value).__qualname__)

    def code(self) -> None:
        """Follows the names that code mentions, until nothing new is found."""
        before = -1
        while before != (now := self._size()):
            before = now
            for function in list(self._functions.values()):
                self._resolve(function.__globals__)
            for module in list(self._modules.values()):
                self._resolve(vars(module))
            for kind in list(self._classes.values()):
                if _is_known(kind.__module__):
                    if "forward" in vars(kind):
                        self._look(kind, "forward")
                else:
                    self._resolve(kind)

    def _size(self) -> int:
        spaces = sum(len(space.found) for space in self._spaces.values())
        known = len(self._names) + len(self._classes) + len(self._modules) + len(self._functions)
        return known + spaces

    def _resolve(self, space: Any) -> None:
        known = self._space(space).found
        inside = vars(space) if isinstance(space, type) else space
        for name in [name for name in self._names if name not in known and name in inside]:
            self._look(space, name)

    def _space(self, space: dict[str, Any] | type) -> _Names:
        found = self._spaces.get(id(space))
        if found is None:
            found = self._spaces[id(space)] = _Names(space)
            self.watched.append(found)
        return found

    def _look(self, space: dict[str, Any] | type, name: str) -> None:
        """Describes what a name means in a namespace."""
        names = self._space(space)
        if name in names.found:
            return
        value = names.found[name] = names.space[name]
        if isinstance(value, types.ModuleType) and names.space is vars(torch):
            self._modules |= {id(value): value} if value.__name__ in REPLACED else {}
            return  # some of PyTorch's are there only once they were used
        path = space.__qualname__ if isinstance(space, type) else space.get("__name__", "")
        self._emit("name", path, name)
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = (value.fget,)
        if isinstance(value, functools.cached_property):
            value = value.func
        self._loose(value, f"{path}.{name}")


def _is_known(module: str) -> bool:
    return module.partition(".")[0] in KNOWN


_CALLABLE = (
    *(types.BuiltinFunctionType, types.MethodType, types.MethodDescriptorType),
    *(types.WrapperDescriptorType, functools.partial, functools._lru_cache_wrapper),
    *(torch._ops.OpOverload, torch._ops.OpOverloadPacket),
)


def _is_code(value: Any) -> bool:
    return callable(value) and (_code_of(value) is not None or isinstance(value, _CALLABLE))


def _code_of(function: Any) -> types.CodeType | None:
    code = getattr(function, "__code__", None)
    return code if isinstance(code, types.CodeType) else None


def _code(code: types.CodeType, emit: Any) -> Iterator[str]:
    """Describes code; gives the names that it mentions."""
    emit("code", code.co_code.hex(), code.co_flags, *code.co_varnames, "free", *code.co_freevars)
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code(constant, emit)
        elif isinstance(constant, frozenset):
            emit("frozenset", *sorted(map(repr, constant)))
        else:
            emit("constant", repr(constant))
    emit("names", *code.co_names)
