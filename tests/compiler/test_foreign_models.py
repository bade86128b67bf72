"""Patterns of models that are neither ours nor diffusers': pixel U-Nets of the lucidrains kind, and
the published DiT's blocks; in float32, and in bf16 by autocast, which is how they run in it."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fastdiff import compiler
from fastdiff.compiler.graph import insert
from fastdiff.testing import assert_within_2x


class ChannelNorm(nn.Module):
    """RMS norm over the channels of an image, by ``normalize``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x, dim=1) * self.gain * x.shape[1] ** 0.5


class StandardisedConv(nn.Conv2d):
    """A convolution by weights that have mean 0 and variance 1 for each output."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * (variance + 1e-5).rsqrt()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class ImageAttention(nn.Module):
    """Over the pixels, with learned keys and values in front; three ways to write it."""

    def __init__(self, kind: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.norm = ChannelNorm(width)
        self.qkv = nn.Conv2d(width, 3 * width, 1, bias=False)
        self.memory = nn.Parameter(torch.randn(2, heads, 4, width // heads))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, dim=1)
        q, k, v = (part.reshape(n, self.heads, -1, h * w).transpose(2, 3) for part in parts)
        memory = self.memory[:, None].expand(2, n, *self.memory.shape[1:])
        k, v = torch.cat((memory[0], k), 2), torch.cat((memory[1], v), 2)
        if self.kind == "linear":  # two softmaxes, and no scores of pixels by pixels
            context = torch.einsum("bhnd,bhne->bhde", k.softmax(2), v)
            y = torch.einsum("bhde,bhnd->bhne", context, q.softmax(3) * q.shape[-1] ** -0.5)
        elif self.kind == "written":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
            y = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
        else:
            three = (t.contiguous() for t in (q, k, v))
            y = functional.scaled_dot_product_attention(*three)
        return self.out(y.transpose(2, 3).reshape(n, c, h, w))


class PixelUNet(nn.Module):
    """x, time: the time as scale and shift behind each norm; space to depth on the way down."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = StandardisedConv(3, width, 3, padding=1)
        self.time = nn.Sequential(nn.Linear(2 * 8, width), nn.GELU(), nn.Linear(width, 2 * width))
        self.norms = nn.ModuleList(ChannelNorm(width) for _ in range(3))
        self.attentions = nn.ModuleList(map(ImageAttention, ("linear", "written", "sdpa")))
        self.down = nn.Conv2d(4 * width, width, 1)
        self.last = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        places = torch.exp(torch.arange(8, device=x.device) * -(9.2 / 7))
        angle = time[:, None] * places[None]
        embedded = self.time(torch.cat((angle.sin(), angle.cos()), -1).to(x.dtype))
        scale, shift = embedded[:, :, None, None].chunk(2, dim=1)
        x = wide = self.first(x)
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = functional.silu(norm(x) * (scale + 1) + shift)
            x = attention(x) + x
            if attention.kind == "linear":
                n, c, h, w = x.shape
                blocks = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
                x = self.down(blocks.reshape(n, 4 * c, h // 2, w // 2))
        up = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.last(torch.cat((up, wide), 1))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    """adaLN-zero, and an attention by one projection that is unbound."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, 1e-6, False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        n, s, width = x.shape
        y = modulated(self.norms[0](x), shift, scale)
        qkv = self.qkv(y).reshape(n, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.0)
        x = x + gate.unsqueeze(1) * self.proj(y.transpose(1, 2).reshape(n, s, width))
        y = functional.gelu(
            self.up(modulated(self.norms[1](x), shift2, scale2)), approximate="tanh"
        )
        return x + gate2.unsqueeze(1) * self.down(y)


class ClassTransformer(nn.Module):
    """x, t, y: labels; patches put together again by einsum."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.register_buffer("places", torch.randn(1, 16, width))
        self.time = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(depth))
        self.norm = nn.LayerNorm(width, 1e-6, False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.last = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        half = torch.arange(0, 16, dtype=torch.float32) / 16
        angle = t[:, None].float() * torch.exp(-9.21 * half).to(t.device)[None]
        embedded = torch.cat((angle.cos(), angle.sin()), -1).to(x.dtype)
        c = self.time(embedded) + self.labels(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        x = self.last(modulated(self.norm(x), shift, scale)).reshape(len(x), 4, 4, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), 4, 8, 8)


FUSED = {
    PixelUNet: {"attention": 2},
    ClassTransformer: {"layer_norm_modulate": 5, "attention": 2, "gate_residual": 4},
}
# What autocast leaves in float32 is added to what it computes in bf16.
AUTOCAST = {PixelUNet: {"attention": 2}, ClassTransformer: {"layer_norm_modulate": 5}}


def made(kind: type[nn.Module]) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The model, and the inputs of three steps."""
    torch.manual_seed(0)
    model, labels = kind().eval(), torch.tensor([1, 4])
    steps = []
    for time in (900, 500, 900):
        if kind is PixelUNet:
            steps.append({"x": torch.randn(2, 3, 16, 16), "time": torch.tensor([time, time])})
        else:
            x = torch.randn(2, 4, 8, 8)
            steps.append({"x": x, "t": torch.tensor([time, time]), "y": labels})
    return model, steps


def run(model: nn.Module, steps: list[dict[str, Tensor]], autocast: bool) -> list[Tensor]:
    context: Any = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.no_grad(), context:
        return [model(**inputs) for inputs in steps]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", FUSED)
def test_results_are_within_twice_eagers_error(kind, autocast):
    model, steps = made(kind)
    wide = [{k: v.double() if v.is_floating_point() else v for k, v in s.items()} for s in steps]
    exact = run(copy.deepcopy(model).double(), wide, False)
    eager = run(model, steps, autocast)
    compiler.compile(model)
    mine = run(model, steps, autocast)
    for result, oracle, other in zip(mine, exact, eager, strict=True):
        assert result.stride() == other.stride()
        assert_within_2x(result, oracle, other)
    report = compiler.report(model)
    (graph,) = report.graphs
    assert not report.eager
    assert not graph.why_whole
    assert (AUTOCAST if autocast else FUSED)[kind].items() <= graph.fused.items()
    assert report.hits > 0
    assert graph.hoisted > 0


def test_autocast_and_float32_are_two_captures():
    model, steps = made(ClassTransformer)
    wide = [{k: v.double() if v.is_floating_point() else v for k, v in s.items()} for s in steps]
    exact = run(copy.deepcopy(model).double(), wide, False)
    eager = run(model, steps, False), run(model, steps, True)
    compiler.compile(model)
    mine = run(model, steps, False), run(model, steps, True)
    again = run(model, steps, False)
    assert compiler.report(model).captures == 2
    for result, other in zip(mine[0] + again, eager[0] + eager[0], strict=True):
        torch.testing.assert_close(result, other)
    for result, oracle, other in zip(mine[1], exact, eager[1], strict=True):
        assert_within_2x(result, oracle, other)


def test_what_an_op_refuses_is_refused_without_a_traceback_on_the_screen(caplog):
    """PyTorch prints one for each TypeError inside a fake tensor's operation."""
    outcome = []

    def backend(module: fx.GraphModule, _: list[Any]) -> Any:
        *_, last = module.graph.nodes
        q, k = (node for node in module.graph.nodes if node.op == "placeholder")
        with pytest.raises(TypeError, match="k must be"):
            insert(module.graph, last, torch.ops.fastdiff.attention.default, q, k, k)
        outcome.append(len(caplog.get_records("call")))
        return module.forward

    q, k = torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8, dtype=torch.float64)
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.addHandler(caplog.handler)
    caplog.handler.setLevel(logging.ERROR)
    try:
        torch.compile(lambda q, k: q + k, backend=backend, fullgraph=True)(q, k)
    finally:
        logger.removeHandler(caplog.handler)
    assert outcome == [0]
