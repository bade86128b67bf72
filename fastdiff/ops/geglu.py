"""geglu: y = hidden * gelu(gate), hidden and gate the halves of the last dimension.

Shazeer, 2020, https://arxiv.org/abs/2002.05202; GELU: Hendrycks and Gimpel, 2016,
https://arxiv.org/abs/1606.08415. The feed-forward of Stable Diffusion's transformer blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastdiff.ops import _gated
from fastdiff.ops._contract import AotConfig, Implementation, Op, register
from fastdiff.ops._gated import example

Tensor = torch.Tensor
APPROXIMATIONS = ("none", "tanh")


def pattern(x: Tensor, approximate: str = "none") -> Tensor:
    """The calls of a transformer block, after its projection."""
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * torch.nn.functional.gelu(gate, approximate=approximate)


def reference(x: Tensor, approximate: str = "none") -> Tensor:
    """The op in plain PyTorch; contiguous."""
    return pattern(x, approximate).contiguous()


def check(x: Tensor, approximate: str = "none") -> None:
    """ValueError or TypeError for arguments outside the contract."""
    _gated.check(x)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate must be one of {APPROXIMATIONS}, got {approximate!r}")


def _activation(approximate: str) -> str:
    return "gelu_tanh" if approximate == "tanh" else "gelu"


def _cpp_supports(x: Tensor, approximate: str = "none") -> str:
    return _gated.cpp_supports(x)


def _cpp(x: Tensor, approximate: str = "none") -> Tensor:
    return _gated.cpp(x, _activation(approximate), False)


def _triton_supports(x: Tensor, approximate: str = "none") -> str:
    return _gated.triton_supports(x)


def _triton(x: Tensor, approximate: str = "none") -> Tensor:
    return _gated.triton(x, _activation(approximate), False)


def flops(x: Tensor, approximate: str = "none") -> int:
    """Per result: 6 for GELU (erf counts as one), 10 for its tanh form, 1 for the product."""
    return x.numel() // 2 * (11 if approximate == "tanh" else 7)


EXAMPLES = (
    example("SD1.5 mid block 64 tokens", (2, 64, 10240)),
    example("SD1.5 256 tokens", (2, 256, 10240)),
    example("SD1.5 1024 tokens", (2, 1024, 5120)),
    example("SD1.5 4096 tokens", (2, 4096, 2560)),
    example("SDXL 1024 tokens", (2, 1024, 10240)),
    example("SDXL 4096 tokens", (2, 4096, 5120)),
)

SAMPLES = (
    *_gated.samples(),
    example("tanh, more than one tile", (5, 2 * 1040), approximate="tanh"),
    example("tanh, saturating values", (4, 256), magnitude=30.0, approximate="tanh"),
    example("tanh, ends of the dtype", (1,), edit=_gated.edges, approximate="tanh"),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import geglu as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="geglu",
        schema='(Tensor x, str approximate="none", str impl="auto") -> Tensor',
        reference=reference,
        pattern=pattern,
        check=check,
        implementations=(
            Implementation("cpp", _cpp_supports, _cpp),
            Implementation("triton", _triton_supports, _triton),
        ),
        examples=EXAMPLES,
        samples=SAMPLES,
        bytes_moved=_gated.bytes_moved,
        flops=flops,
        aot=_aot,
    )
)


def geglu(x: Tensor, *, approximate: str = "none", impl: str = "auto") -> Tensor:
    """hidden * gelu(gate) with hidden, gate = x.chunk(2, dim=-1), in one pass over x.

    x: [..., 2H], float32, float16, bfloat16 (float64 by the reference). Views whose rows are
    contiguous and lie at no more than two strides run fused, any other by the reference.
    approximate: "none" (erf, as in diffusers' GEGLU) or "tanh". impl: "auto", "cpp", "triton" or
    "reference". Returns [..., H], contiguous, in x's dtype, rounded once from float32;
    differentiable through the reference.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.geglu(x, approximate, impl)
