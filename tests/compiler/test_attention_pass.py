"""Attentions of every form become the op, with the same numbers, or stay and say why."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoisers import made
from torch import Tensor, einsum, nn
from torch.nn import functional

from fastdiff import compiler
from fastdiff.compiler.packing import stacked
from fastdiff.testing import assert_within_2x

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
WIDTH, HEADS, LENGTH = 32, 4, 20
SCALE = (WIDTH // HEADS) ** -0.5
ATTENTION = torch.ops.fastdiff.attention.default


class Block(nn.Module):
    """Projections around ``attend(block, q, k, v)``, all of [B, S, C]."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(WIDTH // HEADS, eps=1e-6) for _ in range(2))
        self.layer_q, self.layer_k = (nn.LayerNorm(WIDTH // HEADS, bias=False) for _ in range(2))
        self.attend = attend
        for norm in (self.norm_q, self.norm_k, self.layer_q, self.layer_k):
            nn.init.normal_(norm.weight, mean=1.0, std=0.2)

    def forward(self, sample: Tensor, mask: Tensor | None = None) -> Any:
        given = () if mask is None else (mask,)
        found = self.attend(self, self.q(sample), self.k(sample), self.v(sample), *given)
        if isinstance(found, tuple):
            return self.out(found[0]), *found[1:]
        return self.out(found)


def split(x: Tensor) -> Tensor:
    """[B, S, C] as [B, S, H, D]."""
    return x.reshape(*x.shape[:2], HEADS, -1)


def heads(x: Tensor) -> Tensor:
    return split(x).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """[B * H, S, D]."""
    return split(x).permute(0, 2, 1, 3).reshape(-1, x.shape[1], WIDTH // HEADS)


def together(x: Tensor) -> Tensor:
    """[B, S, C] of [B, H, S, D]."""
    return x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)


def unflat(x: Tensor) -> Tensor:
    return x.reshape(-1, HEADS, *x.shape[1:]).permute(0, 2, 1, 3).reshape(-1, x.shape[1], WIDTH)


# --- forms that are taken -------------------------------------------------------------------------


def sdpa(b, q, k, v):
    """diffusers' AttnProcessor2_0."""
    return together(functional.scaled_dot_product_attention(heads(q), heads(k), heads(v)))


def sdpa_scaled(b, q, k, v):
    return together(
        functional.scaled_dot_product_attention(
            heads(q), heads(k), heads(v), None, 0.0, False, scale=0.7, enable_gqa=False
        )
    )


def sdpa_of_three(b, q, k, v):
    """One head, [B, S, D]."""
    return functional.scaled_dot_product_attention(q, k, v)


def sdpa_contiguous(b, q, k, v):
    out = functional.scaled_dot_product_attention(*(heads(x).contiguous() for x in (q, k, v)))
    return out.permute(0, 2, 1, 3).contiguous().view(*q.shape)


def baddbmm(b, q, k, v, upcast=False):
    """diffusers' AttnProcessor."""
    dtype, (q, k, v) = q.dtype, map(flat, (q, k, v))
    if upcast:
        q, k = q.float(), k.float()
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return unflat(torch.bmm(scores.softmax(dim=-1).to(dtype), v))


def upcast_baddbmm(b, q, k, v):
    return baddbmm(b, q, k, v, upcast=True)


def latent_diffusion(b, q, k, v):
    q, k, v = map(flat, (q, k, v))
    scores = einsum("b i d, b j d -> b i j", q, k) * SCALE
    return unflat(einsum("b i j, b j d -> b i d", scores.softmax(dim=-1), v))


def denoising_diffusion(b, q, k, v):
    """lucidrains' full attention: heads before channels before places."""
    q, k, v = (heads(x).transpose(2, 3).contiguous() for x in (q, k, v))
    scores = einsum("b h d i, b h d j -> b h i j", q * SCALE, k)
    out = einsum("b h i j, b h d j -> b h i d", scores.softmax(dim=-1), v)
    return together(out)


def guided_diffusion(b, q, k, v):
    """OpenAI's QKVAttention: half of the scale on each side."""
    batch, length, _ = q.shape
    scale = 1 / math.sqrt(math.sqrt(WIDTH // HEADS))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = ((x * scale).reshape(batch * HEADS, -1, length) for x in (q, k))
    weight = einsum("bct,bcs->bts", q, k)
    weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
    out = einsum("bts,bcs->bct", weight, v.reshape(batch * HEADS, -1, length))
    return out.reshape(batch, -1, length).transpose(1, 2)


def timm(b, q, k, v):
    """What facebookresearch/DiT calls without a fused attention."""
    scores = (heads(q) * SCALE) @ heads(k).transpose(-2, -1)
    return together(scores.softmax(dim=-1) @ heads(v))


def keys_first(b, q, k, v):
    scores = einsum("bhjd,bhid->bhij", heads(k), heads(q)) / 3.0
    return together(einsum("bhjd,bhij->bhid", heads(v), scores.softmax(-1)))


def normed(b, q, k, v):
    q, k = b.norm_q(split(q)), b.norm_k(split(k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, split(v)))
    return together(functional.scaled_dot_product_attention(q, k, v))


def normed_by_the_op(b, q, k, v):
    norm = torch.ops.fastdiff.rms_norm.default
    q, k = norm(heads(q), b.norm_q.weight, 1e-6), norm(heads(k), b.norm_k.weight, 1e-6)
    return together(functional.scaled_dot_product_attention(q, k, heads(v)))


def layer_normed(b, q, k, v):
    q, k = b.layer_q(heads(q)), b.layer_k(heads(k))
    return together(functional.scaled_dot_product_attention(q, k, heads(v)))


def written_rms(x: Tensor, weight: Tensor) -> Tensor:
    """diffusers' RMSNorm."""
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    return x.to(weight.dtype) * weight


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """diffusers' apply_rotary_emb, [B, S, H, D]."""
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def tables(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length, device=device), torch.tensor([1.0, 0.3, 0.1, 0.02]))
    angles = angles.repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def rotated(b, q, k, v):
    """FLUX's single blocks."""
    cos, sin = tables(q.shape[1], q.device)
    q, k = turn(b.norm_q(split(q)), cos, sin), turn(b.norm_k(split(k)), cos, sin)
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, split(v)))
    out = functional.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3)
    return out.flatten(2, 3)


def joint(b, q, k, v):
    """SD3: the halves side by side, each normed, apart again after."""
    halves = [[heads(part) for part in x.split([14, 6], dim=1)] for x in (q, k, v)]
    for i in (0, 1):
        weight = (b.norm_q.weight, b.norm_k.weight)[i]
        halves[i] = [written_rms(part, weight) for part in halves[i]]
    q, k, v = (torch.cat(parts, dim=2) for parts in halves)
    out = together(functional.scaled_dot_product_attention(q, k, v))
    first, second = out[:, :14], out[:, 14:]
    return torch.cat([second, first * 2], dim=1)


def joint_rotated(b, q, k, v):
    """FLUX's double blocks: norms before the halves are joined, rotation after."""
    cos, sin = tables(q.shape[1], q.device)
    q, k, v = ([split(part) for part in x.split([6, 14], dim=1)] for x in (q, k, v))
    q, k = [b.norm_q(x) for x in q], [b.norm_k(x) for x in k]
    q, k, v = torch.cat(q, dim=1), torch.cat(k, dim=1), torch.cat(v, dim=1)
    q, k = turn(q, cos, sin), turn(k, cos, sin)
    q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v).permute(0, 2, 1, 3).flatten(2, 3)
    first, second = out.split_with_sizes([6, 14], dim=1)
    return torch.cat([second.contiguous(), first.contiguous() * 2], dim=1)


def joint_second_half(b, q, k, v):
    """The queries of the first half are not needed."""
    halves = [[heads(part) for part in x.split([14, 6], dim=1)] for x in (q, k, v)]
    q, k, v = (torch.cat(parts, dim=2) for parts in halves)
    return together(functional.scaled_dot_product_attention(q, k, v))[:, 14:]


def memory_keys(b, q, k, v):
    """lucidrains' learned keys and values, here those of the first rows."""
    k = torch.cat([b.k.weight[:8, :8].expand(2, HEADS, 8, 8), heads(k)], dim=-2)
    v = torch.cat([b.v.weight[:8, :8].expand(2, HEADS, 8, 8), heads(v)], dim=-2)
    return together(functional.scaled_dot_product_attention(heads(q), k, v))


def masked(b, q, k, v, mask):
    mask = mask[:, None, None, :].expand(-1, HEADS, q.shape[1], -1)
    q, k, v = map(heads, (q, k, v))
    return together(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def masked_flat(b, q, k, v, mask):
    q, k, v = map(heads, (q, k, v))
    return together(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:1]))


# (form, arguments of the op that are not the plain ones)
TAKEN: dict[Callable[..., Any], set[str]] = {
    sdpa: set(),
    sdpa_scaled: set(),
    sdpa_of_three: set(),
    sdpa_contiguous: set(),
    baddbmm: set(),
    upcast_baddbmm: set(),
    latent_diffusion: set(),
    denoising_diffusion: set(),
    guided_diffusion: set(),
    timm: set(),
    keys_first: set(),
    normed: {"norm", "q_weight", "k_weight", "eps"},
    normed_by_the_op: {"norm", "q_weight", "k_weight", "eps"},
    layer_normed: {"norm", "q_weight", "k_weight", "eps"},
    rotated: {"norm", "q_weight", "k_weight", "eps", "cos", "sin"},
    joint: {
        "norm", "q_weight", "k_weight", "eps", "extra_q", "extra_k", "extra_v",
        "extra_q_weight", "extra_k_weight",
    },
    joint_rotated: {
        "norm", "q_weight", "k_weight", "eps", "extra_q", "extra_k", "extra_v",
        "extra_q_weight", "extra_k_weight", "cos", "sin", "extra_cos", "extra_sin",
    },
    joint_second_half: {"extra_k", "extra_v"},
    memory_keys: {"extra_k", "extra_v"},
    masked: {"key_mask"},
    masked_flat: {"key_mask"},
}  # fmt: skip


def nodes(model: nn.Module) -> list[torch.fx.Node]:
    """Of all programs of the only graph."""
    (entry,) = model._compiled_call_impl._entries.values()
    return [n for p in entry.runners[0].programs for n in p.module.graph.nodes]


def ran(attend: Callable[..., Any], dtype: torch.dtype) -> tuple[Any, Any, Any, nn.Module]:
    """(compiled, eager, exact, compiled model)."""
    torch.manual_seed(1)
    block = Block(attend).eval().requires_grad_(False)
    inputs: dict[str, Tensor] = {"sample": torch.randn(2, LENGTH, WIDTH)}
    if "masked" in attend.__name__:
        inputs["mask"] = torch.rand(2, LENGTH) > 0.4
    exact = copy.deepcopy(block).double()(**{**inputs, "sample": inputs["sample"].double()})
    inputs["sample"] = inputs["sample"].to(dtype)
    block = block.to(dtype)
    eager = block(**inputs)
    compiler.compile(block)
    return block(**inputs), eager, exact, block


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", TAKEN, ids=lambda form: form.__name__)
def test_attention_becomes_the_op(form, dtype):
    mine, eager, exact, block = ran(form, dtype)
    assert_within_2x(mine, exact, eager, what=form.__name__)
    graph = compiler.report(block).graphs[0]
    assert graph.fused["attention"] == 1
    assert not graph.unfused["softmax"]
    assert not graph.unfused["scaled_dot_product_attention"]
    assert not graph.why_unfused
    (call,) = (node for node in nodes(block) if node.target is ATTENTION)
    assert set(call.kwargs) - {"scale"} == TAKEN[form]


@pytest.mark.parametrize(
    "form", [sdpa, sdpa_contiguous, baddbmm, latent_diffusion, rotated, joint, joint_rotated]
)
def test_no_transpose_is_left(form):
    *_, block = ran(form, torch.float32)
    names = {str(getattr(node.target, "__name__", node.target)) for node in nodes(block)}
    assert not names & {"transpose", "permute", "contiguous", "stack"}
    joins = [node for node in nodes(block) if getattr(node.target, "__name__", "") == "cat"]
    assert len(joins) == ("joint" in form.__name__)  # the model's own, of the results


# --- forms that stay ------------------------------------------------------------------------------


def causal(b, q, k, v):
    q, k, v = map(heads, (q, k, v))
    return together(functional.scaled_dot_product_attention(q, k, v, is_causal=True))


def additive(b, q, k, v):
    bias = torch.linspace(-1, 1, q.shape[1], dtype=q.dtype, device=q.device)
    bias = bias[None].expand(q.shape[1], -1)
    return together(functional.scaled_dot_product_attention(*map(heads, (q, k, v)), bias))


def by_query(b, q, k, v):
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).tril()
    return together(functional.scaled_dot_product_attention(*map(heads, (q, k, v)), mask))


def shared_keys(b, q, k, v):
    k, v = (heads(x)[:, :2] for x in (k, v))
    return together(functional.scaled_dot_product_attention(heads(q), k, v, enable_gqa=True))


def biased(b, q, k, v):
    bias = torch.linspace(-1, 1, q.shape[1], dtype=q.dtype, device=q.device)
    scores = heads(q) @ heads(k).transpose(-2, -1) * SCALE + bias
    return together(scores.softmax(dim=-1) @ heads(v))


def shown(b, q, k, v):
    weights = (heads(q) @ heads(k).transpose(-2, -1) * SCALE).softmax(dim=-1)
    return together(weights @ heads(v)), weights


def wide_values(b, q, k, v):
    v = torch.cat([heads(v)] * 2, dim=-1)
    out = functional.scaled_dot_product_attention(heads(q), heads(k), v)
    return together(out[..., : WIDTH // HEADS])


def negative(b, q, k, v):
    return together((heads(q) @ heads(k).transpose(-2, -1) * -SCALE).softmax(-1) @ heads(v))


def linear_attention(b, q, k, v):
    """Two softmaxes that are no attention's."""
    q, k, v = (heads(x).transpose(2, 3) for x in (q, k, v))
    context = einsum("b h d n, b h e n -> b h d e", k.softmax(dim=-1), v)
    out = einsum("b h d e, b h d n -> b h e n", context, q.softmax(dim=-2))
    return together(out.transpose(2, 3))


STAY = {
    causal: "it is causal",
    additive: "its mask is added to the scores",
    by_query: "its mask differs by query or head",
    shared_keys: "heads share keys",
    biased: "its scores have a mask or bias added",
    shown: "its probabilities are used elsewhere too",
    wide_values: "v must have shape",
    negative: "scale must be positive",
    linear_attention: "",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", STAY, ids=lambda form: form.__name__)
def test_what_the_op_cannot_do_stays_and_says_why(form, dtype):
    *outputs, block = ran(form, dtype)
    every = (x if isinstance(x, tuple) else (x,) for x in outputs)
    for result, own, oracle in zip(*every, strict=True):
        assert_within_2x(result, oracle, own, what=form.__name__)
    graph = compiler.report(block).graphs[0]
    assert graph.fused["attention"] == 0
    assert not graph.why_whole
    if STAY[form]:
        (why,) = graph.why_unfused
        assert STAY[form] in why
        assert why in str(compiler.report(block))


def heads_first_view(b, q, k, v):
    """A view of [B, H, S, D] that another layout does not have."""
    q, k, v = (heads(x).contiguous() for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v)
    return out.view(q.shape[0] * HEADS, -1)[:, : LENGTH * 8].reshape(2, LENGTH, WIDTH)


def test_views_that_need_the_old_layout_are_kept_working():
    mine, eager, exact, block = ran(heads_first_view, torch.float32)
    assert_within_2x(mine, exact, eager, what="view")
    (why,) = compiler.report(block).graphs[0].why_unfused
    assert "another layout" in why


def norms_of_different_kinds(b, q, k, v):
    q, k = b.norm_q(split(q)), b.layer_k(split(k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, split(v)))
    return together(functional.scaled_dot_product_attention(q, k, v))


def rotated_queries_alone(b, q, k, v):
    q = turn(split(q), *tables(q.shape[1], q.device))
    q, k, v = (x.transpose(1, 2) for x in (q, split(k), split(v)))
    return together(functional.scaled_dot_product_attention(q, k, v))


def rotated_by_other_tables(b, q, k, v):
    cos, sin = tables(q.shape[1], q.device)
    q, k = turn(split(q), cos, sin), turn(split(k), sin, cos)
    q, k, v = (x.transpose(1, 2) for x in (q, k, split(v)))
    return together(functional.scaled_dot_product_attention(q, k, v))


def joint_not_parted(b, q, k, v):
    halves = [[heads(part) for part in x.split([14, 6], dim=1)] for x in (q, k, v)]
    q, k, v = (torch.cat(parts, dim=2) for parts in halves)
    return together(functional.scaled_dot_product_attention(q, k, v))[:, 2:]


@pytest.mark.parametrize(
    "form",
    [
        norms_of_different_kinds,
        rotated_queries_alone,
        rotated_by_other_tables,
        joint_not_parted,
    ],
)
def test_what_the_op_cannot_fold_stays_outside(form):
    mine, eager, exact, block = ran(form, torch.bfloat16)
    assert_within_2x(mine, exact, eager, what=form.__name__)
    assert compiler.report(block).graphs[0].fused["attention"] == 1
    (call,) = (node for node in nodes(block) if node.target is ATTENTION)
    assert set(call.kwargs) == {"scale"}


# --- models ---------------------------------------------------------------------------------------

# name -> (attentions, merged projections)
COUNTS = {
    "unet": (12, 12), "sdxl": (24, 24), "scale_shift": (4, 4), "controlnet": (4, 4),
    "autoencoder": (2, 2), "dit": (2, 2), "sd3": (2, 4), "flux": (2, 3), "pixart": (4, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_every_attention_of_the_models_is_fused(name):
    pytest.importorskip("diffusers")
    model, inputs = made(name)
    compiler.compile(model)
    with torch.no_grad():
        model(**inputs(0))
    graph = compiler.report(model).graphs[0]
    assert (graph.fused["attention"], graph.fused["qkv"]) == COUNTS[name]
    assert not graph.unfused["scaled_dot_product_attention"]
    assert not [why for why in graph.why_unfused if "attention" in why or "softmax" in why]
    calls = [node for node in nodes(model) if node.target is ATTENTION]
    if name in ("sd3", "flux"):
        assert {"extra_k", "norm", "q_weight"} <= set(calls[0].kwargs)
    if name == "flux":
        assert all("cos" in call.kwargs for call in calls)
    if name == "sd3":  # the last block's text is not looked at: its queries are not computed
        assert ["extra_q" in call.kwargs for call in calls] == [True, False]


def test_keys_and_values_of_the_text_are_computed_once_a_prompt():
    pytest.importorskip("diffusers")
    model, inputs = made("unet")
    crosses = sum("attn2.to_k" in name for name, _ in model.named_parameters())
    times = sum("time_emb_proj.weight" in name for name, _ in model.named_parameters())
    compiler.compile(model)
    with torch.no_grad():
        model(**inputs(0))
    (entry,) = model._compiled_call_impl._entries.values()
    counts = {}
    for program in entry.runners[0].programs:
        weights = [
            node.args[1]
            for node in program.module.graph.nodes
            if getattr(node.target, "__name__", "") == "linear"
        ]
        counts[program.name] = sum(
            len(weight.args) if weight.target is stacked else 1 for weight in weights
        )
    assert counts["prompt"] == 2 * crosses
    assert counts["schedule"] == times + 2  # and the two layers of the embedding
