"""Merged projections: one product, and weights that stay what they were for everybody else."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from denoisers import made
from torch import Tensor, nn
from torch.nn import functional

from fastdiff import compiler
from fastdiff.compiler import packing
from fastdiff.testing import assert_within_2x


class Block(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32, bias=bias) for _ in range(3))

    def forward(self, sample: Tensor) -> Tensor:
        q, k, v = (f(sample).view(2, -1, 4, 8).transpose(1, 2) for f in self.children())
        out = functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(2, -1, 32)


def compiled(block: nn.Module | None = None) -> tuple[nn.Module, Tensor]:
    """A block that has run compiled, and what it ran on."""
    torch.manual_seed(0)
    block = (block or Block()).eval().requires_grad_(False)
    compiler.compile(block)
    sample = torch.randn(2, 20, 32)
    block(sample)
    return block, sample


def merged(block: nn.Module) -> int:
    return compiler.report(block).graphs[-1].fused["qkv"]


def adjacent(*parts: Tensor) -> bool:
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    return [part.data_ptr() for part in parts[1:]] == ends[:-1]


def assert_right(block: nn.Module, sample: Tensor) -> None:
    torch.testing.assert_close(block(sample), block._call_impl(sample), rtol=1e-4, atol=1e-5)


def weights(block: nn.Module) -> list[Tensor]:
    return [child.weight for child in block.children()]


def test_one_product_on_weights_side_by_side():
    block, sample = compiled()
    assert merged(block) == 1
    assert adjacent(*weights(block))
    assert adjacent(*(child.bias for child in block.children()))
    assert_right(block, sample)
    (entry,) = block._compiled_call_impl._entries.values()
    names = [getattr(n.target, "__name__", "") for n in entry.runners[0].step.module.graph.nodes]
    assert names.count("linear") == 1
    with torch.no_grad():  # no copy: the product reads the memory itself
        assert packing.stacked(*weights(block)).data_ptr() == block.to_q.weight.data_ptr()


def data_add(block: nn.Module, delta: Tensor) -> None:
    """peft's merge and unmerge: the version does not change."""
    block.to_k.weight.data += delta


def data_add_in_place(block: nn.Module, delta: Tensor) -> None:
    block.to_v.weight.data.add_(delta)


def data_set(block: nn.Module, delta: Tensor) -> None:
    block.to_q.weight.data = block.to_q.weight.data + delta


def copied(block: nn.Module, delta: Tensor) -> None:
    with torch.no_grad():
        block.to_k.weight.copy_(delta)


def loaded(block: nn.Module, delta: Tensor) -> None:
    block.load_state_dict({n: v + 0.1 for n, v in block.state_dict().items()})


def assigned(block: nn.Module, delta: Tensor) -> None:
    block.load_state_dict({n: v + 0.1 for n, v in block.state_dict().items()}, assign=True)


def replaced(block: nn.Module, delta: Tensor) -> None:
    block.to_k.weight = nn.Parameter(block.to_k.weight + delta, requires_grad=False)


def trained(block: nn.Module, delta: Tensor) -> None:
    block.requires_grad_(True)
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)
    block(torch.ones(2, 20, 32)).square().sum().backward()
    optimizer.step()
    block.requires_grad_(False)


def swapped(block: nn.Module, delta: Tensor) -> None:
    """Two layers' memory changes places."""
    q, k = block.to_q.weight, block.to_k.weight
    q.data, k.data = k.data, q.data


EDITS = (
    data_add, data_add_in_place, data_set, copied, loaded, assigned, replaced, trained, swapped,
)  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_of_weights_are_seen(edit):
    block, sample = compiled()
    before = block(sample)
    for _ in range(2):
        edit(block, torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))
        assert_right(block, sample)
        assert_right(block, sample)
    assert not torch.allclose(block(sample), before, rtol=1e-3) or edit is swapped
    assert adjacent(*weights(block)) or edit is swapped


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_moving_and_casting_a_model_is_seen(mode):
    block, sample = compiled()
    with mode():
        block.to(torch.bfloat16)
        mine, own = block(sample.bfloat16()), block._call_impl(sample.bfloat16())
        exact = copy.deepcopy(block).double()._call_impl(sample.bfloat16().double())
        assert_within_2x(mine, exact, own)
        block.float()
        assert_right(block, sample)


def test_casting_frees_the_old_memory():
    block, _ = compiled()
    key = tuple(part.data_ptr() for part in weights(block))
    assert packing._blocks[key].alive
    held = packing._blocks[key]
    block.double()
    assert not held.alive


def test_a_dead_model_leaves_nothing():
    block, _ = compiled()
    held = packing._blocks[tuple(part.data_ptr() for part in weights(block))]
    gone = weakref.ref(block)
    compiler.uncompile(block)
    del block
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert not held.alive


def test_weights_are_saved_and_copied_as_before(tmp_path):
    from safetensors.torch import load_file, save_file, save_model

    plain = Block().eval().requires_grad_(False)
    size = len(pickle.dumps(plain))
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    block, sample = compiled(plain)
    right = block(sample)
    state = block.state_dict()
    assert list(state) == list(before)
    for name, value in state.items():
        assert torch.equal(value, before[name])
        assert value.untyped_storage().nbytes() == value.numel() * 4
        assert value.storage_offset() == 0
    assert len(pickle.dumps(block)) < size + 1024
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        torch.testing.assert_close(other(sample), right, rtol=1e-4, atol=1e-5)
        other.to_k.weight.data += 1  # memory of its own
    assert torch.equal(block(sample), right)
    save_file(block.state_dict(), tmp_path / "a.safetensors")
    save_model(block, str(tmp_path / "b.safetensors"))
    for path in tmp_path.iterdir():
        for name, value in load_file(path).items():
            assert torch.equal(value, before[name])
    buffer, lone = io.BytesIO(), io.BytesIO()
    torch.save(block.to_k.weight, buffer)
    torch.save(before["to_k.weight"], lone)
    assert len(buffer.getvalue()) < len(lone.getvalue()) + 1024  # not the memory of all three


def test_save_pretrained_works(tmp_path):
    pytest.importorskip("diffusers")
    model, inputs = made("unet")
    compiler.compile(model)
    with torch.no_grad():
        right = model(**inputs(0)).sample
        assert merged(model) == 12
        model.save_pretrained(tmp_path)
        other = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(other(**inputs(0)).sample, right, rtol=1e-4, atol=1e-5)


def test_two_graphs_share_the_memory():
    block, _ = compiled()
    held = [part.data_ptr() for part in weights(block)]
    assert_right(block, torch.randn(2, 24, 32))
    assert merged(block) == 1
    assert [part.data_ptr() for part in weights(block)] == held


def tied(block: Any) -> None:
    block.to_v.weight = block.to_k.weight


def shared(block: Any) -> Tensor:
    return block.to_k.weight.data  # type: ignore[no-any-return]


def part_of_more(block: Any) -> None:
    block.to_k.weight.data = torch.randn(64, 32)[:32]


def one_bias(block: Any) -> None:
    block.to_q.bias = None


def subclass(block: Any) -> None:
    class Own(nn.Parameter):
        pass

    block.to_q.weight = Own(block.to_q.weight.data, requires_grad=False)


LEFT = {
    tied: "used twice",
    shared: "shares the memory",
    part_of_more: "shares the memory",
    one_bias: "some have a bias",
    subclass: "no plain parameter",
}


@pytest.mark.parametrize("change", LEFT, ids=lambda change: change.__name__)
def test_what_cannot_be_merged_stays_and_says_why(change):
    block = Block()
    alias = change(block)
    before = [part.data_ptr() for part in weights(block)]
    block, sample = compiled(block)
    assert merged(block) == 0
    assert [part.data_ptr() for part in weights(block)] == before
    assert any(LEFT[change] in why for why in compiler.report(block).graphs[0].why_unfused)
    if alias is not None:
        alias += 1  # still the weight
    assert_right(block, sample)


def test_weights_that_move_all_the_time_are_copied(monkeypatch):
    monkeypatch.setattr(packing, "MOST_MOVES", 3)
    block, sample = compiled()
    for _ in range(5):
        block.to_k.weight.data = block.to_k.weight.data + 0.1
        assert_right(block, sample)
    assert not adjacent(*weights(block))
