"""The row-wise passes: each way in which models write an op, and what must be left alone."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fusing import capture, check, random
from torch import Tensor

from fastdiff.compiler.passes import layer_norm as layer_norm_pass

pytest.importorskip("diffusers")
from diffusers.models.embeddings import get_timestep_embedding

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
B, N, C, H = 2, 5, 16, 4


# Adaptive layer norm: x [B, N, C], scale and shift [B, C], a table [2, C], weight and bias [C].


def _norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, (C,), weight, bias, 1e-6)


def _fp32_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """diffusers' FP32LayerNorm."""
    wide = [None if v is None else v.float() for v in (weight, bias)]
    return F.layer_norm(x.float(), (C,), *wide, 1e-6).to(x.dtype)


def _unsqueezed(x, scale, shift, table, weight, bias):
    return _norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _added_before_indexing(x, scale, shift, table, weight, bias):
    return _norm(x, weight, bias) * (1 + scale)[:, None, :] + shift[:, None, :]


def _factor_first(x, scale, shift, table, weight, bias):
    return shift[:, None] + (scale[:, None] + 1.0) * _norm(x)


def _chunked(x, scale, shift, table, weight, bias):
    scale, shift = torch.cat([scale, shift], dim=1).chunk(2, dim=1)
    return _norm(x) * (1 + scale[:, None]) + shift[:, None]


def _of_a_table(x, scale, shift, table, weight, bias):
    """PixArt's scale_shift_table."""
    both = table[None] + torch.stack([shift, scale], dim=1)
    shift, scale = both.chunk(2, dim=1)
    return _norm(x) * (1 + scale) + shift


def _in_float32(x, scale, shift, table, weight, bias):
    """Wan: everything in float32, and back."""
    scale, shift = (table[None].float() + torch.stack([scale, shift], 1).float()).chunk(2, dim=1)
    return (_fp32_norm(x.float()) * (1 + scale) + shift).type_as(x)


def _modulated_in_float32(x, scale, shift, table, weight, bias):
    """ERNIE-Image: only what follows the norm."""
    y = _norm(x).float()
    return (y * (1 + scale[:, None].float()) + shift[:, None].float()).to(x.dtype)


def _fp32_layer_norm(x, scale, shift, table, weight, bias):
    return _fp32_norm(x, weight, bias) * (1 + scale[:, None]) + shift[:, None]


def _scale_alone(x, scale, shift, table, weight, bias):
    """Lumina."""
    return _norm(x) * (1 + scale)[:, None, :]


def _shift_alone(x, scale, shift, table, weight, bias):
    """HunyuanDiT."""
    return _fp32_norm(x, weight, bias) + shift.unsqueeze(dim=1)


def _per_token(x, scale, shift, table, weight, bias):
    """[N, C] is one row per token, whatever B is."""
    rows = x.mean(0)
    return _norm(x) * (1 + rows) + rows


def _one_for_all(x, scale, shift, table, weight, bias):
    return _norm(x) * (1 + table[0]) + table[1]


def _videos(x, scale, shift, table, weight, bias):
    """[B, F, N, C] with a modulation per frame: Cosmos, Sana."""
    frames = torch.stack([x, x + 1, x * 2], dim=1)
    scale, shift = frames[:, :, :1], frames[:, :, 1:2]
    return _norm(frames) * (1 + scale) + shift


@BOTH
@pytest.mark.parametrize(
    "function",
    [
        _unsqueezed, _added_before_indexing, _factor_first, _chunked, _of_a_table, _in_float32,
        _modulated_in_float32, _fp32_layer_norm, _scale_alone, _shift_alone, _per_token,
        _one_for_all, _videos,
    ],
)  # fmt: skip
def test_adaptive_layer_norms_are_one_op(function, dtype):
    args = (random(B, N, C), *(random(2, C) for _ in range(3)), random(C), random(C))
    found, _, graph = capture(function, *(a.to(dtype) for a in args))
    assert found == {"layer_norm_modulate": 1}
    names = [str(node.target) for node in graph.nodes]
    assert not any("layer_norm" in name and "fastdiff" not in name for name in names)
    assert check(function, *(a.to(dtype) for a in args)) == found


@BOTH
def test_one_norm_with_two_modulations_is_two_ops(dtype):
    """SD3.5: nothing is left of the norm, and x is read twice instead of three times."""

    def function(x, a, b):
        y = _norm(x)
        return y * (1 + a[:, None]) + b[:, None], y * (1 + b[:, None]) + a[:, None]

    args = random(B, N, C, dtype=dtype), random(B, C, dtype=dtype), random(B, C + 1)[:, 1:]
    assert check(function, *args[:2], args[2].to(dtype)) == {"layer_norm_modulate": 2}


def test_one_norm_with_one_use_that_does_not_fit_stays_for_it():
    """The first modulation has x's dtype, the second one's result is wider."""

    def function(x, a, b):
        y = _norm(x)
        return y * (1 + a[:, None]), y * (1 + b[:, None])

    args = random(B, N, C).bfloat16(), random(B, C).bfloat16(), random(B, C)
    assert check(function, *args) == {"layer_norm_modulate": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, s: F.layer_norm(x, (N, C)) * (1 + s[:, None]),  # over two dimensions
        lambda x, s: _norm(x) * (2 + s[:, None]),
        lambda x, s: _norm(x) * s[:, None],
        lambda x, s: _norm(x) + 1,
        lambda x, s: _norm(x) + x,  # no shift but a residual
        lambda x, s: _norm(x) * (1 + s[:, None, :1]),  # one number per sample
        lambda x, s: _norm(x[:1]) * (1 + s[:, None]),  # the modulation makes the batch
        lambda x, s: (y := _norm(x)) * (1 + y),
        lambda x, s: (y := _norm(x)) * (1 + s[:, None]) - y.exp(),  # used otherwise too
    ],
)
def test_other_norms_are_left_alone(function):
    args = random(B, N, C), random(B, C)
    assert not check(function, *args)


def test_modulation_of_another_dtype_than_its_norm_is_left_alone():
    """The result would be float32 and the op's is x's dtype."""
    args = random(B, N, C, dtype=torch.bfloat16), random(B, C), random(B, C)
    found = check(lambda x, a, b: _norm(x) * (1 + a[:, None]) + b[:, None], *args)
    assert found == {}
    wrong = random(B, C).half()  # neither x's dtype nor float32
    assert check(lambda x, a: (_norm(x) * (1 + a[:, None])).to(x.dtype), args[0], wrong) == {}


def test_rounding_a_scale_does_not_move_before_the_addition():
    """1 + s has more digits than s near s = -1."""
    x, scale = random(B, N, C, dtype=torch.bfloat16), -1 + random(B, C) / 4096

    def function(x, scale):
        return _norm(x) * (1 + scale).to(x.dtype)[:, None]

    assert check(function, x, scale) == {}


@BOTH
def test_layer_norms_alone(dtype, monkeypatch):
    """Those that take two casts along, and on the CPU the large ones."""
    x, weight, bias = (random(*s, dtype=dtype) for s in ((B, N, C), (C,), (C,)))
    casts = check(_fp32_norm, x, weight, bias)
    assert casts == ({} if dtype == torch.float32 else {"layer_norm_modulate": 1})
    found, _, graph = capture(_norm, x, weight, bias)
    assert found == {}
    assert [n.meta["left"] for n in graph.nodes if "left" in n.meta] == [
        "nothing follows, and it is small"
    ]
    monkeypatch.setattr(layer_norm_pass, "MIN_ELEMENTS_ALONE", x.numel())
    assert check(_norm, x, weight, bias) == {"layer_norm_modulate": 1}


# RMS norm.


def _rms(x, weight, eps=1e-6):
    """diffusers' RMSNorm."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    y = x * torch.rsqrt(variance + eps)
    if weight.dtype in (torch.float16, torch.bfloat16):
        y = y.to(weight.dtype)
    return y * weight


def _rms_in_float32(x, weight):
    """Mochi, LLaMA."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + 1e-5)
    return (y * weight).to(x.dtype)


def _rms_cast_before_the_weight(x, weight):
    y = x.float()
    y = torch.rsqrt((y * y).mean((-1,), keepdim=True) + 1e-5) * y
    return weight * y.type_as(x)


def _rms_without_weight(x, weight):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(2, True) + 1e-5)).to(x.dtype)


def _rms_of_torch(x, weight):
    return F.rms_norm(x, (C,), weight, 1e-6)


@BOTH
@pytest.mark.parametrize(
    "function",
    [_rms, _rms_in_float32, _rms_cast_before_the_weight, _rms_without_weight, _rms_of_torch],
)
def test_rms_norms_are_one_op(function, dtype):
    args = random(B, N, C, dtype=dtype), random(C, dtype=dtype)
    assert check(function, *args) == {"rms_norm": 1}


def test_rms_norm_of_heads_comes_before_their_transposition():
    def function(x, weight):
        q = x.view(B, N, H, C).transpose(1, 2)
        return _rms(q, weight), F.rms_norm(q.permute(0, 1, 2, 3), (C,), weight, 1e-6)

    found, results, graph = capture(function, random(B, N, H * C), random(C))
    assert found == {"rms_norm": 2}
    norm = next(n for n in graph.nodes if n.target is torch.ops.fastdiff.rms_norm.default)
    assert norm.args[0].target == "view"
    assert results[0].stride() == function(random(B, N, H * C), random(C))[0].stride()
    assert check(function, random(B, N, H * C), random(C)) == found


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5),
        lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-5),
        lambda x, w: x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-5),
        lambda x, w: x * torch.rsqrt(x.pow(2).mean() + 1e-5),
        lambda x, w: x.exp() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        lambda x, w: (r := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), x * r),
        lambda x, w: F.rms_norm(x, (C,), w),  # eps is left to PyTorch
        lambda x, w: F.rms_norm(x, (N, C), None, 1e-5),
    ],
)
def test_what_is_no_rms_norm_is_left_alone(function):
    assert check(function, random(B, N, C), random(C)) == {}


def test_rms_norm_that_ends_in_float32_stays_in_float32():
    """diffusers keeps some weights in float32; then the result is, too."""
    x, weight = random(B, N, C, dtype=torch.bfloat16), random(C)
    for function in (_rms, lambda x, w: _rms(x, w).to(x.dtype)):
        found, _, graph = capture(function, x, weight)
        assert found == {"rms_norm": 1} == check(function, x, weight)
        norm = next(n for n in graph.nodes if n.target is torch.ops.fastdiff.rms_norm.default)
        assert norm.args[0].meta["example_value"].dtype == function(x, weight).dtype
    # Its mean square in float32, its products in bfloat16: nothing fits.
    assert check(lambda x, w: (x * w) * x.float().pow(2).mean(-1, True).rsqrt(), x, weight) == {}


# Gated residual: x and y [B, N, C], gate [B, C].

GATES = {
    "DiT": lambda x, y, gate: x + gate.unsqueeze(1) * y,
    "diffusers DiT": lambda x, y, gate: gate[:, None] * y + x,
    "HunyuanVideo": lambda x, y, gate: x + y * gate.unsqueeze(1),
    "Wan": lambda x, y, gate: (x.float() + y * gate[:, None].float()).type_as(x),
    "Kandinsky": lambda x, y, g: (x.float() + g[:, None].float() * y.float()).type_as(x),
    "Helios": lambda x, y, g: (x.float() + y.float() * g[:, None]).type_as(x),
    "ACE-Step": lambda x, y, gate: (x + y * gate[:, None]).type_as(x),
    "gate of a channel": lambda x, y, gate: x + gate[0] * y,
    "gate of a token": lambda x, y, gate: x + (y + x) * y,
    "tanh": lambda x, y, gate: x + gate[:, None].tanh() * y,
}


@BOTH
@pytest.mark.parametrize("name", GATES)
def test_gated_residuals_are_one_op_with_the_same_bits(name, dtype):
    args = random(B, N, C, dtype=dtype), random(B, N, C) + 1, random(B, C)
    args = args[0], args[1].to(dtype), args[2].to(dtype)
    assert check(GATES[name], *args, exact=True) == {"gate_residual": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, gate: x + gate[:, :1, None] * y,  # one number per sample
        lambda x, y, gate: x[:1] + gate[:, None] * y,  # the sum makes the batch
        lambda x, y, gate: x + gate[:, None] * y[:1],
        lambda x, y, gate: x * y + gate[:, None] * y,  # a rotation looks like this
        lambda x, y, gate: torch.add(x, gate[:, None] * y, alpha=2),
        lambda x, y, gate: (p := gate[:, None] * y, x + p),
        lambda x, y, gate: x + 0.5 * y,
    ],
)
def test_other_sums_are_left_alone(function):
    args = random(B, N, C), random(B, N, C) + 1, random(B, C)
    assert check(function, *args, exact=True) == {}


def test_gated_residuals_that_change_the_dtype_are_left_alone():
    x, y, gate = random(B, N, C).bfloat16(), random(B, N, C).bfloat16(), random(B, C)
    assert check(lambda x, y, g: x + g[:, None] * y, x, y, gate, exact=True) == {}
    assert check(lambda x, y, g: x.float() + g[:, None] * y, x, y, gate, exact=True) == {}


def test_views_of_a_residual_with_another_layout_still_work():
    """The op's result is contiguous; the sum's has the layout of an image."""

    def function(x, y, gate):
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + gate[:, None] * y.transpose(0, 1).contiguous().transpose(0, 1)
        return tokens, tokens.transpose(1, 2).view(B, 6 * C)

    x, y = random(B, C, 2, 3), random(B, C, 6).transpose(1, 2)
    assert check(function, x, y, random(B, C), exact=True) == {"gate_residual": 1}


# A gated residual and the norm that follows.


@BOTH
@pytest.mark.parametrize("used", ["later", "before", "not"])
def test_residual_and_norm_are_one_op(used, dtype):
    def function(x, y, gate, scale, shift):
        residual = x + gate[:, None] * y
        early = residual.exp() if used == "before" else None
        normed = _norm(residual) * (1 + scale[:, None]) + shift[:, None]
        if used == "not":
            return normed
        return normed, residual + normed, early if early is not None else normed

    args = [random(B, N, C), random(B, N, C) + 1, *(random(B, C) * k for k in (1, 2, 3))]
    found = check(function, *(a.to(dtype) for a in args))
    assert found.pop("gate_residual_norm_modulate", 0) == (used != "before")
    assert found == {"gate_residual": 1, "layer_norm_modulate": 1}


def test_residual_used_before_its_norm_is_joined_where_the_modulation_is_known():
    def function(x, y, gate, scale, shift):
        scale, shift = scale[:, None], shift[:, None]
        factor = torch.ones((), dtype=x.dtype) * 1 + scale  # not the 1 that a model adds
        residual = x + gate[:, None] * y
        early = residual.exp()
        return early, factor, _norm(residual) * (1 + scale) + shift

    args = [random(B, N, C), random(B, N, C) + 1, *(random(B, C) * k for k in (1, 2, 3))]
    assert check(function, *args)["gate_residual_norm_modulate"] == 1


def test_residual_and_norm_with_gates_of_two_dtypes_stay_two_ops():
    def function(x, y, gate, scale, shift):
        residual = x + gate[:, None] * y
        normed = _norm(residual).float() * (1 + scale[:, None]) + shift[:, None]
        return residual, normed.to(x.dtype)

    x, y, gate = (random(*s).bfloat16() for s in ((B, N, C), (B, N, C), (B, C)))
    found = check(function, x, y, gate, random(B, C), random(B, C) * 2)
    assert found == {"gate_residual": 1, "layer_norm_modulate": 1}


def test_residual_with_a_wider_gate_and_its_norm_are_one_op():
    """Wan's last block: its gates are float32, the output's modulation is not."""

    def function(x, y, gate, scale, shift):
        residual = (x.float() + y * gate[:, None]).type_as(x)
        return (_norm(residual.float()) * (1 + scale[:, None]) + shift[:, None]).type_as(x)

    x, y, scale, shift = (random(*s).bfloat16() for s in ((B, N, C), (B, N, C), (B, C), (B, C)))
    found = check(function, x, y, random(B, C), scale, shift)
    assert found.pop("gate_residual_norm_modulate") == 1
    assert found == {"gate_residual": 1, "layer_norm_modulate": 1}


# Gated units: x [B, N, 2C].


def _halves(x: Tensor, how: str) -> Any:
    if how == "chunk":
        return x.chunk(2, dim=-1)
    if how == "split":
        return torch.split(x, C, dim=2)
    if how == "sizes":
        return x.split([C, C], -1)
    if how == "narrow":
        return x.narrow(-1, 0, C), x.narrow(2, C, C)
    return (x[..., :C], x[..., C:]) if how == "slices" else (x[:, :, 0:C], x[:, :, C : 2 * C])


@BOTH
@pytest.mark.parametrize("how", ["chunk", "split", "sizes", "narrow", "slices", "full slices"])
def test_gated_units_are_one_op(how, dtype):
    x = random(B, N, 2 * C, dtype=dtype)

    def geglu(x, approximate="none"):
        hidden, gate = _halves(x, how)
        return hidden * F.gelu(gate, approximate=approximate)

    def swiglu(x):
        hidden, gate = _halves(x, how)
        return hidden * F.silu(gate)

    def swiglu_first(x):
        gate, hidden = _halves(x, how)
        return F.silu(gate.float()).to(gate.dtype) * hidden

    assert check(geglu, x) == {"geglu": 1}
    assert check(functools.partial(geglu, approximate="tanh"), x) == {"geglu": 1}
    assert check(swiglu, x) == {"swiglu": 1}
    assert check(swiglu_first, x) == {"swiglu": 1}


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (h := x.chunk(2, dim=-1))[1] * F.gelu(h[0]),  # gelu of the first half
        lambda x: (h := x.chunk(2, dim=-1))[0] * F.gelu(h[0]),
        lambda x: (h := x.chunk(2, dim=-1))[0] * torch.sigmoid(h[1]),
        lambda x: (h := x[:, :4].chunk(2, dim=1))[0] * F.silu(h[1]),  # not the last dimension
        lambda x: (h := x.chunk(4, dim=-1))[0] * F.silu(h[1]),  # of four
        lambda x: x[..., 1 : C + 1] * F.silu(x[..., C:]),
        lambda x: x[..., :C] * F.silu((x + 1)[..., C:]),  # of two tensors
        lambda x: (g := F.silu(x[..., C:])) - x[..., :C] * g,  # it would be computed twice
        lambda x: x[..., :C] + F.silu(x[..., C:]),
        lambda x: F.gelu(x) * 2,
    ],
)
def test_other_gates_are_left_alone(function):
    assert check(function, random(B, N, 2 * C)) == {}


# The embedding of the time: t [S].


def _openai(t):
    """guided-diffusion, DiT."""
    freqs = torch.exp(-math.log(10000) * torch.arange(start=0, end=8, dtype=torch.float32) / 8)
    args = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


def _diffusers(flip, shift, scale=1, dim=16):
    def function(t):
        return get_timestep_embedding(t, dim, flip, shift, scale)

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize(
    "function",
    [
        _openai,
        _diffusers(True, 0),
        _diffusers(False, 1),
        _diffusers(False, 0.5, 1000.0),
        _diffusers(True, 0, 0.001),
        _diffusers(True, 1, dim=17),
    ],
)
def test_embeddings_of_the_time_are_one_op_with_the_same_bits(function, dtype):
    t = torch.tensor([0.0, 1.0, 501.0, 999.0]).to(dtype)
    found, mine, _ = capture(function, t)
    assert found == {"timestep_embedding": 1}
    assert torch.equal(mine, function(t))


@pytest.mark.parametrize(
    "function",
    [
        lambda t: _openai(t.double()),
        lambda t: (a := t[:, None] * torch.exp(torch.arange(8.0) * -0.1)[None], a.sin())[1],
        lambda t: torch.cat([(a := t[:, None] * torch.arange(8.0)[None]).sin(), a.cos()], -1),
        lambda t: torch.cat(
            [(a := t[:, None] * torch.exp(-2.3 * torch.arange(1.0, 9.0) / 8)[None]).sin(), a.cos()],
            dim=1,
        ),
        # The frequencies are rounded once less.
        lambda t: torch.cat(
            [(a := t[:, None] * torch.exp(torch.arange(8.0) * -0.1)[None]).sin(), a.cos()], -1
        ),
    ],
)
def test_other_embeddings_are_left_alone(function):
    t = torch.tensor([0.0, 1.0, 501.0, 999.0])
    found, mine, _ = capture(function, t)
    assert found == {}
    assert torch.equal(mine, function(t))
