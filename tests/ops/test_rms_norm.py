"""What is special to rms_norm: bad input, models' own forms, extremes, launch policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from row_cases import DTYPES, assert_no_new_nan, check_policy, extremes, far_rows, numbers, usable

from fastdiff.ops import rms_norm
from fastdiff.ops.rms_norm import OP, reference
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 3, 8)

BAD = [
    ((X.int(),), {}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
    ((torch.tensor(1.0),), {}, ValueError, r"x must have shape \[..., C\] with C >= 1, got \(\)"),
    ((X[..., :0],), {}, ValueError, r"x must have shape \[..., C\] with C >= 1"),
    ((X, torch.ones(4)), {}, ValueError, r"weight must have shape \(8,\), got \(4,\)"),
    ((X, torch.ones(1, 8)), {}, ValueError, r"weight must have shape \(8,\), got \(1, 8\)"),
    ((X, torch.ones(8).half()), {}, TypeError, "weight must be torch.float32 like x or float32"),
    ((X, torch.ones(8).to("meta")), {}, ValueError, "weight must be on cpu like x, got meta"),
    ((X,), {"eps": -1.0}, ValueError, "eps must be positive and finite, got -1.0"),
    ((X,), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rms_norm(*args, **kwargs)


def test_is_torchs_module_and_diffusers() -> None:
    x, weight = numbers(2, 5, 3, 64), numbers(64, seed=1)
    module = torch.nn.RMSNorm(64, eps=1e-6)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(rms_norm(x, weight), module(x).detach())
    normalization = pytest.importorskip("diffusers.models.normalization")
    other = normalization.RMSNorm(64, eps=1e-6)
    other.weight.data.copy_(weight)
    torch.testing.assert_close(rms_norm(x, weight), other(x).detach())


def test_heads_of_a_fused_projection_are_read_where_they_lie() -> None:
    fused = numbers(2, 9, 3 * 4 * 64).unflatten(-1, (3, 4, 64))
    for heads in (fused[:, :, 1], fused[:, :, 1].transpose(1, 2)):
        assert not heads.is_contiguous()
        assert "cpp" not in OP.implementation_names() or not OP.why_not("cpp", heads)
        result = rms_norm(heads)
        assert result.is_contiguous()
        assert torch.equal(result, rms_norm(heads.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    for _, x in extremes(dtype, 4, 96):
        assert_no_new_nan(OP, x, numbers(96, dtype=dtype))


def test_gradient() -> None:
    x, weight = (numbers(2, 3, 5).double(), numbers(5, seed=1).double())
    assert torch.autograd.gradcheck(rms_norm, (x.requires_grad_(), weight.requires_grad_()))


def test_rows_further_apart_than_int32_counts() -> None:
    x = far_rows()
    for name in usable(OP, x):
        assert_within_2x(rms_norm(x, impl=name), reference(x.double()), reference(x), name)


def test_launch_policy_covers_every_shape() -> None:
    kernels = pytest.importorskip("fastdiff.kernels.rms_norm", exc_type=ImportError)
    check_policy(kernels, kernels._rms_norm_kernel)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    x = torch.randn(9, 2**20, 4, 64, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    result = rms_norm(x, impl="triton")[-1:, -64:]
    last = x[-1:, -64:]
    assert_within_2x(result, reference(last.double()), reference(last))
