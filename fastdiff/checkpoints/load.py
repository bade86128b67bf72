"""``fastdiff.load``: from a name, a file, a folder or a repository to modules with weights."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints import hub
from fastdiff.checkpoints.assign import assign, dominant_dtype
from fastdiff.checkpoints.detect import Component, Description, describe
from fastdiff.checkpoints.differences import nearest
from fastdiff.checkpoints.header import refuse_pickle
from fastdiff.checkpoints.sampling import sampling_of
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.dit import CONFIGS
from fastdiff.models.weights import EMBEDDED, verify


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    component: str | None = None,
    prediction: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    tokenizers: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Any:
    """A model with its weights, or a pipeline of several; in eval mode, without gradients.

    name_or_path: an embedded model ("digits"); a ``.safetensors`` file of one model or of several
        (Stable Diffusion's single files); a diffusers pipeline or one of its folders, shards
        included; a repository "owner/name" of the Hugging Face hub (needs huggingface_hub). What
        it is is found from the names and shapes of the tensors, or from the folder's JSON.
    device: default CPU. There, tensors that keep their dtype are views of the mapped file: loading
        costs no memory of its own, and the file may be replaced, but not changed in place, while
        the model lives.
    dtype: of floating-point parameters. Default: the one most of the model's parameters have in the
        file, each model its own, and bfloat16 where that is an 8-bit float; but float32 for files
        of fastdiff's own, which are in half precision for the disk's sake.
    component: only this part of several, such as "unet", "transformer", "vae", "text_encoder".
    prediction: what the model predicts, where the file does not say (a single file of Stable
        Diffusion 2 looks alike for "eps" and "v").
    variant: of the files in folders, as "fp16". revision: of a repository.
    tokenizers: a folder with a pipeline's tokenizers, for single files, which hold none; see
        :func:`fastdiff.pipelines.assemble`.
    progress: bars, in bytes.

    ``.sampling`` of a denoiser says how to use it (``fastdiff.models.Sampling``).

    Raises ValueError for an unknown name, another file format (a pickle is never opened), a damaged
    file and for missing, unknown or mis-shaped tensors, all listed at once; FileNotFoundError for a
    path that does not exist; TypeError for a dtype that is not floating; ImportError and
    ConnectionError for a repository that cannot be asked for.

    >>> model = fastdiff.load("digits")  # doctest: +SKIP
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    place = torch.device("cpu" if device is None else device)
    with _without_collections():
        found = describe(_resolve(name_or_path, variant, revision), variant)
        chosen = _choose(found, component)
        made = {
            name: _load_component(part, found, place, dtype, prediction, progress)
            for name, part in chosen.items()
        }
    if len(made) == 1 and (component is not None or found.kind != "pipeline"):
        return next(iter(made.values()))
    from fastdiff.pipelines.components import assemble

    return assemble(made, found, tokenizers=tokenizers)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Thousands of objects are made here, and stay: looking through all of the process's for
    garbage meanwhile takes as long as the rest."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _choose(found: Description, component: str | None) -> dict[str, Component]:
    if component is not None:
        if component not in found.components:
            there = ", ".join(found.components) or "none"
            raise ValueError(f"component must be one of {there}, got {component!r}")
        return {component: found.components[component]}
    if found.problems:
        listed = "\n  ".join(found.problems)
        raise ValueError(
            f"{found.path} must hold models of the zoo and nothing else, got:\n  {listed}"
        )
    return dict(found.components)


def _load_component(
    part: Component,
    found: Description,
    place: torch.device,
    dtype: torch.dtype | None,
    prediction: str | None,
    progress: bool,
) -> nn.Module:
    own = found.kind == "fastdiff"
    if own:
        verify(part.checkpoint)
    module = part.build()
    assign(
        module,
        part.checkpoint,
        part.sources(),
        optional=part.family.optional,
        device=place,
        dtype=dtype or (torch.float32 if own else dominant_dtype(part.checkpoint)),
        mapped=not own,  # what was verified must not change with the file
        progress=progress,
    )
    if isinstance(module, Denoiser):
        module.sampling = part.sampling or sampling_of(
            part.family, part.config, found.scheduler, prediction
        )
    return module.eval().requires_grad_(False)


def _resolve(
    name_or_path: str | os.PathLike[str], variant: str | None, revision: str | None
) -> Path:
    """The local path that a name stands for."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a string or a path, got {name_or_path!r}")
    text = os.fspath(name_or_path)
    if text in EMBEDDED:
        return EMBEDDED[text]
    path = Path(text)
    refuse_pickle(path)
    if path.is_dir():
        return path
    if path.name.endswith((".safetensors", ".safetensors.index.json")):
        if not path.exists():
            raise FileNotFoundError(f"name_or_path must exist, got {text!r}")
        return path
    if path.exists():
        raise ValueError(f"name_or_path must be a .safetensors file, got {text!r}")
    if text in CONFIGS:
        raise ValueError(
            f"name_or_path must be a file for {text!r}: fastdiff embeds only "
            f"{', '.join(EMBEDDED)}; pass the checkpoint as a .safetensors file"
        )
    if isinstance(name_or_path, str) and hub.REPOSITORY.fullmatch(text):
        return hub.download(text, variant=variant, revision=revision)
    raise ValueError(
        f"name_or_path must be one of {', '.join(map(repr, EMBEDDED))}, a .safetensors file or a "
        f"folder with one, or a repository owner/name, got {text!r}{nearest(text, EMBEDDED)}"
    )
