"""What is special to attention: bad input, equivalences, routes, launch policy, offsets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import attention
from fastdiff.ops._contract import outputs
from fastdiff.ops.attention import (
    MEASURED,
    OP,
    Arguments,
    Route,
    _cpp_is_faster,
    prefer,
    reference,
)
from fastdiff.testing import assert_within_2x

X = torch.zeros(2, 3, 2, 8)
E = torch.zeros(2, 5, 2, 8)
W = torch.ones(8)
T = torch.zeros(5, 8)
L = torch.tensor([1, 2])
EXTRA = {"extra_q": E, "extra_k": E, "extra_v": E}

BAD: list[tuple[Any, Any, type[Exception], str]] = [
    ((X.int(), X, X), {}, TypeError, "q must be float32, float16, bfloat16 or float64, got"),
    ((X[0], X, X), {}, ValueError, r"q must have shape \[B, S, H, D\], got \(3, 2, 8\)"),
    ((X[:, :, :0], X, X), {}, ValueError, "q must have at least one head and column"),
    ((X, X[:, :0], X), {}, ValueError, r"k must have shape \[B, S >= 1, H, D\]"),
    ((X, X[:1], X), {}, ValueError, r"k must have shape \[2, 3, 2, 8\], got \(1, 3, 2, 8\)"),
    ((X, X, E), {}, ValueError, r"v must have shape \[2, 3, 2, 8\], got \(2, 5, 2, 8\)"),
    ((X, X.half(), X), {}, TypeError, "k must be torch.float32 like q, got torch.float16"),
    ((X, X, X.to("meta")), {}, ValueError, "v must be on cpu like q, got meta"),
    ((X, X, X), {"extra_k": E}, ValueError, "extra_k and extra_v must come together"),
    ((X, X, X), {"extra_q": E}, ValueError, "extra_q must come with extra_k and extra_v"),
    ((X, X, X), {**EXTRA, "extra_v": X}, ValueError, r"extra_v must have shape \[2, 5, 2, 8\]"),
    ((X, X, X), {"key_lengths": L[:1]}, ValueError, r"key_lengths must have shape \(2,\)"),
    ((X, X, X), {"key_lengths": L.float()}, TypeError, "key_lengths must be int32 or int64"),
    ((X, X, X), {"extra_key_lengths": L}, ValueError, "extra_key_lengths must come with extra_k"),
    ((X, X, X), {"key_mask": torch.ones(2, 5) > 0}, ValueError, r"key_mask must .* \(2, 3\)"),
    ((X, X, X), {"key_mask": torch.ones(2, 3)}, TypeError, "key_mask must be bool, got"),
    ((X, X, X), {"norm": "batch"}, ValueError, "norm must be one of .* got 'batch'"),
    ((X, X, X), {"q_weight": W}, ValueError, "q_weight must come with norm='rms' or 'layer'"),
    ((X, X, X), {"norm": "rms", "q_weight": W}, ValueError, "k_weight must be given, as others"),
    (
        (X, X, X),
        {"norm": "rms", "q_weight": W, "k_weight": W[:4]},
        ValueError,
        r"k_weight must have shape \(8,\), got \(4,\)",
    ),
    (
        (X.half(), X.half(), X.half()),
        {"norm": "rms", "q_weight": W.half(), "k_weight": W},
        TypeError,
        "k_weight must be torch.float16 like q_weight, got torch.float32",
    ),
    ((X, X, X), {"cos": T}, ValueError, "cos and sin must come together, got one of them"),
    ((X, X, X), {"cos": T[:2], "sin": T}, ValueError, r"cos must have shape \[>= 3, 8\], got"),
    ((X, X, X), {"cos": T, "sin": T[:4]}, ValueError, r"sin must have shape \(5, 8\) like cos"),
    ((X, X, X), {"extra_cos": T, "extra_sin": T}, ValueError, "extra_cos must come with extra_k"),
    ((X, X, X), {"cos": T.double(), "sin": T}, TypeError, "cos must be torch.float32 like q"),
    ((X, X, X), {"scale": 0.0}, ValueError, "scale must be positive and finite, got 0.0"),
    ((X, X, X), {"scale": float("nan")}, ValueError, "scale must be positive and finite, got nan"),
    ((X, X, X), {"eps": -1.0}, ValueError, "eps must be positive and finite, got -1.0"),
    ((X, X, X), {"impl": "flash"}, ValueError, "impl must be 'auto' or one of"),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD)
def test_bad_input(args: Any, kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(*args, **kwargs)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_torchs_attention_on_joined_segments() -> None:
    """FLUX's order of things, with its own functions: RMSNorm, pairs rotated as complex numbers,
    text and image concatenated."""
    image, text = random(2, 7, 3, 2, 8), random(2, 4, 3, 2, 8, seed=1)
    weights = 1 + random(4, 8, seed=2) / 5
    angles = random(11, 4, seed=3)
    rotations = torch.polar(torch.ones_like(angles), angles)

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * rotations[:, None]).flatten(-2)

    def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, (8,), weight, 1e-6)

    q = torch.cat([normed(text[:, :, 0], weights[2]), normed(image[:, :, 0], weights[0])], 1)
    k = torch.cat([normed(text[:, :, 1], weights[3]), normed(image[:, :, 1], weights[1])], 1)
    v = torch.cat([text[:, :, 2], image[:, :, 2]], 1)
    parts = (turned(q).transpose(1, 2), turned(k).transpose(1, 2), v.transpose(1, 2))
    expected = functional.scaled_dot_product_attention(*parts).transpose(1, 2)

    tables = [f(angles).repeat_interleave(2, 1) for f in (torch.cos, torch.sin)]
    out, extra = attention(
        *image.unbind(2),
        **dict(zip(("extra_q", "extra_k", "extra_v"), text.unbind(2), strict=True)),
        norm="rms",
        q_weight=weights[0],
        k_weight=weights[1],
        extra_q_weight=weights[2],
        extra_k_weight=weights[3],
        cos=tables[0][4:],
        sin=tables[1][4:],
        extra_cos=tables[0],
        extra_sin=tables[1],
    )
    torch.testing.assert_close(torch.cat([extra, out], 1), expected)


def test_the_reference_in_parts_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for sample in OP.samples[:4]:
        call = sample.make("cpu", torch.float64)
        expected = reference(*call.args, **call.kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[reference.__module__], "MAX_SCORES", 20)
            torch.testing.assert_close(reference(*call.args, **call.kwargs), expected)


def test_results_come_as_asked() -> None:
    assert isinstance(attention(X, X, X), torch.Tensor)
    assert [tuple(t.shape) for t in attention(X, X, X, return_lse=True)] == [X.shape, (2, 2, 3)]
    both = attention(X, X, X, **EXTRA, return_lse=True)
    assert [tuple(t.shape) for t in both] == [X.shape, E.shape, (2, 2, 8)]
    one = attention(X, X, X, extra_k=E, extra_v=E)
    assert isinstance(one, torch.Tensor)


@pytest.mark.parametrize("impl", ["reference", "sdpa", "cpp"])
def test_an_image_without_keys_gives_zero(impl: str) -> None:
    q, k, v = (random(2, 20, 1, 8, seed=s).float().requires_grad_() for s in range(3))
    if OP.why_not(impl, q, k, v):
        pytest.skip(OP.why_not(impl, q, k, v))
    lengths = torch.tensor([0, 20])
    out = attention(q, k, v, key_lengths=lengths, impl=impl)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert bool((out[1] != 0).all())
    out.sum().backward()
    for tensor in (q, k, v):
        assert bool(tensor.grad.isfinite().all())
    _, lse = attention(q, k, v, key_lengths=lengths, return_lse=True)
    assert bool((lse[0] == float("-inf")).all())
    assert bool(lse[1].isfinite().all())


def test_gradcheck() -> None:
    tensors = [random(1, s, 1, 4, seed=s).requires_grad_() for s in (3, 2, 2)]
    extra = [random(1, 2, 1, 4, seed=9 + s).requires_grad_() for s in range(3)]
    weights = [(1 + random(4, seed=20 + s) / 4).requires_grad_() for s in range(4)]
    tables = [random(3, 4, seed=30 + s) for s in range(2)]

    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, extra_q, extra_k, extra_v, *w = given
        names = ("q_weight", "k_weight", "extra_q_weight", "extra_k_weight")
        return outputs(
            attention(
                *(q, k, v), extra_q=extra_q, extra_k=extra_k, extra_v=extra_v, norm="layer",
                **dict(zip(names, w, strict=True)), cos=tables[0], sin=tables[1],
                key_lengths=torch.tensor([1]), return_lse=True,
            )
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (*tensors, *extra, *weights))


def test_routes() -> None:
    """Without a GPU the device is all that a tensor must pretend."""

    class OnGpu:
        def __init__(self, head_dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
            self.shape = torch.Size((2, 1024, 8, head_dim))
            self.dtype, self.device = dtype, torch.device("cuda", 0)

    def route(head_dim: int, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> str:
        return prefer(*[OnGpu(head_dim, dtype)] * 3, **kwargs)

    assert [route(d) for d in (40, 72, 80, 96, 160)] == ["triton"] * 5
    assert [route(d) for d in (64, 128)] == ["sdpa"] * 2
    assert route(40, torch.float32) == "sdpa"
    extra = OnGpu(64)
    assert route(64, extra_k=extra, extra_v=extra) == "triton"
    assert route(64, norm="rms") == "triton"
    assert route(128, cos=T, sin=T) == "triton"
    assert prefer(X, X, X, norm="rms") == "sdpa", "three queries"
    many = random(1, 16, 1, 8)
    assert prefer(many, X, X, norm="rms") == ("cpp" if _cpp_is_faster() else "sdpa")


def test_a_measured_route_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnGpu:
        shape, dtype = torch.Size((2, 1024, 8, 64)), torch.bfloat16
        device = torch.device("cuda", 0)

    key = Route(90, torch.bfloat16, 64, (1024).bit_length(), (1024).bit_length(), False)
    monkeypatch.setitem(MEASURED, key, "triton")
    assert prefer(*[OnGpu()] * 3) == "triton"
    assert prefer(*[OnGpu()] * 3, norm="rms") == "triton"
    monkeypatch.setitem(MEASURED, key, "sdpa")
    assert prefer(*[OnGpu()] * 3) == "sdpa"


@pytest.mark.skipif(not _cpp_is_faster(), reason="needs the extension and AVX-512")
def test_auto_on_the_cpu_is_the_kernel_where_it_is_faster() -> None:
    q = random(1, 20, 1, 8).float()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = q.to(dtype)
        assert OP.choose("auto", x, x, x).__name__ == "_cpp"
    assert OP.choose("auto", q, q, q, return_lse=True).__name__ == "_cpp"
    assert OP.choose("auto", q[:, :15], q, q).__name__ == "_sdpa", "vectors of queries half empty"
    double = q.double()
    assert OP.choose("auto", double, double, double).__name__ == "_sdpa"
    across = random(1, 8, 1, 20).float().transpose(1, 3)
    assert OP.why_not("cpp", q, across, q) == "k has stride 20 along its last dimension, not 1"


def test_auto_on_the_cpu_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastdiff.ops.attention"], "ext_status", lambda: "not built")
    q = random(1, 20, 1, 8).float()
    assert OP.choose("auto", q, q, q).__name__ == "_sdpa"
    assert OP.choose("auto", q, q, q, return_lse=True) is reference
    few = q[:, :15]
    assert OP.choose("auto", q, few, few) is reference, "torch's CPU kernel hides NaN there"
    with pytest.raises(RuntimeError, match="not built"):
        OP.choose("cpp", q, q, q)


def test_launch_policy_is_compiled_and_covers() -> None:
    """select() returns only tiles that aot_configs() compiles; pieces cover the head dimension."""
    kernels = pytest.importorskip("fastdiff.kernels.attention", exc_type=ImportError)
    compiled = set()
    for config in kernels.aot_configs():
        if config["kernel"] is kernels.attention_kernel:
            c, options = config["constexprs"], config["options"]
            tile = (c["BLOCK_M"], c["BLOCK_N"], options["num_warps"], options["num_stages"])
            fp32 = config["signature"]["q_ptr"] == "*fp32"
            (arch,) = config["architectures"]
            compiled.add((arch, fp32, c["D0"], c["D1"], *tile))
    for D in range(8, 257, 8):
        d0, d1 = kernels.pieces(D)
        assert d0 + d1 >= D
        assert d0 + d1 <= max(16, 1 << (D - 1).bit_length()), "never more than one power of two"
        assert d1 == 0 or d1 <= d0 < D
        for arch in (80, 86, 89, 90, 100, 120):
            for dtype in (torch.float16, torch.float32)[: 2 if D <= 128 else 1]:
                for B, Sq, Sk in ((1, 1, 1), (1, 1, 10**6), (2, 64, 64), (2, 4096, 77)):
                    plan = kernels.select(B, 8, Sq, Sk, D, dtype, arch)
                    kind = max(a for a in kernels.SMS if a <= arch)
                    tile = (plan.block_m, plan.block_n, plan.num_warps, plan.stages)
                    assert (plan.d0, plan.d1) == kernels.pieces(D, dtype)
                    assert (kind, dtype == torch.float32, plan.d0, plan.d1, *tile) in compiled
                    assert 1 <= plan.splits <= kernels.MAX_SPLITS
                    assert plan.splits == 1 or Sk > plan.splits * plan.block_n
    assert kernels.select(1, 1, 1, 10**6, 64, torch.float16, 90).splits > 8
    assert kernels.select(2, 8, 4096, 10**6, 64, torch.float16, 90).splits == 1


def test_exact_fit_saves_what_padding_costs() -> None:
    kernels = pytest.importorskip("fastdiff.kernels.attention", exc_type=ImportError)
    saved = {d: kernels.fit(d) for d in (40, 64, 72, 80, 96, 128, 160)}
    assert {d: columns for d, (columns, _, _) in saved.items()} == {
        40: 48, 64: 64, 72: 80, 80: 80, 96: 96, 128: 128, 160: 160,
    }  # fmt: skip
    assert saved[40][2] == 0.25
    assert saved[72][2] == saved[80][2] == saved[160][2] == 0.375


OFFSETS = """
import torch
from fastdiff.kernels import attention as kernels

# Rows of one buffer, seen with strides that reach past 2^31 elements: what is never touched costs
# no memory. The second head or image is 2.2e9 elements after the first.
far = 2**31 + 2**27
buffer = torch.empty(far + 4096, dtype=torch.bfloat16)
which = {which!r}
sizes, strides = {{"batch": ((2, 8, 1, 16), (far, 16, 16, 1)),
                  "head": ((1, 8, 2, 16), (16, 16, far, 1))}}[which]
x = buffer.as_strided(sizes, strides)
x.copy_(torch.randn(sizes, generator=torch.Generator().manual_seed(1)))
out = torch.ops.fastdiff.attention(x, x, x, impl="triton")[0]
near = x.contiguous()
expected = torch.ops.fastdiff.attention(near, near, near, impl="triton")[0]
assert torch.equal(out, expected), which
print("same")
"""


@pytest.mark.interpret
@pytest.mark.parametrize("which", ["batch", "head"])
def test_offsets_past_int32(which: str, fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    program = "import fastdiff\n" + OFFSETS.format(which=which)
    assert fresh_python("-c", program, TRITON_INTERPRET="1").strip() == "same"


NAN = """
import torch
from fastdiff.ops.attention import OP

for where in range(3):
    call = OP.samples[0].make("cpu", torch.float32)
    call.args[where][0, 0, 0, 0] = float("nan")
    results = [OP(*call.args, **call.kwargs, impl=impl) for impl in ("triton", "reference")]
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan()), where
print("seen")
"""


@pytest.mark.interpret
def test_the_kernel_does_not_hide_nan(fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    assert fresh_python("-c", NAN, TRITON_INTERPRET="1").strip() == "seen"


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_long_sequences(impl: str) -> None:
    """16k tokens: a 1k x 1k latent of a video model; row offsets of a fused QKV pass 2^27."""
    q, k, v = torch.randn(1, 16384, 3, 24, 80, device="cuda", dtype=torch.bfloat16).unbind(2)
    result = attention(q, k, v, impl=impl)
    last = q[:, -64:]
    oracle = reference(last.double(), k.double(), v.double())[0]
    assert_within_2x(result[:, -64:], oracle, reference(last, k, v)[0])


def test_compiles_with_symbolic_shapes() -> None:
    compiled = torch.compile(
        lambda q, k: attention(q, k, k) + 1, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch, queries, keys in ((2, 5, 20), (3, 8, 33), (7, 6, 70)):
        q, k = torch.randn(batch, queries, 2, 8), torch.randn(batch, keys, 2, 8)
        assert torch.equal(compiled(q, k), attention(q, k, k) + 1)


def test_the_callables_take_the_schemas_arguments() -> None:
    names = [a.name for a in torch.ops.fastdiff.attention.default._schema.arguments]
    assert tuple(names[:-1]) == Arguments._fields
