"""Row-wise Triton kernels in the interpreter, where their offsets pass 2^31."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

PROGRAM = """
import sys
import torch
sys.path.append(sys.argv[1])
from row_cases import far_rows, numbers
from fastdiff.ops._contract import outputs
from fastdiff.ops import OPS
from fastdiff.testing import assert_within_2x

x = far_rows(torch.float16)
mod = numbers(3, 192, seed=1, dtype=x.dtype).chunk(3, 1)
calls = {
    "gate_residual": (x, x, mod[0]),
    "gate_residual_norm_modulate": (x, x, *mod),
    "layer_norm_modulate": (x, *mod[:2]),
    "rms_norm": (x,),
    # Modulation per token, as far apart as the tokens.
    "gate_residual ": (mod[0], mod[1], x),
    "layer_norm_modulate ": (mod[0], x, x),
}
for name, call in calls.items():
    op = next(op for op in OPS if op.name == name.strip())
    oracle = outputs(op.reference(*(t.double() for t in call)))
    expected = outputs(op.reference(*call))
    result = outputs(op(*call, impl="triton"))
    for mine, right, theirs in zip(result, oracle, expected, strict=True):
        assert_within_2x(mine, right, theirs, what=name)
"""


@pytest.mark.interpret
def test_rows_further_apart_than_int32_counts(fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    folder = Path(__file__).parents[1] / "ops"
    fresh_python("-c", PROGRAM, str(folder), TRITON_INTERPRET="1")
