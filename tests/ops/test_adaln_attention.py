"""What is special to adaln_attention: bad input, the blocks it replaces, statistics, policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import row_cases
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff.models.dit import DiTBlock, DiTConfig
from fastdiff.ops import adaln_attention
from fastdiff.ops._contract import Call
from fastdiff.ops.adaln_attention import OP, RESULTS, Stream, prefer
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 3, 8)
M = torch.zeros(2, 8)
QKV = torch.zeros(24, 8)
OUT = torch.zeros(8, 8)
GOOD: dict[str, Any] = {
    "x": X, "shift": M, "scale": M, "gate": M, "qkv_weight": QKV, "qkv_bias": None,
    "out_weight": OUT, "out_bias": None, "num_heads": 2,
}  # fmt: skip
EXTRA = {
    "extra_x": X, "extra_shift": M, "extra_scale": M, "extra_gate": M, "extra_qkv_weight": QKV,
    "extra_out_weight": OUT,
}  # fmt: skip
ROWS = torch.zeros(2, 3)

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": X.int()}, TypeError, "x must be float32, float16, bfloat16 or float64, got"),
    ({"x": X[0]}, ValueError, r"x must have shape \[3, S >= 1, C >= 1\], got \(3, 8\)"),
    ({"x": X[:, :0]}, ValueError, r"x must have shape \[2, S >= 1, C >= 1\], got \(2, 0, 8\)"),
    ({"shift": M[:1]}, ValueError, r"shift must have shape \(2, 8\), or the 3 dimensions of x"),
    ({"scale": M.half()}, TypeError, "scale must be torch.float32 like x or float32"),
    ({"gate": M.to("meta")}, ValueError, "gate must be on cpu like x, got meta"),
    ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    ({"num_heads": 3}, ValueError, r"qkv_weight must have 3 \* 3 \* D rows for num_heads=3"),
    ({"qkv_weight": QKV[:, :4]}, ValueError, r"qkv_weight must have shape \[N, 8\]"),
    ({"qkv_weight": QKV.half()}, TypeError, "qkv_weight must be torch.float32 like x"),
    ({"qkv_bias": torch.zeros(8)}, ValueError, r"qkv_bias must have shape \(24,\), got \(8,\)"),
    ({"out_weight": OUT[:4]}, ValueError, r"out_weight must have shape \(8, 8\), got \(4, 8\)"),
    ({"out_bias": torch.zeros(4)}, ValueError, r"out_bias must have shape \(8,\), got \(4,\)"),
    ({"mean": ROWS}, ValueError, "mean and rstd must come together, got one of them"),
    ({"mean": ROWS[:1], "rstd": ROWS}, ValueError, r"mean must have shape \(2, 3\), got \(1, 3\)"),
    ({"mean": ROWS, "rstd": ROWS.half()}, TypeError, "rstd must be torch.float32, got"),
    ({"mean": ROWS, "rstd": ROWS.to("meta")}, ValueError, "rstd must be on cpu like x, got meta"),
    ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    ({"qk_eps": -1.0}, ValueError, "qk_eps must be positive and finite, got -1.0"),
    ({"norm": "batch"}, ValueError, "norm must be one of .* got 'batch'"),
    ({"q_weight": M[0, :4]}, ValueError, "q_weight must come with norm='rms' or 'layer'"),
    ({"cos": torch.zeros(2, 4), "sin": torch.zeros(2, 4)}, ValueError, r"cos must .*\[>= 3, 4\]"),
    ({"extra_scale": M}, ValueError, "extra_scale must come with extra_x, got extra_x=None"),
    ({**EXTRA, "extra_shift": None}, ValueError, "extra_shift must come with extra_x, got None"),
    ({**EXTRA, "extra_gate": None}, ValueError, "extra_gate and extra_out_weight must come tog"),
    (
        {**EXTRA, "extra_gate": None, "extra_out_weight": None, "extra_out_bias": M[0]},
        ValueError,
        "extra_out_bias must come with extra_out_weight, got extra_out_weight=None",
    ),
    ({**EXTRA, "extra_x": X[:1]}, ValueError, r"extra_x must have shape \[2, S >= 1, C >= 1\]"),
    ({**EXTRA, "extra_x": X.half()}, TypeError, "extra_x must be torch.float32 like x, got"),
    ({**EXTRA, "extra_x": X.to("meta")}, ValueError, "extra_x must be on cpu like x, got meta"),
    ({**EXTRA, "extra_qkv_weight": QKV[:12]}, ValueError, "extra_qkv_weight must have 24 rows"),
    ({**EXTRA, "extra_mean": ROWS}, ValueError, "extra_mean and extra_rstd must come together"),
    ({"impl": "cpp"}, ValueError, "impl must be 'auto' or one of"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    adaln_attention(**GOOD)
    with pytest.raises(error, match=message):
        adaln_attention(**{**GOOD, **change})


def _random_parameters(module: torch.nn.Module) -> None:
    """Nothing is zero, as adaLN-Zero initialises it."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)


def _first_half(linear: torch.nn.Linear, c: torch.Tensor) -> dict[str, torch.Tensor]:
    """shift, scale, gate of the attention; the gate of the MLP, the last sixth, becomes 0, so that
    a block's result is its first half's."""
    for parameter in (linear.weight, linear.bias):
        parameter.data[-(linear.out_features // 6) :] = 0
    chunks = linear(torch.nn.functional.silu(c)).chunk(6, 1)
    return dict(zip(("shift", "scale", "gate"), chunks, strict=False))


def _conforms(result: Any, call: dict[str, Any], block: Any) -> None:
    """Against the reference in float64, with a block's own result as torch's."""
    exact = Call((), call).double()
    oracle = [r for r in OP.reference(*exact.args, **exact.kwargs) if r.numel()]
    for mine, right, theirs in zip(result, oracle, block, strict=True):
        assert_within_2x(mine, right, theirs)


@torch.no_grad()
def test_is_the_first_half_of_a_dit_block() -> None:
    config = DiTConfig(input_size=8, patch_size=2, hidden_size=48, depth=1, num_heads=4)
    block = DiTBlock(config)
    _random_parameters(block)
    generator = torch.Generator().manual_seed(0)
    x, c = (torch.randn(size, generator=generator) for size in ((2, 16, 48), (2, 48)))
    call = {
        "x": x, **_first_half(block.adaLN_modulation[1], c),
        "qkv_weight": block.attn.qkv.weight, "qkv_bias": block.attn.qkv.bias,
        "out_weight": block.attn.proj.weight, "out_bias": block.attn.proj.bias, "num_heads": 4,
    }  # fmt: skip
    _conforms([adaln_attention(**call)], call, [block(x, block.adaLN_modulation(c))])


def _diffusers_call(block: Any, x: Any, text: Any, c: Any, text_modulation: Any) -> dict[str, Any]:
    attn = block.attn

    def layer(name: str, *parts: torch.nn.Linear) -> dict[str, torch.Tensor]:
        return {
            f"{name}_weight": torch.cat([part.weight for part in parts]),
            f"{name}_bias": torch.cat([part.bias for part in parts]),
        }

    extra = {"x": text, **text_modulation} | layer(
        "qkv", attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
    )
    if "gate" in extra:
        extra |= layer("out", attn.to_add_out)
    return {
        "x": x, **_first_half(block.norm1.linear, c),
        **layer("qkv", attn.to_q, attn.to_k, attn.to_v), **layer("out", attn.to_out[0]),
        "num_heads": attn.heads, **{f"extra_{name}": value for name, value in extra.items()},
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("last", [False, True])
def test_is_the_first_half_of_an_sd3_block(last: bool) -> None:
    attention = pytest.importorskip("diffusers.models.attention")
    block = attention.JointTransformerBlock(32, 2, 16, context_pre_only=last)
    _random_parameters(block)
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 20, 32), (2, 7, 32), (2, 32))
    x, text, c = (torch.randn(size, generator=generator) for size in sizes)
    linear = block.norm1_context.linear
    if last:
        scale, shift = linear(torch.nn.functional.silu(c)).chunk(2, 1)
        modulation = {"scale": scale, "shift": shift}
    else:
        modulation = _first_half(linear, c)
    call = _diffusers_call(block, x, text, c, modulation)
    text_result, result = block(x, text, c)
    mine = adaln_attention(**call)
    if last:
        _conforms([mine], call, [result])
    else:
        _conforms(mine, call, [result, text_result])


@torch.no_grad()
def test_is_the_first_half_of_a_flux_block() -> None:
    flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")
    block = flux.FluxTransformerBlock(32, 2, 16)
    _random_parameters(block)
    generator = torch.Generator().manual_seed(2)
    sizes = ((2, 20, 32), (2, 7, 32), (2, 32), (27, 8))
    x, text, c, angles = (torch.randn(size, generator=generator) for size in sizes)
    cos, sin = (f(angles).repeat_interleave(2, 1) for f in (torch.cos, torch.sin))
    attn = block.attn
    modulation = _first_half(block.norm1_context.linear, c)
    call = _diffusers_call(block, x, text, c, modulation) | {
        "norm": "rms", "cos": cos[7:], "sin": sin[7:], "extra_cos": cos[:7], "extra_sin": sin[:7],
        "q_weight": attn.norm_q.weight, "k_weight": attn.norm_k.weight,
        "extra_q_weight": attn.norm_added_q.weight, "extra_k_weight": attn.norm_added_k.weight,
    }  # fmt: skip
    text_result, result = block(x, text, c, (cos, sin))
    _conforms(adaln_attention(**call), call, [result, text_result])


def _call(name: str, dtype: torch.dtype = torch.float64) -> Call:
    return next(s for s in OP.samples if s.name == name).make("cpu", dtype)


def test_statistics_are_those_of_the_result_and_are_taken_as_given() -> None:
    call = _call("two heads, statistics")
    result, mean, rstd = adaln_attention(*call.args, **call.kwargs)
    torch.testing.assert_close(mean, result.mean(-1))
    variance = result.var(-1, correction=0)
    torch.testing.assert_close(rstd, torch.rsqrt(variance + 1e-6))
    kwargs = {**call.kwargs, "return_statistics": False}
    following = adaln_attention(result, **kwargs)
    torch.testing.assert_close(adaln_attention(result, **kwargs, mean=mean, rstd=rstd), following)
    # Not computed again: others give another result.
    other = adaln_attention(result, **kwargs, mean=mean + 1, rstd=rstd)
    assert not torch.allclose(other, following)


@pytest.mark.parametrize("dtype", row_cases.DTYPES, ids=str)
def test_no_new_nan_at_the_ends_of_the_range(dtype: torch.dtype) -> None:
    call = _call("modulation with a dimension of one", dtype)
    for _, rows in row_cases.extremes(dtype, 36, 32):
        row_cases.assert_no_new_nan(OP, rows.view_as(call.args[0]), **call.kwargs)


def test_a_stream_without_a_result_does_not_change_the_other() -> None:
    call = _call("streams of other widths")
    both = adaln_attention(*call.args, **call.kwargs)
    absent = {"extra_gate": None, "extra_out_weight": None, "extra_out_bias": None}
    torch.testing.assert_close(adaln_attention(*call.args, **{**call.kwargs, **absent}), both[0])


def test_gradients_are_right() -> None:
    call = _call("text gives keys only, without bias")
    names = [name for name, value in call.kwargs.items() if isinstance(value, torch.Tensor)]
    tensors = [call.args[0], *(call.kwargs[name] for name in names)]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def function(x: torch.Tensor, *values: torch.Tensor) -> Any:
        given = dict(zip(names, values, strict=True))
        return adaln_attention(x, **{**call.kwargs, **given}, return_statistics=True)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_extra_arguments_are_the_main_ones() -> None:
    """`Stream` is read from the arguments by name: both streams have all of them."""
    schema = torch.ops.fastdiff.adaln_attention.default._schema
    names = [argument.name for argument in schema.arguments]
    for field in Stream._fields:
        assert {field, f"extra_{field}"} <= set(names)
    assert len(schema.returns) == 2 * RESULTS


def test_what_auto_takes() -> None:
    call = _call("one token, one head", torch.float32)
    assert prefer(*call.args, **call.kwargs) == "composed"
    assert not OP.why_not("composed", *call.args, **call.kwargs)
    assert "CUDA devices" in OP.why_not("triton", *call.args, **call.kwargs)

    def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> str:
        with FakeTensorMode():
            return prefer(**{**GOOD, "x": torch.empty(shape, device="cuda", dtype=dtype)})

    assert on_gpu(2, 256, 1152) == on_gpu(2, 4096, 1536) == "triton"
    assert on_gpu(1, 4096, 3072) == on_gpu(64, 1, 1152) == "composed"
    assert on_gpu(2, 256, 1152, dtype=torch.float32) == "composed"


def test_launch_policy_covers_every_shape() -> None:
    """select() returns only what aot_configs() compiles, within the shared memory there is."""
    kernels = pytest.importorskip("fastdiff.kernels.adaln_attention", exc_type=ImportError)
    linear = pytest.importorskip("fastdiff.kernels._linear", exc_type=ImportError)
    dtypes = {"*bf16": torch.bfloat16, "*fp32": torch.float32}
    compiled, cores = set(), set()
    for config in kernels.aot_configs():
        constants, options = config["constexprs"], config["options"]
        if "BLOCK_M" not in constants:
            continue
        key = (
            *(constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "EVEN_K", "GATED")),
            *(options["num_warps"], options["num_stages"], dtypes[config["signature"]["x_ptr"]]),
        )
        compiled |= {(arch, *key) for arch in config["architectures"]}
        cores |= set(config["tensor_cores"].items())
    assert cores == {(80, "HMMA"), (89, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")}
    seen = set()
    for arch in (80, 89, 90, 100):
        for dtype in dtypes.values():
            for aligned in (False, True):
                for M in (1, 64, 65, 512, 2048, 8192, 2**24):
                    for N, K in ((24, 8), (320, 320), (1152, 1152), (3456, 1152), (9216, 3072)):
                        p = kernels.select(M, N, K, dtype, arch, aligned)
                        even = p.block_k == kernels.WHOLE_K
                        assert not even or K % p.block_k == 0
                        for gated in (False, True):
                            key = (p.block_m, p.block_n, p.block_k, even, gated)
                            assert (arch, *key, p.num_warps, p.num_stages, dtype) in compiled
                        size = (p.block_m + p.block_n) * p.block_k * dtype.itemsize
                        assert size * p.num_stages <= linear.SHARED.get(arch, linear.LEAST_SHARED)
                        seen.add((arch, *key))
    assert len(seen) >= 4 * 5


OFFSETS = """
import torch
import fastdiff
from fastdiff.ops.adaln_attention import OP

# The third image starts 2^31 elements after the first, at a stride that int32 holds; what is never
# touched costs no memory.
far = 2**30 + 64
call = next(s for s in OP.samples if s.name == "a batch").make("cpu", torch.bfloat16)
near = call.args[0]
x = torch.empty(2 * far + near[0].numel(), dtype=near.dtype)
x = x.as_strided(near.shape, (far, near.stride(1), 1)).copy_(near)
expected = OP(near, **call.kwargs, impl="triton")
result = OP(x, **call.kwargs, impl="triton")
assert all(torch.equal(*pair) for pair in zip(result, expected))
print("same")
"""


@pytest.mark.interpret
def test_offsets_past_int32(fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    assert fresh_python("-c", OFFSETS, TRITON_INTERPRET="1").strip() == "same"
