"""Models of the real layouts, compiled and eager: equality, a trajectory, counts and times.

Widths, heads, context widths and text lengths are those of the public checkpoints; the weights are
random, and depth is reduced where memory asks (5 GB). Run by hand, one model at a time, not in CI:

    python tests/compiler/real_layouts.py sd15 [sdxl sd3 flux dit-xl] [--steps 20] [--json out.json]

- equality: one step in float32 and bf16 against float64 by the 2 x rule. Weights and inputs are
  representable in bf16, so that all three compute from the same numbers.
- trajectory: Euler over ``--steps`` steps; the PSNR of its end against eager's in float32. Held:
  at least 80 dB in float32, and in bf16 at most 1 dB below eager's own.
- times: medians of interleaved calls on ``--threads`` threads; on a shared machine they are noise.

The exit status is 1 when something held does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor, nn

from fastdiff import compiler
from fastdiff.compiler import captured
from fastdiff.testing import assert_within_2x, psnr

Inputs = dict[str, Any]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random float32 numbers that bf16 can represent."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return drawn.bfloat16().float()


def sd15(size: int) -> tuple[nn.Module, Inputs, tuple[str, str]]:
    model = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8
    )
    text = {"encoder_hidden_states": numbers(1, 77, 768)}
    return model, {"sample": numbers(1, 4, size, size), **text}, ("timestep", "noise")


def sdxl(size: int) -> tuple[nn.Module, Inputs, tuple[str, str]]:
    """One layer in its largest transformers, of 10."""
    model = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 1),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    sizes = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]])
    added = {"text_embeds": numbers(1, 1280), "time_ids": sizes}
    text = {"encoder_hidden_states": numbers(1, 77, 2048), "added_cond_kwargs": added}
    return model, {"sample": numbers(1, 4, size, size), **text}, ("timestep", "noise")


def sd3(size: int) -> tuple[nn.Module, Inputs, tuple[str, str]]:
    """3 blocks of 24."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=128,
        num_layers=3,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )
    text = {
        "encoder_hidden_states": numbers(1, 333, 4096),
        "pooled_projections": numbers(1, 2048),
    }
    return model, {"hidden_states": numbers(1, 16, size, size), **text}, ("timestep", "flow")


def flux(size: int) -> tuple[nn.Module, Inputs, tuple[str, str]]:
    """1 double and 2 single blocks, of 19 and 38."""
    model = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=2, guidance_embeds=True
    )
    rows = size // 2
    places = torch.zeros(rows, rows, 3)
    places[..., 1], places[..., 2] = torch.arange(rows)[:, None], torch.arange(rows)
    condition = {
        "encoder_hidden_states": numbers(1, 512, 4096),
        "pooled_projections": numbers(1, 768),
        "txt_ids": torch.zeros(512, 3),
        "img_ids": places.flatten(0, 1),
        "guidance": torch.tensor([3.5]),
    }
    return model, {"hidden_states": numbers(1, rows * rows, 64), **condition}, ("timestep", "unit")


def dit_xl(size: int) -> tuple[nn.Module, Inputs, tuple[str, str]]:
    """4 blocks of 28."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        sample_size=32,
    )
    labels = {"class_labels": torch.tensor([207])}
    return model, {"hidden_states": numbers(1, 4, size, size), **labels}, ("timestep", "noise")


MODELS: dict[str, Callable[[int], tuple[nn.Module, Inputs, tuple[str, str]]]] = {
    "sd15": sd15,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "dit-xl": dit_xl,
}


def draw(model: nn.Module) -> nn.Module:
    """Weights that start as zeros, which hide mistakes, drawn; all of them rounded to bf16."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.eval().requires_grad_(False).parameters():
        if not parameter.any():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        parameter.copy_(parameter.bfloat16())
    return model


@contextlib.contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Within it each layer computes in float64, with one layer's weights at a time in memory."""
    handles = []

    def before(module: nn.Module, _: Any) -> None:
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        module.narrow = [(t, t.data) for t in held if t.is_floating_point()]
        for tensor, data in module.narrow:
            tensor.data = data.double()

    def after(module: nn.Module, *_: Any) -> None:
        for tensor, data in module.narrow:
            tensor.data = data
        del module.narrow

    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Loop:
    """One prompt in one dtype: the condition is the same objects in every step."""

    def __init__(self, inputs: Inputs, time: tuple[str, str], dtype: torch.dtype) -> None:
        name, self.kind = time
        self.time, self.dtype = name, dtype
        self.sample = next(n for n in ("sample", "hidden_states") if n in inputs)
        self.inputs = torch.utils._pytree.tree_map(
            lambda v: v.to(dtype) if v.is_floating_point() else v, inputs
        )
        self.start = inputs[self.sample].double()

    def step(self, model: Callable[..., Any], x: Tensor, sigma: float) -> Tensor:
        """The model's output for a sample in float64, in the layout of the sample."""
        if self.kind == "noise":
            scaled = x / math.sqrt(1 + sigma * sigma)
            at = torch.tensor([int(999 * sigma / (1 + sigma))])
        else:
            scaled, at = x, torch.tensor([sigma * (1000 if self.kind == "flow" else 1)])
            at = at.to(self.dtype)
        here = {**self.inputs, self.sample: scaled.to(self.dtype), self.time: at}
        with torch.no_grad():
            return model(**here, return_dict=False)[0]

    def sigmas(self, steps: int) -> list[float]:
        """From the first noise level to 0."""
        if self.kind != "noise":
            return [1 - i / steps for i in range(steps + 1)]
        ends = 14.6 ** (1 / 7), 0.03 ** (1 / 7)
        ramp = [ends[0] + i / (steps - 1) * (ends[1] - ends[0]) for i in range(steps)]
        return [*(r**7 for r in ramp), 0.0]

    def trajectory(self, model: Callable[..., Any], steps: int) -> Tensor:
        """The end of a run of Euler steps, which are made in float64."""
        sigmas = self.sigmas(steps)
        x = self.start * (sigmas[0] if self.kind == "noise" else 1)
        for sigma, after in itertools.pairwise(sigmas):
            out = self.step(model, x, sigma).double()
            x = x + (after - sigma) * out[:, : x.shape[1]]
        return x


def compare(name: str, size: int, steps: int, calls: int) -> dict[str, Any]:
    """Everything about one model."""
    model, inputs, time_of = MODELS[name](size)
    draw(model)
    facts: dict[str, Any] = {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(f"{name}: {facts['parameters'] / 1e6:.0f} M parameters", flush=True)
    broken: list[str] = []
    with in_float64(model):
        wide = Loop(inputs, time_of, torch.float64)
        exact = wide.step(model, wide.start, 0.7)
    assert exact.dtype == torch.float64
    reference: Any = None
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        model = model.to(dtype)
        loop = Loop(inputs, time_of, dtype)
        own = model._call_impl
        eager = loop.step(own, loop.start, 0.7)
        compiler.compile(model)
        mine, spent = first_call(loop, model)
        here: dict[str, Any] = {**spent}
        try:
            here["of_bound"] = assert_within_2x(mine, exact, eager, f"{name} {short}")
        except AssertionError as error:
            broken.append(str(error))
        here |= times(loop, model, own, calls)
        end = loop.trajectory(own, steps)
        reference = end if reference is None else reference
        here["psnr_eager"] = psnr(end, reference)
        here["psnr"] = psnr(loop.trajectory(model, steps), reference)
        least = 80.0 if dtype == torch.float32 else here["psnr_eager"] - 1
        if not here["psnr"] >= least:
            broken.append(f"{name} {short}: {here['psnr']:.1f} dB, must be at least {least:.1f}")
        report = compiler.report(model)
        if len(report.graphs) != 1 or report.eager or report.graphs[0].why_whole:
            broken.append(f"{name} {short}: not one graph: {report}")
        graph = report.graphs[0]
        here["fused"] = {op: count for op, count in graph.fused.items() if count}
        here["unfused"] = {**graph.why_unfused}
        here |= {"nodes": [graph.nodes_before, graph.nodes_after], "hoisted": graph.hoisted}
        facts[short] = here
        print(printed(short, here), flush=True)
        compiler.uncompile(model)
        torch.compiler.reset()
    return {**facts, "broken": broken}


def first_call(loop: Loop, model: nn.Module) -> tuple[Tensor, dict[str, float]]:
    """Its result, and its seconds: PyTorch's tracing, our passes, and the first run."""
    ours: list[float] = []
    make = captured.Graph.__init__

    def timed(self: Any, *args: Any) -> None:
        start = time.perf_counter()
        make(self, *args)
        ours.append(time.perf_counter() - start)

    with mock.patch.object(captured.Graph, "__init__", timed):
        start = time.perf_counter()
        result = loop.step(model, loop.start, 0.7)
        whole = time.perf_counter() - start
    found = compiler.report(model).graphs[0].seconds
    passes = sum(ours)
    return result, {"tracing_s": found - passes, "passes_s": passes, "first_run_s": whole - found}


def times(loop: Loop, model: nn.Module, own: Callable[..., Any], calls: int) -> dict[str, float]:
    """Median seconds of a step, eager and compiled in turn, each step at a time of its own."""
    found: dict[str, list[float]] = {"eager_s": [], "compiled_s": []}
    for number in range(calls + 1):
        for name, function in (("eager_s", own), ("compiled_s", model)):
            start = time.perf_counter()
            loop.step(function, loop.start, 0.6 - 0.5 * number / (calls + 1))
            if number:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent) for name, spent in found.items()}


def printed(short: str, here: dict[str, Any]) -> str:
    """The facts of one model in one dtype, in lines."""
    fused = ", ".join(f"{count} {op}" for op, count in here["fused"].items())
    lines = [
        f"  {short}: error {here.get('of_bound', math.nan):.2f} of the bound; "
        f"{here['psnr']:.1f} dB (eager {here['psnr_eager']:.1f})",
        f"    tracing {here['tracing_s']:.1f} s, passes {here['passes_s']:.1f} s, first run "
        f"{here['first_run_s']:.1f} s; {here['nodes'][0]} nodes, then {here['nodes'][1]}; "
        f"{here['hoisted']:.2%} hoisted",
        f"    step {here['compiled_s']:.3f} s, eager {here['eager_s']:.3f} s: ratio "
        f"{here['eager_s'] / here['compiled_s']:.2f} (noisy)",
        f"    fused: {fused}",
        *(f"    left: {count} {why}" for why, count in here["unfused"].items()),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", choices=list(MODELS))
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--calls", type=int, default=3, help="interleaved timed calls")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path, help="where the facts go")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    results = []
    for name in options.models:
        results.append(compare(name, options.size, options.steps, options.calls))
        for line in results[-1]["broken"]:
            print(f"  BROKEN {line}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    return 1 if any(facts["broken"] for facts in results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
