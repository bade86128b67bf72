"""y = act(W2 silu(W1 e + b1) + b2), e the sinusoidal embedding of t; act = SiLU or none.

    t [S]; w1 [H, E], w2 [D, H], b1 [H], b2 [D], out [S, D] in the weights' dtype

Three launches for a whole schedule: the embedding (`timestep_embedding.py`), written in the
weights' dtype, and two products with the activation in their epilogue (`_linear.py`). Making the
embedding inside the first product would repeat its fp64 in every block of columns.

Bytes: the weights read once; the rest is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fastdiff.kernels import _linear, timestep_embedding


def launch(
    t: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    w2: torch.Tensor,
    b2: torch.Tensor | None,
    out: torch.Tensor,
    final_silu: bool,
    convention: tuple[bool, float, float, float],
) -> None:
    """Writes `out` [S, D]; not empty. convention: flip_sin_to_cos, downscale_freq_shift,
    max_period, scale."""
    steps = t.shape[0]
    embedding = torch.empty((steps, w1.shape[1]), dtype=w1.dtype, device=t.device)
    hidden = torch.empty((steps, w1.shape[0]), dtype=w1.dtype, device=t.device)
    timestep_embedding.launch(t, embedding, *convention)
    for x, weight, bias, y, silu in (
        (embedding, w1, b1, hidden, True),
        (hidden, w2, b2, out, final_silu),
    ):
        rows = (1, steps, 0, x.shape[1])
        _linear.launch(x, rows, weight, bias, y, "silu" if silu else "none")


def aot_configs() -> Iterator[dict[str, Any]]:
    """What the other two files do not compile: a product without activation."""
    return _linear.aot_configs((("none", False),))
