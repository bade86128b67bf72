"""Images of given classes from a class-conditional model, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.models import DiT
from fastdiff.models.weights import Sampling
from fastdiff.sampling import sample


def sample_classes(
    model: DiT,
    labels: Sequence[int] | Tensor,
    *,
    solver: str = "best_linear",
    steps: int = 20,
    guidance_scale: float | None = None,
    seed: int | Sequence[int] | None = 0,
    **options: Any,
) -> Tensor:
    """One image per label: float [B, C, H, W] in the model's value range, unclipped.

    labels: [B] class numbers. guidance_scale: default the model's own; see Ho and Salimans
    (https://arxiv.org/abs/2207.12598), with 1 for the plain conditional model.
    solver, steps, seed, options: as for :func:`fastdiff.sample`.
    Raises ValueError for labels outside the model's classes and a model without ``.sampling``.
    """
    sampling = model.sampling
    if not isinstance(sampling, Sampling):
        raise ValueError(f"model must carry .sampling, as fastdiff.load sets it, got {sampling!r}")
    y = torch.as_tensor(labels)
    classes = sampling.num_classes
    if y.dim() != 1 or not len(y) or y.is_floating_point() or y.is_complex():
        raise ValueError(f"labels must be a list of class numbers, got {labels!r}")
    if int(y.min()) < 0 or int(y.max()) >= classes:
        wrong = next(int(v) for v in y if not 0 <= v < classes)
        raise ValueError(f"labels must be in 0..{classes - 1}, got {wrong}")
    y = y.to(model.pos_embed.device, torch.int64)
    return sample(
        model,
        (len(y), *sampling.shape),
        solver=solver,
        steps=steps,
        cond={"y": y},
        uncond={"y": torch.full_like(y, model.config.null_label)},
        guidance_scale=sampling.guidance_scale if guidance_scale is None else guidance_scale,
        seed=seed,
        drop_variance=model.config.learn_sigma,
        **options,
    )
