"""y = act(x W^T + b), or hidden * act(gate) of the halves of x W^T + b, in one matrix product.

The kernel, its layouts, bytes, limits and launch policy are in `_linear.py`; GLU variants: Shazeer,
2020, https://arxiv.org/abs/2002.05202.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.kernels import _linear


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every tile for this op; the tanh form needs fewer registers than the exact GELU."""
    return _linear.aot_configs((("gelu", True), ("silu", True), ("gelu", False), ("silu", False)))
