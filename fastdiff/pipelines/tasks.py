"""What is more than one call of a pipeline: refining, inversion, interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.pipelines.job import Job
from fastdiff.pipelines.pipeline import Pipeline, Result
from fastdiff.sampling import sample
from fastdiff.solvers.noise import beside


def refine(
    base: Pipeline,
    refiner: Pipeline,
    prompt: Any,
    *,
    switch: float = 0.8,
    steps: int = 40,
    conditions: dict[str, Any] | None = None,
    refiner_conditions: dict[str, Any] | None = None,
    **options: Any,
) -> Result:
    """SDXL's base and refiner (arXiv 2307.01952, section 2.5): the one hands its latents on.

    switch: the fraction of the noise levels that the base runs. steps: of both together.
    conditions, refiner_conditions: sizes for the one and the other. options: of both calls; a seed
    is the base's; the refiner draws, if its solver does, from a stream of its own beside it.
    """
    if not 0 < switch < 1:
        raise ValueError(f"switch must be above 0 and below 1, got {switch}")
    output, preview = options.pop("output", "pil"), options.pop("preview", None)
    if "part" in options:
        raise ValueError("part must not be given: switch says it")
    shared = {**options, "steps": steps, "preview": preview}
    first = base(prompt, **shared, part=(0.0, switch), conditions=conditions, output="latent")
    second = {**shared, "latents": first.latents, "part": (switch, 1.0)}
    if options.get("generator") is None:
        seeds = [settings["seed"] for settings in first.settings]
        second["seed"] = [beside(one) for one in seeds]  # its draws are numbered from 0, too
    last = refiner(prompt, **second, conditions=refiner_conditions, output=output)
    settings = [
        {**mine, "refiner": refiner.name, "switch": switch, "steps": steps}
        for mine in first.settings
    ]
    return replace(last, settings=settings)


def invert(
    pipe: Pipeline,
    image: Any,
    prompt: Any = "",
    *,
    steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int | Sequence[int] = 0,
    **options: Any,
) -> Tensor:
    """DDIM inversion (arXiv 2105.05233, appendix F): the noise that DDIM turns into ``image``.

    Returns the latents to give ``pipe(prompt, latents=..., solver="ddim")`` with as many steps, the
    same prompt and guidance. Exact for infinitely many steps; guidance above 1 needs more of them.
    The pictures are encoded as their distribution's mean. options: of ``Pipeline.__call__``.
    """
    job = Job.of(
        pipe,
        prompt,
        image=image,
        strength=1.0,
        steps=steps,
        solver="ddim_inverse",
        guidance_scale=guidance_scale,
        seed=seed,
        **options,
    )
    with torch.no_grad():
        cond, uncond = pipe.conditions(job)
        assert job.image is not None
        return sample(
            pipe.denoiser,
            x=pipe.encode(job.image, replace(job, seeds=None, generator=None), mean=True),
            solver=job.table,
            cond=cond,
            uncond=uncond,
            guidance=job.guidance,
            dtype=pipe.dtype,
            progress=job.progress,
        )


def slerp(a: Tensor, b: Tensor, fraction: float) -> Tensor:
    """Spherical interpolation of latents (Shoemake, SIGGRAPH 1985), image by image.

    a, b: [B, ...]. At fraction 0 it is a, at 1 b; between, along the arc between their directions,
    which keeps the norm of noise. Parallel tensors are interpolated linearly.
    """
    if a.shape != b.shape:
        raise ValueError(f"b must have a's shape {tuple(a.shape)}, got {tuple(b.shape)}")
    left, right = a.flatten(1).double(), b.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(left, right, dim=1).clamp(-1, 1)
    angle = torch.acos(cosine)
    sine = torch.sin(angle)
    straight = sine < 1e-6
    safe = torch.where(straight, torch.ones_like(sine), sine)
    first = torch.where(straight, 1 - fraction, torch.sin((1 - fraction) * angle) / safe)
    second = torch.where(straight, fraction, torch.sin(fraction * angle) / safe)
    return (left * first[:, None] + right * second[:, None]).view_as(a).to(a.dtype)


def interpolate(
    pipe: Pipeline,
    prompts: Sequence[Any],
    *,
    frames: int = 8,
    seed: int | Sequence[int] = 0,
    **options: Any,
) -> Result:
    """Pictures on the way from each prompt and noise to the next: latents by slerp, conditions
    linearly.

    prompts: two or more. frames: pictures from one to the next, both included. seed: of the first
    prompt's noise (the others' follow), or one for each. options: of ``Pipeline.__call__``.
    """
    if len(prompts) < 2:
        raise ValueError(f"prompts must be at least two, got {len(prompts)}")
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    job = Job.of(pipe, list(prompts), seed=seed, **options)
    with torch.no_grad():
        cond, uncond = pipe.conditions(job)
    noise = pipe.noise(job)
    parts = [(i, j / (frames - 1)) for i in range(len(prompts) - 1) for j in range(frames)]
    parts = [part for k, part in enumerate(parts) if part[1] < 1 or k == len(parts) - 1]

    def mixed(values: dict[str, Any] | None) -> dict[str, Any] | None:
        if values is None:
            return None
        return {
            name: torch.stack([torch.lerp(value[i], value[i + 1], f) for i, f in parts])
            for name, value in values.items()
        }

    latents = torch.cat([slerp(noise[i : i + 1], noise[i + 1 : i + 2], f) for i, f in parts])
    kept = {k: v for k, v in options.items() if k not in ("negative", "long", "clip_skip")}
    seeds = job.seeds or [0]
    return pipe(
        cond=mixed(cond),
        uncond=mixed(uncond),
        latents=latents,
        seed=[seeds[i] for i, _ in parts],
        **kept,
    )
