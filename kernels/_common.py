"""What several kernels share: activations, the architecture of a device, the interpreter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Triton's interpreter multiplies bfloat16 tiles as the integers it stores them in.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def arch_of(x: torch.Tensor) -> int:
    """80, 90, ... for a CUDA tensor; 0 in the interpreter."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x (fp32) in dtype, to nearest: the interpreter cuts bf16 off, so it rounds before."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x in fp32 through "gelu", "gelu_tanh", "silu" or "none".

    The tanh form is x / (1 + exp(-2u)): (1 + tanh u) / 2 without its cancellation, and 0 or x where
    the exponential is inf or 0.
    """
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        u2 = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
        x = x / (1.0 + tl.exp(-u2))
    elif ACTIVATION == "silu":
        x = x / (1.0 + tl.exp(-x))
    return x
