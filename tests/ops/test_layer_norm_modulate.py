"""What is special to layer_norm_modulate: bad input, models' own forms, extremes, launch policy."""

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

from fastdiff.ops import layer_norm_modulate
from fastdiff.ops.layer_norm_modulate import OP, reference
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 3, 8)
ROW = torch.zeros(2, 8)

BAD = [
    ((X.int(),), {}, TypeError, "x must be float32, float16, bfloat16 or float64, got torch.int32"),
    ((torch.zeros(8),), {}, ValueError, r"x must have shape \[B, ..., C\] .* got \(8,\)"),
    ((X[..., :0],), {}, ValueError, r"x must have shape \[B, ..., C\] with C >= 1"),
    ((X, torch.zeros(3, 8)), {}, ValueError, r"scale must have shape \(2, 8\), or .* \(3, 8\)"),
    ((X, torch.zeros(1, 8)), {}, ValueError, r"scale must have shape \(2, 8\), or"),
    ((X, ROW, torch.zeros(2, 2, 8)), {}, ValueError, r"shift must have shape .* \(2, 2, 8\)"),
    ((X, ROW, torch.zeros(2, 1, 1)), {}, ValueError, r"shift must have shape .* \(2, 1, 1\)"),
    ((X, ROW.double()), {}, TypeError, "scale must be torch.float32 like x or float32"),
    (
        (X.half(), ROW.half(), ROW),
        {},
        TypeError,
        "shift must be torch.float16 like scale, got torch.float32",
    ),
    ((X, ROW.to("meta")), {}, ValueError, "scale must be on cpu like x, got meta"),
    ((X,), {"weight": torch.ones(4)}, ValueError, r"weight must have shape \(8,\), got \(4,\)"),
    ((X,), {"bias": torch.zeros(8)}, ValueError, "bias must come with weight"),
    ((X,), {"weight": torch.ones(8).double()}, TypeError, "weight must be torch.float32 like x"),
    ((X,), {"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    ((X,), {"eps": float("inf")}, ValueError, "eps must be positive and finite, got inf"),
    ((X,), {"impl": "cuda"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        layer_norm_modulate(*args, **kwargs)


def test_is_diffusers_ada_layer_norm_zero() -> None:
    """The chunks of its [B, 6 C] modulation go in as they are."""
    normalization = pytest.importorskip("diffusers.models.normalization")
    module = normalization.AdaLayerNormZero(32, None, norm_type="layer_norm").double()
    x, emb = numbers(2, 5, 32).double(), numbers(2, 32, seed=1).double()
    with torch.no_grad():
        expected = module(x, emb=emb)[0]
        modulation = module.linear(module.silu(emb)).chunk(6, dim=1)
    assert not modulation[1].is_contiguous()
    torch.testing.assert_close(layer_norm_modulate(x, modulation[1], modulation[0]), expected)


def test_forms_of_modulation_agree() -> None:
    x = numbers(2, 7, 40)
    scale, shift = numbers(2, 80, seed=1).chunk(2, 1)
    rows = layer_norm_modulate(x, scale, shift)
    between = layer_norm_modulate(x, scale[:, None], shift[:, None])
    per_token = layer_norm_modulate(x, *(t[:, None].expand(x.shape) for t in (scale, shift)))
    assert torch.equal(rows, between)
    assert torch.equal(rows, per_token)
    copied = [t[:, None].expand(x.shape).contiguous() for t in (scale, shift)]
    assert torch.equal(rows, layer_norm_modulate(x, *copied))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    for _, x in extremes(dtype, 4, 96):
        scale, shift = numbers(4, 192, seed=2, dtype=dtype).chunk(2, 1)
        assert_no_new_nan(OP, x, scale, shift)


def test_constant_row_gives_the_shift() -> None:
    """x - mean is exactly 0, whatever the constant."""
    shift = torch.linspace(-1, 1, 64)[None]
    for value in (0.0, 1.0, -7.25, 4096.0):
        x = torch.full((1, 3, 64), value)
        for name in usable(OP, x, None, shift):
            result = layer_norm_modulate(x, None, shift, impl=name)
            assert torch.equal(result, shift[:, None].expand(x.shape))


def test_float32_keeps_its_digits_beside_a_large_mean() -> None:
    x = numbers(4, 96) + 4096
    oracle = reference(x.double())
    for name in usable(OP, x):
        error = (layer_norm_modulate(x, impl=name).double() - oracle).abs().max()
        assert error < 8 * torch.finfo(torch.float32).eps, error  # |y| < 4


def test_rows_do_not_depend_on_their_batch() -> None:
    x, scale = numbers(3, 9, 40), numbers(3, 40, seed=1)
    together = layer_norm_modulate(x, scale)
    alone = [layer_norm_modulate(x[i : i + 1], scale[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_gradient() -> None:
    x, (scale, shift) = numbers(2, 3, 5), numbers(2, 10, seed=1).chunk(2, 1)
    gradcheck(layer_norm_modulate, x, scale, shift, numbers(5, seed=2), numbers(5, seed=3))
    gradcheck(layer_norm_modulate, x, scale[:, None], None)


def test_rows_further_apart_than_int32_counts() -> None:
    x = far_rows()
    for name in usable(OP, x):
        oracle, expected = reference(x.double()), reference(x)
        assert_within_2x(layer_norm_modulate(x, impl=name), oracle, expected, name)


def test_launch_policy_covers_every_shape() -> None:
    name = "fastdiff.kernels.layer_norm_modulate"
    kernels = pytest.importorskip(name, exc_type=ImportError)
    check_policy(kernels, kernels._layer_norm_modulate_kernel)


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    x = torch.randn(9, 2**20, 256, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    scale = torch.randn(9, 256, dtype=torch.bfloat16, device="cuda")
    result = layer_norm_modulate(x, scale, impl="triton")[-1:, -64:]
    last = (x[-1:, -64:], scale[-1:])
    oracle = reference(*(t.double() for t in last))
    assert_within_2x(result, oracle, reference(*last))


def test_compiles_with_symbolic_shapes() -> None:
    compiled = torch.compile(
        lambda x, scale: layer_norm_modulate(x, scale) + 1,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, tokens in ((2, 5), (3, 8), (7, 6)):
        x, scale = torch.randn(batch, tokens, 8), torch.randn(batch, 8)
        assert torch.equal(compiled(x, scale), layer_norm_modulate(x, scale) + 1)
