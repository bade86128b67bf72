"""``quantize=``: linear layers with weights of one byte.

The bytes depend on the weights alone, so the split makes them once and keeps them, as long as the
weights stay what they are; the module's own parameters stay untouched.

Left as they are, besides what ``skip`` names:

- layers outside of lists of blocks (no number is a part of their name): the first and last
  projections and the embeddings, which are few and the most sensitive;
- layers with fewer than 64 features in or out: they are no work;
- what no step repeats (the projections of the time and of the text): it is computed once per run;
- on a CUDA device, what the kernel cannot run: plain PyTorch would be slower than the layer.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastdiff.compiler.graph import (
    argument,
    calls,
    insert,
    is_tensor,
    leave,
    parameter_of,
    replace,
    value_of,
)
from fastdiff.compiler.options import Options
from fastdiff.compiler.packing import stacked
from fastdiff.compiler.split import dependencies, program_of
from fastdiff.ops.linear_quantized import OP, quantize_weight, quantized, reference

LEAST = 64  # features in and out
LEAST_FP8 = (8, 9)  # Ada
ROWS = 16  # of the standard-normal input that the error of a layer's output is estimated on


def parents(name: str) -> list[str]:
    """The name of a module and of all that it is in: a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)]


def skipped(name: str, skip: Iterable[str]) -> str:
    """The pattern that names a module, or one that it is in; or ""."""
    return next((p for p in skip for whole in parents(name) if fnmatchcase(whole, p)), "")


def check(models: Sequence[nn.Module], options: Options) -> None:
    """ValueError for patterns that name nothing, and for a device that cannot."""
    if options.quantize is None:
        return
    names = [name for model in models for name, _ in model.named_modules() if name]
    for pattern in options.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"skip must name modules of the model, got {pattern!r}")
    devices = {parameter.device for model in models for parameter in model.parameters()}
    for device in devices if options.quantize == "fp8" else ():
        found = str(device)
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability >= LEAST_FP8:
                continue
            found += f" (sm_{capability[0]}{capability[1]})"
        raise ValueError(
            f"quantize='fp8' must have a CUDA device of sm_89 or newer, which multiplies fp8, got "
            f"{found}: move the model to one before compiling it, or use 'int8'"
        )


class Quantize:
    """The pass, for one graph of a model.

    done: names of the layers that run in bytes. left: those that do not -> why.
    """

    def __init__(self, model: nn.Module, options: Options, roles: dict[str, str]) -> None:
        assert options.quantize is not None
        self._kind, self._skip, self._roles = options.quantize, options.skip, roles
        self._names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names.setdefault(id(parameter), []).append(name.rpartition(".")[0])
        self.done: list[str] = []
        self.left: dict[str, str] = {}

    def __call__(self, graph: fx.Graph) -> int:
        """How many products changed; merged projections are one."""
        count = 0
        depends = dependencies(graph, self._roles)
        for node in list(graph.nodes):
            if not calls(node, "linear") or not is_tensor(node):
                continue
            names = self._layers(argument(node, 1, "weight"))
            if not names:
                leave(node, "its weight is computed")
                continue
            why = self._why_not(node, names, program_of(depends[node]))
            why = why or self._replace(graph, node)
            if why:
                self.left |= dict.fromkeys(names, why)
                leave(node, why)
            else:
                self.done += names
                count += 1
        self.left = {name: why for name, why in self.left.items() if name not in self.done}
        return count

    def _layers(self, weight: Any) -> list[str]:
        """The modules that a weight belongs to: several where it is shared or merged."""
        merged = isinstance(weight, fx.Node) and weight.target is stacked
        parts = weight.args if merged else [weight]
        found = [self._names.get(id(parameter_of(part)), []) for part in parts]
        return [name for names in found for name in names] if all(found) else []

    def _why_not(self, node: fx.Node, names: list[str], program: str) -> str:
        x, weight = value_of(argument(node, 0, "input")), value_of(argument(node, 1, "weight"))
        for name in names:
            if pattern := skipped(name, self._skip):
                other = "" if len(names) == 1 else " (or a layer merged with it)"
                return f"skip={pattern!r} names it{other}"
        if not all(any(part.isdecimal() for part in name.split(".")) for name in names):
            return "it is outside of lists of blocks"
        if min(weight.shape) < LEAST:
            return f"it has fewer than {LEAST} features in or out"
        if program != "step":
            return "no step repeats it"
        if not x.dtype == weight.dtype == value_of(node).dtype:
            return "autocast changes its dtype"
        return ""

    def _replace(self, graph: fx.Graph, node: fx.Node) -> str:
        """ "" or why the op refuses."""
        x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        bias = argument(node, 2, "bias")
        packed = insert(graph, node, quantized, weight, self._kind)
        weight_q, scale = (insert(graph, node, operator.getitem, packed, i) for i in range(2))
        values = [value_of(v) for v in (x, weight_q, scale, bias)]
        if values[0].is_cuda and (why := OP.why_not("triton", *values)):
            return why
        try:
            op = torch.ops.fastdiff.linear_quantized.default
            new = insert(graph, node, op, x, weight_q, scale, bias)
        except (ValueError, TypeError) as error:  # outside the op's contract
            return str(error)
        replace(node, new)
        graph.erase_node(node)
        return ""


def errors(weight: Tensor, kind: str) -> dict[str, float]:
    """The relative errors of a layer in the Frobenius norm: of its weight, and of its output (less
    the bias) for standard-normal input of a fixed seed; infinite where the weight is not finite."""
    if not bool(weight.isfinite().all()):
        return {"weight": float("inf"), "output": float("inf")}
    weight_q, scale, lost = quantize_weight(weight, kind)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, weight.shape[1], generator=generator, dtype=torch.float64)
    x = x.to(weight.device)
    exact = nn.functional.linear(x, weight.detach().double())
    norm = float(exact.norm())
    output = float((reference(x, weight_q, scale.double()) - exact).norm()) / norm if norm else 0.0
    return {"weight": lost, "output": output}
