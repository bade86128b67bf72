"""linear_gate: y = act(x W^T + b), the activation, or the gated product, in the product's epilogue.

The first half of a transformer's feed-forward. GLU variants: Shazeer, 2020,
https://arxiv.org/abs/2002.05202; GELU: Hendrycks and Gimpel, 2016,
https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fastdiff.ops import _gated
from fastdiff.ops._contract import AotConfig, Call, Example, Implementation, Op, register
from fastdiff.ops._strides import rows_of, why_not_triton

Tensor = torch.Tensor
# name: (activation of _gated, whether it halves the columns)
ACTIVATIONS = {
    "geglu": ("gelu", True),
    "swiglu": ("silu", True),
    "gelu": ("gelu", False),
    "gelu_tanh": ("gelu_tanh", False),
    "silu": ("silu", False),
}


def pattern(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "geglu",
    gate: str = "last",
) -> Tensor:
    """The calls of a feed-forward's first half."""
    y = torch.nn.functional.linear(x, weight, bias)
    name, gated = ACTIVATIONS[activation]
    if not gated:
        return _gated.activate(y, name)
    first, second = y.chunk(2, dim=-1)
    if gate == "first":
        return _gated.activate(first, name) * second
    return first * _gated.activate(second, name)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "geglu",
    gate: str = "last",
) -> Tensor:
    """The op in plain PyTorch; contiguous."""
    return pattern(x, weight, bias, activation, gate).contiguous()


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "geglu",
    gate: str = "last",
) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    if x.dtype not in _gated.DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., K] with K > 0, got {tuple(x.shape)}")
    check_layer(x.shape[-1], ("x", x), weight, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if ACTIVATIONS[activation][1] and weight.shape[0] % 2:
        raise ValueError(
            f"weight must have an even number of rows for {activation}, got {tuple(weight.shape)}"
        )
    if gate not in ("last", "first"):
        raise ValueError(f"gate must be one of ('last', 'first'), got {gate!r}")


def check_layer(
    features: int,
    like: tuple[str, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    names: tuple[str, str] = ("weight", "bias"),
) -> None:
    """ValueError or TypeError unless these belong to a linear layer of `features` inputs.

    like: the name and the tensor that give the dtype and the device; names: of the layer's.
    """
    wide, vector = names
    if weight.dim() != 2 or weight.shape[1] != features or weight.shape[0] < 1:
        raise ValueError(
            f"{wide} must have shape [N, {features}] with N > 0, got {tuple(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{vector} must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in ((wide, weight), (vector, bias)):
        if tensor is None:
            continue
        if tensor.dtype != like[1].dtype:
            raise TypeError(f"{name} must be {like[1].dtype} like {like[0]}, got {tensor.dtype}")
        if tensor.device != like[1].device:
            raise ValueError(
                f"{name} must be on {like[1].device} like {like[0]}, got {tensor.device}"
            )


def why_not_rows(weight: Tensor, bias: Tensor | None) -> str:
    """Why the matrix product cannot take a layer's tensors, or ""."""
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"weights are {weight.dtype}; the kernel takes float32, float16 and bfloat16"
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        return f"a weight has strides {weight.stride()}: rows must be contiguous"
    if bias is not None and bias.shape[0] > 1 and bias.stride(0) != 1:
        return f"a bias has stride {bias.stride(0)}: it must be contiguous"
    return ""


def _triton_supports(x, weight, bias=None, activation="geglu", gate="last") -> str:
    if reason := why_not_triton(x) or why_not_rows(weight, bias):
        return reason
    if rows_of(x) is None:
        return f"x has strides {x.stride()}: rows must be contiguous and lie at two strides"
    return ""


def _triton(x, weight, bias=None, activation="geglu", gate="last") -> Tensor:
    from fastdiff.kernels import _linear as kernels

    name, gated = ACTIVATIONS[activation]
    columns = weight.shape[0] // (2 if gated else 1)
    out = torch.empty((*x.shape[:-1], columns), dtype=x.dtype, device=x.device)
    rows = rows_of(x)
    assert rows is not None  # `_triton_supports` came first
    if out.numel():
        kernels.launch(x, rows, weight, bias, out, name, gated, gate == "first")
    return out


def bytes_moved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "geglu",
    gate: str = "last",
) -> int:
    """x, weight and bias read once, the result written once."""
    columns = weight.shape[0] // (2 if ACTIVATIONS[activation][1] else 1)
    count = x.numel() + weight.numel() + x.numel() // x.shape[-1] * columns
    return (count + (0 if bias is None else bias.numel())) * x.element_size()


def flops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "geglu",
    gate: str = "last",
) -> int:
    """2 per product of the matrix multiplication; what comes after it is not counted."""
    return 2 * x.numel() * weight.shape[0]


def example(
    name: str,
    shape: tuple[int, ...],
    columns: int,
    activation: str = "geglu",
    bias: bool = True,
    magnitude: float = 1.0,
    edit: Callable[[Call], Call] | None = None,
    **kwargs: Any,
) -> Example:
    """A case with random numbers; columns: of the result. Weights are scaled as when trained."""

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(23)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        rows = columns * (2 if ACTIVATIONS[activation][1] else 1)
        x = (random(*shape) * magnitude).to(device, dtype)
        weight = (random(rows, shape[-1]) / shape[-1] ** 0.5).to(device, dtype)
        vector = random(rows).to(device, dtype) if bias else None
        call = Call((x, weight, vector), {"activation": activation, **kwargs})
        return edit(call) if edit else call

    return Example(name, make)


EXAMPLES = (
    example("SD1.5 time embedding, 50 steps", (50, 320), 1280, "silu"),
    example("SD1.5 256 tokens", (2, 256, 1280), 5120),
    example("SD1.5 1024 tokens", (2, 1024, 640), 2560),
    example("SD1.5 4096 tokens", (2, 4096, 320), 1280),
    example("SDXL 1024 tokens", (2, 1024, 1280), 5120),
    example("SDXL 4096 tokens", (2, 4096, 640), 2560),
    example("DiT-XL/2 256x256", (2, 256, 1152), 4608, "gelu_tanh"),
    example("FLUX.1 512x512", (1, 1024, 3072), 12288, "gelu_tanh"),
    example("FLUX.2 klein 4B 512x512", (1, 1024, 3072), 9216, "swiglu", bias=False, gate="first"),
)


def _sliced(call: Call) -> Call:
    """Tokens of a joint sequence, and rows of a fused weight."""
    x, weight, *rest = call.args
    return Call(
        (x[:, 3:], torch.cat([weight, weight], 1)[:, : weight.shape[1]], *rest), call.kwargs
    )


def _transposed(call: Call) -> Call:
    x, *rest = call.args
    return Call((x.transpose(0, 1).contiguous().transpose(0, 1), *rest), call.kwargs)


SAMPLES = (
    example("one row", (1, 16), 8),
    example("odd sizes", (3, 5, 37), 19, "swiglu"),
    example("one of everything", (1, 1), 1, "gelu", bias=False),
    example("no bias, gate first", (2, 9, 48), 40, "swiglu", bias=False, gate="first"),
    example("geglu, gate first", (6, 32), 24, gate="first"),
    # More than one tile of rows, of columns and of K, none of them whole.
    example("several tiles", (70, 80), 75),
    example("several tiles, gelu", (70, 160), 130, "gelu"),
    example("gelu_tanh", (2, 7, 64), 33, "gelu_tanh"),
    example("silu", (2, 7, 64), 33, "silu"),
    example("tokens of a sequence", (2, 9, 32), 16, edit=_sliced),
    example("batch inside", (3, 4, 32), 16, edit=_transposed),
    # The products pass fp16's range, and exp's, but not the results.
    example("large activations", (4, 64), 16, "silu", magnitude=3e2),
    example("small activations", (4, 64), 16, "swiglu", magnitude=1e-4),
    example("no tokens", (2, 0, 16), 8, "gelu"),
    example("empty batch", (0, 16), 8),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import linear_gate as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="linear_gate",
        schema='(Tensor x, Tensor weight, Tensor? bias=None, str activation="geglu", '
        'str gate="last", str impl="auto") -> Tensor',
        reference=reference,
        pattern=pattern,
        check=check,
        implementations=(Implementation("triton", _triton_supports, _triton),),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=bytes_moved,
        flops=flops,
        aot=_aot,
    )
)


def linear_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "geglu",
    gate: str = "last",
    impl: str = "auto",
) -> Tensor:
    """act(x W^T + b) in one matrix product; gated, the [..., 2H] product never reaches memory.

    x: [..., K], float32, float16, bfloat16 (float64 by the reference); views whose rows are
    contiguous and lie at no more than two strides run fused. weight: [N, K], [2H, K] when gated,
    contiguous rows. bias: [N]. All of one dtype. activation: "geglu" or "swiglu" (hidden * gelu or
    silu of the gate, the halves of the product's columns), "gelu", "gelu_tanh" or "silu". gate: the
    half that is activated, "last" (diffusers) or "first" (FLUX.2); see `swiglu`. impl: "auto",
    "triton" or "reference"; on the CPU "auto" is the reference. Returns [..., N], [..., H] when
    gated, contiguous, rounded once from float32; differentiable through the reference.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.linear_gate(x, weight, bias, activation, gate, impl)
