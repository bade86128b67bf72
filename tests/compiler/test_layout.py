"""layout=: images channels last, with eager's results and strides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from denoisers import made, tensors
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdiff import compiler
from fastdiff.compiler.passes import layout
from fastdiff.testing import assert_within_2x

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`"),
]


def cast(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def one(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    return torch.utils._pytree.tree_map(one, values)


class Copies(fx.Interpreter):
    """Counts the images that had to be copied."""

    count = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is layout.last:
            self.count += not args[0].is_contiguous(memory_format=torch.channels_last)
        return super().call_function(target, args, kwargs)


# How many images of a step are copied: the samples that come in, and half the channels of what an
# encoder gives. SDXL's tokens become images after its linear layers.
COPIED = {"unet": 1, "sdxl": 1, "scale_shift": 1, "autoencoder": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n == "sdxl" else ()) for n in COPIED]
)
def test_models_are_within_twice_eagers_error(name, dtype):
    model, inputs = made(name)
    wide = copy.deepcopy(model).double()
    model = model.to(dtype)
    # Convolutions add up channels in another order then, in eager too.
    same = copy.deepcopy(model).to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    compiler.compile(model, layout="channels_last")
    copied = []
    with torch.no_grad():
        for step in range(2):
            mine = tensors(model(**cast(inputs(step), dtype)))
            eager = tensors(model._call_impl(**cast(inputs(step), dtype)))
            there = cast(inputs(step), dtype)
            for argument, value in there.items():
                if isinstance(value, Tensor) and value.dim() == 4:
                    there[argument] = value.contiguous(memory_format=torch.channels_last)
            reference = tensors(same(**there))
            oracle = tensors(wide(**cast(inputs(step), torch.float64)))
            for result, right, other in zip(mine, oracle, reference, strict=True):
                assert_within_2x(result, right, other)
            assert [r.stride() for r in mine] == [e.stride() for e in eager]
        (entry,) = model._compiled_call_impl._entries.values()
        step_program = entry.runners[0].step.module

        def counting(*args: Any) -> Any:
            counter = Copies(step_program)
            copied.append(counter)
            return counter.run(*args)

        entry.runners[0]._run_step = counting
        again = tensors(model(**cast(inputs(1), dtype)))
        assert all(torch.equal(a, b) for a, b in zip(again, mine, strict=True))
    assert copied[0].count <= COPIED[name]
    (graph,) = compiler.report(model).graphs
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert graph.fused["channels_last"] == convolutions
    assert graph.images == f"channels last in {convolutions} of {convolutions} convolutions"
    assert graph.images in str(compiler.report(model))
    assert compiler.report(model).kept_bytes > 0
    assert [p.stride() for p in model.parameters()] == strides
    compiler.uncompile(model)
    assert [p.stride() for p in model.parameters()] == strides


def test_writes_to_weights_are_seen():
    model, inputs = made("unet")
    compiler.compile(model, layout="channels_last")
    values = inputs(0)

    def assert_right() -> None:
        torch.testing.assert_close(
            model(**values).sample, model._call_impl(**values).sample, rtol=1e-4, atol=1e-5
        )

    with torch.no_grad():
        assert_right()
        model.conv_in.weight.mul_(1.5)
        assert_right()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data.add_(0.01)  # as a LoRA is fused: seen when a run begins
        assert_right()
        model.conv_out.weight.data = model.conv_out.weight.data * 2
        assert_right()
    assert compiler.report(model).captures == 1


class Views(nn.Module):
    """What models do with images: look at their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        x = self.first(sample)
        b, c, h, w = x.shape
        tokens = x.view(b, c, h * w).transpose(1, 2)
        y = self.last(tokens.transpose(1, 2).reshape(b, c, h, w))
        return x, y, x.view(b, -1), y.transpose(1, 3)


@pytest.mark.parametrize("size", [(2, 4, 6, 5), (1, 4, 6, 5), (2, 4, 1, 1)])
def test_views_and_strides_of_results(size):
    torch.manual_seed(0)
    model = compiler.compile(Views().eval().requires_grad_(False), layout="channels_last")
    x = torch.randn(size)
    wide = copy.deepcopy(model).double()(x.double())
    for mine, right, oracle in zip(model(x), model._call_impl(x), wide, strict=True):
        assert_within_2x(mine, oracle, right)
        assert mine.stride() == right.stride()
    assert compiler.report(model).graphs[0].fused["channels_last"] == 2


def test_what_stays_as_it_is():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.line = nn.Conv2d(4, 4, 3), nn.Conv1d(4, 4, 3)

        def forward(self, sample: Tensor) -> Tensor:
            scaled = nn.functional.conv2d(sample, self.conv.weight * 2)
            return self.conv(sample[0]) + scaled + self.line(scaled.flatten(2)).mean()

    model = compiler.compile(Computed().eval().requires_grad_(False), layout="channels_last")
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(model(x), model._call_impl(x))
    (graph,) = compiler.report(model).graphs
    assert graph.fused["channels_last"] == 0
    assert graph.images == "as given"
    assert graph.why_unfused == {
        "conv2d: its weight is computed": 1,
        "conv2d: its image has no batch": 1,
    }


def test_auto_is_channels_last_on_cuda_in_half_precision():
    with FakeTensorMode(allow_non_fake_inputs=True):
        for device, dtype, right in (
            ("cuda", torch.float16, True),
            ("cuda", torch.bfloat16, True),
            ("cuda", torch.float32, False),
            ("cpu", torch.bfloat16, False),
        ):
            assert layout.pays(torch.empty(4, 4, 3, 3, device=device, dtype=dtype)) is right
        with torch.autocast("cpu", torch.bfloat16):
            assert not layout.pays(torch.empty(4, 4, 3, 3))
    for options in ({}, {"layout": "auto"}, {"layout": "contiguous"}):
        model = compiler.compile(nn.Conv2d(4, 4, 3).eval().requires_grad_(False), **options)
        model(torch.randn(1, 4, 8, 8))
        (graph,) = compiler.report(model).graphs
        assert graph.fused["channels_last"] == 0
        assert graph.images == "as given"
    with pytest.raises(ValueError, match="layout must be one of auto, channels_last, contiguous"):
        compiler.compile(nn.Conv2d(4, 4, 3), layout="nhwc")
