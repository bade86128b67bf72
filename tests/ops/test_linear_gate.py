"""What is special to linear_gate: bad input, the modules it replaces, launch policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdiff.ops import geglu, linear_gate, swiglu
from fastdiff.ops.linear_gate import EXAMPLES, reference
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 3, 8)
W = torch.zeros(6, 8)
BAD = [
    ((X.int(), W), {}, TypeError, "x must be float32"),
    ((torch.zeros(()), W), {}, ValueError, r"x must have shape \[..., K\] with K > 0, got \(\)"),
    ((X, W[:, :4]), {}, ValueError, r"weight must have shape \[N, 8\] with N > 0, got \(6, 4\)"),
    ((X, W[0]), {}, ValueError, r"weight must have shape \[N, 8\] with N > 0, got \(8,\)"),
    ((X, W[:5]), {}, ValueError, "weight must have an even number of rows for geglu"),
    ((X, W, torch.zeros(3)), {}, ValueError, r"bias must have shape \(6,\), got \(3,\)"),
    ((X, W.half()), {}, TypeError, "weight must be torch.float32 like x, got torch.float16"),
    ((X, W, torch.zeros(6).double()), {}, TypeError, "bias must be torch.float32 like x"),
    ((X, W.to("meta")), {}, ValueError, "weight must be on cpu like x, got meta"),
    ((X, W), {"activation": "relu"}, ValueError, "activation must be one of .* got 'relu'"),
    ((X, W), {"gate": "left"}, ValueError, "gate must be one of .* got 'left'"),
    ((X, W), {"impl": "cpp"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_gate(*args, **kwargs)


def test_is_the_diffusers_modules() -> None:
    activations = pytest.importorskip("diffusers.models.activations")
    x = torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    modules = {
        "geglu": activations.GEGLU(12, 40),
        "swiglu": activations.SwiGLU(12, 40),
        "gelu": activations.GELU(12, 40),
        "gelu_tanh": activations.GELU(12, 40, approximate="tanh"),
        "silu": activations.LinearActivation(12, 40, activation="silu"),
    }
    with torch.no_grad():
        for activation, module in modules.items():
            projection = module.double().proj
            result = linear_gate(x, projection.weight, projection.bias, activation=activation)
            assert torch.equal(result, module(x)), activation


@pytest.mark.parametrize("gate", ["last", "first"])
def test_agrees_with_the_gates_alone(gate: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(10, 8, dtype=torch.float64, generator=generator)
    product = torch.nn.functional.linear(x, weight)
    result = linear_gate(x, weight, activation="swiglu", gate=gate)
    assert torch.equal(result, swiglu(product, gate=gate))
    assert torch.equal(linear_gate(x, weight), geglu(product))


def test_launch_policy_covers_every_shape() -> None:
    """select() returns only what aot_configs() compiles, within the shared memory there is."""
    kernels = pytest.importorskip("fastdiff.kernels._linear", exc_type=ImportError)
    names = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
    kinds = (("gelu", False), ("gelu", True))
    compiled = set()
    for config in kernels.aot_configs(kinds):
        constants = config["constexprs"]
        key = (
            *(constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GATED")),
            *(config["options"]["num_warps"], config["options"]["num_stages"]),
            *(names[config["signature"]["x_ptr"]], bool(config["multiples_of_16"])),
        )
        compiled |= {(arch, *key) for arch in config["architectures"]}
    seen = set()
    for arch in (80, 89, 90, 100):
        for dtype in names.values():
            for gated in (False, True):
                for aligned in (False, True):
                    for M in (1, 64, 65, 154, 512, 2048, 8192, 2**24):
                        for N in (1, 16, 320, 1280, 5120, 12288):
                            p = kernels.select(M, N, 320, dtype, arch, gated, aligned)
                            key = (
                                *(p.block_m, p.block_n, p.block_k, gated),
                                *(p.num_warps, p.num_stages, dtype, aligned),
                            )
                            assert (arch, *key) in compiled
                            rows = p.block_m + p.block_n * (2 if gated else 1)
                            shared = rows * p.block_k * dtype.itemsize * p.num_stages
                            assert shared <= kernels.SHARED.get(arch, kernels.LEAST_SHARED)
                            seen.add((arch, *key))
    assert len(seen) > 40


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    x = torch.empty((2**17 + 1, 64), dtype=torch.bfloat16, device="cuda").normal_()
    weight = torch.empty((2 * 16400, 64), dtype=torch.bfloat16, device="cuda").normal_(std=0.1)
    result = linear_gate(x, weight, impl="triton")
    assert result.numel() > 2**31
    last = x[-2:]
    oracle = reference(last.double(), weight.double())
    assert_within_2x(result[-2:], oracle, reference(last, weight))


def test_examples_are_of_every_activation_of_the_models() -> None:
    used = {example.make("meta", torch.bfloat16).kwargs["activation"] for example in EXAMPLES}
    assert used == {"geglu", "swiglu", "gelu_tanh", "silu"}
