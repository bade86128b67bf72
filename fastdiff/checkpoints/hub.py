"""Repositories of the Hugging Face hub: which files are downloaded, and the folder they are in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Tokenizers' files; configurations and indices are .json, weights .safetensors.
TEXTS = (".json", ".txt", ".model")
TIMEOUT = 15.0  # seconds
VARIANT = re.compile(r"\.(fp16|bf16|fp32|fp8|non_ema|ema)(\.|-)")


def wanted(names: Iterable[str], variant: str | None = None) -> list[str]:
    """The files of a repository that a model is read from.

    Of a pipeline its folders only, not the single files beside them; of each folder the weights
    without a variant or of the one asked for. Nothing that holds code or a pickle.
    """
    names = list(names)
    is_pipeline = "model_index.json" in names
    chosen = [name for name in names if name.endswith(TEXTS)]
    for name in names:
        if not name.endswith(".safetensors") or (is_pipeline and "/" not in name):
            continue
        own = VARIANT.search(name.rsplit("/", 1)[-1])
        if (own[1] if own else None) == variant:
            chosen.append(name)
    return chosen


def download(repository: str, *, variant: str | None = None, revision: str | None = None) -> Path:
    """The folder with a repository's files, downloaded or from the hub's cache.

    Raises ImportError without huggingface_hub, ValueError for a repository that is not there or
    has no safetensors, ConnectionError without a network when the cache has no copy either.
    """
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"name_or_path {repository!r} is a repository of the Hugging Face hub, which needs "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        about = hub.HfApi().model_info(repository, revision=revision, timeout=TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"name_or_path must be a path, or a repository of the hub that you may read, got "
            f"{repository!r} ({_first_line(error)})"
        ) from error
    except Exception as error:  # each HTTP library has its own for "no network"
        return _cached(repository, revision, error)
    names = [file.rfilename for file in about.siblings or ()]
    files = wanted(names, variant)
    if not any(name.endswith(".safetensors") for name in files):
        kinds = sorted({Path(name).suffix for name in names})
        asked = f" of the variant {variant!r}" if variant else ""
        raise ValueError(
            f"name_or_path must be a repository with .safetensors files{asked}, got "
            f"{repository!r} with {', '.join(kinds)}"
        )
    return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=files))


def _cached(repository: str, revision: str | None, reason: Exception) -> Path:
    import huggingface_hub as hub

    try:
        return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True))
    except Exception as error:
        raise ConnectionError(
            f"name_or_path {repository!r} is no local path, and the Hugging Face hub does not "
            f"answer ({_first_line(reason)}) and nothing of it is in the local cache"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
