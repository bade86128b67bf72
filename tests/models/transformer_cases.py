"""What the tests of the transformers share: weights, layouts, and the comparison with a reference.

Every number is one of bf16, so that the float64 oracle and each dtype compute from the same ones.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.family import Family, Layout
from fastdiff.testing import assert_within_2x


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).bfloat16().float()


def randomise(model: nn.Module, keep: tuple[str, ...] = ("pos_embed",)) -> nn.Module:
    """Weights without the zero initialisation, which would hide every block; by their names."""
    for name, value in model.state_dict().items():
        if name not in keep:
            fan = max(1, value[0].numel()) if value.dim() > 1 else 0
            noise = random(*value.shape, seed=zlib.crc32(name.encode()))
            # Vectors are biases around 0, and the scales of QK-norms around 1.
            scaled = noise * fan**-0.5 if fan else noise * 0.1
            if name.endswith(("ln_q.weight", "ln_k.weight", "_norm.scale")):
                scaled = 1 + scaled
            value.copy_(scaled.bfloat16())
    return model.eval().requires_grad_(False)


def written(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file in a layout."""
    out: dict[str, Tensor] = {}
    for name, source in layout.items():
        made = source.write(state[name])
        assert not out.keys() & made.keys()
        out |= made
    return out


def read(layout: Layout, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict:
    return {
        name: source.read([tensors[key] for key in source.keys], tuple(like[name].shape))
        for name, source in layout.items()
    }


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def digest(names: Mapping[str, tuple[int, ...]]) -> str:
    """Of every name and shape."""
    listed = json.dumps(sorted((name, list(shape)) for name, shape in names.items()))
    return hashlib.sha256(listed.encode()).hexdigest()


def golden(name: str) -> dict[str, Any]:
    """What the official code gave, run once: ``source`` says how."""
    return json.loads((Path(__file__).parent / "data" / f"{name}.json").read_text())


def check_names(family: Family, config: Any, reference: Callable[[Any], nn.Module]) -> nn.Module:
    """Names and shapes equal in both directions, against reference(entries) on the meta device."""
    entries = family.to_diffusers(config)
    with torch.device("meta"):
        ours, theirs = family.build(config), reference(entries)
    layout = family.diffusers(config)
    assert set(ours.state_dict()) - set(layout) <= family.optional
    # A layout's tensors are written from what the model has, on a device without values.
    state = {name: value.to("meta") for name, value in ours.state_dict().items()}
    assert shapes(written(layout, state)) == shapes(theirs.state_dict())
    assert family.from_diffusers(dict(theirs.config)) == config
    assert family.recognise(shapes(ours.state_dict())) == config
    return ours


def check_outputs(
    ours: nn.Module,
    theirs: nn.Module,
    mine: Callable[[nn.Module, torch.dtype], Tensor],
    right: Callable[[nn.Module, torch.dtype], Tensor],
) -> None:
    """mine(model, dtype) equals right(reference, dtype) by the 2x rule, in float32 and bf16."""
    with torch.no_grad():
        oracle = right(theirs.double(), torch.float64)
        assert oracle.std() > 0.1
        for dtype in (torch.float32, torch.bfloat16):
            found = mine(ours.to(dtype), dtype)
            assert_within_2x(found, oracle, right(theirs.to(dtype), dtype), str(dtype))


def check_programs(model: Any, x: Tensor, steps: Tensor, *cond: Any, **named: Any) -> None:
    """One schedule for all steps is one at a time, and the three programs are the forward."""
    prompt = model.prompt(*cond, **named)
    whole = model.schedule(steps, prompt)
    for s, t in enumerate(steps):
        alone = model.schedule(t, prompt)
        here = torch.utils._pytree.tree_map(lambda value, s=s: value[s], whole)
        for one, other in zip(*map(torch.utils._pytree.tree_leaves, (alone, here)), strict=True):
            assert one.shape == other.shape
            torch.testing.assert_close(one, other)
        expected = model(x, t, *cond, **named)
        torch.testing.assert_close(model.step(x, alone, prompt), expected, rtol=0, atol=0)
        torch.testing.assert_close(model.step(x, here, prompt), expected)


def check_compiled(model: nn.Module, arguments: Callable[[torch.dtype], tuple]) -> None:
    """``fastdiff.compile`` of the model equals it by the 2x rule, in float32."""
    import fastdiff

    with torch.no_grad():
        oracle = model.double()(*arguments(torch.float64))
        eager = model.float()(*arguments(torch.float32))
        compiled = fastdiff.compile(model)
        assert_within_2x(compiled(*arguments(torch.float32)), oracle, eager, "compiled")


def check_gradients(model: nn.Module, arguments: tuple, without: tuple[str, ...] = ()) -> None:
    """Every parameter gets one, and none is zero throughout."""
    model.float().requires_grad_(True)
    model(*arguments).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name not in without:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
