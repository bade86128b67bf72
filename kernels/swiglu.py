"""y = hidden * silu(gate): the halves of each row of x [..., 2H], in either order; out [..., H].

The kernel, its layouts, bytes and limits are in `_gated.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.kernels import _gated


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every configuration of the kernel for this op."""
    return _gated.aot_configs(("silu",), (False, True))
