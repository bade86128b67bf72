"""The CPU kernel of the row-wise ops at every instruction set level, through the ops.

The extension reads FASTDIFF_ISA_MAX once, so each level is a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff._ext import ext, require_ext

PROGRAM = """
import sys
import torch
sys.path.append(sys.argv[1])
from row_cases import DTYPES, extremes
from fastdiff._ext import ext
from fastdiff.ops import OPS, gate_residual
from fastdiff.ops._contract import outputs
from fastdiff.testing import assert_within_2x, poisoned_empty

count = 0
names = ("gate_residual", "gate_residual_norm_modulate", "layer_norm_modulate", "rms_norm")
for op in (op for op in OPS if op.name in names):
    for sample in op.samples:
        for dtype in DTYPES:
            call = sample.make("cpu", dtype)
            if op.why_not("cpp", *call.args, **call.kwargs):
                continue
            exact = call.double()
            oracle = outputs(op.reference(*exact.args, **exact.kwargs))
            expected = outputs(op.reference(*call.args, **call.kwargs))
            for threads in (1, 3):
                torch.set_num_threads(threads)
                with poisoned_empty():
                    result = outputs(op(*call.args, **call.kwargs, impl="cpp"))
                for mine, right, theirs in zip(result, oracle, expected, strict=True):
                    assert_within_2x(mine, right, theirs, what=f"{op.name} {sample.name} {dtype}")
                if op.name.startswith("gate"):
                    assert torch.equal(result[0], expected[0]), f"{op.name} {sample.name} {dtype}"
                count += 1
for dtype in DTYPES:
    cases = extremes(dtype, 64, 67)
    for what, x in cases:
        for other, y in cases:
            result, expected = gate_residual(x, y, x, impl="cpp"), x + x * y
            torch.testing.assert_close(
                result, expected, rtol=0, atol=0, equal_nan=True, msg=f"{what} {other} {dtype}"
            )
            count += 1
print(f"level {ext().isa_level()}: {count} cases")
"""


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_kernel_at_level(level: int, fresh_python: Callable[..., str]) -> None:
    if level > require_ext().isa_level():
        pytest.skip(f"the processor has level {require_ext().isa_level()} only")
    folder = str(Path(__file__).parents[1] / "ops")
    printed = fresh_python("-c", PROGRAM, folder, FASTDIFF_ISA_MAX=str(level))
    assert f"level {level}:" in printed


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": 3}, "norm must be 0"),
        ({"width": 0}, "width must be in 1..8192, got 0"),
        ({"width": 8193}, "width must be in 1..8192, got 8193"),
        ({"x_dtype": 3}, "x_dtype must be 0"),
        ({"mod_dtype": -1}, "mod_dtype must be 0"),
    ],
)
def test_nonsense_is_refused(change: dict[str, int], message: str) -> None:
    x = torch.zeros(4, 8)
    absent = [0, 0, 0, 0]
    arguments: dict[str, Any] = dict.fromkeys(("y", "gate", "scale", "shift"), absent)
    arguments |= {"x": [x.data_ptr(), 0, 0, 8], "weight": 0, "bias": 0, "residual": 0}
    arguments |= {"out": x.data_ptr(), "sizes": [1, 1, 4], "width": 8, "norm": 1, "eps": 1e-6}
    arguments |= {"x_dtype": 0, "param_dtype": 0, "mod_dtype": 0, "threads": 1}
    with pytest.raises(ValueError, match=message):
        require_ext().rows(**{**arguments, **change})
