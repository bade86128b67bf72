"""Runs of tiny denoisers, and the two step caches written by hand, for the tests of `cache=`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from denoisers import tensors
from torch import Tensor, nn

from fastdiff import compiler

UNETS = ("unet", "sdxl", "scale_shift")
TRANSFORMERS = ("dit", "sd3", "flux", "pixart", "wan", "flux2", "zoo_dit")
# How far the sample is moved, and the time, of each step of a run: small moves and one jump.
MOVES = (0.0, 0.01, 0.02, 2.0, 2.01, 2.02)
TIMES = (901.0, 900.0, 899.0, 301.0, 300.0, 299.0)
THRESHOLD = 0.2  # lies between what the two do to the first block


def steps(
    inputs: Callable[[int], dict[str, Any]], dtype: torch.dtype = torch.float32, **changed: Any
) -> list[dict[str, Any]]:
    """The inputs of a run; the condition is the same objects in all."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    first, second = inputs(0), inputs(1)
    fixed = {name: value for name, value in first.items() if value is second[name]}
    fixed = torch.utils._pytree.tree_map(cast, fixed) | changed
    sample, time = (name for name in first if name not in fixed)
    run = []
    for move, t in zip(MOVES, TIMES, strict=True):
        like = first[time]
        moved = torch.full_like(like, t / 1000 if like.max() < 1 else t)
        x = first[sample] + move * second[sample]
        run.append({sample: cast(x), time: moved, **fixed})
    return run


def results(model: nn.Module, run: list[dict[str, Any]]) -> list[Tensor]:
    with torch.no_grad():
        return [tensors(model(**values))[0] for values in run]


def facts(model: nn.Module) -> dict[str, Any]:
    (graph,) = compiler.report(model).graphs
    return graph.cache


def counts(model: nn.Module) -> tuple[int, int]:
    """Steps whole, and in part, of all graphs."""
    found = [graph.cache for graph in compiler.report(model).graphs]
    return sum(sum(f["whole"].values()) for f in found), sum(f["part"] for f in found)


class DeepCache:
    """By hand, for a U-Net of diffusers: what comes up from below to one layer of the up blocks is
    put in the place of the one of the step."""

    def __init__(self, model: nn.Module, interval: int, branch: int) -> None:
        self.model, self.interval, self.count, self.kept = model, interval, 0, None
        layers = [layer for block in model.up_blocks for layer in block.resnets]
        skips = [model.conv_in.out_channels]
        for block in model.down_blocks:
            skips += [layer.conv2.out_channels for layer in block.resnets]
            skips += [s.conv.out_channels for s in block.downsamplers or ()]
        layer = layers[-1 - branch]
        self.channels = layer.in_channels - skips[branch]
        layer.register_forward_pre_hook(self.hook)

    def hook(self, module: nn.Module, args: Any) -> Any:
        x, *rest = args
        if self.count % self.interval == 0:
            self.kept = x[:, : self.channels].clone()
        return torch.cat([self.kept, x[:, self.channels :]], 1), *rest

    def __call__(self, **values: Any) -> Any:
        result = self.model(**values)
        self.count += 1
        return result


def wide(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same in float64; the condition stays the same objects."""
    done: dict[int, Tensor] = {}

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return done.setdefault(id(value), value.double())

    return [torch.utils._pytree.tree_map(one, values) for values in run]


class FirstBlock:
    """By hand, for transformers of diffusers: the other blocks give what they are given, and the
    last one adds the residual that it had at the last whole step."""

    def __init__(self, model: nn.Module, threshold: float) -> None:
        self.model, self.threshold = model, threshold
        self.first: Tensor | None = None
        self.whole: list[bool] = []
        lists = (model.transformer_blocks, getattr(model, "single_transformer_blocks", ()))
        head, *rest = (block for blocks in lists for block in blocks)
        own = head.forward

        def first(*args: Any, **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            self.out = hidden(result)
            new = self.out - (args[0] if args else kwargs["hidden_states"])
            change = 1e9
            if self.first is not None:
                change = float((new - self.first).abs().mean() / self.first.abs().mean())
            self.whole.append(change >= self.threshold)
            if self.whole[-1]:
                self.first = new
            return result

        head.forward = first
        for block in rest:
            block.forward = self.other(block.forward, block is rest[-1])

    def other(self, own: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.whole[-1]:
                result = own(*args, **kwargs)
                if last:
                    self.residual = hidden(result) - self.out
                return result
            x = args[0] if args else kwargs["hidden_states"]
            x = self.out + self.residual if last else x
            text = kwargs.get("encoder_hidden_states")
            return x if self.alone else (text, x)

        return forward

    @property
    def alone(self) -> bool:
        return type(self.model).__name__ in ("DiTTransformer2DModel", "PixArtTransformer2DModel")

    def __call__(self, **values: Any) -> Any:
        return self.model(**values)


def hidden(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[1]
