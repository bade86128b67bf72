"""Functions for PyTorch's front end to compile, used again and again; and what else it would keep.

PyTorch counts recompilations per code object, and keeps what it knows of code objects, backends,
guards and generated sources for as long as the process lives: some 160 KiB for every capture of a
model of two layers. So each set of shapes has a function with code, globals and a backend of its
own, and when it is no longer needed the next set of shapes gets them, emptied: what PyTorch keeps
is bounded by the sets that are in use at once.

A model in pieces is compiled at the code of its own classes too, which others share. That is
forgotten as soon as nothing that is in use was compiled there.
"""

from __future__ import annotations

import builtins
import functools
import itertools
import linecache
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx
from torch._dynamo import convert_frame, eval_frame
from torch.fx import graph_module

_lock = threading.RLock()
_free: list[Slot] = []
_numbers = itertools.count()
_in_pieces = 0  # calls that are running
_dead: list[Any] = []  # backends of slots that were in pieces and are no more


class Owner(Protocol):
    """Whose graphs are captured; it holds what it makes of them."""

    def _backend(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]: ...


class Slot:
    """A function with a body that others have too."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.body = body
        self._owner: Callable[[], Owner | None] = lambda: None
        self._shared = False  # code of others was compiled with its backend
        # Globals of its own, too: PyTorch puts what it has compiled there.
        self._function = types.FunctionType(
            body.__code__.replace(co_name=f"{body.__name__}_{next(_numbers)}"), {}
        )
        self._set_globals()

        def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
            owner = self._owner()
            assert owner is not None  # it is calling
            made = owner._backend(module, inputs)
            return _Weak(made) if self._shared else made

        self._compile = functools.partial(
            torch.compile, self._function, backend=backend, dynamic=False
        )
        self.whole = self._compile(fullgraph=True)
        self._pieces: Any = None

    def _set_globals(self) -> None:
        own = {"__builtins__": builtins, "__name__": self.body.__module__}
        self._function.__globals__.update(own)

    def pieces(self, *args: Any) -> Any:
        """The function compiled as several graphs, with Python between them. ``whole``, which
        is compiled as one or raises, must not be called any more."""
        global _in_pieces
        with _lock:
            if not _in_pieces:
                _forget_dead()
            _in_pieces += 1
            if self._pieces is None:
                self._shared = True
                self._pieces = self._compile(fullgraph=False)
        try:
            return self._pieces(*args)
        finally:
            with _lock:
                _in_pieces -= 1

    def empty(self) -> None:
        """Forgets what was compiled. Nobody may be running it."""
        self._owner = lambda: None
        _detach(_entries(self._function.__code__))
        eval_frame.remove_from_cache(self._function)
        for name in list(self._function.__globals__):
            # PyTorch takes this one out itself when it goes.
            if not name.startswith("__builtins_dict"):
                del self._function.__globals__[name]
        self._set_globals()

    def retire(self) -> None:
        """Not to be used by others, if code of others was compiled: that can be forgotten."""
        with _lock:
            if not self._shared or self._compile.keywords["backend"] in _dead:
                return
            for key, value in list(eval_frame.cached_backends.items()):
                if _innermost(value) is self._compile.keywords["backend"]:
                    del eval_frame.cached_backends[key]
            _dead.append(self._compile.keywords["backend"])


class _Weak:
    """Calls what its owner holds: code of others may be forgotten long after that is gone, and is
    not called again."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = weakref.ref(function)

    def __call__(self, *args: Any) -> Any:
        function = self._function()
        assert function is not None
        return function(*args)


def slot_for(owner: Owner, body: Callable[..., Any]) -> Slot:
    """An empty slot, until the owner is no more; whoever runs its function holds the owner."""
    with _lock:
        found = next((slot for slot in _free if slot.body is body), None)
        if found is not None:
            _free.remove(found)
    slot = Slot(body) if found is None else found
    # Not a strong reference: PyTorch's caches hold the function, and uncompiling frees.
    slot._owner = weakref.ref(owner)
    weakref.finalize(owner, _give_back, slot).atexit = False
    return slot


def _give_back(slot: Slot) -> None:
    slot.empty()
    slot.retire()
    with _lock:
        if not slot._shared:
            _free.append(slot)


def _entries(code: types.CodeType) -> list[Any]:
    """What PyTorch has compiled of a code object."""
    return list(eval_frame._debug_get_cache_entry_list(code))


def _innermost(backend: Any) -> Any:
    backend = eval_frame.innermost_fn(backend)
    return getattr(backend, "compiler_fn", backend)


def _forget_dead() -> None:
    """Forgets code of others where nothing but dead backends' work is left."""
    if not _dead:
        return
    with convert_frame.compile_lock:
        left = []
        for reference in list(convert_frame.input_codes.seen):
            code = reference()
            entries = [] if code is None else _entries(code)
            mine = [_innermost(entry.backend) for entry in entries]
            if mine and all(any(one is dead for dead in _dead) for one in mine):
                _detach(entries)
                eval_frame.remove_from_cache(code)
            else:
                left += mine
        _dead[:] = [dead for dead in _dead if any(one is dead for one in left)]


def _detach(entries: list[Any]) -> None:
    """PyTorch asks to be told when a class, module or function that a guard knows goes, and keeps
    the guard, its tracing state and fake tensors until then. These guards are no more."""
    managers = [entry.guard_manager for entry in entries]
    for finalizer in list(weakref.finalize._registry) if managers else ():  # type: ignore[attr-defined]
        known = finalizer.peek()
        callback = getattr(known[1], "func", None) if known is not None else None
        if getattr(callback, "__name__", "") != "invalidate":
            continue
        mine = getattr(getattr(callback, "__self__", None), "guard_manager", None)
        if any(mine is manager for manager in managers):
            finalizer.detach()


def forget_source(module: fx.GraphModule) -> None:
    """Of the copy that PyTorch has made just before it hands over a captured graph."""
    made = graph_module._loader.eval_cache
    name = next(reversed(made), "")
    header = made.get(name, "").partition("):")[0]
    inputs = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    if all(one in header for one in inputs):
        _drop(name)


def forget_source_later(module: fx.GraphModule) -> None:
    """Of the code that a module has when it goes."""
    kind = type(module)
    weakref.finalize(module, lambda: _drop(kind.forward.__code__.co_filename)).atexit = False


def _drop(name: str) -> None:
    if name.startswith("<eval_with_key>"):
        graph_module._loader.eval_cache.pop(name, None)
        linecache.cache.pop(name, None)
