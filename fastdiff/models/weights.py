"""Loading and saving weights: safetensors files only, nothing here unpickles.

A file written by :func:`save` carries its configuration, how to sample from it and a checksum in
the header's metadata, under the key ``fastdiff``. A public DiT checkpoint converted to
safetensors has none of that; its configuration is recognised from the shapes.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.dit import CONFIGS, DiT, DiTConfig

DATA = Path(__file__).parent / "data"
EMBEDDED = {"digits": DATA / "digits.safetensors"}
METADATA_KEY = "fastdiff"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
STORED = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Sampling:
    """How a model's weights are meant to be sampled; ``fastdiff.sample`` reads the first four.

    schedule: name of the noise schedule it was trained with. prediction: what it outputs.
    grid: the time grid to sample on. "leading" by default because it starts below t = T-1, where a
        cosine schedule has alpha = 5e-5 and an eps model's x0 = (x - sigma eps)/alpha explodes.
    shape: (C, H, W) of one image. guidance_scale: a good default for class-conditional pictures.
    value_range: of the training images.
    """

    schedule: str = "cosine"
    prediction: str = "eps"
    grid: str = "leading"
    shape: tuple[int, int, int] = (1, 8, 8)
    num_classes: int = 10
    guidance_scale: float = 1.0
    value_range: tuple[float, float] = (-1.0, 1.0)


def load(
    name_or_path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DiT:
    """A model with its weights, in eval mode, without gradients; ``.sampling`` says how to use it.

    name_or_path: the name of an embedded model ("digits"), a ``.safetensors`` file, or a folder
        that holds exactly one.
    device: default CPU. dtype: of the parameters; default float32 whatever the file stores, since
        a file in half precision is small for the disk's sake and computing in it is a choice.

    Raises ValueError for an unknown name, another file format, a damaged file (truncated, not
    safetensors, checksum) and for missing, unknown or mis-shaped tensors, all listed at once;
    FileNotFoundError for a path that does not exist; TypeError for a dtype that is not floating.

    >>> model = fastdiff.load("digits")  # doctest: +SKIP
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype or None, got {dtype!r}")
    path = _resolve(name_or_path)
    tensors, metadata = _read(path)
    config, sampling = _describe(path, tensors, metadata)
    with torch.device("meta"):
        model = DiT(config)
    _check_tensors(path, model.state_dict(), tensors)
    place = torch.device("cpu" if device is None else device)
    placed = {
        key: value.to(place, torch.float32 if dtype is None else dtype)
        for key, value in tensors.items()
    }
    model.load_state_dict(placed, assign=True)
    model.sampling = sampling
    return model.eval().requires_grad_(False)


def save(
    model: DiT,
    path: str | os.PathLike[str],
    *,
    sampling: Sampling | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes ``model`` as safetensors with its configuration; ``path`` is whole or untouched.

    sampling: default the model's own. dtype: stored precision (default the parameters'); float16
    halves the file of a float32 model.
    Raises TypeError when ``model`` is not a DiT, ValueError for another suffix, a model without
    ``sampling``, or values that overflow ``dtype``; OSError when the folder cannot be written.
    """
    from safetensors.torch import save as serialise

    if not isinstance(model, DiT):
        raise TypeError(f"model must be a DiT, got {type(model).__name__}")
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {str(path)!r}")
    sampling = model.sampling if sampling is None else sampling
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be given for a model without .sampling, got {sampling!r}")
    if dtype is not None and dtype not in STORED.values():
        raise ValueError(f"dtype must be one of {', '.join(STORED)}, got {dtype}")
    tensors = {}
    for key, value in model.state_dict().items():
        stored = value.detach().to("cpu", dtype or value.dtype).contiguous()
        if value.isfinite().all() and not stored.isfinite().all():
            raise ValueError(f"dtype must hold the values of {key}, got {dtype}, which overflows")
        tensors[key] = stored
    about = {"family": "DiT", "config": asdict(model.config), "sampling": asdict(sampling)}
    about["sha256"] = _checksum(tensors, about)
    write_atomically(target, serialise(tensors, {METADATA_KEY: json.dumps(about)}))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside ``path`` and renames: a reader, or a crash, never sees half a file."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes files that only the owner reads
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def nearest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the known names closest to ``word``, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def _resolve(name_or_path: str | os.PathLike[str]) -> Path:
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path must be a string or a path, got {name_or_path!r}")
    text = os.fspath(name_or_path)
    if text in EMBEDDED:
        return EMBEDDED[text]
    path = Path(text)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"name_or_path must be a .safetensors file, got {text!r}: a {path.suffix} file is a "
            "pickle, which can run any code when opened. Convert it once where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'model.safetensors')"
        )
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise ValueError(
                f"name_or_path must be a folder with exactly one .safetensors file, got {text!r} "
                f"with {names}"
            )
        return found[0]
    if path.suffix == ".safetensors":
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
    raise ValueError(
        f"name_or_path must be one of {', '.join(map(repr, EMBEDDED))}, a .safetensors file or a "
        f"folder with one, got {text!r}{nearest(text, EMBEDDED)}"
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, got {size} bytes that are not ({error}); "
            "copy or download it again"
        ) from error


def _describe(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[DiTConfig, Sampling]:
    if METADATA_KEY not in metadata:
        return _recognise(path, tensors)
    try:
        about = json.loads(metadata[METADATA_KEY])
        expected = about.pop("sha256")
        if about["family"] != "DiT":
            raise ValueError(f"family must be 'DiT', got {about['family']!r}")
        config = DiTConfig(**about["config"])
        raw = dict(about["sampling"])
        for key in ("shape", "value_range"):
            raw[key] = tuple(raw[key])
        sampling = Sampling(**raw)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        names = ", ".join(field.name for field in fields(DiTConfig))
        raise ValueError(
            f"{path} must carry a fastdiff configuration this version reads ({names}), got "
            f"{type(error).__name__}: {error}"
        ) from error
    if _checksum(tensors, about) != expected:
        raise ValueError(
            f"{path} must have the checksum it was saved with, got another: the file is damaged; "
            "copy or download it again"
        )
    return config, sampling


def _recognise(path: Path, tensors: Mapping[str, Tensor]) -> tuple[DiTConfig, Sampling]:
    """The configuration of a checkpoint without our metadata, from its shapes."""
    patches = tensors.get("x_embedder.proj.weight")
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    if patches is not None and patches.dim() == 4:
        sizes = (patches.shape[0], depth, patches.shape[2], patches.shape[1])
        for config in CONFIGS.values():
            theirs = (config.hidden_size, config.depth, config.patch_size, config.in_channels)
            if sizes == theirs and config.learn_sigma:
                shape = (config.in_channels, config.input_size, config.input_size)
                return config, Sampling(
                    schedule="linear",
                    shape=shape,
                    num_classes=config.num_classes,
                    guidance_scale=4.0,
                )
    raise ValueError(
        f"{path} must carry its configuration (the metadata key {METADATA_KEY!r}, written by "
        f"fastdiff.models.save) or have the shapes of one of {', '.join(CONFIGS)}, got neither"
    )


def _check_tensors(path: Path, want: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
    problems = []
    unknown = sorted(got.keys() - want.keys())
    for key in sorted(want.keys() - got.keys()):
        problems.append(f"missing {key}{nearest(key, unknown)}")
    for key in unknown:
        problems.append(f"unknown {key}{nearest(key, want.keys() - got.keys())}")
    for key in sorted(want.keys() & got.keys()):
        if want[key].shape != got[key].shape:
            problems.append(
                f"{key} must have shape {tuple(want[key].shape)}, got {tuple(got[key].shape)}"
            )
        elif not got[key].is_floating_point():
            problems.append(f"{key} must be floating-point, got {got[key].dtype}")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"{path} must hold the tensors of its configuration, got {len(problems)} "
            f"difference{'s' if len(problems) > 1 else ''}:\n  {listed}"
        )


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """SHA-256 of the configuration and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"\n{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
