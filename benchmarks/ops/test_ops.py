"""Every op on the shapes of real models, beside plain PyTorch and beside a copy (`measure.py`).

x best is the speed-up against the fastest of the baselines that were measured. On a GPU: CUDA
events and a cold L2.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import measure

from fastdiff.ops import OPS, Op
from fastdiff.ops._contract import Example

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
DTYPES = (torch.float32, torch.bfloat16)
CASES = [
    pytest.param(op, example, id=f"{op.name}-{example.name}")
    for op in OPS
    for example in op.examples
]
SECONDS = 3.0  # per case, shared by its variants
QUICK_SECONDS = 0.2
QUICK_ELEMENTS = 1 << 21


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "example"), CASES)
@torch.no_grad()
def test_op(
    op: Op,
    example: Example,
    device: str,
    dtype: torch.dtype,
    quick: bool,
    pytestconfig: pytest.Config,
    benchmark: Any,
    record: Any,
) -> None:
    call = example.make(device, dtype)
    if quick and call.args[0].numel() > QUICK_ELEMENTS:
        pytest.skip("--quick: small shapes only")
    benchmark.group = op.name
    found = benchmark.pedantic(  # the rounds are inside, the variants in turns
        measure,
        (op, call, QUICK_SECONDS if quick else SECONDS, pytestconfig.getoption("--with-compile")),
        rounds=1,
        iterations=1,
    )
    if found is None:
        pytest.skip(f"no implementation of {op.name} besides the reference runs here")
    row = {
        "name": f"{op.name} {example.name} {found['dtype']}",
        "op": op.name,
        "example": example.name,
        **found,
    }
    benchmark.extra_info.update(row)
    record(device, row)
