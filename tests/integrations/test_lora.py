"""LoRA on a compiled pipeline: the picture changes as in eager, and little is captured again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from tiny_pipelines import draw, made, text_encoder  # noqa: E402

import fastdiff  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
# Of the attentions, and of what is computed once per schedule.
TRANSFORMER = ("to_q", "to_k", "to_v", "to_out.0", "norm1.linear", "linear_1")
UNET = ("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj", "linear_1")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def file_of(model: Any, prefix: str, seed: int, targets: tuple[str, ...]) -> dict[str, Tensor]:
    """A LoRA as diffusers saves it: PREFIX.LAYER.lora_A.weight, ....lora_B.weight."""
    other = copy.deepcopy(model)
    other.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{prefix}.{name}": torch.randn(value.shape, generator=generator) * 0.2
        for name, value in peft.utils.get_peft_model_state_dict(other).items()
    }


class Pair:
    """A compiled pipeline, and the same one as it was; both get all that is done."""

    def __init__(self, name: str, part: str) -> None:
        (self.mine, self.call), (self.theirs, _) = made(name), made(name)
        for pipe in (self.mine, self.theirs):
            # As peft does when a LoRA is loaded, for good: PyTorch guards it, and the graph from
            # before could not serve again after an unload.
            getattr(pipe, part).requires_grad_(False)
        self.part = part
        fastdiff.compile(self.mine)
        self.last: Tensor | None = None

    def do(self, change: Any = None, moved: bool = True, **more: Any) -> int:
        """The graphs captured by the change and the picture after it, which must be eager's.

        moved: whether the picture must be another one.
        """
        before = fastdiff.report(self.mine).captures()
        for pipe in (self.theirs, self.mine):
            if change is not None:
                change(pipe)
        right = draw(self.theirs, {**self.call(), **more})
        mine = draw(self.mine, {**self.call(), **more})
        size = float(right.abs().max())
        assert float((mine - right).abs().max()) <= 1e-4 * size
        if self.last is not None:
            assert (float((right - self.last).abs().max()) > 1e-3 * size) is moved
        self.last = right
        report = fastdiff.report(self.mine)
        assert not report.components[self.part].parts[self.part].eager
        return report.captures() - before


def fused_by_hand(module: Any, factor: float) -> None:
    """As peft and diffusers write to weights: nothing counts it."""
    for name, parameter in module.named_parameters():
        if "linear_1" in name or "norm1.linear" in name or "to_k" in name:
            parameter.data *= factor


def test_load_scale_swap_fuse_and_unload():
    pair = Pair("sd3", "transformer")
    first = file_of(pair.theirs.transformer, "transformer", 1, TRANSFORMER)
    second = file_of(pair.theirs.transformer, "transformer", 2, TRANSFORMER)
    assert pair.do() == 1
    # New layers are new code.
    assert pair.do(lambda p: p.load_lora_weights(dict(first), adapter_name="a")) == 1
    for scale in (0.5, 2.0, 0.25, 1.5):
        assert pair.do(lambda p, scale=scale: p.set_adapters(["a"], [scale])) == 0
    assert pair.do(joint_attention_kwargs={"scale": 0.5}) <= 1  # another argument, another graph
    assert pair.do(joint_attention_kwargs={"scale": 0.1}) == 0
    assert pair.do() == 0
    assert pair.do(lambda p: p.fuse_lora(), moved=False) == 1
    assert pair.do(lambda p: p.unfuse_lora(), moved=False) == 0
    assert pair.do(lambda p: p.unload_lora_weights()) == 0  # the first graph again
    # Other weights in the same places, without any layer of peft's left.
    assert (
        pair.do(
            lambda p: (p.load_lora_weights(dict(second)), p.fuse_lora(), p.unload_lora_weights())
        )
        == 0
    )


def test_a_lora_of_a_unet_and_the_scale_of_a_call():
    pair = Pair("sd", "unet")
    encoder = text_encoder()
    for pipe in (pair.mine, pair.theirs):
        pipe.text_encoder = encoder
    lora = file_of(pair.theirs.unet, "unet", 1, UNET)
    assert pair.do(lambda p: p.load_lora_weights(dict(lora))) == 1
    assert pair.do(cross_attention_kwargs={"scale": 0.3}) == 1
    assert pair.do(cross_attention_kwargs={"scale": 0.6}) == 0
    fastdiff.uncompile(pair.mine)
    layers = [m for m in pair.mine.unet.modules() if hasattr(m, "lora_A")]
    assert layers
    assert all(type(scale) is float for m in layers for scale in m.scaling.values())


@pytest.mark.parametrize("name", ["sd3", "sd"])
def test_weights_written_behind_pytorchs_back(name):
    """`parameter.data *= x`: no address and no version tells; kept results must not be used."""
    part = "unet" if name == "sd" else "transformer"
    pair = Pair(name, part)
    assert pair.do() == 1
    assert pair.do(moved=False) == 0
    for factor in (1.5, 0.5):
        assert pair.do(lambda p, f=factor: fused_by_hand(getattr(p, part), f)) == 0


def test_the_same_inputs_again_after_such_a_write():
    """No pipeline says where a run begins: a repeated call, and a time that comes back, do."""
    pipe, _ = made("sd3")
    model = fastdiff.compile(pipe.transformer)
    values = {
        "hidden_states": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 64),
    }

    def check(*times: float) -> None:
        for time in times:
            given = {**values, "timestep": torch.tensor([time, time])}
            mine, right = model(**given).sample, model._call_impl(**given).sample
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)

    with torch.no_grad():
        check(900, 500, 100)
        for times in ((100, 100), (900, 500, 100), (700, 500)):
            fused_by_hand(model, 1.5)
            check(*times)
    assert fastdiff.report(model).captures == 1
