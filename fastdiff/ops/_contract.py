"""What an op is: one reference, checks, examples and the implementations that must agree with it.

An op is registered as ``torch.ops.fastdiff.<name>``. Its fake and its gradient come from the
reference, so `torch.compile` and autograd work with every implementation.

To add an op `<name>`:
1. `kernels/<name>.py`: the Triton kernels, `select` (the pure launch policy), `launch`, and
   `aot_configs` (every configuration `select` can return). Torch and Triton only.
2. `fastdiff/ops/<name>.py`: `OP = register(Op(name="<name>", ...))` and the public function
   `<name>(...)`, which calls `torch.ops.fastdiff.<name>`. It imports the kernels at the first
   launch, never at import. A C++ implementation is a call on raw pointers through `_ext.ext()`.
3. One line in `fastdiff/ops/__init__.py`.
4. `tests/ops/test_<name>.py`: bad input, and what is special to it.
Conformance, opcheck, gradients, compilation, the interpreter, the compile check, the benchmarks and
the doctor find it through the list.

It is one opaque operator for the compiler (define and impl, not `triton_op`): the C++ call and the
choice between implementations cannot be traced, and what is around it is fused before it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastdiff.hardware import ARCHITECTURES
from fastdiff.tuning import Choice, Key

_LIBRARY = torch.library.Library("fastdiff", "FRAGMENT")

# What an op returns.
Result = torch.Tensor | tuple[torch.Tensor, ...]


def outputs(result: Result) -> tuple[torch.Tensor, ...]:
    """The tensors of a result, one or several."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


@dataclass(frozen=True)
class Call:
    """The arguments of one call, in the order and with the names of the schema."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map_tensors(self, function: Callable[[torch.Tensor], Any]) -> Call:
        """The same call with every tensor replaced by ``function(tensor)``."""

        def one(value: Any) -> Any:
            return function(value) if isinstance(value, torch.Tensor) else value

        return Call(tuple(map(one, self.args)), {k: one(v) for k, v in self.kwargs.items()})

    def double(self) -> Call:
        """The same numbers in float64, for the oracle."""
        return self.map_tensors(lambda t: t.double() if t.is_floating_point() else t)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the call."""
        values = (*self.args, *self.kwargs.values())
        return [value for value in values if isinstance(value, torch.Tensor)]


@dataclass(frozen=True)
class Example:
    """A named case: ``make(device, dtype)`` gives the call. Same numbers on every machine."""

    name: str
    make: Callable[[torch.device | str, torch.dtype], Call]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. ``supports`` gives "" or the reason this call cannot run."""

    name: str
    supports: Callable[..., str]
    run: Callable[..., Result]


@dataclass(frozen=True)
class AotConfig:
    """One kernel specialisation to compile ahead of time, in the terms of ``triton.compile``.

    multiples_of_16: the integer arguments compiled as such; wide loads need them.
    architectures: where the launch policy uses it; empty for everywhere.
    tensor_cores: for an architecture, the SASS instruction that must be there, without its form:
        {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}. A kernel with `tl.dot` says so here.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    label: str
    multiples_of_16: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ()
    tensor_cores: dict[int, str] = field(default_factory=dict)

    @property
    def archs(self) -> tuple[int, ...]:
        """The architectures it is compiled for."""
        return self.architectures or ARCHITECTURES


@dataclass(frozen=True)
class Tuning:
    """What `python -m fastdiff.tune` needs to know of an op's Triton launches.

    example: of a shape and the options of ``--set``; ValueError for a shape it cannot have.
    key, candidates: of a call's arguments. The candidates are (choice, launch) pairs, `select`'s
        first, of which every one is compiled ahead of time; a choice is a flat dict of numbers and
        strings that does not depend on the shape.
    """

    example: Callable[..., Example]
    key: Callable[..., Key]
    candidates: Callable[..., Sequence[tuple[Choice, Any]]]


@dataclass(frozen=True)
class Op:
    """The contract of one op.

    name: the one name that finds the kernel, the contract, the tests and the benchmarks.
    schema: arguments and result in PyTorch's schema language, without the name and without "*"; the
        last argument is ``str impl="auto"``, which the callables below do not receive.
    reference: plain PyTorch; the meaning, the fallback, the source of fake and gradient.
    pattern: the same arguments, the calls as a model writes them, without care for dtype or layout:
        what fusion looks for in a graph, and the eager baseline of the benchmarks.
    check: raises ValueError or TypeError for arguments outside the contract.
    implementations: in order of preference; the reference is added as the last one.
    examples: shapes of real models, by name, the smallest first.
    samples: awkward cases for the conformance tests.
    bytes_moved, flops: of a call, counting every input and output once.
    aot: the launch configurations to compile ahead of time, or None when there is no Triton kernel.
    tuning: how its launches are tuned on the user's GPU, or None when there is nothing to choose.
    numerics: the numerical contract. "bounded": the error against float64 is at most twice that of
        the reference in the same dtype, plus rounding. "exact": the reference's bits.
    fake: empty results with the shapes, strides and dtypes of the reference's; None: the reference
        gives them, which takes milliseconds where it is long. Capturing a model asks for many.
    """

    name: str
    schema: str
    reference: Callable[..., Result]
    pattern: Callable[..., Result]
    check: Callable[..., None]
    implementations: tuple[Implementation, ...]
    examples: tuple[Example, ...]
    samples: tuple[Example, ...]
    bytes_moved: Callable[..., int]
    flops: Callable[..., int]
    aot: Callable[[], Iterable[AotConfig]] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    numerics: str = "bounded"
    prefer: Callable[..., str] | None = None
    tuning: Tuning | None = None
    fake: Callable[..., Result] | None = None

    def implementation_names(self) -> tuple[str, ...]:
        """Every value ``impl`` takes besides "auto"."""
        return (*(impl.name for impl in self.implementations), "reference")

    def why_not(self, name: str, *args: Any, **kwargs: Any) -> str:
        """ "" when the implementation can run this call, else the reason."""
        if name == "reference":
            return ""
        for impl in self.implementations:
            if impl.name == name:
                return impl.supports(*args, **kwargs)
        raise ValueError(
            f"impl must be 'auto' or one of {self.implementation_names()}, got {name!r}"
        )

    def choose(self, impl: str, *args: Any, **kwargs: Any) -> Callable[..., Result]:
        """The function that computes this call.

        ValueError for an unknown name, RuntimeError for a named one that cannot run the call.
        """
        if impl == "auto":
            first = "" if self.prefer is None else self.prefer(*args, **kwargs)
            if first and not self.why_not(first, *args, **kwargs):
                return self.choose(first, *args, **kwargs)
            for candidate in self.implementations:
                if not candidate.supports(*args, **kwargs):
                    return candidate.run
            return self.reference
        reason = self.why_not(impl, *args, **kwargs)
        if reason:
            raise RuntimeError(f"{self.name}: impl={impl!r} cannot run: {reason}")
        if impl == "reference":
            return self.reference
        return next(candidate.run for candidate in self.implementations if candidate.name == impl)

    def __call__(self, *args: Any, impl: str = "auto", **kwargs: Any) -> Any:
        """Through ``torch.ops``, so that compilation, autograd and fakes see one op."""
        return getattr(torch.ops.fastdiff, self.name)(*args, **kwargs, impl=impl)

    def self_check(self, device: str) -> dict[str, str]:
        """Runs the first example through every implementation: name -> "ok ...", "not usable:
        why", or what went wrong."""
        from fastdiff.testing import assert_within_2x

        outcomes = {}
        call = self.examples[0].make(device, torch.float32)
        oracle = outputs(self.reference(*call.double().args, **call.double().kwargs))
        torch_result = outputs(self.reference(*call.args, **call.kwargs))
        for name in self.implementation_names():
            try:
                reason = self.why_not(name, *call.args, **call.kwargs)
                if reason:
                    outcomes[name] = f"not usable: {reason}"
                    continue
                result = outputs(self(*call.args, **call.kwargs, impl=name))
                worst = max(map(assert_within_2x, result, oracle, torch_result))
                outcomes[name] = f"ok, error {worst:.2f} of the allowed"
            except Exception as error:  # the doctor reports whatever breaks
                outcomes[name] = f"{type(error).__name__}: {error}"
        return outcomes


def register(op: Op) -> Op:
    """Defines ``torch.ops.fastdiff.<op.name>`` on CPU and CUDA, with its fake and its gradient."""
    _LIBRARY.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"fastdiff::{op.name}"

    # The dispatcher leaves out arguments that equal their default: bind puts `impl` where it is.
    impl_position = len(getattr(torch.ops.fastdiff, op.name).default._schema.arguments) - 1

    def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
        if len(args) > impl_position:
            return args[impl_position], args[:impl_position]
        return kwargs.pop("impl", "auto"), args

    def compute(*args: Any, **kwargs: Any) -> Result:
        impl, args = split(args, kwargs)
        op.check(*args, **kwargs)
        return op.choose(impl, *args, **kwargs)(*args, **kwargs)

    def fake(*args: Any, **kwargs: Any) -> Result:
        _, args = split(args, kwargs)
        op.check(*args, **kwargs)
        return (op.fake or op.reference)(*args, **kwargs)

    # The schema has no keyword-only arguments (torch.library gives those no gradient), so `inputs`
    # holds all of them, `impl` last.
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        positions = iter(range(len(tensors)))
        ctx.save_for_backward(*tensors)
        ctx.inputs = [
            _Saved(next(positions)) if isinstance(value, torch.Tensor) else value
            for value in inputs[:-1]
        ]

    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[Any, ...]:
        """The reference's gradient, computed again from the inputs: no activation is kept."""
        with torch.enable_grad():
            leaves = [
                tensor.detach().requires_grad_(tensor.is_floating_point())
                for tensor in ctx.saved_tensors
            ]
            result = op.reference(
                *(leaves[v.index] if isinstance(v, _Saved) else v for v in ctx.inputs)
            )
        wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        reached = [
            (value, grad)
            for value, grad in zip(outputs(result), given, strict=True)
            if grad is not None and value.requires_grad
        ]
        found = torch.autograd.grad(
            [value for value, _ in reached],
            [leaves[i] for i in wanted],
            [grad for _, grad in reached],
            allow_unused=True,
        )
        grads = dict(zip(wanted, found, strict=True))
        return (*(grads.get(v.index) if isinstance(v, _Saved) else None for v in ctx.inputs), None)

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(op.name, compute, key)
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return op


@dataclass(frozen=True)
class _Saved:
    """Stands for a tensor that autograd keeps."""

    index: int
