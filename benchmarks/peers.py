"""What else computes an op: compiled plain PyTorch, SDPA's backends, installed packages.

A peer is found by importing its package, and offered only for calls in which it does the same
thing. Nobody here is trusted: `measure.py` compares every result with float64 before it is timed,
and a peer that is not equal, or cannot run the call, is reported with the reason.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdiff.ops import Op
from fastdiff.ops._contract import Call, Result, outputs

Function = Callable[[], Result]
Named = tuple[str, Callable[[], Function]]  # the inner call builds, and may raise

BACKENDS = {
    "cpu": ("FLASH_ATTENTION", "MATH"),
    "cuda": ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"),
}


def installed(name: str) -> Any | None:
    """The module, or None where the package is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):  # OSError: a shared library of another CUDA
        return None


def named(op: Op, call: Call) -> dict[str, Any]:
    """The arguments of a call by the names of the schema, with its defaults."""
    schema = getattr(torch.ops.fastdiff, op.name).default._schema.arguments[:-1]
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found.update(zip((a.name for a in schema), call.args, strict=False))
    return {**found, **call.kwargs}


# --- plain PyTorch, compiled ----------------------------------------------------------------------


def is_weight(name: str) -> bool:
    """Whether an argument of this name is a parameter of the layer, the same in every call."""
    return "weight" in name or "bias" in name or name in ("w1", "b1", "w2", "b2")


class Layer(nn.Module):
    """An op's pattern as the layer it comes from: weights inside, where freezing sees them."""

    def __init__(self, op: Op, call: Call) -> None:
        super().__init__()
        self._pattern, self._values = op.pattern, named(op, call)
        self._inputs: list[str] = []
        for name, value in self._values.items():
            if not isinstance(value, Tensor):
                continue
            if is_weight(name):
                self.register_buffer(f"of_{name}", value)
            else:
                self._inputs.append(name)

    def inputs(self) -> tuple[Tensor, ...]:
        """What forward takes: the tensors that are no weights."""
        return tuple(self._values[name] for name in self._inputs)

    def forward(self, *inputs: Tensor) -> Result:
        values = dict(self._values)
        values.update(zip(self._inputs, inputs, strict=True))
        for name in values:
            if hasattr(self, f"of_{name}"):
                values[name] = getattr(self, f"of_{name}")
        result: Result = self._pattern(**values)
        return result


def compiled(op: Op, call: Call) -> Iterator[Named]:
    """torch.compile as its users run it: on a GPU both max-autotune modes, on a CPU frozen."""
    torch._dynamo.reset()  # else the ninth shape of a function is refused
    if call.tensors()[0].device.type == "cuda":
        for mode in ("max-autotune-no-cudagraphs", "max-autotune"):

            def tuned(mode: str = mode) -> Function:
                function = torch.compile(op.pattern, fullgraph=True, dynamic=False, mode=mode)
                return lambda: function(*call.args, **call.kwargs)

            yield f"compile {mode}", tuned
        return

    def frozen() -> Function:
        import torch._inductor.config

        layer = Layer(op, call).eval()
        inputs = layer.inputs()
        function = torch.compile(layer, fullgraph=True, dynamic=False)
        with torch._inductor.config.patch(freezing=True):
            function(*inputs)
        return lambda: function(*inputs)

    yield "compile frozen", frozen


def converted(op: Op, call: Call) -> Iterator[Named]:
    """OpenVINO and ONNX Runtime on a CPU, in float32: NumPy, their interface, has no bfloat16."""
    if any(t.device.type != "cpu" or t.dtype == torch.bfloat16 for t in call.tensors()):
        return
    openvino, runtime = installed("openvino"), installed("onnxruntime")
    threads = torch.get_num_threads()

    def with_openvino() -> Function:
        layer = Layer(op, call).eval()
        model = openvino.convert_model(layer, example_input=layer.inputs())  # type: ignore[union-attr]
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        request = openvino.compile_model(model, "CPU", settings).create_infer_request()  # type: ignore[union-attr]
        arrays = [tensor.numpy() for tensor in layer.inputs()]

        def run() -> Result:
            found = request.infer(arrays, share_inputs=True, share_outputs=True)
            return tuple(torch.from_numpy(value) for value in found.values())

        return run

    def with_runtime() -> Function:
        layer = Layer(op, call).eval()
        options = runtime.SessionOptions()  # type: ignore[union-attr]
        options.intra_op_num_threads = threads
        # Threads that wait by spinning take the processor from the variants that come next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/layer.onnx"
            torch.onnx.export(layer, layer.inputs(), path, dynamo=False)
            session = runtime.InferenceSession(  # type: ignore[union-attr]
                path, options, providers=["CPUExecutionProvider"]
            )
        names = [argument.name for argument in session.get_inputs()]
        feed = dict(zip(names, (t.numpy() for t in layer.inputs()), strict=True))
        return lambda: tuple(map(torch.from_numpy, session.run(None, feed)))

    if openvino is not None:
        yield "openvino", with_openvino
    if runtime is not None:
        yield "onnxruntime", with_runtime


# --- packages, op by op ---------------------------------------------------------------------------


def _sdpa(op: Op, call: Call) -> Iterator[Named]:
    """The plain calls with SDPA held to one backend."""
    for name in BACKENDS[call.tensors()[0].device.type]:

        def held(name: str = name) -> Function:
            backend = getattr(SDPBackend, name)

            def run() -> Result:
                with sdpa_kernel(backend):
                    result: Result = op.pattern(*call.args, **call.kwargs)
                return result

            return run

        yield f"sdpa {name.removesuffix('_ATTENTION').lower()}", held


def _attention(op: Op, call: Call) -> Iterator[Named]:
    yield from _sdpa(op, call)
    given = named(op, call)
    q, k, v, scale = given["q"], given["k"], given["v"], given["scale"]
    more = ("extra_k", "key_lengths", "key_mask", "cos")
    if given["norm"] != "none" or given["return_lse"] or any(given[n] is not None for n in more):
        return
    if q.device.type != "cuda" or q.dtype == torch.float32:
        return
    nothing = (q.new_empty(0), q.new_empty(0, dtype=torch.float32))

    def plain(function: Callable[..., Any], **options: Any) -> Callable[[], Function]:
        def run() -> Result:
            out = function(q, k, v, **options)
            return (out[0] if isinstance(out, tuple) else out, *nothing)

        return lambda: run

    if (flash := installed("flash_attn")) is not None:
        yield "flash-attn", plain(flash.flash_attn_func, softmax_scale=scale)
    if (flash := installed("flash_attn_interface")) is not None:
        yield "flash-attn 3", plain(flash.flash_attn_func, softmax_scale=scale)
    if (xformers := installed("xformers.ops")) is not None:
        yield "xformers", plain(xformers.memory_efficient_attention, scale=scale)


def _layer_norm(op: Op, call: Call) -> Iterator[Named]:
    given = named(op, call)
    x, weight, bias, eps = (given[n] for n in ("x", "weight", "bias", "eps"))
    if given["scale"] is not None or given["shift"] is not None or weight is None or bias is None:
        return
    if (apex := installed("apex.normalization.fused_layer_norm")) is not None:
        yield (
            "apex",
            lambda: lambda: apex.fused_layer_norm_affine(x, weight, bias, x.shape[-1:], eps),
        )
    if (liger := installed("liger_kernel.ops.layer_norm")) is not None:
        yield "liger", lambda: lambda: liger.LigerLayerNormFunction.apply(x, weight, bias, eps)


def _rms_norm(op: Op, call: Call) -> Iterator[Named]:
    given = named(op, call)
    x, weight, eps = (given[n] for n in ("x", "weight", "eps"))
    if weight is None:
        return
    if (apex := installed("apex.normalization.fused_layer_norm")) is not None:
        yield "apex", lambda: lambda: apex.fused_rms_norm_affine(x, weight, x.shape[-1:], eps)
    if (liger := installed("liger_kernel.ops.rms_norm")) is not None:
        # offset 0; "gemma" computes in float32 to the end, as the op does; not in place.
        rest = (0.0, "gemma", False)
        yield "liger", lambda: lambda: liger.LigerRMSNormFunction.apply(x, weight, eps, *rest)


def _geglu(op: Op, call: Call) -> Iterator[Named]:
    given = named(op, call)
    hidden, gate = given["x"].chunk(2, dim=-1)
    liger = installed("liger_kernel.ops.geglu")
    if liger is not None and given["approximate"] == "tanh":
        yield "liger", lambda: lambda: liger.LigerGELUMulFunction.apply(gate, hidden)


def _swiglu(op: Op, call: Call) -> Iterator[Named]:
    given = named(op, call)
    first, second = given["x"].chunk(2, dim=-1)
    gate, hidden = (first, second) if given["gate"] == "first" else (second, first)
    if (liger := installed("liger_kernel.ops.swiglu")) is not None:
        yield "liger", lambda: lambda: liger.LigerSiLUMulFunction.apply(gate, hidden)


def _group_norm(op: Op, call: Call) -> Iterator[Named]:
    given = named(op, call)
    x, groups, weight, bias = (given[n] for n in ("x", "num_groups", "weight", "bias"))
    extra = any(given[n] is not None for n in ("add", "scale", "shift", "skip"))
    if extra or weight is None or bias is None or x.dim() != 4:
        return
    channels, eps, silu = x.shape[1], given["eps"], given["activation"] == "silu"
    if (apex := installed("apex.contrib.group_norm")) is not None:

        def with_apex() -> Function:
            norm = apex.GroupNorm(groups, channels, eps, act="silu" if silu else "")
            norm = norm.to(x.device, x.dtype)
            with torch.no_grad():
                norm.weight.copy_(weight)
                norm.bias.copy_(bias)
            return lambda: norm(x)

        if x.is_contiguous(memory_format=torch.channels_last):
            yield "apex", with_apex
    if (liger := installed("liger_kernel.ops.group_norm")) is not None:
        apply = liger.LigerGroupNormFunction.apply

        def with_liger() -> Result:
            y = apply(x, channels, groups, weight, bias, eps)
            return nn.functional.silu(y) if silu else y

        if x.is_contiguous():
            yield "liger", lambda: with_liger


PEERS: dict[str, Callable[[Op, Call], Iterator[Named]]] = {
    "attention": _attention,
    "adaln_attention": _sdpa,
    "layer_norm_modulate": _layer_norm,
    "rms_norm": _rms_norm,
    "geglu": _geglu,
    "swiglu": _swiglu,
    "group_norm_silu": _group_norm,
}


def peers(op: Op, call: Call) -> Iterator[Named]:
    """(name, builder) of every installed package's way to compute this call."""
    if op.name in PEERS:
        yield from PEERS[op.name](op, call)


def shaped(result: Any, like: Result) -> Result:
    """A peer's result as the op's: as many tensors, those the call did not ask for empty."""
    found, wanted = outputs(result), outputs(like)
    rest = [value for value in wanted[len(found) :] if value.numel() == 0]
    return (*found, *rest)
