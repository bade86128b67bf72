"""A step on a large latent beside a copy of as many bytes: the step's tensors, streamed once.

1x16x128x128 float32 (the latent of a 1024x1024 image in SD3 and FLUX) on the CPU, one thread, a
model that returns a constant tensor, 50 steps. The step reads the state, the model's output and the
predictions it uses, and writes the state and the prediction it keeps; the copy moves that many
bytes, half of them read and half written, into memory that is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import Timing, interleaved

import fastdiff
from fastdiff.solvers import SolverTable, make_table

STEPS = 50
SHAPE = (1, 16, 128, 128)
BAR = 1.5
SOLVERS = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "deis")


def tensors_moved(table: SolverTable) -> float:
    """State-sized tensors read or written, on average over the rows."""
    moved = 0
    for row in table.rows:
        read = {j for u in row.updates for j, c in enumerate(u.from_registers) if c}
        read |= {row.feed} if row.from_state else set()
        moved += len(read) + row.evaluates + len(row.updates)
    return moved / len(table)


@pytest.mark.parametrize("name", SOLVERS)
@torch.no_grad()
def test_step_against_streaming(
    name: str, benchmark: Any, record: Callable[..., None], quick: bool
) -> None:
    table = make_table(name, "scaled_linear", STEPS)
    torch.manual_seed(0)
    x, constant = torch.randn(2, *SHAPE)
    bytes_per_step = tensors_moved(table) * constant.nbytes
    source = torch.zeros(int(bytes_per_step) // 2, dtype=torch.int8)
    target = torch.zeros_like(source)
    variants = {
        "fastdiff": lambda: fastdiff.sample(lambda _x, _t: constant, x=x, solver=table),
        "copy": lambda: target.copy_(source),
    }
    timings = interleaved(variants, torch.device("cpu"), budget=0.5 if quick else 4.0)
    step = timings["fastdiff"].median / STEPS
    stream = timings["copy"].median
    benchmark.extra_info.update(us_per_step=step * 1e6, us_stream=stream * 1e6)
    benchmark.pedantic(variants["fastdiff"], rounds=3 if quick else 10)
    row = {
        "name": f"{name} step, 1x16x128x128 float32, one thread",
        "peer": "a copy of as many bytes",
        "tensors_moved": tensors_moved(table),
        "times_copy": step / stream,
        "bar": BAR,
    }
    timings["fastdiff"] = Timing(tuple(s / STEPS for s in timings["fastdiff"].seconds))
    record("cpu", row, timings, ours=("fastdiff",))
    print(f"\n{name}: {step * 1e6:.0f} us a step, {stream * 1e6:.0f} us the copy")
    assert step <= BAR * stream
