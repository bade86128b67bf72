"""quantize=: linear layers in bytes, the rest and the module's own weights as they were."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from denoisers import tensors
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import compiler
from fastdiff.compiler import cuda_graphs
from fastdiff.compiler.passes import quantize
from fastdiff.ops import linear_quantized, quantize_weight

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
TIME = torch.tensor([500.0, 20.0])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.modulate = nn.LayerNorm(64), nn.Linear(64, 128)
        self.to_q, self.to_k, self.to_v = (nn.Linear(64, 64) for _ in range(3))
        self.out = nn.Linear(64, 64, bias=False)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.narrow = nn.Linear(64, 48)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale, shift = self.modulate(t)[:, None].chunk(2, -1)
        h = self.norm(x) * (1 + scale) + shift
        q, k, v = (
            f(h).view(2, -1, 4, 16).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v)
        )
        h = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.out(h)
        x = x + self.down(functional.gelu(self.up(x)))
        return functional.pad(self.narrow(x), (0, 16)) + x


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time, self.text = nn.Linear(8, 64), nn.Linear(1, 64), nn.Linear(64, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(64, 64)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        t = self.time(timestep[:, None].to(sample.dtype) / 1000)
        x = self.embed(sample) + self.text(text)
        for block in self.blocks:
            x = block(x, t)
        return self.last(x)


LAYERS = [
    f"blocks.{i}.{n}" for i in range(2) for n in ("to_q", "to_k", "to_v", "out", "up", "down")
]


def made(dtype: torch.dtype = torch.float32) -> tuple[Denoiser, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = Denoiser().eval().requires_grad_(False).to(dtype)
    return model, (torch.randn(2, 10, 8, dtype=dtype), TIME, torch.randn(2, 1, 64, dtype=dtype))


def by_hand(model: nn.Module, kind: str, names: list[str]) -> nn.Module:
    """A copy whose named layers call the op."""
    model = copy.deepcopy(model)
    for name in names:
        layer = model.get_submodule(name)
        packed = quantize_weight(layer.weight, kind)[:2]
        layer.forward = lambda x, p=packed, b=layer.bias: linear_quantized(x, *p, b)
    return model


def lost(result: Tensor, right: Tensor) -> float:
    return float((result - right).norm() / right.norm())


@pytest.fixture
def any_device(monkeypatch):
    """fp8 in plain PyTorch: only the check of the device refuses it."""
    monkeypatch.setattr(quantize, "check", lambda models, options: None)
    monkeypatch.setattr("fastdiff.compiler.api.check", lambda models, options: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_layers_run_through_the_op(any_device, kind, dtype):
    model, inputs = made(dtype)
    right = by_hand(model, kind, LAYERS)(*inputs)
    eager = model(*inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    compiler.compile(model, quantize=kind)
    for _ in range(3):
        result = model(*inputs)
    made_by_bytes = lost(right, eager)
    if dtype == torch.float32:
        # What rounds x in another way moves some of its bytes.
        assert lost(result, right) < (1e-5 if kind == "int8" else 0.1 * made_by_bytes)
        assert lost(result, eager) == pytest.approx(made_by_bytes, rel=0.05)
    else:
        wide = by_hand(copy.deepcopy(model), kind, LAYERS).double()
        oracle = wide(*(v.double() for v in inputs))
        assert lost(result, oracle) < 2 * lost(right, oracle)
    report = compiler.report(model)
    assert sorted(report.quantized) == sorted(LAYERS)
    # Merged projections are one product.
    assert report.graphs[0].fused["quantize"] == 8
    assert report.graphs[0].fused["qkv"] == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    compiler.uncompile(model)
    assert torch.equal(model(*inputs), eager)


def test_bytes_are_made_once_and_kept():
    model, inputs = made()
    compiler.compile(model, quantize="int8")
    for step in range(5):
        model(inputs[0] + step, TIME - step, inputs[2])
    (entry,) = model._compiled_call_impl._entries.values()
    (kept,) = (k for k in entry.runners[0].kept if k.program.name == "weights")
    assert (kept.misses, kept.hits) == (1, 4)
    sizes = [model.get_submodule(name).weight.numel() for name in LAYERS]
    rows = sum(model.get_submodule(name).out_features for name in LAYERS)
    assert kept.nbytes() == sum(sizes) + 4 * rows
    targets = [node.target for node in entry.runners[0].step.module.graph.nodes]
    assert quantize.quantized not in targets
    assert targets.count(torch.ops.fastdiff.linear_quantized.default) == 8


def in_place(weight: Tensor) -> None:
    weight.mul_(1.5)


def through_data(weight: Tensor) -> None:
    weight.data.mul_(1.5)  # peft's merge: no version counts it


def other_memory(weight: Tensor) -> None:
    weight.data = weight.data * 1.5


@pytest.mark.parametrize("name", ["blocks.0.to_k", "blocks.1.down"])
@pytest.mark.parametrize("write", [in_place, through_data, other_memory])
def test_writes_to_weights_are_seen(write, name):
    model, inputs = made()
    compiler.compile(model, quantize="int8")
    before = model(*inputs)
    model(inputs[0], TIME - 1, inputs[2])
    write(model.get_submodule(name).weight)
    right = by_hand(model, "int8", LAYERS)
    for time in (TIME, TIME - 1):  # a run begins
        result = model(inputs[0], time, inputs[2])
        assert lost(result, right(inputs[0], time, inputs[2])) < 1e-5
    assert lost(before, model(*inputs)) > 1e-3
    assert compiler.report(model).captures == 1


def test_what_stays_and_why():
    model, inputs = made()
    compiler.compile(model, quantize="int8", skip=["blocks.0", "*.down"])
    model(*inputs)
    report = compiler.report(model)
    ones = [name for name in LAYERS if name.startswith("blocks.1") and "down" not in name]
    assert sorted(report.quantized) == sorted(ones)
    assert report.unquantized == {
        **dict.fromkeys(("embed", "time", "text", "last"), "it is outside of lists of blocks"),
        **dict.fromkeys(
            (f"blocks.0.{n}" for n, _ in model.blocks[0].named_children() if n != "norm"),
            "skip='blocks.0' names it",
        ),
        "blocks.1.modulate": "no step repeats it",
        "blocks.1.down": "skip='*.down' names it",
        "blocks.1.narrow": "it has fewer than 64 features in or out",
    } | dict.fromkeys(
        ("blocks.0.to_q", "blocks.0.to_k", "blocks.0.to_v"),
        "skip='blocks.0' names it (or a layer merged with it)",
    )
    assert lost(model(*inputs), by_hand(model, "int8", ones)(*inputs)) < 1e-5


def test_one_of_merged_projections_that_stays_keeps_all():
    model, inputs = made()
    compiler.compile(model, quantize="int8", skip=["*.to_v"])
    model(*inputs)
    report = compiler.report(model)
    assert not any("to_" in name for name in report.quantized)
    ones = [name for name in LAYERS if "to_" not in name]
    assert lost(model(*inputs), by_hand(model, "int8", ones)(*inputs)) < 1e-5


def test_a_weight_that_two_layers_share():
    model, inputs = made()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    compiler.compile(model, quantize="int8", skip=["blocks.0.up"])
    model(*inputs)
    assert not {"blocks.0.up", "blocks.1.up"} & set(compiler.report(model).quantized)


def test_errors_in_the_report():
    model, inputs = made()
    # One large value in each row: most of the others become few bytes' worth.
    model.blocks[1].down.weight[:, 0] = 5.0
    compiler.compile(model, quantize="int8")
    model(*inputs)
    report = compiler.report(model)
    assert next(iter(report.quantized)) == "blocks.1.down"
    for name, error in report.quantized.items():
        weight = model.get_submodule(name).weight
        weight_q, scale, right = quantize_weight(weight)
        assert error["weight"] == right
        x = torch.randn(16, weight.shape[1], generator=torch.Generator().manual_seed(0),
                        dtype=torch.float64)  # fmt: skip
        exact = x @ weight.T.double()
        mine = x @ (weight_q.double() * scale.double()[:, None]).T
        assert error["output"] == pytest.approx(lost(mine, exact), rel=1e-6)
    outputs = [error["output"] for error in report.quantized.values()]
    assert outputs == sorted(outputs, reverse=True)
    assert report.to_dict()["quantized"] == report.quantized
    text = str(report)
    assert "int8: 12 layers, 8 stay" in text
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if "int8: 12 layers" in line) + 1
    printed = [line.split()[-1] for line in lines[first : first + 10]]
    assert printed == list(report.quantized)[:10]
    assert "and 2 with smaller ones" in text
    # Of the weights as they are now.
    model.blocks[1].down.weight[:, 0] = 0.01
    again = compiler.report(model).quantized["blocks.1.down"]
    assert again["weight"] < report.quantized["blocks.1.down"]["weight"]
    model.blocks[0].up.weight[0, 0] = torch.inf
    assert next(iter(compiler.report(model).quantized)) == "blocks.0.up"


def test_the_error_of_fp8_holds_that_of_the_input():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = quantize.errors(weight, "fp8")
    assert 0.02 < error["weight"] < 0.03
    assert 1.2 < error["output"] / error["weight"] < 1.6
    assert quantize.errors(torch.zeros(4, 8), "int8") == {"weight": 0.0, "output": 0.0}


def test_flops_are_those_of_the_layers():
    counts = []
    for kind in (None, "int8"):
        model, inputs = made()
        compiler.compile(model, quantize=kind)
        model(*inputs)
        counts.append(compiler.report(model).graphs[0].programs["step"]["flops"])
    assert counts[0] == counts[1] > 2 * 2 * 20 * 64 * 64 * 4


def test_gradients_and_training_run_the_models_own_layers():
    model, inputs = made()
    eager = model(*inputs)
    compiler.compile(model, quantize="int8")
    assert torch.equal(model.requires_grad_(True)(*inputs), eager)
    with torch.no_grad():
        assert lost(model(*inputs), eager) > 1e-3


def test_autocast_is_left():
    model, inputs = made()
    compiler.compile(model, quantize="int8")
    with torch.autocast("cpu", torch.bfloat16):
        result = model(*inputs)
        eager = model._call_impl(*inputs)
        assert result.dtype == eager.dtype == torch.bfloat16
        assert lost(result, eager) < 1e-2
    report = compiler.report(model)
    assert {report.unquantized.get(name) for name in LAYERS} == {"autocast changes its dtype"}
    assert report.graphs[0].programs["step"]["flops"] > 0


def test_graphs_read_the_bytes_where_they_are():
    """A CUDA graph has no copy of what is made of weights alone."""
    model, inputs = made()
    compiler.compile(model, quantize="int8")
    model(*inputs)
    (entry,) = model._compiled_call_impl._entries.values()
    runner = entry.runners[0]
    graphed = runner.graphed["step"]
    made_of_weights = set(next(p for p in runner.programs if p.name == "weights").outputs)
    positions = {i for i, name in enumerate(runner.step.inputs) if name in made_of_weights}
    assert len(positions) == 16
    assert positions <= graphed._fixed
    assert isinstance(graphed, cuda_graphs.Graphed)


def test_diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(64, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip
    inputs: dict[str, Any] = {
        "sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 7, 64),
    }  # fmt: skip
    right = tensors(model(**inputs))[0]
    compiler.compile(model, quantize="int8")
    assert 1e-4 < lost(tensors(model(**inputs))[0], right) < 0.02
    report = compiler.report(model)
    names = set(report.quantized)
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert names | set(report.unquantized) == linear
    once = {n for n in linear if "time" in n or ("attn2.to_" in n and n.endswith(("k", "v")))}
    assert names == linear - once


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"quantize": "int4"}, ValueError, "quantize must be one of None, int8, fp8, got 'int4'"),
    ({"quantize": "int8", "skip": "up"}, TypeError, "skip must be a list of names .* got 'up'"),
    ({"quantize": "int8", "skip": [3]}, TypeError, "skip must be names or patterns"),
    ({"skip": ["last"]}, ValueError, "skip must be empty without quantize, got"),
    (
        {"quantize": "int8", "skip": ["las"]},
        ValueError,
        "skip must name modules of the model, got 'las'",
    ),
    (
        {"quantize": "fp8"},
        ValueError,
        "quantize='fp8' must have a CUDA device of sm_89 or newer.* got cpu: .* use 'int8'",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options_change_nothing(options, error, message):
    model, _ = made()
    with pytest.raises(error, match=message):
        compiler.compile(model, dtype=torch.bfloat16, **options)
    assert model._compiled_call_impl is None
    assert model.last.weight.dtype == torch.float32


@pytest.mark.parametrize(("capability", "works"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_by_device(capability, works):
    parameter = mock.Mock(device=torch.device("cuda", 0))
    model = mock.Mock(parameters=lambda: [parameter], named_modules=list)
    options = compiler.options.Options(quantize="fp8")
    with mock.patch.object(torch.cuda, "get_device_capability", return_value=capability):
        if works:
            quantize.check([model], options)
        else:
            with pytest.raises(ValueError, match=r"got cuda:0 \(sm_80\)"):
                quantize.check([model], options)
