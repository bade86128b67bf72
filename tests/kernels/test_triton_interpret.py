"""The Triton kernels in Triton's interpreter: the conformance samples, on any machine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastdiff.ops import OPS

PROGRAM = """
import sys
import torch
from fastdiff.ops import OPS
from fastdiff.ops._contract import outputs
from fastdiff.testing import assert_within_2x, poisoned_empty

op = next(op for op in OPS if op.name == sys.argv[1])
ran = 0
dtypes = [torch.float32, torch.bfloat16]
if op.numerics == "exact":
    dtypes.append(torch.float16)  # the interpreter truncates where a GPU rounds to bfloat16
for sample in op.samples:
    for dtype in dtypes:
        call = sample.make("cpu", dtype)
        if op.why_not("triton", *call.args, **call.kwargs):
            continue
        exact = call.double()
        oracle = outputs(op.reference(*exact.args, **exact.kwargs))
        torch_result = outputs(op.reference(*call.args, **call.kwargs))
        with poisoned_empty():
            result = outputs(op(*call.args, **call.kwargs, impl="triton"))
        for mine, right, theirs in zip(result, oracle, torch_result, strict=True):
            assert_within_2x(mine, right, theirs, what=f"{sample.name} {dtype}")
            if op.numerics == "exact" and dtype != torch.bfloat16:
                assert torch.equal(mine, theirs), sample.name
        ran += 1
print("ran", ran)
"""


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("name", [op.name for op in OPS if op.aot is not None])
def test_conforms_in_the_interpreter(name: str, fresh_python: Callable[..., str]) -> None:
    pytest.importorskip("triton")
    # A process of its own: Triton decides between interpreting and compiling when it is imported.
    ran = int(fresh_python("-c", PROGRAM, name, TRITON_INTERPRET="1").split()[-1])
    samples = next(len(op.samples) for op in OPS if op.name == name)
    assert ran >= samples, f"only {ran} cases of {samples} samples in two dtypes ran"
