"""The ways a workload is run, as data, and how each is put on and taken off the models.

`VARIANTS` is in the order of the waterfall: each of ours is the one before and one technique more.
The peers are what a user would take instead.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import engines
import torch
from loops import (
    Decode,
    Denoise,
    diffusers_decode,
    diffusers_loop,
    latents_in,
    sample_loop,
    zoo_decode,
)
from pairs import Pair

import fastdiff


@dataclass(frozen=True)
class Variant:
    """One way.

    loop: "diffusers" (its module in its pipelines' loop) or "sample" (the zoo's model in
    ``fastdiff.sample``). by: "eager", "torch.compile", "fastdiff", "openvino", "onnxruntime".
    tier: what is measured first where time is short. options: of the compiler. last: channels last.
    exact: the same function but for rounding; else it changes results and says by how much
    (OpenVINO rounds to bf16 where PyTorch's bf16 does not).
    waterfall: place in it, or None. devices: where it makes sense. only: "convolutional" models.
    slow: Inductor compiles, which takes minutes; on a CPU only with ``--with-compile``.
    """

    name: str
    by: str
    loop: str = "diffusers"
    tier: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    last: bool = False
    exact: bool = True
    waterfall: int | None = None
    devices: tuple[str, ...] = ("cuda", "cpu")
    convolutional: bool = False
    slow: bool = False

    @property
    def peer(self) -> bool:
        return self.by != "fastdiff"


GPU = ("cuda",)
CPU = ("cpu",)
MAX = {"mode": "max"}
VARIANTS = (
    Variant("eager", "eager", waterfall=0),
    Variant(
        "kernels", "fastdiff", tier=2, options={"cuda_graphs": False, "layout": "contiguous"},
        waterfall=1,
    ),
    Variant(
        "+ channels last", "fastdiff", tier=2, waterfall=2, convolutional=True,
        options={"cuda_graphs": False, "layout": "channels_last"},
    ),
    Variant("fastdiff", "fastdiff", waterfall=3),
    Variant("fastdiff.sample", "fastdiff", "sample", waterfall=4),
    Variant(
        "fastdiff.sample max", "fastdiff", "sample", tier=4, options=MAX, waterfall=5, slow=True,
    ),
    Variant(
        "fastdiff.sample max + fp8", "fastdiff", "sample", tier=5, exact=False, waterfall=6,
        options={**MAX, "quantize": "fp8"}, devices=GPU, slow=True,
    ),
    Variant(
        "fastdiff.sample max + fp8 + step cache", "fastdiff", "sample", tier=5, exact=False,
        waterfall=7, options={**MAX, "quantize": "fp8", "cache": True}, devices=GPU, slow=True,
    ),
    Variant(
        "fastdiff.sample fp8", "fastdiff", "sample", tier=1, exact=False, devices=GPU,
        options={"quantize": "fp8"},
    ),
    Variant(
        "fastdiff.sample step cache", "fastdiff", "sample", tier=1, exact=False,
        options={"cache": True},
    ),
    Variant("fastdiff freeze", "fastdiff", tier=1, options={"freeze": True}, devices=CPU),
    Variant("eager channels last", "eager", last=True, convolutional=True, devices=CPU),
    Variant("torch.compile", "torch.compile", tier=1, slow=True),
    Variant(
        "torch.compile max-autotune channels last", "torch.compile", tier=4, last=True, slow=True,
        options={"mode": "max-autotune"}, devices=GPU,
    ),
    Variant(
        "torch.compile freezing channels last", "torch.compile", tier=1, last=True, slow=True,
        options={"options": {"freezing": True}}, devices=CPU,
    ),
    Variant("openvino", "openvino", tier=1, exact=False, devices=CPU),
    Variant("onnxruntime", "onnxruntime", tier=1, devices=CPU),
)  # fmt: skip


def variants_for(pair_of: Any, device: str, tier: int | None = None) -> list[Variant]:
    """Those that make sense for a workload on a device."""
    return [
        v
        for v in VARIANTS
        if device in v.devices
        and (tier is None or v.tier == tier)
        and (pair_of.convolutional or not v.convolutional)
        and not (v.options.get("cache") and not pair_of.cache)
        and not (pair_of.family == "autoencoder" and v.loop == "sample" and v.options)
    ]


def why_not(variant: Variant, with_compile: bool, device: str) -> str:
    """Why a variant cannot be measured here, or ""."""
    if variant.by in engines.CONVERTERS:
        return engines.missing(variant.by)
    if variant.slow and device == "cpu" and not with_compile:
        return "compiles for minutes: --with-compile"
    if variant.options.get("quantize") == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        return "fp8 needs sm_89"
    return ""


@dataclass
class Ready:
    """What a variant runs. report: of what fastdiff did, the lines that matter."""

    denoise: Denoise
    decode: Decode | None
    compiled: list[Any] = field(default_factory=list)

    def notes(self) -> dict[str, Any]:
        """Of our compiler: what was left, and why a run was no replay."""
        if not self.compiled:
            return {}
        found = fastdiff.report(self.compiled[0])
        graphs = found.graphs
        notes: dict[str, Any] = {
            "graphs": len(graphs),
            "stored": any(graph.stored for graph in graphs),
            "eager_calls": dict(found.eager),
            "stepwise": dict(found.stepwise),
        }
        if graphs and graphs[0].cache:
            cache = graphs[0].cache
            names = ("kind", "why_not", "whole", "part", "saved")
            notes["cache"] = {n: cache[n] for n in names if n in cache}
        return notes


@contextlib.contextmanager
def applied(variant: Variant, pair: Pair) -> Iterator[Ready]:
    """The variant's run; afterwards the models are what they were."""
    if variant.by in engines.CONVERTERS:
        try:
            yield _converted(variant, pair.to(torch.float32))
        finally:
            pair.to(pair.dtype)
        return
    models = [pair.peer, pair.peer_vae] if variant.loop == "diffusers" else [pair.zoo, pair.zoo_vae]
    held = [model for model in models if model is not None]
    layout = torch.channels_last if variant.last else torch.contiguous_format
    if variant.last:
        for model in held:
            model.to(memory_format=layout)
    targets = _targets(variant, pair) if variant.by == "fastdiff" else []
    try:
        yield _ready(variant, pair, targets)
    finally:
        for model in targets:
            fastdiff.uncompile(model)
        if variant.last:
            for model in held:
                model.to(memory_format=torch.contiguous_format)
        forget()


def forget() -> None:
    """Compiled code and freed memory go, so that the next variant finds neither."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _targets(variant: Variant, pair: Pair) -> list[Any]:
    """The modules that ``fastdiff.compile`` is called on."""
    sample = variant.loop == "sample"
    model, vae = (pair.zoo, pair.zoo_vae) if sample else (pair.peer, pair.peer_vae)
    if pair.workload.family == "autoencoder":
        return [model.decoder]
    return [model, *([vae.decoder] if vae is not None else [])]


def _ready(variant: Variant, pair: Pair, targets: list[Any]) -> Ready:
    work = pair.workload
    wrap: Callable[[Any], Any] = lambda function: function  # noqa: E731
    if variant.by == "torch.compile":
        wrap = lambda function: torch.compile(function, **variant.options)  # noqa: E731
    for index, model in enumerate(targets):
        options = dict(variant.options)
        if options.get("cache") is True:
            options["cache"] = work.cache
        if index:  # the autoencoder: no linear layers of blocks, no steps
            options = {k: v for k, v in options.items() if k not in ("quantize", "cache")}
        fastdiff.compile(model, **options)
    if work.family == "autoencoder":
        if variant.loop == "sample":
            return Ready(latents_in(pair, pair.dtype), zoo_decode(pair.zoo), targets)
        dtype = next(pair.peer.parameters()).dtype
        decode = diffusers_decode(pair.peer, wrap(pair.peer.decode))
        return Ready(latents_in(pair, dtype), decode, targets)
    if variant.loop == "sample":
        after = None if pair.zoo_vae is None else zoo_decode(pair.zoo_vae)
        return Ready(sample_loop(pair, pair.zoo), after, targets)
    after = None
    if pair.peer_vae is not None:
        after = diffusers_decode(pair.peer_vae, wrap(pair.peer_vae.decode))
    return Ready(diffusers_loop(pair, wrap(pair.peer)), after, targets)


def _converted(variant: Variant, pair: Pair) -> Ready:
    """Another engine's form of diffusers' modules, which computes in the precision it chooses."""
    convert = engines.CONVERTERS[variant.by]
    if pair.workload.family == "autoencoder":
        decode = engines.Converted(pair.peer, pair.peer.decode, convert)
        return Ready(latents_in(pair, torch.float32), diffusers_decode(pair.peer, decode))
    after = None
    if pair.peer_vae is not None:
        vae = pair.peer_vae
        after = diffusers_decode(vae, engines.Converted(vae, vae.decode, convert))
    return Ready(diffusers_loop(pair, engines.Converted(pair.peer, pair.peer, convert)), after)
