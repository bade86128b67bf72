"""What is special to linear_quantized: bad input, the quantisation and its error, launch policy."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch

from fastdiff.ops import linear_quantized, quantize_weight
from fastdiff.ops.linear_quantized import FP8, OP

X = torch.zeros(2, 3, 16)
W = torch.zeros(6, 16, dtype=torch.int8)
S = torch.ones(6)
BAD = [
    ((X.int(), W, S), {}, TypeError, "x must be float32"),
    ((X, W.float(), S), {}, TypeError, "weight_q must be int8 or float8_e4m3fn, got torch.float32"),
    ((X, W[:, :8], S), {}, ValueError, r"weight_q must have shape \[N, 16\] with N > 0, got"),
    ((X, W, S[:1]), {}, ValueError, r"scale must have shape \(6,\), got \(1,\)"),
    ((X, W, S.half()), {}, TypeError, "scale must be torch.float32, got torch.float16"),
    ((X, W, S, S.half()), {}, TypeError, "bias must be torch.float32, got torch.float16"),
    ((X, W, S, S[:2]), {}, ValueError, r"bias must have shape \(6,\), got \(2,\)"),
    ((X, W.to("meta"), S), {}, ValueError, "weight_q must be on cpu like x, got meta"),
    ((X, W, S), {"impl": "cpp"}, ValueError, "impl must be 'auto' or one of"),
]
BAD_WEIGHTS = [
    ((W.float(), "int4"), ValueError, "kind must be one of .* got 'int4'"),
    ((W,), TypeError, "weight must be of a float dtype, got torch.int8"),
    ((S,), ValueError, r"weight must have shape \[N, K\], got \(6,\)"),
    ((torch.full((2, 2), torch.inf),), ValueError, "weight must be finite"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_quantized(*args, **kwargs)


@pytest.mark.parametrize(("args", "error", "message"), BAD_WEIGHTS)
def test_bad_weights(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(*args)


@pytest.mark.parametrize(
    ("kind", "dtype", "low", "high"), [("int8", torch.int8, 4e-3, 1e-2), ("fp8", FP8, 2e-2, 3e-2)]
)
def test_quantized_weights(kind: str, dtype: torch.dtype, low: float, high: float) -> None:
    """The error reported is the error made: about 0.7 % and 2.6 % of Gaussian weights."""
    weight = torch.randn(64, 320, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight[4] *= 1e-30
    weight_q, scale, error = quantize_weight(weight, kind)
    assert weight_q.dtype == dtype
    back = weight_q.double() * scale[:, None].double()
    assert error == pytest.approx(float((back - weight).norm() / weight.double().norm()), rel=1e-9)
    assert low < error < high
    assert torch.equal(back[3], torch.zeros(320).double())
    assert float((back[4] - weight[4]).norm() / weight[4].double().norm()) < high
    largest = {"int8": 127, "fp8": 448}[kind]
    assert bool((weight_q.double().abs().amax(1)[:3] == largest).all())


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_is_near_the_linear_layer(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(32, 320, generator=generator), torch.randn(64, generator=generator)
    weight = torch.randn(64, 320, generator=generator) / 18
    weight_q, scale, error = quantize_weight(weight, kind)
    exact = torch.nn.functional.linear(x, weight)
    result = linear_quantized(x, weight_q, scale, bias) - bias
    lost = float((result - exact).norm() / exact.norm())
    # fp8 rounds x as well.
    assert lost < error * (1.1 if kind == "int8" else 1.6)


def test_values_that_are_exact_stay_so() -> None:
    x = torch.tensor([[448.0, -3.5] + [0.0] * 14])
    weight_q = torch.eye(16).to(FP8)
    result = linear_quantized(x, weight_q, torch.full((16,), 2.0))
    assert torch.equal(result, 2 * x)


def test_fp8_is_refused_on_ampere() -> None:
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    weight_q = torch.zeros(6, 16).to(FP8)
    pretend = mock.Mock(wraps=x, spec=torch.Tensor, dtype=x.dtype, shape=x.shape)
    pretend.device = torch.device("cuda:0")
    pretend.stride = x.stride
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 0)):
        assert "it needs sm_89 or newer" in OP.why_not("triton", pretend, weight_q, S)
        assert OP.why_not("triton", pretend, W, S) == ""
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=(8, 9)):
        assert OP.why_not("triton", pretend, weight_q, S) == ""


def test_rows_that_start_anywhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("fastdiff.ops.linear_quantized")
    monkeypatch.setattr(module, "why_not_triton", lambda x, least: "")
    whole = torch.zeros(4, 40, dtype=torch.bfloat16)
    assert OP.why_not("triton", whole[:, :16].contiguous(), W, S) == ""
    for view in (whole[:, :16], whole.view(-1)[1:65].view(4, 16)):
        assert "start between multiples of 16" in OP.why_not("triton", view, W, S)
    assert "K a multiple of 16" in OP.why_not("triton", whole[:, :8].contiguous(), W[:, :8], S)


def test_launch_policy_covers_every_shape() -> None:
    """select() returns only what aot_configs() compiles, within the shared memory there is."""
    kernels = pytest.importorskip("fastdiff.kernels.linear_quantized", exc_type=ImportError)
    compiled = set()
    for config in kernels.aot_configs():
        constants, options = config["constexprs"], config["options"]
        if "FP8" not in constants:
            continue
        tile = tuple(constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "FP8"))
        for arch in config["architectures"]:
            compiled.add((arch, *tile, options["num_warps"], options["num_stages"]))
    for arch in (80, 89, 90, 100):
        for fp8 in (False, True)[: 1 if arch < 89 else 2]:
            for M in (1, 64, 65, 512, 8192):
                for N in (1, 320, 1280, 12288):
                    p = kernels.select(M, N, 320, fp8, arch)
                    tile = (p.block_m, p.block_n, p.block_k, fp8, p.num_warps, p.num_stages)
                    assert (arch, *tile) in compiled
                    assert p.num_stages >= 2
