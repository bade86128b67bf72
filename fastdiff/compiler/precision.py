"""``dtype=``: a model in another precision, for callers that keep theirs."""

from __future__ import annotations

import inspect
import os
import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff._ext import ext


@dataclass(frozen=True)
class Cast:
    """before, after: the model's dtypes. sample: the argument whose dtype results have. kept:
    arguments that stay what they are: times, which 8 bits do not tell apart."""

    before: torch.dtype
    after: torch.dtype
    sample: str
    kept: tuple[str, ...]

    def inputs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Tensors in the model's old dtype in the new one, also within lists and dictionaries.

        Not what is called ...ids: positions and sizes. Part of captured graphs, so that what a
        condition is cast to is kept.
        """
        return {
            name: value if name in self.kept or name.endswith("ids") else self._cast(value)
            for name, value in values.items()
        }

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.after) if value.dtype == self.before else value
        if type(value) is dict:
            return self.inputs(value)
        if type(value) is list:
            return [self._cast(item) for item in value]
        if type(value) is tuple:
            return tuple([self._cast(item) for item in value])
        return value

    def bound(self, bound: inspect.BoundArguments) -> inspect.BoundArguments:
        """The same for the arguments of a call."""
        rest = [p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        arguments = self.inputs(bound.arguments)
        arguments |= {name: self.inputs(arguments[name]) for name in rest if name in arguments}
        bound.arguments.clear()
        bound.arguments.update(arguments)
        return bound

    def result(self, result: Any, given: Mapping[str, Any]) -> Any:
        """What a model returned, for a caller whose sample is in the old dtype: in that one."""
        sample = given.get(self.sample)
        if not isinstance(sample, Tensor) or sample.dtype != self.before:
            return result
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda t: t.to(self.before) if t.dtype == self.after else t, result
        )


def multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products (AMX, AVX512_BF16), and oneDNN may use them:
    ``ONEDNN_MAX_CPU_ISA`` counts. bf16 that is computed otherwise is slower than float32."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    may = most in ("", "ALL", "DEFAULT") or any(name in most for name in _WITH_BF16)
    return may and bool(torch.cpu._is_avx512_bf16_supported())  # all that have AMX have it


# In the names of oneDNN's instruction sets with bf16 products.
_WITH_BF16 = ("BF16", "FP16", "AMX", "AVX10")


def _chosen(model: nn.Module, known: Cast | None) -> torch.dtype | None:
    """What "auto" stands for."""
    if known is not None and known.after == torch.bfloat16:
        return known.after  # chosen before
    kinds = {(p.device.type, p.dtype) for p in model.parameters() if p.is_floating_point()}
    here = kinds == {("cpu", torch.float32)}
    return torch.bfloat16 if here and multiplies_bf16() else None


def instructions() -> str:
    """What the C++ kernels and PyTorch's layers compute with on this CPU."""
    module = ext()
    mine = "none, no extension"
    if module is not None:
        level = module.attention_level()
        mine = module.isa_name() + {3: ", AVX512_BF16", 4: ", AMX"}.get(level, "")
    most = os.environ.get("ONEDNN_MAX_CPU_ISA")
    theirs = torch.backends.cpu.get_cpu_capability()
    theirs += f", oneDNN up to {most}" if most else ""
    products = "with" if multiplies_bf16() else "without"
    return f"kernels {mine}; PyTorch {theirs}, {products} bfloat16 products"


def dtypes(model: nn.Module) -> str:
    """Those of its weights, the most frequent first."""
    floating = (p for p in model.parameters() if p.is_floating_point())
    found = Counter(str(p.dtype).removeprefix("torch.") for p in floating)
    return ", ".join(name for name, _ in found.most_common())


def cast(
    model: nn.Module, dtype: torch.dtype | str | None, roles: Mapping[str, str], known: Cast | None
) -> Cast | None:
    """Casts a model in place; None where there is nothing to cast.

    The parts that a model of diffusers keeps in float32 stay so. known: what an earlier call did.
    ValueError for a model that another library has quantised.
    """
    if dtype == "auto":
        dtype = _chosen(model, known)
    if dtype is None:
        return None
    assert isinstance(dtype, torch.dtype)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"dtype must be None for a model that is quantised, got {dtype}")
    before = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    own = getattr(model, "_keep_in_fp32_modules", None) or ()
    own = {own} if isinstance(own, str) else set(own)
    if dtype == torch.float32:
        own = set()
    tensors = (*model.named_parameters(), *model.named_buffers())
    stay = {id(tensor) for name, tensor in tensors if own & set(name.split("."))}

    def one(tensor: Tensor) -> Tensor:
        floating = tensor.is_floating_point() and id(tensor) not in stay
        return tensor.to(dtype) if floating else tensor

    # Not `.to`: the one of diffusers casts what is to stay in float32, and warns.
    nn.Module._apply(model, one)
    if before == dtype:
        return known if known is not None and known.after == dtype else None
    samples = [name for name, role in roles.items() if role == "sample"]
    times = tuple(name for name, role in roles.items() if role == "time")
    return Cast(before, dtype, samples[0] if samples else "", times)
