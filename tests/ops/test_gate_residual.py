"""What is special to gate_residual: bad input, the bits of PyTorch, extremes, launch policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from row_cases import DTYPES, check_policy, extremes, far_rows, gradcheck, numbers, usable

from fastdiff.ops import gate_residual
from fastdiff.ops.gate_residual import OP, reference

X = torch.zeros(2, 3, 8)
ROW = torch.zeros(2, 8)

BAD = [
    ((X.int(), X.int(), ROW), {}, TypeError, "x must be float32, float16, bfloat16 or float64"),
    ((ROW[0], ROW[0], ROW), {}, ValueError, r"x must have shape \[B, ..., C\] .* got \(8,\)"),
    ((X, X[:1], ROW), {}, ValueError, r"y must have shape \(2, 3, 8\) like x, got \(1, 3, 8\)"),
    ((X, X.half(), ROW), {}, TypeError, "y must be torch.float32 like x, got torch.float16"),
    ((X, X.to("meta"), ROW), {}, ValueError, "y must be on cpu like x, got meta"),
    ((X, X, ROW[:1]), {}, ValueError, r"gate must have shape \(2, 8\), or .* got \(1, 8\)"),
    ((X, X, ROW[0]), {}, ValueError, r"gate must have shape \(2, 8\), or .* got \(8,\)"),
    ((X, X, ROW.half()), {}, TypeError, "gate must be torch.float32 like x or float32"),
    ((X, X, ROW), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gate_residual(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_has_the_bits_of_two_operations(dtype: torch.dtype) -> None:
    """A contracted product, or one that is not rounded, differs in some of these elements."""
    x, y = numbers(2, 64, 320, dtype=dtype), numbers(2, 64, 320, seed=1, dtype=dtype)
    gate = numbers(2, 640, seed=2, dtype=dtype).chunk(2, 1)[1]
    expected = x + gate[:, None] * y
    once = torch.addcmul(x.double(), gate[:, None].double(), y.double()).to(dtype)
    assert not torch.equal(once, expected), "the case must tell the two apart"
    for name in usable(OP, x, y, gate):
        assert torch.equal(gate_residual(x, y, gate, impl=name), expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes_have_the_same_bits(dtype: torch.dtype) -> None:
    """Infinities and NaN (inf - inf) included."""
    for what, x in extremes(dtype, 4, 96):
        for _, y in extremes(dtype, 4, 96):
            for gate in (numbers(4, 96, seed=3, dtype=dtype), x):
                expected = x + gate * y
                for name in usable(OP, x, y, gate):
                    torch.testing.assert_close(
                        gate_residual(x, y, gate, impl=name),
                        expected,
                        rtol=0,
                        atol=0,
                        equal_nan=True,
                        msg=f"{name} {what}",
                    )


def test_float32_gate_is_rounded_once() -> None:
    x, y = numbers(2, 9, 64, dtype=torch.bfloat16), numbers(2, 9, 64, seed=1, dtype=torch.bfloat16)
    gate = numbers(2, 64, seed=2)
    expected = (x + gate[:, None] * y).to(torch.bfloat16)
    assert torch.equal(gate_residual(x, y, gate), expected)


def test_gradient() -> None:
    x, y, gate = numbers(2, 3, 5), numbers(2, 3, 5, seed=1), numbers(2, 5, seed=2)
    gradcheck(gate_residual, x, y, gate)
    gradcheck(gate_residual, x, y, gate[:, None])


def test_rows_further_apart_than_int32_counts() -> None:
    x = far_rows()
    gate = numbers(3, 64, seed=1, dtype=x.dtype)
    for name in usable(OP, x, x, gate):
        assert torch.equal(gate_residual(x, x, gate, impl=name), reference(x, x, gate)), name


def test_launch_policy_covers_every_shape() -> None:
    kernels = pytest.importorskip("fastdiff.kernels.gate_residual", exc_type=ImportError)
    check_policy(kernels, kernels._gate_residual_kernel)


def test_float32_products_are_not_contracted_on_a_gpu() -> None:
    kernels = pytest.importorskip("fastdiff.kernels.gate_residual", exc_type=ImportError)
    for config in kernels.aot_configs():
        assert config["options"]["enable_fp_fusion"] == (
            "*fp32" not in config["signature"].values()
        )
    assert not kernels.fp_fusion(torch.zeros(1), torch.zeros(1))
    assert not kernels.fp_fusion(torch.zeros(1).bfloat16(), torch.zeros(1))
    assert kernels.fp_fusion(torch.zeros(1).bfloat16(), torch.zeros(1).bfloat16())


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    x = torch.randn(9, 2**20, 256, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    gate = torch.randn(9, 256, dtype=torch.bfloat16, device="cuda")
    result = gate_residual(x, x, gate, impl="triton")[-1:, -64:]
    assert torch.equal(result, reference(x[-1:, -64:], x[-1:, -64:], gate[-1:]))
