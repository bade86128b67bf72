"""Every op on the shapes of real models, beside its peers and the limit (`measure.py`).

The shapes are the ops' own examples, named by model and layer. On a CPU those that two cores
compute in a moment.
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
# The largest shape of every op, then the next: a run that is cut short has seen them all.
CASES = [
    pytest.param(op, op.examples[-rank], id=f"{op.name}-{op.examples[-rank].name}")
    for rank in range(1, 1 + max(len(op.examples) for op in OPS))
    for op in OPS
    if rank <= len(op.examples)
]
SECONDS = 1.0  # per case, shared by its variants
QUICK_SECONDS = 0.05
CPU_FLOPS = 50e9  # above, a variant takes half a second and more, and there are ten rounds
QUICK_EXAMPLES, QUICK_FLOPS, QUICK_BYTES, QUICK_SIDE = 2, 2e9, 50e6, 512
FLOAT32_ON_CUDA = ("solver_step", "solver_step_indexed")  # the states; models run in bfloat16


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
    resumed: Any,
) -> None:
    if device == "cuda" and dtype == torch.float32 and op.name not in FLOAT32_ON_CUDA:
        pytest.skip("models run in half precision on a GPU")
    if quick and example not in op.examples[:QUICK_EXAMPLES]:
        pytest.skip("--quick: the smallest shapes only")
    call = example.make(device, dtype)
    flops, most = op.flops(*call.args, **call.kwargs), QUICK_FLOPS if quick else CPU_FLOPS
    if device == "cpu" and flops > most:
        pytest.skip(f"{flops / 1e9:.0f} GFLOP take too long on a CPU")
    if quick and op.bytes_moved(*call.args, **call.kwargs) > QUICK_BYTES:
        pytest.skip("--quick: the smallest shapes only")
    name = f"{op.name} {example.name} {str(call.args[0].dtype).removeprefix('torch.')}"
    resumed(device, name)
    benchmark.group = op.name
    seconds, side = (QUICK_SECONDS, QUICK_SIDE) if quick else (SECONDS, None)
    with_compile = device == "cuda" or bool(pytestconfig.getoption("--with-compile"))
    found = benchmark.pedantic(  # the rounds are inside, the variants in turns
        measure, (op, call, seconds, with_compile, side), rounds=1, iterations=1
    )
    if found is None:
        pytest.skip(f"no implementation of {op.name} besides the reference runs here")
    row = {"name": name, "op": op.name, "example": example.name, **found.facts}
    benchmark.extra_info.update(row)
    record(device, row, found.timings, found.columns, found.ours)
