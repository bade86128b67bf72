"""What is special to add_group_norm_silu: bad input, its two parts, memory formats, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from row_cases import DTYPES, assert_no_new_nan, extremes, gradcheck, numbers, usable

from fastdiff.ops import add_group_norm_silu, group_norm_silu
from fastdiff.ops.add_group_norm_silu import OP, reference
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 8, 3, 3)

BAD = [
    ((X.int(), X.int(), 2), {}, TypeError, "x must be float32, float16, bfloat16"),
    ((X, X[:1], 2), {}, ValueError, r"residual must have shape \(2, 8, 3, 3\) like x, got \(1, 8"),
    ((X, X[..., :1], 2), {}, ValueError, r"residual must have shape \(2, 8, 3, 3\) like x"),
    ((X, X.half(), 2), {}, TypeError, "residual must be torch.float32 like x, got torch.float16"),
    ((X, X.to("meta"), 2), {}, ValueError, "residual must be on cpu like x, got meta"),
    ((X, X, 3), {}, ValueError, "num_groups must divide the 8 channels of x, got 3"),
    ((X, X, 2, torch.ones(4)), {}, ValueError, r"weight must have shape \(8,\), got \(4,\)"),
    ((X, X, 2, None, torch.ones(8)), {}, ValueError, "bias must come with weight"),
    ((X, X, 2), {"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    ((X, X, 2), {"activation": "gelu"}, ValueError, "activation must be one of .* got 'gelu'"),
    ((X, X, 2), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_group_norm_silu(*args, **kwargs)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 3000.0])
def test_is_its_two_parts(mean: float, dtype: torch.dtype, channels_last: bool) -> None:
    """The sum has the bits of PyTorch's, and the norm is that of the rounded sum."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for shape in ((2, 40, 9, 7), (1, 12, 64, 65), (3, 24, 1, 1)):
        x, residual = (
            (numbers(*shape, seed=seed) + mean).to(dtype).contiguous(memory_format=memory_format)
            for seed in (0, 1)
        )
        weight, bias = numbers(2, shape[1], seed=2, dtype=dtype)
        for activation in ("silu", "none"):
            rest = (4, weight, bias)
            total, expected = reference(x, residual, *rest, activation=activation)
            assert torch.equal(total, x + residual)
            exact = (total.double(), 4, weight.double(), bias.double())
            oracle = group_norm_silu(*exact, activation=activation)
            for name in usable(OP, x, residual, *rest):
                result = add_group_norm_silu(x, residual, *rest, activation=activation, impl=name)
                assert torch.equal(result[0], total), name
                assert_within_2x(result[1], oracle, expected, name)
                if name == "cpp":
                    alone = group_norm_silu(total, *rest, activation=activation, impl=name)
                    assert torch.equal(result[1], alone)


def test_both_results_lie_like_x() -> None:
    last = numbers(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    first = numbers(2, 8, 3, 5, seed=1)
    for x, residual in ((last, first), (first, last)):
        for result in add_group_norm_silu(x, residual, 4):
            assert result.stride() == x.stride()
        why = OP.why_not("cpp", x, residual, 4)
        assert "another memory layout than x" in why


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    for _, values in extremes(dtype, 8, 64):
        x = values.reshape(1, 8, 8, 8)
        assert_no_new_nan(OP, x, torch.zeros_like(x), 2)
        assert_no_new_nan(OP, x, -x, 2)


def test_gradient() -> None:
    x, residual = numbers(2, 6, 2, 3), numbers(2, 6, 2, 3, seed=1)
    weight, bias = numbers(6, seed=3), numbers(6, seed=4)
    gradcheck(lambda *given: add_group_norm_silu(given[0], given[1], 3, *given[2:]), x, residual,
              weight, bias)  # fmt: skip


def test_gradient_of_one_result() -> None:
    """A loss may use the norm alone, or the sum alone."""
    given = [numbers(2, 6, 2, 3).double(), numbers(2, 6, 2, 3, seed=1).double()]
    for index in (0, 1):
        leaves = [t.clone().requires_grad_() for t in given]
        others = [t.clone().requires_grad_() for t in given]
        add_group_norm_silu(*leaves, 3)[index].square().sum().backward()
        reference(*others, 3)[index].square().sum().backward()
        for mine, theirs in zip(leaves, others, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_second_pass_of_the_split_way_is_compiled_with_group_norm_silu() -> None:
    """Which is why aot_configs() leaves it out: same kernel, same signature, same constants."""
    pytest.importorskip("triton")
    from fastdiff.kernels import _group_norm, add_group_norm_silu, group_norm_silu

    mine = {config["kernel"] for config in add_group_norm_silu.aot_configs()}
    theirs = {config["kernel"] for config in group_norm_silu.aot_configs()}
    last = {_group_norm._apply_last_kernel, _group_norm._finalize_last_kernel}
    assert theirs - mine == {_group_norm._apply_kernel, *last}


@pytest.mark.gpu
@pytest.mark.parametrize("channels_last", [False, True])
def test_more_elements_than_int32_counts(channels_last: bool) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (9, 64, 2048, 2048)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=memory_format)
    x.normal_(mean=1.0)
    total, normed = add_group_norm_silu(x, x, 32, impl="triton")
    last = x[-1:]
    expected = reference(last, last, 32)
    assert torch.equal(total[-1:], expected[0])
    oracle = reference(last.double(), last.double(), 32)
    assert_within_2x(normed[-1:], oracle[1], expected[1])
