"""swiglu: y = hidden * silu(gate), hidden and gate the halves of the last dimension.

Shazeer, 2020, https://arxiv.org/abs/2002.05202. Models differ in which half is the gate:
"first" in FLUX.2 and wherever LLaMA's gate and up projections (Lumina's w1 and w3) are joined in
that order; "last" in diffusers' SwiGLU feed-forward (Stable Audio, Mochi, Ovis).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastdiff.ops import _gated
from fastdiff.ops._contract import AotConfig, Implementation, Op, register
from fastdiff.ops._gated import example

Tensor = torch.Tensor
GATES = ("last", "first")


def pattern(x: Tensor, gate: str = "last") -> Tensor:
    """The calls of a transformer block, after its projection."""
    first, second = x.chunk(2, dim=-1)
    if gate == "first":
        return torch.nn.functional.silu(first) * second
    return first * torch.nn.functional.silu(second)


def reference(x: Tensor, gate: str = "last") -> Tensor:
    """The op in plain PyTorch; contiguous."""
    return pattern(x, gate).contiguous()


def check(x: Tensor, gate: str = "last") -> None:
    """ValueError or TypeError for arguments outside the contract."""
    _gated.check(x)
    if gate not in GATES:
        raise ValueError(f"gate must be one of {GATES}, got {gate!r}")


def _cpp_supports(x: Tensor, gate: str = "last") -> str:
    return _gated.cpp_supports(x)


def _cpp(x: Tensor, gate: str = "last") -> Tensor:
    return _gated.cpp(x, "silu", gate == "first")


def _triton_supports(x: Tensor, gate: str = "last") -> str:
    return _gated.triton_supports(x)


def _triton(x: Tensor, gate: str = "last") -> Tensor:
    return _gated.triton(x, "silu", gate == "first")


def flops(x: Tensor, gate: str = "last") -> int:
    """Per result: 4 for SiLU (exp counts as one), 1 for the product."""
    return x.numel() // 2 * 5


EXAMPLES = (
    example("Stable Audio 1025 tokens", (1, 1025, 12288)),
    example(
        "FLUX.2 klein 4B single block 512x512",
        (1, 1536, 27648),
        edit=lambda x: x[..., 9216:],
        gate="first",
    ),
)

SAMPLES = (
    *_gated.samples(),
    example("gate first, odd sizes", (3, 5, 2 * 67), gate="first"),
    example("gate first, slice", (2, 7, 200), edit=lambda x: x[..., 56:], gate="first"),
    example("gate first, ends of the dtype", (1,), edit=_gated.edges, gate="first"),
)


def _aot() -> Iterable[AotConfig]:
    from fastdiff.kernels import swiglu as kernels

    return (AotConfig(**config) for config in kernels.aot_configs())


OP = register(
    Op(
        name="swiglu",
        schema='(Tensor x, str gate="last", str impl="auto") -> Tensor',
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


def swiglu(x: Tensor, *, gate: str = "last", impl: str = "auto") -> Tensor:
    """hidden * silu(gate), the halves of x's last dimension, in one pass over x.

    x: [..., 2H], float32, float16, bfloat16 (float64 by the reference). Views whose rows are
    contiguous and lie at no more than two strides run fused, any other by the reference.
    gate: the half that goes through SiLU, "last" (diffusers' SwiGLU) or "first" (FLUX.2, LLaMA's
    joined gate and up projections). impl: "auto", "cpp", "triton" or "reference". Returns [..., H],
    contiguous, in x's dtype, rounded once from float32; differentiable through the reference.

    ValueError or TypeError for arguments outside this; RuntimeError when a named impl cannot run.
    """
    return torch.ops.fastdiff.swiglu(x, gate, impl)
