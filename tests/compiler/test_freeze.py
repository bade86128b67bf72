"""freeze=True: weights in oneDNN's order and images channels last, with eager's results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoisers import made, tensors
from torch import Tensor, nn

from fastdiff import compiler
from fastdiff.compiler.passes.prepack import usable
from fastdiff.testing import assert_within_2x

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(not usable(), reason="needs a CPU with bf16 products"),
]
BF16 = torch.bfloat16


def frozen(model: nn.Module, **options: Any) -> nn.Module:
    model = model.eval().requires_grad_(False).to(BF16)
    return compiler.compile(model, freeze=True, **options)


def packed(model: nn.Module) -> int:
    return compiler.report(model).graphs[-1].fused["prepack"]


def assert_same(mine: Tensor, right: Tensor) -> None:
    assert torch.equal(mine, right)
    assert mine.stride() == right.stride()
    assert mine.dtype == right.dtype


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(BF16)


# Every one with more multiplications than prepack.LEAST; (module, shape of its input).
LAYERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear": lambda: (nn.Linear(64, 96), (2, 40, 64)),
    "linear, no bias": lambda: (nn.Linear(64, 96, bias=False), (2, 40, 64)),
    "linear, one row": lambda: (nn.Linear(320, 1280), (1, 320)),
    "linear, one vector": lambda: (nn.Linear(320, 1280), (320,)),
    "linear, odd sizes": lambda: (nn.Linear(123, 457), (3, 7, 123)),
    "linear, four dimensions": lambda: (nn.Linear(64, 65), (2, 3, 11, 64)),
    "conv 3x3": lambda: (nn.Conv2d(32, 48, 3, padding=1), (2, 32, 12, 12)),
    "conv 1x1": lambda: (nn.Conv2d(32, 48, 1), (2, 32, 12, 12)),
    "conv, no bias": lambda: (nn.Conv2d(32, 48, 3, bias=False), (2, 32, 12, 12)),
    "conv, odd sizes": lambda: (nn.Conv2d(33, 17, 3, padding=1), (1, 33, 13, 11)),
    "conv, few channels in": lambda: (nn.Conv2d(4, 320, 3, padding=1), (1, 4, 16, 16)),
    "conv, few channels out": lambda: (nn.Conv2d(320, 4, 3, padding=1), (1, 320, 16, 16)),
    "conv, one channel": lambda: (nn.Conv2d(1, 64, 5, padding=2), (1, 1, 40, 40)),
    "conv, stride": lambda: (nn.Conv2d(32, 48, 3, stride=2, padding=1), (2, 32, 13, 13)),
    "conv, two strides": lambda: (
        nn.Conv2d(32, 48, (3, 5), stride=(1, 2), padding=(1, 2)),
        (2, 32, 12, 14),
    ),
    "conv, groups": lambda: (nn.Conv2d(64, 64, 3, padding=1, groups=4), (2, 64, 9, 9)),
    "conv, depthwise": lambda: (nn.Conv2d(64, 64, 3, padding=1, groups=64), (2, 64, 24, 24)),
    "conv, dilation": lambda: (nn.Conv2d(32, 48, 3, padding=2, dilation=2), (2, 32, 12, 12)),
    "conv, one pixel": lambda: (nn.Conv2d(512, 512, 1), (1, 512, 1, 1)),
    "conv, one row of pixels": lambda: (nn.Conv2d(64, 64, 3, padding=1), (1, 64, 1, 40)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_has_eagers_bits(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]()
    model = frozen(nn.Sequential(layer))
    x = image(*shape)
    right = model._call_impl(x)
    oracle = copy.deepcopy(layer).double()(x.double())
    for _ in range(2):
        assert_within_2x(model(x), oracle, right)
        assert model(x).stride() == right.stride()
    assert packed(model) == 1
    if x.dim() == 4 and isinstance(layer, nn.Conv2d):
        # The bits of eager's other layout: oneDNN adds up the channels in another order.
        last = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        right = last(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(model(x), right)
    spread = torch.zeros(*shape[:-1], shape[-1] * 2, dtype=BF16)[..., ::2].copy_(x)
    assert not spread.is_contiguous()
    assert_within_2x(model(spread), oracle, model._call_impl(spread))


@pytest.mark.parametrize("view", ["squeeze", "flatten", "view", "reshape"])
def test_a_convolution_that_its_model_uses_as_a_linear_layer(view):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(64, 96, 1)

        def forward(self, sample: Tensor) -> Tensor:
            weight = self.conv.weight
            more = {"squeeze": (-1,), "flatten": (1,)}.get(view, (96, 64))
            return nn.functional.linear(sample, getattr(weight, view)(*more), self.conv.bias)

    model = frozen(Tokens())
    x = image(2, 40, 64)
    for _ in range(2):
        assert torch.equal(model(x), model._call_impl(x))
        with torch.no_grad():
            model.conv.weight.mul_(-1.5)
    assert packed(model) == 1


def test_a_computed_weight_stays():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 96)

        def forward(self, sample: Tensor) -> Tensor:
            return nn.functional.linear(sample, (self.layer.weight * 2).view(96, 64))

    model = frozen(Scaled())
    x = image(2, 40, 64)
    assert torch.equal(model(x), model._call_impl(x))
    assert packed(model) == 0


@pytest.mark.parametrize("kind", ["none", "tanh"])
def test_a_gelu_that_follows_is_part_of_the_layer(kind):
    """Of sums that have not been rounded: no less accurate than eager."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 256)
    model = frozen(nn.Sequential(layer, nn.GELU(approximate=kind), nn.Linear(256, 64)))
    x = image(2, 40, 64)
    oracle = copy.deepcopy(model).double()(x.double())
    right = model._call_impl(x)
    assert_within_2x(model(x), oracle, right)
    assert packed(model) == 2
    assert compiler.report(model).graphs[-1].unfused["gelu"] == 0
    with torch.no_grad():
        layer.weight.mul_(-1.5)
    oracle = copy.deepcopy(model).double()(x.double())
    assert_within_2x(model(x), oracle, model._call_impl(x))


def test_it_is_the_gelu_that_was_asked_for():
    """The two differ by more than rounding where they are close to zero."""
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 256).requires_grad_(False), image(8, 40, 64)
    wide = copy.deepcopy(layer).bfloat16().double()(x.double())
    near = (wide < -1.5) & (wide > -3)
    assert near.sum() > 100
    kinds = ("none", "tanh")
    errors = {}
    for kind in kinds:
        mine = frozen(nn.Sequential(copy.deepcopy(layer), nn.GELU(approximate=kind)))(x)
        for other in kinds:
            exact = nn.functional.gelu(wide, approximate=other)
            errors[kind, other] = float((mine.double() - exact)[near].abs().mean())
    for kind, other in (kinds, kinds[::-1]):
        assert errors[kind, kind] < 0.7 * errors[kind, other], errors


def test_a_gelu_that_is_not_alone_stays():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, sample: Tensor) -> Tensor:
            y = self.layer(sample)
            return nn.functional.gelu(y) + y

    model = frozen(Two())
    x = image(2, 40, 64)
    oracle = copy.deepcopy(model).double()(x.double())
    assert_within_2x(model(x), oracle, model._call_impl(x))
    assert packed(model) == 1
    assert compiler.report(model).graphs[-1].unfused["gelu"] == 1


class Views(nn.Module):
    """What models do with images: flatten them, and give them back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, 32, 3, padding=1)
        self.norm, self.project = nn.GroupNorm(4, 32), nn.Linear(32, 32)
        self.last = nn.Conv2d(32, 16, 1)

    def forward(self, sample: Tensor) -> tuple[Tensor, ...]:
        image = self.first(sample)
        b, c, h, w = image.shape
        tokens = image.view(b, c, h * w).transpose(1, 2)
        tokens = self.project(tokens)
        again = tokens.transpose(1, 2).reshape(b, c, h, w)
        bits = image.view(torch.int16)
        return image, self.last(again), image.view(b, -1), bits, image.transpose(1, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_views_of_images_and_strides_of_results(layout):
    torch.manual_seed(0)
    model = frozen(Views())
    x = image(2, 16, 20, 20).contiguous(memory_format=layout)
    if layout is torch.channels_last:  # eager refuses this view then
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            model._call_impl(x)
        return
    wide = copy.deepcopy(model).double()
    oracles = list(wide(x.double()))
    del oracles[3]  # of bits
    results, rights = list(model(x)), list(model._call_impl(x))
    for mine, right in zip(results, rights, strict=True):
        assert mine.stride() == right.stride()
    bits = results.pop(3)
    assert torch.equal(bits, results[0].view(torch.int16))
    del rights[3]
    for mine, oracle, right in zip(results, oracles, rights, strict=True):
        assert_within_2x(mine, oracle, right)
    assert packed(model) == 3


def test_images_that_are_channels_last_stay_so():
    model = frozen(nn.Sequential(nn.Conv2d(16, 32, 3), nn.SiLU(), nn.Conv2d(32, 16, 3)))
    x = image(2, 16, 20, 20).contiguous(memory_format=torch.channels_last)
    assert_same(model(x), model._call_impl(x))
    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "name", ["unet", "autoencoder", "dit", pytest.param("sdxl", marks=pytest.mark.long)]
)
def test_models_are_within_twice_eagers_error(name):
    pytest.importorskip("diffusers")
    model, inputs = made(name)
    wide = copy.deepcopy(model).double()
    model = frozen(model)

    def cast(step: int, dtype: torch.dtype) -> Any:
        def one(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(BF16).to(dtype) if floating else value

        return torch.utils._pytree.tree_map(one, inputs(step))

    with torch.no_grad():
        for step in range(3):
            right = tensors(wide(**cast(step, torch.float64)))
            here = cast(step, BF16)
            eager = tensors(model._call_impl(**here))
            for mine, oracle, other in zip(tensors(model(**here)), right, eager, strict=True):
                assert_within_2x(mine, oracle, other, what=f"{name}, step {step}")
                assert mine.stride() == other.stride()
    assert packed(model) > (0 if name == "dit" else 10)


def assert_right(model: nn.Module, x: Tensor) -> None:
    oracle = copy.deepcopy(model).double()(x.double())
    assert_within_2x(model(x), oracle, model._call_impl(x))


def in_place(weight: Tensor) -> None:
    weight.mul_(1.5)


def other_memory(weight: Tensor) -> None:
    weight.data = weight.data * 1.5


def copied(weight: Tensor) -> None:
    weight.copy_(torch.ones_like(weight))


def stepped(weight: Tensor) -> None:
    weight.requires_grad_(True)
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=0.5).step()
    weight.requires_grad_(False)


@pytest.mark.parametrize("which", [0, 2], ids=["conv", "linear"])
@pytest.mark.parametrize("write", [in_place, other_memory, copied, stepped])
def test_writes_to_weights_are_seen(write, which):
    torch.manual_seed(0)
    model = frozen(nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(2), nn.Linear(324, 64)))
    x = image(2, 16, 20, 20)
    before = model(x)
    assert packed(model) == 2
    write(model[which].weight)
    for _ in range(2):
        assert_right(model, x)
    assert not torch.equal(model(x), before)
    model[which].bias.add_(1)
    assert_right(model, x)


def test_copies_count_in_the_report_and_are_made_once():
    model = frozen(nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(2), nn.Linear(324, 64)))
    x = image(2, 16, 20, 20)
    for _ in range(4):
        model(x)
    report = compiler.report(model)
    least = sum(2 * model[i].weight.numel() for i in (0, 2))
    assert least <= report.kept_bytes <= 1.5 * least + 4096
    assert (report.misses, report.hits) == (1, 3)
    compiler.uncompile(model)
    assert model[0].weight.layout == torch.strided


class Other(nn.Module):
    """Layers whose weights are not those of the model, or that are no work."""

    def __init__(self, wide: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(wide, wide))
        self.image = nn.Parameter(torch.randn(wide, wide, 1, 1))
        self.small = nn.Linear(wide, 2)
        self.named = nn.Conv2d(wide, wide, 3, padding="same")
        self.long = nn.Conv1d(wide, wide, 3)

    def forward(self, sample: Tensor, other: Tensor) -> Tensor:
        x = nn.functional.linear(sample, self.weight * 2) + nn.functional.linear(sample, other)
        picture = x.transpose(0, 1)[None, :, :, None].contiguous()
        picture = nn.functional.conv2d(picture, self.image + 1)
        picture = self.named(picture)
        line = self.long(picture[..., 0])
        return self.small(line[0].transpose(0, 1)[:4])


def test_what_stays():
    torch.manual_seed(0)
    model = frozen(Other())
    x, other = image(200, 64), image(64, 64)
    assert torch.equal(model(x, other), model._call_impl(x, other))
    assert packed(model) == 0


def test_float32_stays():
    model = nn.Sequential(nn.Linear(64, 64)).eval().requires_grad_(False)
    compiler.compile(model, freeze=True)
    x = torch.randn(64, 64)
    assert torch.equal(model(x), model._call_impl(x))
    assert packed(model) == 0


def test_with_quantize():
    """What is not quantised is packed."""
    model = frozen(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), quantize="int8", skip=["1"])
    x = image(64, 64)
    result = model(x)
    assert packed(model) == 1
    assert list(compiler.report(model).quantized) == ["0"]
    right = model._call_impl(x).double()
    assert 1e-4 < float((result - right).norm() / right.norm()) < 0.02


def test_not_without_being_asked():
    model = nn.Sequential(nn.Linear(64, 64)).eval().requires_grad_(False).to(BF16)
    compiler.compile(model)
    model(image(64, 64))
    assert "prepack" not in compiler.report(model).graphs[0].fused
