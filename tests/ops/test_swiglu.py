"""What is special to swiglu: bad input, which half is the gate, the modules it replaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff.ops import swiglu
from fastdiff.ops.swiglu import OP

X = torch.zeros(2, 3, 8)
BAD = [
    ((torch.zeros(2, 8, dtype=torch.int32),), {}, TypeError, "x must be float32"),
    ((torch.zeros(2, 7),), {}, ValueError, r"x must have shape \[..., 2H\] with H > 0, got \(2, 7"),
    ((X,), {"gate": "second"}, ValueError, "gate must be one of .* got 'second'"),
    ((X,), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        swiglu(*args, **kwargs)


def test_is_the_diffusers_modules() -> None:
    """diffusers' SwiGLU gates with the last half, FLUX.2's with the first."""
    activations = pytest.importorskip("diffusers.models.activations")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=generator)
    module = activations.SwiGLU(12, 40).double()
    with torch.no_grad():
        assert torch.equal(swiglu(module.proj(x)), module(x))
    flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")
    assert torch.equal(swiglu(x, gate="first"), flux2.Flux2SwiGLU()(x))


@pytest.mark.parametrize("name", [impl.name for impl in OP.implementations])
def test_swapped_halves_swap_the_gate(name: str) -> None:
    x = torch.randn(7, 2 * 45, generator=torch.Generator().manual_seed(1))
    if reason := OP.why_not(name, x):
        pytest.skip(reason)
    swapped = torch.cat([x[:, 45:], x[:, :45]], 1)
    last, first = swiglu(x, impl=name), swiglu(swapped, gate="first", impl=name)
    assert torch.equal(last, first)
    assert not torch.equal(last, swiglu(x, gate="first", impl=name))


@pytest.mark.parametrize("gate", ["first", "last"])
def test_gradient_in_float64(gate: str) -> None:
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda value: swiglu(value, gate=gate), (x,))
