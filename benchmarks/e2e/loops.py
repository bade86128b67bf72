"""One run of a workload: diffusers' loop as its pipelines have it, and ``fastdiff.sample``.

Both go from the same noise with the same solver, so that without rounding they end in the same
latents. A run gives its latents, [B, C, h, w], and its picture where there is an autoencoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pairs import Pair, pack, unpack
from torch import Tensor

import fastdiff
from fastdiff.pipelines.recipes import from_scheduler
from fastdiff.solvers import SolverTable

# (steps) -> the latents; steps: None for the workload's own.
Denoise = Callable[[int | None], Tensor]
# latents -> the picture.
Decode = Callable[[Tensor], Tensor]


def scheduler_of(pair: Pair) -> tuple[Any, Callable[[int], None]]:
    """(diffusers' scheduler, what sets its steps as the pipelines do in every call)."""
    import diffusers

    work = pair.workload
    config = dict(work.scheduler)
    made = getattr(diffusers, config.pop("_class_name"))(**config)

    def start(steps: int) -> None:
        if work.family != "flux":
            made.set_timesteps(steps, device=pair.device)
            return
        named: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if config.get("use_dynamic_shifting"):
            low, high = config["base_image_seq_len"], config["max_image_seq_len"]
            slope = (config["max_shift"] - config["base_shift"]) / (high - low)
            named["mu"] = config["base_shift"] + slope * (tokens_of(pair) - low)
        made.set_timesteps(device=pair.device, **named)

    return made, start


def tokens_of(pair: Pair) -> int:
    """FLUX's, of the picture."""
    return pair.workload.latent[1] * pair.workload.latent[2] // 4


def table_of(pair: Pair, steps: int) -> SolverTable:
    """Our table of the same scheduler."""
    recipe = from_scheduler(pair.workload.scheduler)
    if pair.workload.family == "flux":
        recipe = dataclasses.replace(recipe, warp="flux")
    return recipe.table(steps, tokens=tokens_of(pair))


def diffusers_loop(pair: Pair, model: Callable[..., Any]) -> Denoise:
    """The loop of diffusers' pipelines around ``model``, in the dtype of diffusers' module."""
    work = pair.workload
    predict = pair.peer_call(model)
    dtype = next(pair.peer.parameters()).dtype
    scheduler, start = scheduler_of(pair)

    def run(steps: int | None = None) -> Tensor:
        start(steps or work.steps)
        x = pair.noise.to(dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
        if work.family == "flux":
            x = pack(x)
        for t in scheduler.timesteps:
            given = torch.cat([x, x]) if work.rows == 2 else x
            if hasattr(scheduler, "scale_model_input"):
                given = scheduler.scale_model_input(given, t)
            out = predict(given, t)
            if work.rows == 2:
                uncond, cond = out.chunk(2)
                out = uncond + work.guidance * (cond - uncond)
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return unpack(x, *work.latent[1:]) if work.family == "flux" else x

    return run


def sample_loop(pair: Pair, model: Any) -> Denoise:
    """``fastdiff.sample`` of the zoo's model, or of it compiled."""
    work = pair.workload
    cond, uncond = pair.zoo_conditions()
    tables: dict[int, SolverTable] = {}

    def run(steps: int | None = None) -> Tensor:
        count = steps or work.steps
        if count not in tables:
            tables[count] = table_of(pair, count)
        table = tables[count]
        return fastdiff.sample(
            model,
            x=pair.noise * table.init_scale,
            solver=table,
            cond=cond,
            uncond=uncond,
            guidance_scale=work.guidance,
            dtype=pair.dtype,
            drop_variance=work.family == "dit",
        )

    return run


def latents_in(pair: Pair, dtype: torch.dtype) -> Denoise:
    """Of a decoder's workload: the latents it is given, of unit variance."""
    given = pair.noise.to(dtype)

    def run(steps: int | None = None) -> Tensor:
        return given

    return run


def diffusers_decode(vae: Any, decode: Callable[..., Any] | None = None) -> Decode:
    dtype = next(vae.parameters()).dtype
    call: Any = vae.decode if decode is None else decode
    return lambda latents: call(latents.to(dtype), return_dict=False)[0]


def zoo_decode(vae: Any) -> Decode:
    return lambda latents: vae.decode(latents.to(vae.dtype))
