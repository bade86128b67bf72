"""What is special to geglu: bad input, the modules it replaces, accuracy, launch policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastdiff.ops import geglu
from fastdiff.ops.geglu import OP, reference
from fastdiff.testing import assert_within_2x, rounding_band

X = torch.zeros(2, 3, 8)
BAD = [
    ((torch.zeros(2, 8, dtype=torch.int32),), {}, TypeError, "x must be float32"),
    ((torch.zeros(2, 7),), {}, ValueError, r"x must have shape \[..., 2H\] with H > 0, got \(2, 7"),
    ((torch.zeros(2, 0),), {}, ValueError, r"x must have shape \[..., 2H\] with H > 0, got \(2, 0"),
    ((torch.zeros(()),), {}, ValueError, r"x must have shape \[..., 2H\] with H > 0, got \(\)"),
    ((X,), {"approximate": "erf"}, ValueError, "approximate must be one of .* got 'erf'"),
    ((X,), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        geglu(*args, **kwargs)


def test_is_the_diffusers_module() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    module = activations.GEGLU(12, 40).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(geglu(module.proj(x)), module(x))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradient_in_float64(approximate: str) -> None:
    x = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda value: geglu(value, approximate=approximate), (x,))


@pytest.mark.parametrize("name", [impl.name for impl in OP.implementations])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gelu_itself(name: str, approximate: str, dtype: torch.dtype) -> None:
    """With a hidden half of ones the result is GELU: every value near the exact one, rounded."""
    gate = torch.linspace(-6, 6, 4001).to(dtype)
    x = torch.cat([torch.ones_like(gate), gate])[None]
    if reason := OP.why_not(name, x):
        pytest.skip(reason)
    result = geglu(x, approximate=approximate, impl=name)[0].double()
    exact = torch.nn.functional.gelu(gate.double(), approximate=approximate)
    # What 1 + erf in float32, or a short polynomial, leaves of the small values left of 0.
    cancelled = 1e-7 if dtype == torch.float32 else 1e-5
    allowed = 2 * rounding_band(exact, dtype) + gate.double().abs().clamp(max=1) * cancelled
    assert ((result - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_nan_at_the_ends_of_the_dtype(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    gate = torch.tensor([largest, -largest, torch.inf, 0.0], dtype=dtype)
    x = torch.cat([torch.ones_like(gate), gate])[None]
    expected = torch.tensor([largest, 0.0, torch.inf, 0.0], dtype=dtype)
    for impl in OP.implementations:
        if impl.supports(x):
            continue
        for approximate in ("none", "tanh"):  # torch's own tanh form gives NaN for inf
            result = geglu(x, approximate=approximate, impl=impl.name)[0]
            assert torch.equal(result, expected), impl.name


def test_launch_policy_covers_every_width() -> None:
    """select() returns only what aot_configs() compiles, and few lanes have no work."""
    kernels = pytest.importorskip("fastdiff.kernels._gated", exc_type=ImportError)
    compiled = set()
    for config in kernels.aot_configs(("gelu",), (False,)):
        constants = config["constexprs"]
        compiled.add((constants["BLOCK_M"], constants["BLOCK_H"], config["options"]["num_warps"]))
    for H in (*range(1, 70), 320, 640, 1280, 2560, 5120, 6144, 9216, 2501, 2**20 + 1):
        plan = kernels.select(4096, H, torch.bfloat16, 90)
        assert (plan.block_m, plan.block_h, plan.num_warps) in compiled
        covered = -(-H // plan.block_h) * plan.block_h
        assert plan.block_h == kernels.MIN_BLOCK_H or covered * 7 <= H * 8
    assert kernels.select(8192, 1280, torch.bfloat16, 90).block_h == 256
    assert kernels.select(2048, 5120, torch.bfloat16, 90).block_h == 1024


FAR_ROWS = """
import sys
import torch
from fastdiff.ops import geglu

stride = 2**30 + 8  # itself an int32; twice it is not
storage = torch.empty(2 * stride + 128, dtype=torch.bfloat16)  # untouched pages cost nothing
x = storage.as_strided((3, 128), (stride, 1))
x.copy_(torch.randn(3, 128))
near = geglu(x.clone(), impl=sys.argv[1])
assert torch.equal(geglu(x, impl=sys.argv[1]), near)
"""


@pytest.mark.interpret
@pytest.mark.parametrize("name", [impl.name for impl in OP.implementations])
def test_rows_further_apart_than_int32_counts(name: str, fresh_python: Callable[..., str]) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    elif reason := OP.why_not(name, X):
        pytest.skip(reason)
    fresh_python("-c", FAR_ROWS, name, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    x = torch.empty((2**19 + 1, 2 * 2048 + 2), dtype=torch.bfloat16, device="cuda").normal_()
    assert x.numel() > 2**31
    last = x[-2:]
    result = geglu(x, impl="triton")[-2:]
    assert_within_2x(result, reference(last.double()), reference(last))
