"""The CPU kernel of geglu and swiglu at every instruction set level.

The extension reads FASTDIFF_ISA_MAX once, so each level is a process of its own: this file run as a
program checks the conformance samples at the level it finds itself at.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastdiff._ext import ext, require_ext
from fastdiff.ops import OPS
from fastdiff.testing import assert_within_2x


def run_all() -> None:
    ran = 0
    for op in OPS:
        if op.name not in ("geglu", "swiglu"):
            continue
        for sample in op.samples:
            for dtype in op.dtypes:
                call = sample.make("cpu", dtype)
                if op.why_not("cpp", *call.args, **call.kwargs):
                    continue
                exact = call.double()
                oracle = op.reference(*exact.args, **exact.kwargs)
                torch_result = op.reference(*call.args, **call.kwargs)
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    result = op(*call.args, **call.kwargs, impl="cpp")
                    what = f"{op.name} {sample.name} {dtype} threads {threads}"
                    assert_within_2x(result, oracle, torch_result, what)
                    ran += 1
    print(f"level {require_ext().isa_level()}: {ran} cases")


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize("level", [0, 1, 2])
def test_kernel_at_level(level: int, fresh_python: Callable[..., str]) -> None:
    if level > require_ext().isa_level():
        pytest.skip(f"the processor has level {require_ext().isa_level()} only")
    printed = fresh_python(str(Path(__file__).resolve()), FASTDIFF_ISA_MAX=str(level))
    assert f"level {level}:" in printed


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": 3}, "activation must be 0"),
        ({"dtype": 3}, "dtype must be 0"),
    ],
)
def test_nonsense_is_refused(change: dict[str, int], message: str) -> None:
    x, out = torch.zeros(2, 8), torch.zeros(2, 4)
    arguments = {"outer": 1, "inner": 2, "outer_stride": 0, "inner_stride": 8, "width": 4}
    arguments |= {"gate_first": False, "activation": 0, "dtype": 0, "threads": 1}
    with pytest.raises(ValueError, match=message):
        require_ext().gated(x.data_ptr(), out.data_ptr(), **{**arguments, **change})


if __name__ == "__main__":
    run_all()
