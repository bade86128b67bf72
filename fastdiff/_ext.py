"""The C++/CUDA extension ``fastdiff._C``: found once, and told about when it is missing."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import torch

# csrc/common.h, enum class DType.
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """Returns the module, or None with the reason."""
    try:
        return importlib.import_module("fastdiff._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "fastdiff._C":
            return None, f"fastdiff._C failed to import: {error}"
        reason = build_info().get("reason") or "it was not built"
        return None, f"fastdiff._C is missing: {reason}"
    except ImportError as error:
        return None, f"fastdiff._C failed to import: {error}"


def build_info() -> dict[str, str]:
    """What the build recorded: ``extension`` ("cuda", "cpu" or "none") and ``reason``."""
    path = Path(__file__).with_name("_build_info.json")
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def ext() -> ModuleType | None:
    """The extension, or None when it is not usable; :func:`ext_status` says why."""
    return _load()[0]


def ext_status() -> str:
    """ "" when the extension is usable, else the reason it is not."""
    return _load()[1]


def require_ext() -> ModuleType:
    """The extension; RuntimeError with the remedy when it is not usable."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(
            f"{reason}. Remedy: install a C++17 compiler and run "
            "`pip install --force-reinstall fastdiff` "
            "(FASTDIFF_EXT=cpu or cuda makes a failing build an error)"
        )
    return module
