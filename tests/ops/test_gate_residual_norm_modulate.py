"""What is special to gate_residual_norm_modulate: bad input, its two parts, extremes, policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from row_cases import (
    DTYPES,
    assert_no_new_nan,
    check_policy,
    extremes,
    far_rows,
    gradcheck,
    numbers,
    usable,
)

from fastdiff.ops import gate_residual, gate_residual_norm_modulate, layer_norm_modulate
from fastdiff.ops.gate_residual_norm_modulate import OP, reference
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 3, 8)
ROW = torch.zeros(2, 8)

BAD = [
    ((X.int(), X.int(), ROW, ROW, ROW), {}, TypeError, "x must be float32, float16, bfloat16"),
    ((X, X[:, :1], ROW, ROW, ROW), {}, ValueError, r"y must have shape \(2, 3, 8\) like x"),
    ((X, X, ROW[:1], ROW, ROW), {}, ValueError, r"gate must have shape \(2, 8\), or"),
    ((X, X, ROW, ROW[:1], ROW), {}, ValueError, r"scale must have shape \(2, 8\), or"),
    ((X, X, ROW, ROW, ROW[:1]), {}, ValueError, r"shift must have shape \(2, 8\), or"),
    (
        (X.half(), X.half(), ROW, ROW, ROW.half()),
        {},
        TypeError,
        "shift must be torch.float32 like gate, got torch.float16",
    ),
    ((X, X, ROW, ROW, ROW, None, ROW[0]), {}, ValueError, "bias must come with weight"),
    ((X, X, ROW, ROW, ROW), {"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    ((X, X, ROW, ROW, ROW), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gate_residual_norm_modulate(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_its_two_parts(dtype: torch.dtype) -> None:
    """The residual to the bit; the norm of the rounded residual."""
    x, y = numbers(2, 9, 320, dtype=dtype), numbers(2, 9, 320, seed=1, dtype=dtype)
    gate, scale, shift = numbers(2, 960, seed=2, dtype=dtype).chunk(3, 1)
    for name in ("reference", *usable(OP, x, y, gate, scale, shift)):
        given = (x, y, gate, scale, shift)
        residual, normed = gate_residual_norm_modulate(*given, impl=name)
        assert torch.equal(residual, x + gate[:, None] * y), name
        assert torch.equal(residual, gate_residual(x, y, gate, impl=name)), name
        assert torch.equal(normed, layer_norm_modulate(residual, scale, shift, impl=name)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    for _, x in extremes(dtype, 4, 96):
        y = numbers(4, 96, seed=1, dtype=dtype)
        gate, scale, shift = numbers(4, 288, seed=2, dtype=dtype).chunk(3, 1)
        assert_no_new_nan(OP, x, y, gate, scale, shift)


def test_gradient() -> None:
    x, y = numbers(2, 3, 5), numbers(2, 3, 5, seed=1)
    gate, scale, shift = numbers(2, 15, seed=2).chunk(3, 1)
    affine = (numbers(5, seed=3), numbers(5, seed=4))
    gradcheck(gate_residual_norm_modulate, x, y, gate, scale, shift, *affine)


def test_gradient_of_one_result() -> None:
    """A loss may use the norm alone, or the residual alone."""
    given = [numbers(2, 3, 5).double(), numbers(2, 3, 5, seed=1).double()]
    given += list(numbers(2, 15, seed=2).double().chunk(3, 1))
    for index in (0, 1):
        leaves = [t.clone().requires_grad_() for t in given]
        others = [t.clone().requires_grad_() for t in given]
        gate_residual_norm_modulate(*leaves)[index].sum().backward()
        reference(*others)[index].sum().backward()
        for mine, theirs in zip(leaves, others, strict=True):
            expected = torch.zeros_like(mine) if theirs.grad is None else theirs.grad
            found = torch.zeros_like(mine) if mine.grad is None else mine.grad
            torch.testing.assert_close(found, expected)


def test_rows_further_apart_than_int32_counts() -> None:
    x = far_rows()
    given = (x, x, *numbers(3, 192, seed=1, dtype=x.dtype).chunk(3, 1))
    expected, oracle = reference(*given), reference(*(t.double() for t in given))
    for name in usable(OP, *given):
        residual, normed = gate_residual_norm_modulate(*given, impl=name)
        assert torch.equal(residual, expected[0]), name
        assert_within_2x(normed, oracle[1], expected[1], name)


def test_launch_policy_covers_every_shape() -> None:
    name = "fastdiff.kernels.gate_residual_norm_modulate"
    kernels = pytest.importorskip(name, exc_type=ImportError)
    check_policy(kernels, kernels._gate_residual_norm_modulate_kernel)
