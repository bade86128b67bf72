"""y = hidden * gelu(gate): the halves of each row of x [..., 2H], out [..., H].

The kernel, its layouts, bytes and limits are in `_gated.py`. GELU exact (erf) or in its tanh form:
Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdiff.kernels import _gated


def aot_configs() -> Iterator[dict[str, Any]]:
    """Every configuration of the kernel for this op."""
    return _gated.aot_configs(("gelu", "gelu_tanh"), (False,))
