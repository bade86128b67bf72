"""linear_quantized: y = x (weight_q * scale)^T + bias, weights of one byte with a scale per row.

int8: the weights only. fp8 (e4m3: Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433): x
is quantised as well, each row by its largest magnitude over 448.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fastdiff.ops._contract import AotConfig, Call, Example, Implementation, Op, register
from fastdiff.ops._strides import rows_of, why_not_triton

Tensor = torch.Tensor
FP8 = torch.float8_e4m3fn
LARGEST = {"int8": 127.0, "fp8": 448.0}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _scales(rows: Tensor, kind: str) -> Tensor:
    """[..., 1]: what the largest magnitude of each row is divided by; 1 for a row of zeros."""
    largest = rows.abs().amax(-1, keepdim=True)
    # By a tensor: CUDA multiplies by the reciprocal of a number, which is rounded twice.
    scale = largest / torch.full_like(largest, LARGEST[kind])
    return torch.where(largest == 0, torch.ones_like(largest), scale)


def quantized(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(weight_q [N, K], scale [N]) of `quantize_weight`, which checks first."""
    wide = weight.detach().float()
    scale = _scales(wide, kind).clamp(min=torch.finfo(torch.float32).tiny)
    weight_q = wide / scale
    return (weight_q.round().to(torch.int8) if kind == "int8" else weight_q.to(FP8)), scale[:, 0]


def quantize_weight(weight: Tensor, kind: str = "int8") -> tuple[Tensor, Tensor, float]:
    """(weight_q, scale, error) of a linear layer's weight, for `linear_quantized`.

    weight: [N, K], any float dtype. kind: "int8" (rounded to nearest even, symmetric in +-127) or
    "fp8" (e4m3). weight_q: [N, K]; scale: [N] float32, weight ~ weight_q * scale[:, None]; error:
    |weight - weight_q * scale| / |weight| in the Frobenius norm, 0 for a weight of zeros.

    ValueError or TypeError for arguments outside this, and for weights that are not finite.
    """
    if kind not in LARGEST:
        raise ValueError(f"kind must be one of {tuple(LARGEST)}, got {kind!r}")
    if weight.dtype not in DTYPES:
        raise TypeError(f"weight must be of a float dtype, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight must have shape [N, K], got {tuple(weight.shape)}")
    wide = weight.detach().float()
    if not bool(wide.isfinite().all()):
        raise ValueError("weight must be finite, got inf or NaN")
    weight_q, scale = quantized(weight, kind)
    norm = float(wide.double().norm())
    lost = float((wide.double() - weight_q.double() * scale[:, None].double()).norm())
    return weight_q, scale, lost / norm if norm else 0.0


def reference(x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op in plain PyTorch, in float32 (float64 for a float64 x), rounded once to x's dtype.

    A weight_q of float64 stands for the fp8 values it holds.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y, weight = x.to(wide), weight_q.to(wide)
    if weight_q.dtype == torch.int8:
        y = torch.nn.functional.linear(y, weight)
    else:
        by_row = _scales(y.detach(), "fp8")
        scaled = y / by_row
        rounded = scaled.detach().to(FP8).to(wide)
        if scaled.requires_grad:  # the gradient passes the rounding of x by
            rounded = scaled + (rounded - scaled.detach())
        y = torch.nn.functional.linear(rounded, weight) * by_row
    y = y * scale.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype).contiguous()


def pattern(x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """int8: the weights widened, then a linear layer. fp8 has no short form."""
    if weight_q.dtype != torch.int8:
        return reference(x, weight_q, scale, bias)
    weight = weight_q.to(x.dtype) * scale[:, None].to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def check(x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    """ValueError or TypeError for arguments outside the contract."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be float32, float16, bfloat16 or float64, got {x.dtype}")
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., K] with K > 0, got {tuple(x.shape)}")
    exact = (torch.float64,) if x.dtype == torch.float64 else ()
    if weight_q.dtype not in (torch.int8, FP8, *exact):
        raise TypeError(f"weight_q must be int8 or float8_e4m3fn, got {weight_q.dtype}")
    if weight_q.dim() != 2 or weight_q.shape[1] != x.shape[-1] or weight_q.shape[0] < 1:
        raise ValueError(
            f"weight_q must have shape [N, {x.shape[-1]}] with N > 0, got {tuple(weight_q.shape)}"
        )
    dtypes = {"scale": (torch.float32, *exact), "bias": (x.dtype,)}
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is None:
            continue
        if tuple(vector.shape) != (weight_q.shape[0],):
            raise ValueError(
                f"{name} must have shape ({weight_q.shape[0]},), got {tuple(vector.shape)}"
            )
        if vector.dtype not in dtypes[name]:
            raise TypeError(f"{name} must be {dtypes[name][0]}, got {vector.dtype}")
    for name, tensor in (("weight_q", weight_q), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {tensor.device}")


def _triton_supports(x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None) -> str:
    # Ampere has no fp8 tensor cores.
    if reason := why_not_triton(x, 89 if weight_q.dtype == FP8 else 80):
        return reason
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"x is {x.dtype}; the kernel takes float16 and bfloat16"
    rows = rows_of(x)
    if rows is None:
        return f"x has strides {x.stride()}: rows must be contiguous and lie at two strides"
    if weight_q.shape[1] % 16 or weight_q.stride(1) != 1:
        return f"weight_q is {tuple(weight_q.shape)}: rows must be contiguous, K a multiple of 16"
    # Tiles of any of these are copied 16 bytes at a time.
    starts = (rows.outer_stride, rows.inner_stride, weight_q.stride(0), weight_q.storage_offset())
    if any(start % 16 for start in starts) or x.storage_offset() % 8:
        return f"rows of x or weight_q start between multiples of 16 values: {x.stride()}"
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and vector.shape[0] > 1 and vector.stride(0) != 1:
            return f"{name} has stride {vector.stride(0)}: it must be contiguous"
    return ""


def _triton(x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    from fastdiff.kernels import linear_quantized as kernels

    out = torch.empty((*x.shape[:-1], weight_q.shape[0]), dtype=x.dtype, device=x.device)
    rows = rows_of(x)
    assert rows is not None  # `_triton_supports` came first
    if out.numel():
        kernels.launch(x, rows, weight_q, scale, bias, out)
    return out


def bytes_moved(x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None) -> int:
    """x, weight_q, scale and bias read once, the result written once."""
    read = sum(v.numel() * v.element_size() for v in (x, weight_q, scale, bias) if v is not None)
    return read + x.numel() // x.shape[-1] * weight_q.shape[0] * x.element_size()


def flops(x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None) -> int:
    """2 per product of the matrix multiplication."""
    return 2 * x.numel() * weight_q.shape[0]


def example(
    name: str,
    shape: tuple[int, ...],
    columns: int,
    kind: str = "int8",
    bias: bool = True,
    magnitude: float = 1.0,
    edit: Callable[[Tensor], Tensor] | None = None,
) -> Example:
    """A case with random numbers; the weights go through `quantize_weight`."""

    def make(device: torch.device | str, dtype: torch.dtype) -> Call:
        generator = torch.Generator().manual_seed(31)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        x = (random(*shape) * magnitude).to(device, dtype)
        x = edit(x) if edit else x
        weight_q, scale, _ = quantize_weight(
            random(columns, x.shape[-1]) / x.shape[-1] ** 0.5, kind
        )
        vector = random(columns).to(device, dtype) if bias else None
        return Call((x, weight_q.to(device), scale.to(device), vector))

    return Example(name, make)


EXAMPLES = (
    example("DiT-XL/2 256x256, attention out, int8", (2, 256, 1152), 1152),
    example("SD1.5 1024 tokens, feed-forward out, int8", (2, 1024, 2560), 640),
    example("DiT-XL/2 256x256, feed-forward, fp8", (2, 256, 1152), 4608, "fp8"),
    example("FLUX.1 512x512, feed-forward, int8", (1, 1024, 3072), 12288),
    example("FLUX.1 512x512, feed-forward, fp8", (1, 1024, 3072), 12288, "fp8"),
)


def _with_zeros(x: Tensor) -> Tensor:
    return torch.cat([x[:1], torch.zeros_like(x[:1]), x[2:]])


SAMPLES = (
    example("one row", (1, 16), 8),
    example("odd sizes, K in part", (3, 5, 48), 19),
    example("no bias", (4, 64), 33, bias=False),
    example("fp8, one row", (1, 16), 8, "fp8"),
    # More than one tile of rows, of columns and of K, none of them whole.
    example("several tiles", (70, 80), 75),
    example("fp8, several tiles", (70, 144), 75, "fp8"),
    example("tokens of a sequence", (2, 9, 32), 16, edit=lambda x: x[:, 3:]),
    example("large activations", (4, 64), 16, magnitude=3e3),
    example("fp8, tokens of a sequence", (2, 9, 32), 16, "fp8", edit=lambda x: x[:, 3:]),
    example("fp8, large activations", (4, 64), 16, "fp8", magnitude=3e3),
    example("fp8, small activations", (4, 64), 16, "fp8", magnitude=1e-3),
    example("fp8, a row of zeros", (4, 64), 16, "fp8", edit=_with_zeros),
    example("small activations", (4, 64), 16, magnitude=1e-3),
    example("no tokens", (2, 0, 16), 8),
    example("empty batch", (0, 16), 8, "fp8"),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import linear_quantized as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="linear_quantized",
        schema="(Tensor x, Tensor weight_q, Tensor scale, Tensor? bias=None, "
        'str impl="auto") -> Tensor',
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


def linear_quantized(
    x: Tensor, weight_q: Tensor, scale: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """x (weight_q * scale)^T + bias, from weights of one byte (`quantize_weight` makes them).

    x: [..., K], float32, float16, bfloat16 or float64; the kernel takes the 16-bit ones, K a
    multiple of 16, rows contiguous at no more than two strides. weight_q: [N, K], int8 (weights
    only) or float8_e4m3fn (x is quantised too, each row by its largest magnitude over 448; sm_89
    or newer). scale: [N] float32. bias: [N] like x. impl: "auto", "triton" or "reference". Returns
    [..., N] in x's dtype, contiguous, rounded once from float32; differentiable through the
    reference, past the rounding of x.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.linear_quantized(x, weight_q, scale, bias, impl)
