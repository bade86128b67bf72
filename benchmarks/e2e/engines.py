"""Other engines for CPUs, where they are installed: OpenVINO and ONNX Runtime.

Both take diffusers' module in float32, exported once by ``torch.export`` with the shapes of the
run. OpenVINO computes in bf16 where the processor has it (its hint), ONNX Runtime in float32.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NEEDS = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx", "onnxscript")}
# A converted model: tensors in the order of the exported module's arguments -> its one result.
Engine = Callable[..., Tensor]


def missing(name: str) -> str:
    """What is not installed for an engine, or ""."""
    absent = [need for need in NEEDS[name] if importlib.util.find_spec(need) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def openvino(module: nn.Module, arguments: tuple[Tensor, ...]) -> Engine:
    import openvino

    exported = torch.export.export(module, arguments, strict=False)
    model = openvino.convert_model(exported)
    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = core.compile_model(model, "CPU", settings)

    def run(*given: Tensor) -> Tensor:
        found = compiled([value.contiguous().numpy() for value in given])
        return torch.from_numpy(found[0].copy())

    return run


def onnxruntime(module: nn.Module, arguments: tuple[Tensor, ...]) -> Engine:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.onnx")
        with contextlib.redirect_stdout(io.StringIO()):
            torch.onnx.export(module, arguments, file, dynamo=True, external_data=True)
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*given: Tensor) -> Tensor:
        values = dict(zip(names, (value.contiguous().numpy() for value in given), strict=True))
        return torch.from_numpy(session.run(None, values)[0])

    return run


CONVERTERS: dict[str, Callable[[nn.Module, tuple[Tensor, ...]], Engine]] = {
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}


class _Flat(nn.Module):
    """A call with keywords as one with tensors alone: what exporters take."""

    def __init__(self, call: Callable[..., Any], module: nn.Module, rebuild: Any) -> None:
        super().__init__()
        self.module = module
        self._call, self._rebuild = call, rebuild

    def forward(self, *tensors: Tensor) -> Tensor:
        args, kwargs = self._rebuild(tensors)
        return self._call(*args, **kwargs)[0]


def flat(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """(a module of tensors alone, the function from (args, kwargs) to those tensors)."""
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def rebuild(tensors: tuple[Tensor, ...]) -> Any:
        values = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            values[place] = tensor
        return torch.utils._pytree.tree_unflatten(values, spec)

    def tensors_of(args: Any, kwargs: Any) -> tuple[Tensor, ...]:
        found = torch.utils._pytree.tree_leaves((args, kwargs))
        return tuple(leaf for leaf in found if isinstance(leaf, Tensor))

    return _Flat(call, module, rebuild).eval(), tensors_of


class Converted:
    """Stands for a module: the first call converts, every call runs the engine."""

    def __init__(self, module: nn.Module, call: Callable[..., Any], convert: Any) -> None:
        self._module, self._call, self._convert = module, call, convert
        self._engine: Engine | None = None
        self._tensors: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        kwargs = {**kwargs, "return_dict": False}
        if self._engine is None:
            module, self._tensors = flat(self._call, self._module, args, kwargs)
            with torch.no_grad():
                self._engine = self._convert(module, self._tensors(args, kwargs))
        return (self._engine(*self._tensors(args, kwargs)),)
