"""A compiled model where instructions are missing: ours by FASTDIFF_ISA_MAX, oneDNN's by its own
ONEDNN_MAX_CPU_ISA, with one and two threads. Each is read once, so each is a process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastdiff._ext import ext, require_ext

PROGRAM = """
import copy, sys
import torch
import fastdiff
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.testing import assert_within_2x

torch.set_num_threads(int(sys.argv[1]))
torch.manual_seed(0)
torch.set_grad_enabled(False)
sizes = {"channels": (32, 64), "depths": (1, 0), "num_heads": (2, 2), "context_dim": 32}
model = UNet(UNetConfig(num_res_blocks=1, **sizes)).eval().bfloat16()
x, text = torch.randn(2, 4, 16, 16).bfloat16(), torch.randn(2, 7, 32).bfloat16()
oracle, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
fastdiff.compile(model, freeze=True, disk_cache=False)
for t in (900.0, 500.0):
    t = torch.full((2,), t)
    right = oracle(x.double(), t.double(), context=text.double())
    assert_within_2x(model(x, t, context=text), right, eager(x, t, context=text))
report = fastdiff.report(model)
assert not report.eager
print(report.graphs[0].fused["prepack"], report.instructions)
"""

# (threads, FASTDIFF_ISA_MAX, ONEDNN_MAX_CPU_ISA)
SETTINGS = [
    (2, 0, "SSE41"),
    (1, 1, "AVX2"),
    (2, 2, "AVX512_CORE"),
    (1, 3, "AVX512_CORE_BF16"),  # all but AMX
]


@pytest.mark.skipif(ext() is None, reason="needs the extension")
@pytest.mark.parametrize(("threads", "level", "most"), SETTINGS)
def test_without_instructions(
    threads: int, level: int, most: str, fresh_python: Callable[..., str]
) -> None:
    if min(level, 2) > require_ext().isa_level():
        pytest.skip(f"the processor has level {require_ext().isa_level()} only")
    settings = {"FASTDIFF_ISA_MAX": str(level), "ONEDNN_MAX_CPU_ISA": most}
    printed = fresh_python("-c", PROGRAM, str(threads), **settings).splitlines()[-1]
    packed, said = printed.split(" ", 1)
    names = ("portable", "AVX2", "AVX-512", "AVX-512, AVX512_BF16")
    if level < 3 or require_ext().attention_level() >= 3:
        assert said.startswith(f"kernels {names[level]};")
    assert f"oneDNN up to {most}" in said
    if level < 2:  # oneDNN has no bf16 then: nothing to pack for
        assert packed == "0"
