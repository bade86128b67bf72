"""The compile check: what it must let through and, above all, what it must refuse."""

from __future__ import annotations

import dataclasses

import pytest

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastdiff import aot  # noqa: E402
from fastdiff.environment import interpreting  # noqa: E402
from fastdiff.ops import OPS  # noqa: E402
from fastdiff.ops._contract import AotConfig  # noqa: E402

pytestmark = pytest.mark.skipif(interpreting(), reason="the interpreter compiles nothing")


@triton.jit
def _hungry_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Keeps a tile in one warp's registers that does not fit them."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    total = tl.sum(x)
    tl.store(out_ptr + offsets, x / total)


def hungry(block: int) -> AotConfig:
    signature = {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"}
    return AotConfig(_hungry_kernel, signature, {"BLOCK": block}, {"num_warps": 1}, "hungry")


def test_reports_a_spill() -> None:
    """256 values per thread and 255 registers."""
    outcome = aot.compile_config(hungry(32 * 512), 80)
    assert not outcome.error
    assert outcome.spill_bytes > 0
    assert outcome.bad


def test_reports_what_does_not_compile() -> None:
    outcome = aot.compile_config(hungry(1000), 80)  # not a power of two
    assert "power of 2" in outcome.error
    assert outcome.bad


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_lets_a_small_kernel_through(arch: int) -> None:
    outcome = aot.compile_config(hungry(1024), arch)
    assert not outcome.bad, outcome
    assert 0 < outcome.registers < 255


def test_reports_a_missing_instruction_and_too_much_shared_memory() -> None:
    copies = dataclasses.replace(hungry(1024), instruction="HMMA")
    outcome = aot.compile_config(copies, 80)
    assert "must hold HMMA" in outcome.error
    loads = dataclasses.replace(hungry(1024), instruction="LDG")
    assert not aot.compile_config(loads, 80).bad
    assert aot.Outcome("large", 90, shared_bytes=200 << 10).verdict == ""
    assert "SHARED MEMORY" in aot.Outcome("large", 89, shared_bytes=200 << 10).verdict


def test_every_op_with_a_kernel_is_checked() -> None:
    labels = [config.label for config in aot.all_configs()]
    assert len(set(labels)) == len(labels)
    for op in OPS:
        if op.aot is not None:
            assert any(label.startswith(f"{op.name} ") for label in labels), op.name


@pytest.mark.slow
@pytest.mark.parametrize("op", [op for op in OPS if op.aot is not None], ids=lambda op: op.name)
def test_first_configurations_do_not_spill(op) -> None:
    there = [c for c in op.aot() if not c.architectures or 90 in c.architectures]
    for config in there[:4]:
        outcome = aot.compile_config(config, 90)
        assert not outcome.bad, outcome
